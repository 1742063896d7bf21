"""Clipping what stands out by its z-score (ZClip, arXiv 2504.02507)."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any

from gradwatch.errors import ConfigurationError
from gradwatch.policies.base import Policy, bounded, positive, whole
from gradwatch.records import Keep, Measurement, Scale

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ZClip", "ZClipState"]


@dataclasses.dataclass(frozen=True, slots=True)
class ZClipState:
    """Warm-up: the norms so far. After it: their running mean and variance. Never reset."""

    norms: tuple[float, ...] = ()
    mean: float = math.nan
    variance: float = math.nan

    @property
    def warm(self) -> bool:
        """Whether the warm-up is over."""
        return not math.isnan(self.mean)


@dataclasses.dataclass(frozen=True)
class ZClip(Policy[ZClipState]):
    """Clip by the global norm where it lies `z_threshold` standard deviations above its mean.

    Warm-up: the first `warmup` norms n are collected, and clipped at `max_norm`; μ and σ² are then
    theirs. After it, with z = (n - μ) / σ: where z > z*, τ = μ + z*²·σ / z, else τ = n; the
    gradient is clipped to min(τ, max_norm). Then μ ← α·μ + (1-α)·τ and
    σ² ← α·σ² + (1-α)·(τ - μ)², with the new μ: a spike moves both only as far as it was let through.

    Args:
        alpha: how slowly mean and variance move, between 0 and 1.
        z_threshold: z*, above 0.
        warmup: norms collected first, 2 or more.
        max_norm: the threshold in the warm-up and an upper limit after it, above 0; None for none.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> policy = ZClip(warmup=2, max_norm=100.0)
    >>> state = policy.update(policy.update(policy.init(), 9.0), 11.0)
    >>> state.mean, state.variance
    (10.0, 1.0)
    >>> policy.decide(Measurement(15.0, 2.0, [15.0], [], [], 1.0), state)
    Scale(max_norm=11.25)

    Source: arXiv 2504.02507.
    """

    alpha: float = 0.97
    z_threshold: float = 2.5
    warmup: int = 25
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        positive(self, "alpha")
        positive(self, "z_threshold")
        whole(self, "warmup", least=2)
        if self.max_norm is not None:
            positive(self, "max_norm")
        if not self.alpha < 1:
            msg = f"ZClip(alpha={self.alpha}): alpha lies between 0 and 1, as in alpha=0.97"
            raise ConfigurationError(msg)

    def init(self) -> ZClipState:
        """Nothing collected."""
        return ZClipState()

    def decide(self, measurement: Measurement, state: ZClipState) -> Scale | Keep:
        """Scale to τ where the norm stands out, else to where it would begin to."""
        limit = self.threshold(state)
        if limit is None:
            return Keep()
        norm = measurement.norm
        if state.warm and norm > self._outlier_from(state):
            limit = min(limit, bounded(self._let_through(state, norm)))
        return Scale(limit)

    def learn(self, state: ZClipState, norm: float, loss: float | None) -> ZClipState:  # noqa: ARG002
        """Collect the norm, or move mean and variance by what of it is let through."""
        if not state.warm:
            norms = (*state.norms, norm)
            if len(norms) < self.warmup:
                return ZClipState(norms)
            mean = statistics.fmean(norms)
            return ZClipState((), mean, statistics.fmean([(n - mean) ** 2 for n in norms]))
        through = norm if norm <= self._outlier_from(state) else self._let_through(state, norm)
        mean = self.alpha * state.mean + (1 - self.alpha) * through
        variance = self.alpha * state.variance + (1 - self.alpha) * (through - mean) ** 2
        return ZClipState((), mean, variance)

    def threshold(self, state: ZClipState) -> float | None:
        """The norm from which a step is clipped; None in a warm-up without `max_norm`."""
        if not state.warm:
            return self.max_norm
        start = bounded(self._outlier_from(state))
        return start if self.max_norm is None else min(start, self.max_norm)

    def dump(self, state: ZClipState) -> dict[str, Any]:
        """The norms of the warm-up, or mean and variance."""
        moments = {"mean": state.mean, "variance": state.variance} if state.warm else {}
        return {"norms": list(state.norms), **moments}

    def load(self, dumped: Mapping[str, Any]) -> ZClipState:
        """The state from what `dump` wrote."""
        moments = (dumped.get("mean", math.nan), dumped.get("variance", math.nan))
        return ZClipState(tuple(map(float, dumped["norms"])), *map(float, moments))

    def _outlier_from(self, state: ZClipState) -> float:
        return state.mean + self.z_threshold * math.sqrt(state.variance)

    def _let_through(self, state: ZClipState, norm: float) -> float:
        """τ = μ + z*²·σ / z, written without dividing by a σ that may be 0."""
        return state.mean + self.z_threshold**2 * state.variance / (norm - state.mean)
