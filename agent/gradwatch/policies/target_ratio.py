"""A controller that holds the share of clipped steps in a band."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

from gradwatch.errors import ConfigurationError
from gradwatch.policies.base import Policy, bounded, positive, quantile
from gradwatch.records import Measurement, Scale

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TargetRatio", "TargetRatioState"]

_WINDOW = 50  # steps the quantile looks back on
_GAIN = 0.05  # how far one step moves the offset
_FEEDBACK_FROM = 20  # norms seen before the offset moves
_RISE_LIMIT_FROM = 5  # norms seen before the rise is limited
_RISE = math.exp(0.1)  # the most the threshold grows in one step


@dataclasses.dataclass(frozen=True, slots=True)
class TargetRatioState:
    """The threshold for the next step, the learnt offset, the last norms. Never reset."""

    threshold: float
    offset: float = 0.0
    norms: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class TargetRatio(Policy[TargetRatioState]):
    """Clip by the global norm at a threshold that follows the run, so that a share is clipped.

    With t = (low + high) / 2, b the last 50 norms and o an offset that starts at 0, after each
    step of norm n at threshold C: o ← clip(o + 0.05 · ([n > C] - t), -1, 1) and
    C ← min(quantile(b, 1 - t) · exp(o), C · exp(0.1), cap). A norm that is not finite, or 0,
    changes nothing.

    Args:
        low, high: the band of the clip ratio, 0 < low < high < 1.
        cap: the threshold never goes above it; without one, an exploding run drags it along.
        initial: the threshold of the first step, above 0.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> TargetRatio(cap=5.0).init().threshold
    1.0

    Source: stochastic approximation on a rolling quantile; the nearest published rule is Opacus
    AdaClip (Andrew et al. 2021, arXiv 1905.03871).
    """

    low: float = 0.10
    high: float = 0.30
    cap: float | None = None
    initial: float = 1.0
    ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        positive(self, "low")
        positive(self, "high")
        positive(self, "initial")
        if self.cap is not None:
            positive(self, "cap")
        if not self.low < self.high < 1:
            msg = (
                f"TargetRatio(low={self.low}, high={self.high}): a band of the clip ratio is "
                "0 < low < high < 1, as in low=0.10, high=0.30"
            )
            raise ConfigurationError(msg)

    def init(self) -> TargetRatioState:
        """`initial`, or the cap where that is lower."""
        return TargetRatioState(min(self.initial, self.cap or math.inf))

    def decide(self, measurement: Measurement, state: TargetRatioState) -> Scale:  # noqa: ARG002
        """Scale to the threshold that the steps before this one gave."""
        return Scale(state.threshold)

    def learn(
        self,
        state: TargetRatioState,
        norm: float,
        loss: float | None,  # noqa: ARG002
    ) -> TargetRatioState:
        """Take the norm in, move the offset, and set the next step's threshold."""
        target = (self.low + self.high) / 2
        seen = len(state.norms)
        norms = (*state.norms, norm)[-_WINDOW:]
        offset = state.offset
        if seen >= _FEEDBACK_FROM:
            offset = min(1.0, max(-1.0, offset + _GAIN * ((norm > state.threshold) - target)))
        threshold = quantile(sorted(norms), 1 - target) * math.exp(offset)
        if seen >= _RISE_LIMIT_FROM:
            threshold = min(threshold, state.threshold * _RISE)
        if self.cap is not None:
            threshold = min(threshold, self.cap)
        return TargetRatioState(bounded(threshold), offset, norms)

    def threshold(self, state: TargetRatioState) -> float:
        """The threshold of the next step."""
        return state.threshold

    def dump(self, state: TargetRatioState) -> dict[str, Any]:
        """Threshold, offset and norms."""
        return {
            "threshold": state.threshold,
            "offset": state.offset,
            "norms": list(state.norms),
        }

    def load(self, dumped: Mapping[str, Any]) -> TargetRatioState:
        """The state from what `dump` wrote."""
        threshold = min(float(dumped["threshold"]), self.cap or math.inf)
        return TargetRatioState(threshold, float(dumped["offset"]), tuple(dumped["norms"]))
