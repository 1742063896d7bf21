"""Does `TargetRatio` hold its band? Small real jobs, each under a policy, counted over windows.

For each job: the share of all 200-step windows after 100 steps of warm-up in which 10–30 % of the
steps were clipped; and on a recurrent network that explodes, how many seeds solve their task.

    .venv/bin/python benchmarks/jobs.py
    .venv/bin/python benchmarks/jobs.py --only rnn --seeds 1
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import gradwatch
from gradwatch.testing import MemorySink

WINDOW, WARMUP = 200, 100


class Watched:
    """An optimizer under a policy, and what came of its steps."""

    def __init__(self, optimizer, policy):
        self.optimizer, self.sink = optimizer, MemorySink()
        self.agent = gradwatch.Agent(optimizer, clip=policy, store=self.sink, metrics_port=None)

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.agent.log(loss=loss)
        self.optimizer.step()

    def clipped(self):
        self.agent.close()
        return np.array([record.clipped for record in self.sink.steps])


# -- the jobs: each takes a policy and a seed, and returns clip flags and how it ended ------------


class Recurrent(nn.Module):
    """A plain tanh network whose recurrent weights begin above 1: its gradients explode."""

    def __init__(self, hidden=50, gain=1.2):
        super().__init__()
        self.rnn = nn.RNN(6, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 4)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain)

    def forward(self, x):
        states, _ = self.rnn(x)
        return self.head(states[:, -1])


def temporal_order(generator, batch=32, length=30):
    """In which order did two symbols come, far apart in noise? (Hochreiter, Schmidhuber 1997)."""
    symbols = torch.randint(0, 4, (batch, length), generator=generator)
    first = torch.randint(length // 10, length // 5, (batch,), generator=generator)
    second = torch.randint(4 * length // 10, length // 2, (batch,), generator=generator)
    marks = torch.randint(0, 2, (batch, 2), generator=generator)
    rows = torch.arange(batch)
    symbols[rows, first], symbols[rows, second] = 4 + marks[:, 0], 4 + marks[:, 1]
    return nn.functional.one_hot(symbols, 6).float(), 2 * marks[:, 0] + marks[:, 1]


def rnn(policy, seed, steps=3000):
    """Solved: all of 1,000 fresh sequences but at most 1 % told right."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Recurrent()
    job = Watched(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), policy)
    for _ in range(steps):
        x, order = temporal_order(generator)
        job.step(nn.functional.cross_entropy(model(x), order))
    with torch.no_grad():
        x, order = temporal_order(generator, batch=1000)
        accuracy = (model(x).argmax(1) == order).float().mean().item()
    return job.clipped(), accuracy >= 0.99, f"{accuracy:.1%} right"


def characters():
    """Real text that every Python has: the source of a few of its modules."""
    names = ("argparse", "ast", "inspect", "statistics", "textwrap", "typing")
    text = "".join(Path(importlib.util.find_spec(name).origin).read_text() for name in names)
    alphabet = sorted(set(text))
    return torch.tensor([alphabet.index(c) for c in text]), len(alphabet)


def char_lstm(policy, seed, steps=1500, length=64, batch=16):
    """The next character of Python source; ended at this loss, the mean of 50 steps."""
    torch.manual_seed(seed)
    text, size = characters()
    embed, lstm, head = (
        nn.Embedding(size, 48),
        nn.LSTM(48, 96, batch_first=True),
        nn.Linear(96, size),
    )
    model = nn.ModuleList([embed, lstm, head])
    job = Watched(torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True), policy)
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - length - 1, (batch,))
        rows = torch.stack([text[s : s + length + 1] for s in starts])
        scores = head(lstm(embed(rows[:, :-1]))[0])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        job.step(loss)
        losses.append(loss.item())
    return job.clipped(), None, f"loss {np.mean(losses[-50:]):.3f}"


def cnn(policy, seed, steps=1500, batch=32):
    """Handwritten digits (Alpaydin, Kaynak 1998); ended at this loss, and right on held-out ones."""
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(288, 10),
    )  # fmt: skip
    job = Watched(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), policy)
    losses = []
    for _ in range(steps):
        rows = torch.randint(0, 1400, (batch,))
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        job.step(loss)
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    return job.clipped(), None, f"loss {np.mean(losses[-50:]):.4f}, {accuracy:.1%} right"


