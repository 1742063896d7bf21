"""Carts that balance poles (Barto, Sutton, Anderson 1983), by policy gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from workloads.workload import Workload, seeded


class Poles:
    """Carts with poles on them, with Gym's CartPole-v0's numbers."""

    def __init__(self, count, seed, limit=200):
        self.random, self.limit = np.random.default_rng(seed), limit
        self.state, self.age, self.returns = self._begun(count), np.zeros(count), []

    def _begun(self, count):
        return self.random.uniform(-0.05, 0.05, (4, count))

    def seen(self):
        """One row a cart: position, speed, the pole's angle and how fast that changes."""
        return torch.from_numpy(self.state.T.astype(np.float32))

    def move(self, right):
        """Push each cart. Where it came to, which poles fell, whose episode is over."""
        place, speed, angle, turning = self.state
        sin, cos = np.sin(angle), np.cos(angle)
        push = (np.where(right, 10.0, -10.0) + 0.05 * turning**2 * sin) / 1.1
        bend = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        pull = push - 0.05 * bend * cos / 1.1
        self.state = self.state + 0.02 * np.stack([speed, pull, turning, bend])
        self.age += 1
        place, _, angle, _ = self.state
        after, fell = self.seen(), (np.abs(place) > 2.4) | (np.abs(angle) > np.pi / 15)
        over = fell | (self.age >= self.limit)
        self.returns.extend(self.age[over])
        self.state[:, over], self.age[over] = self._begun(over.sum()), 0
        return after, torch.from_numpy(fell), torch.from_numpy(over)


def _advantage(values, following, over, discount=0.99, smoothing=0.95):
    """Generalized advantage estimation (Schulman et al. 2016); each step upright is worth 1."""
    surprise = 1 + discount * following - values
    advantage, carried = [], torch.zeros(())
    for step in reversed(range(len(values))):
        carried = surprise[step] + discount * smoothing * ~over[step] * carried
        advantage.append(carried)
    return torch.stack(advantage[::-1])


class _Balancing:
    def __init__(self, model, seed, poles, length):
        self.model, self.carts, self.length = model, Poles(poles, seed), length

    def moves(self):
        moves = []
        for _ in range(self.length):
            before = self.carts.seen()
            with torch.no_grad():
                right = torch.bernoulli(self.model(before)[:, 0].sigmoid())
            moves.append((before, right, *self.carts.move(right.numpy() > 0)))
        return map(torch.stack, zip(*moves, strict=True))

    def score(self):
        """Less is better: the steps that the poles fell short of the limit, over the last episodes."""
        return self.carts.limit - float(np.mean(self.carts.returns[-300:]))


def actor_critic(seed, steps=600, poles=32, length=32):
    """Advantage actor-critic (Mnih et al. 2016)."""
    seeded(seed)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    job = _Balancing(model, seed, poles, length)

    def loss():
        before, right, after, fell, over = job.moves()
        scores, values = model(before).unbind(-1)
        with torch.no_grad():
            advantage = _advantage(values, model(after)[..., 1] * ~fell, over)
        push = torch.distributions.Bernoulli(logits=scores)
        gain = push.log_prob(right) * (advantage - advantage.mean())
        critic = nn.functional.mse_loss(values, advantage + values.detach())
        return 0.5 * critic - (gain + 0.01 * push.entropy()).mean()

    return Workload(model, torch.optim.Adam(model.parameters(), lr=3e-3), loss, steps, job.score,
                    loss_tells=False)  # fmt: skip


# -- to tune on ----------------------------------------------------------------------------------


def reinforce(seed, steps=500, poles=24, length=32):
    """REINFORCE (Williams 1992) on the discounted steps that are left, no critic."""
    seeded(seed)
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 1))
    job = _Balancing(model, seed, poles, length)

    def loss():
        before, right, _, _, over = job.moves()
        left, carried = [], torch.zeros(poles)
        for step in reversed(range(length)):
            carried = 1 + 0.95 * carried * ~over[step]
            left.append(carried)
        gain = torch.stack(left[::-1])
        push = torch.distributions.Bernoulli(logits=model(before)[..., 0])
        return -(push.log_prob(right) * (gain - gain.mean())).mean()

    return Workload(model, torch.optim.RMSprop(model.parameters(), lr=2e-3), loss, steps, job.score,
                    loss_tells=False)  # fmt: skip
