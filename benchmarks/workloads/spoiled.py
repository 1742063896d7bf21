"""Loops that go wrong in one known way each: what `gradwatch diagnose` is measured on."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.amp import GradScaler

import gradwatch
from workloads.images import digits
from workloads.sequences import _exploding, _order, _sgd
from workloads.workload import Workload, seeded

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 600


@dataclasses.dataclass
class Spoiled:
    """A workload, the policy it runs under, and what its loop does that it should not."""

    workload: Workload
    clip: gradwatch.Policy[Any]
    loss: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, loss: loss
    before_step: Callable[[nn.Module], object] = lambda _: None
    after_step: Callable[[nn.Module], object] = lambda _: None
    scaler: GradScaler | None = None
    zeroes: bool = True

    def train(self, agent: gradwatch.Agent) -> None:
        """The loop, to its end."""
        model, optimizer = self.workload.model, self.workload.optimizer
        for step in range(self.workload.steps):
            if self.zeroes:
                optimizer.zero_grad()
            loss = self.loss(step, self.workload.loss())
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            self.before_step(model)
            agent.log(loss=loss)
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
                self.scaler.update()
            self.after_step(model)


def perceptron(depth=2, width=64, activation=nn.ReLU):
    """A classifier of digits."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, width), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def on_digits(seed, lr=0.05, batch=32, momentum=0.9, spoil=lambda _, *rows: rows, **model):
    """The classifier in training by SGD; `spoil` may change a step's images and labels."""
    generator = seeded(seed)
    net = perceptron(**model)
    images, labels = digits()
    step = -1

    def loss():
        nonlocal step
        step += 1
        rows = torch.randint(0, len(images), (batch,), generator=generator)
        x, y = spoil(step, images[rows], labels[rows])
        return nn.functional.cross_entropy(net(x), y)

    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    return Workload(net, optimizer, loss, STEPS)


def by_adam(seed, lr):
    """The classifier with four tanh layers, whose weights Adam carries off at such a rate."""
    workload = on_digits(seed, depth=4, activation=nn.Tanh)
    optimizer = torch.optim.Adam(workload.model.parameters(), lr=lr)
    return dataclasses.replace(workload, optimizer=optimizer)


def full_batch(seed, lr):
    """Gradient descent without noise, beyond the rate at which it is stable (Cohen et al. 2021)."""
    seeded(seed)
    net = perceptron(depth=1, activation=nn.Tanh)
    images, labels = digits()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    return Workload(net, optimizer, lambda: nn.functional.cross_entropy(net(images), labels), STEPS)


def exploding(seed):
    """A plain tanh network on the temporal-order task, its recurrent weights from 1.4 on."""
    return _order(lambda: _exploding(50, 1.4, 6), _sgd(0.01), seed, 1000)


class Tempered(nn.Module):
    """A classifier whose scores are divided by a temperature that is learnt, from far too low on."""

    def __init__(self):
        super().__init__()
        self.body, self.temperature = perceptron(), nn.Parameter(torch.tensor(0.001))

    def forward(self, x):
        return self.body(x) / self.temperature


def tempered(seed):
    """Its temperature's gradient is all of the norm, and decides when the others are clipped."""
    generator = seeded(seed)
    net = Tempered()
    images, labels = digits()

    def loss():
        rows = torch.randint(0, len(images), (32,), generator=generator)
        return nn.functional.cross_entropy(net(images[rows]), labels[rows])

    return Workload(net, torch.optim.SGD(net.parameters(), lr=1e-7), loss, STEPS)