class Poles:
    """Carts that balance poles (Barto, Sutton, Anderson 1983), with Gym's CartPole-v0's numbers."""

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


def policy_gradient(policy, seed, steps=800, poles=32, length=32):
    """Advantage actor-critic (Mnih et al. 2016); begun and ended at this return, of 200 at best."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    job = Watched(torch.optim.Adam(model.parameters(), lr=3e-3), policy)
    carts, returns = Poles(poles, seed), []
    for _ in range(steps):
        moves, carts.returns = [], []
        for _ in range(length):
            before = carts.seen()
            with torch.no_grad():
                right = torch.bernoulli(model(before)[:, 0].sigmoid())
            moves.append((before, right, *carts.move(right.numpy() > 0)))
        before, right, after, fell, over = map(torch.stack, zip(*moves, strict=True))
        scores, values = model(before).unbind(-1)
        with torch.no_grad():
            advantage = _advantage(values, model(after)[..., 1] * ~fell, over)
        push = torch.distributions.Bernoulli(logits=scores)
        gain = push.log_prob(right) * (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        critic = nn.functional.mse_loss(values, advantage + values.detach())
        job.step(0.5 * critic - (gain + 0.01 * push.entropy()).mean())
        returns.append(carts.returns)
    first, last = (np.mean(np.concatenate(part)) for part in (returns[:50], returns[-50:]))
    return job.clipped(), None, f"return {first:.0f} → {last:.0f}"


def _advantage(values, following, over, discount=0.99, smoothing=0.95):
    """Generalized advantage estimation (Schulman et al. 2016); each step upright is worth 0.01."""
    surprise = (1 - discount) + discount * following - values
    advantage, carried = [], torch.zeros(())
    for step in reversed(range(len(values))):
        carried = surprise[step] + discount * smoothing * ~over[step] * carried
        advantage.append(carried)
    return torch.stack(advantage[::-1])


BOTH = (gradwatch.TargetRatio(), gradwatch.ClipNorm(1.0))
JOBS = {
    "tanh RNN, temporal order": (
        rnn,
        5,
        (gradwatch.TargetRatio(cap=3.0), gradwatch.ClipNorm(1.0), gradwatch.TargetRatio(),
         gradwatch.ObserveOnly()),
    ),
    "char-LSTM, Python source": (char_lstm, 3, BOTH),
    "CNN, digits": (cnn, 3, BOTH),
    "actor-critic, cart and pole": (policy_gradient, 3, BOTH),
}  # fmt: skip


def in_band(clipped, low=0.10, high=0.30):
    """The share of windows whose clip ratio lies in the band."""
    ratios = np.convolve(clipped[WARMUP:], np.ones(WINDOW) / WINDOW, mode="valid")
    return float(np.mean((ratios >= low - 1e-9) & (ratios <= high + 1e-9)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=[job.__name__ for job, _, _ in JOBS.values()])
    parser.add_argument("--seeds", type=int, help="instead of 5 of the RNN, 3 of the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=220, highlight=False)
    table = Table(title="share of 200-step windows in the band of 10–30 %", box=box.MARKDOWN)
    headings = ("job", "policy", "seeds", "windows in the band", "worst seed", "solved", "ended at")
    for heading in (*headings, "s"):
        table.add_column(heading)
    for name, (job, usual, policies) in JOBS.items():
        if arguments.only not in {None, job.__name__}:
            continue
        for policy in policies:
            began = time.perf_counter()
            results = [job(policy, seed) for seed in range(arguments.seeds or usual)]
            shares = [in_band(clipped) for clipped, _, _ in results]
            solved = [bool(s) for _, s, _ in results if s is not None]
            table.add_row(
                name,
                str(policy),
                str(len(results)),
                f"{np.mean(shares):.1%}",
                f"{min(shares):.1%}",
                f"{sum(solved)} of {len(solved)}" if solved else "",
                "; ".join(ended for _, _, ended in results),
                f"{time.perf_counter() - began:.0f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
