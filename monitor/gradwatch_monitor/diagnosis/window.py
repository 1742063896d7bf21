"""What the rules look at: the last steps of a run, how it began, its layers and its settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gradwatch_monitor.ratio import clip_ratio, without_gradient

__all__ = [
    "Array",
    "BadWeights",
    "Flags",
    "LayerSamples",
    "Rule",
    "Severity",
    "Sign",
    "Window",
    "usable",
]

Array = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
_STANDS = 50  # steps at one threshold, after which it does not move by itself any more
_BY_ITSELF = 10  # thresholds within a window: a policy moves it, nobody applied so many
Severity = Literal["critical", "warning", "info"]


@dataclasses.dataclass(frozen=True)
class LayerSamples:
    """Sampled norms of all parameters: a row a sample, a column a parameter; NaN where absent."""

    step: Array
    names: Sequence[str]
    grad_norm: Array
    weight_norm: Array


class BadWeights(NamedTuple):
    """Weights that were NaN or inf before the update of a step."""

    step: int
    first: str  # of their parameters, in model order
    parameters: int
    tensors: int  # parameters of the optimizer


@dataclasses.dataclass(frozen=True)
class Window:
    """The last steps of a run, one entry a step in order; NaN where absent."""

    step: Array
    loss: Array
    pre_norm: Array
    post_norm: Array
    threshold: Array
    loss_scale: Array
    lr: Array  # of the first parameter group
    clipped: Flags
    nonfinite: Flags
    nonfinite_loss: Flags
    skipped: Flags
    first_losses: Array  # of the run's first steps
    first_norms: Array
    layers: LayerSamples | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bad_weights: BadWeights | None = None  # as they were found last

    def __len__(self) -> int:
        """How many steps it holds."""
        return len(self.step)

    def last(self, count: int) -> Window:
        """The same, of the last steps alone."""
        kept = {
            f.name: getattr(self, f.name)[-count:]
            for f in dataclasses.fields(self)
            if f.name in _A_STEP
        }
        return dataclasses.replace(self, **kept)

    @property
    def finite(self) -> Flags:
        """Which steps have a finite gradient norm."""
        return np.isfinite(self.pre_norm)

    @property
    def clip_ratio(self) -> float | None:
        """Clipped steps over those with a finite norm; None without such a step."""
        return clip_ratio(int(self.clipped.sum()), int(self.finite.sum()))

    @property
    def absent(self) -> Flags:
        """Which steps had no gradient at all."""
        return without_gradient(self.pre_norm, self.nonfinite, self.skipped)

    @property
    def optimizer(self) -> str:
        """The optimizer's class."""
        return str(self.settings.get("optimizer", ""))

    @property
    def policy(self) -> Mapping[str, Any]:
        """The policy's name and arguments; empty where there are several."""
        policies = self.settings.get("policies", [])
        return policies[0] if len(policies) == 1 else {}

    @property
    def constant(self) -> float:
        """The threshold in force at the end; NaN where there is no single one."""
        known = self.threshold[np.isfinite(self.threshold)]
        return float(known[-1]) if len(known) else math.nan

    @property
    def first_loss(self) -> float:
        """The first loss that was logged and is finite; NaN where none is."""
        known = self.first_losses[np.isfinite(self.first_losses)]
        return float(known[0]) if len(known) else math.nan

    @property
    def held(self) -> Window:
        """The steps since the threshold was last changed; all, where it moves by itself."""
        known = np.isfinite(self.threshold)
        others = np.flatnonzero(known & (self.threshold != self.constant))
        if not len(others):
            return self
        since = len(self) - int(others[-1]) - 1
        if since < _STANDS and len(np.unique(self.threshold[known])) > _BY_ITSELF:
            return self
        return self.last(since)

    def span(self, where: Flags | None = None) -> tuple[int, int]:
        """The first and the last step, of those where it is so."""
        steps = self.step if where is None else self.step[where]
        return int(steps[0]), int(steps[-1])


_A_STEP = {
    "step", "loss", "pre_norm", "post_norm", "threshold", "loss_scale", "lr", "clipped",
    "nonfinite", "nonfinite_loss", "skipped",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a rule saw. A finding opens at a `strength` of 1 and stays open down to 0.7."""

    finding: str
    severity: Severity
    strength: float
    steps: tuple[int, int]
    message: str
    advice: str
    source: str
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Rule = Callable[[Window], Sign | None]


def usable(loss: Array) -> Array:
    """Finite losses, where they measure progress: none below 0, which some are in the end."""
    finite = loss[np.isfinite(loss)]
    return finite if len(finite) and finite.min() >= 0 < finite.max() else np.empty(0)
