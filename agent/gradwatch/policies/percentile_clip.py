"""Clipping at a percentile of the norms so far (AutoClip, Seetharaman et al. 2020)."""

from __future__ import annotations

import bisect
import dataclasses
from typing import TYPE_CHECKING, Any

from gradwatch.errors import ConfigurationError
from gradwatch.policies.base import Policy, bounded, positive, quantile, whole
from gradwatch.records import Measurement, Scale

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PercentileClip", "PercentileClipState"]


@dataclasses.dataclass(frozen=True, slots=True)
class PercentileClipState:
    """The last `history` norms as they came, the same sorted, and how many were ever seen.

    Never reset; a full history forgets its oldest.
    """

    norms: tuple[float, ...] = ()
    ordered: tuple[float, ...] = ()
    seen: int = 0


@dataclasses.dataclass(frozen=True)
class PercentileClip(Policy[PercentileClipState]):
    """Clip by the global norm at a multiple of a percentile of the last norms.

    threshold = multiplier · percentile(last `history` norms, the current one included), linearly
    interpolated; `initial` until `warmup` norms are seen. AutoClip is
    `PercentileClip(percentile=10, multiplier=1)` with a history as long as the run; it clips 90 %
    of the steps by its nature.

    Args:
        percentile: from 0 to 100.
        multiplier: above 0.
        history: norms kept, 1 or more.
        warmup: norms seen before the percentile is used, 1 or more; the current one counts.
        initial: the threshold until then, above 0.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> policy = PercentileClip(percentile=50, multiplier=2, warmup=3, initial=10)
    >>> state = policy.init()
    >>> for norm in (1.0, 3.0, 2.0):
    ...     state = policy.update(state, norm)
    >>> policy.threshold(state)
    4.0

    Source: AutoClip (Seetharaman et al. 2020, arXiv 2007.14469).
    """

    percentile: float = 95.0
    multiplier: float = 2.0
    history: int = 1000
    warmup: int = 100
    initial: float = 10.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        positive(self, "multiplier")
        positive(self, "initial")
        whole(self, "history")
        whole(self, "warmup")
        if isinstance(self.percentile, bool) or not 0 <= self.percentile <= 100:
            msg = f"PercentileClip(percentile={self.percentile!r}): percentile is from 0 to 100"
            raise ConfigurationError(msg)

    def init(self) -> PercentileClipState:
        """Nothing seen."""
        return PercentileClipState()

    def decide(self, measurement: Measurement, state: PercentileClipState) -> Scale:
        """Scale to the percentile with the current norm among the last ones."""
        return Scale(self.threshold(self.update(state, measurement.norm)))

    def learn(
        self,
        state: PercentileClipState,
        norm: float,
        loss: float | None,  # noqa: ARG002
    ) -> PercentileClipState:
        """Take the norm in; where the history is full, forget its oldest."""
        norms, ordered = state.norms, state.ordered
        if len(norms) == self.history:
            oldest = bisect.bisect_left(ordered, norms[0])
            norms, ordered = norms[1:], ordered[:oldest] + ordered[oldest + 1 :]
        place = bisect.bisect_left(ordered, norm)
        return PercentileClipState(
            (*norms, norm), (*ordered[:place], norm, *ordered[place:]), state.seen + 1
        )

    def threshold(self, state: PercentileClipState) -> float:
        """The percentile of what was seen; a step's own norm counts as well once it is there."""
        if state.seen < self.warmup:
            return self.initial
        return bounded(self.multiplier * quantile(state.ordered, self.percentile / 100))

    def dump(self, state: PercentileClipState) -> dict[str, Any]:
        """The norms, and how many were seen."""
        return {"norms": list(state.norms), "seen": state.seen}

    def load(self, dumped: Mapping[str, Any]) -> PercentileClipState:
        """The state from what `dump` wrote."""
        norms = tuple(map(float, dumped["norms"]))[-self.history :]
        return PercentileClipState(norms, tuple(sorted(norms)), int(dumped["seen"]))
