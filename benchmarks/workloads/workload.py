"""One training job: a model, its optimizer, and what a step's loss is."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

LAST = 50  # steps whose mean is the loss a job ended at


@dataclasses.dataclass
class Workload:
    """What a loop needs; `score` says how well it ended where that is not the loss, less is better."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], torch.Tensor]
    steps: int
    score: Callable[[], float] | None = None
    schedule: Callable[[int], float] | None = None  # the share of the learning rate at a step
    loss_tells: bool = True  # whether the loss says how it goes: a policy gradient's does not


def train(workload, agent=None):
    """The loop that a user has: the loss of each step."""
    optimizer, losses = workload.optimizer, []
    scheduler = workload.schedule and torch.optim.lr_scheduler.LambdaLR(
        optimizer, workload.schedule
    )
    for _ in range(workload.steps):
        loss = workload.loss()
        optimizer.zero_grad()
        loss.backward()
        if agent is not None:
            agent.log(loss=loss)
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return np.array(losses)


def ended(workload, losses):
    """How a job ended, less is better: inf where it did not."""
    with torch.no_grad():
        value = workload.score() if workload.score else float(np.mean(losses[-LAST:]))
    return value if math.isfinite(value) else math.inf


def seeded(seed):
    """Both the weights' and the data's randomness."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