def regression(seed, lr):
    """A plain regression onto the digits' numbers, at a rate that carries it away."""
    generator = seeded(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    images, labels = digits()

    def loss():
        rows = torch.randint(0, len(images), (32,), generator=generator)
        return nn.functional.mse_loss(net(images[rows])[:, 0], labels[rows].float())

    return Workload(net, torch.optim.SGD(net.parameters(), lr=lr), loss, STEPS)


def _mislabelled(step, x, y):
    """Every 40th batch comes from a shard whose labels are off by one."""
    return x, (y + 1) % 10 if step > 100 and step % 40 == 0 else y


def _missing(step, x, y):
    """One batch holds missing values."""
    return torch.where(x == 1.0, math.nan, x) if step == 500 else x, y


def _root(step, loss):
    """The root of a distance that is 0 for once."""
    return loss + (loss * 0.0).sqrt() if step == 500 else loss


def _masked(step, loss):
    """Every 50th batch has nothing but padding."""
    return loss * 0.0 if step % 50 == 49 else loss


def _half(workload):
    """Gradients as float16 has them: what is greater than 65,504 is inf."""
    for parameter in workload.model.parameters():
        parameter.register_hook(lambda grad: grad.half().float())
    return workload


def _norm(limit):
    return lambda model: nn.utils.clip_grad_norm_(model.parameters(), limit)


Clip = gradwatch.ClipNorm

SPOILED: dict[str, Callable[[int], Spoiled]] = {
    # the five symptoms
    "loss_spikes": lambda s: Spoiled(on_digits(s, spoil=_mislabelled), Clip(1.0)),
    "nonfinite_loss": lambda s: Spoiled(on_digits(s, spoil=_missing), Clip(1.0)),
    "exploding_weights": lambda s: Spoiled(full_batch(s, lr=4.0), Clip(100.0)),
    "oscillating_loss": lambda s: Spoiled(regression(s, lr=3.0), Clip(5.0)),
    "no_convergence": lambda s: Spoiled(on_digits(s, lr=3.0), Clip(1.0)),
    # the bugs
    "clip_after_step": lambda s: Spoiled(on_digits(s), Clip(5.0), after_step=_norm(1.0)),
    "clipped_twice": lambda s: Spoiled(on_digits(s), Clip(5.0), before_step=_norm(0.5)),
    "gradients_not_zeroed": lambda s: Spoiled(on_digits(s, lr=0.01), Clip(1.0), zeroes=False),
    "not_unscaled": lambda s: Spoiled(
        on_digits(s), Clip(5.0), before_step=_norm(1.0), scaler=GradScaler("cpu", init_scale=1024.0)
    ),
    "clipping_every_step": lambda s: Spoiled(on_digits(s), Clip(0.01)),
    "value_taken_for_a_norm": lambda s: Spoiled(on_digits(s), gradwatch.ClipValue(1.0)),
    "dead_gradient": lambda s: Spoiled(on_digits(s), Clip(1.0), loss=_masked),
    "clipping_keeps_it_alive": lambda s: Spoiled(exploding(s), Clip(0.5)),
    # the rest
    "exploding_gradients": lambda s: Spoiled(exploding(s), gradwatch.ObserveOnly()),
    "nonfinite_gradient": lambda s: Spoiled(on_digits(s), Clip(1.0), loss=_root),
    "learning_rate_too_high": lambda s: Spoiled(by_adam(s, lr=0.1), Clip(1.0)),
    "vanishing_gradients": lambda s: Spoiled(
        on_digits(s, depth=12, activation=nn.Sigmoid, lr=0.01), Clip(1.0)
    ),
    "clipping_most_steps": lambda s: Spoiled(on_digits(s, lr=0.01), Clip(0.9)),
    "threshold_never_reached": lambda s: Spoiled(on_digits(s, spoil=_mislabelled), Clip(1e6)),
    "norm_drift": lambda s: Spoiled(
        on_digits(s, lr=0.03, momentum=0.0, depth=3, activation=nn.Tanh), Clip(10.0)
    ),
    "dominating_layer": lambda s: Spoiled(tempered(s), Clip(1.0)),
    "loss_scale_trouble": lambda s: Spoiled(
        _half(on_digits(s)), Clip(1.0), scaler=GradScaler("cpu", growth_interval=4)
    ),
}
