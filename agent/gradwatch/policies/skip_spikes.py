"""Not applying a step that stands out by its loss or its norm (as OLMo-core does)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

from gradwatch.errors import ConfigurationError
from gradwatch.policies.base import Policy, positive, whole
from gradwatch.records import Decision, Measurement, Skip

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SkipSpikes", "SkipSpikesState"]


@dataclasses.dataclass(frozen=True, slots=True)
class SkipSpikesState:
    """The last `window` losses and norms, and the state of the policy inside. Never reset."""

    inner: Any
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class SkipSpikes(Policy[SkipSpikesState]):
    """Another policy's clipping, and no step at all where the loss or the norm is a spike.

    A step is applied only where both are at most mean + sigma · std of the `window` values before
    it (the current one excluded; std with n - 1), once half a window of them was seen. A skipped
    step leaves parameters and optimizer state untouched, goes on record as skipped with an event,
    and its values count for the next windows, so a new level is accepted in time. The loss is the
    one given to `agent.log(loss=…)`; without it the norm alone decides.

    Args:
        policy: what clips the steps that are applied.
        window: values looked back on, 4 or more.
        sigma: standard deviations above the mean, above 0.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> from gradwatch.policies import ClipNorm
    >>> str(SkipSpikes(ClipNorm(1.0)))
    'SkipSpikes(ClipNorm(1.0))'

    Source: OLMo-core's `SkipStepOptimizer`.
    """

    policy: Policy[Any]
    window: int = 128
    sigma: float = 6.0
    wants_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.policy, Policy) or isinstance(self.policy, SkipSpikes):
            msg = f"SkipSpikes({self.policy!r}): policy is another policy, as in ClipNorm(1.0)"
            raise ConfigurationError(msg)
        whole(self, "window", least=4)
        positive(self, "sigma")
        object.__setattr__(self, "norm_type", self.policy.norm_type)
        object.__setattr__(self, "takes_sparse", self.policy.takes_sparse)

    def init(self) -> SkipSpikesState:
        """Nothing seen."""
        return SkipSpikesState(self.policy.init())

    def decide(self, measurement: Measurement, state: SkipSpikesState) -> Decision:
        """Skip a spike, else what the policy inside decides."""
        return (
            self._spike("loss", measurement.loss, state.losses)
            or self._spike("gradient norm", measurement.norm, state.norms)
            or self.policy.decide(measurement, state.inner)
        )

    def learn(self, state: SkipSpikesState, norm: float, loss: float | None) -> SkipSpikesState:
        """Take both in, spikes too."""
        losses = state.losses
        if loss is not None:
            losses = (*losses, loss)[-self.window :]
        norms = (*state.norms, norm)[-self.window :]
        return SkipSpikesState(self.policy.update(state.inner, norm, loss), losses, norms)

    def threshold(self, state: SkipSpikesState) -> float | None:
        """That of the policy inside."""
        return self.policy.threshold(state.inner)

    def dump(self, state: SkipSpikesState) -> dict[str, Any]:
        """Losses, norms, and the state inside."""
        return {
            "inner": self.policy.dump(state.inner),
            "losses": list(state.losses),
            "norms": list(state.norms),
        }

    def load(self, dumped: Mapping[str, Any]) -> SkipSpikesState:
        """The state from what `dump` wrote."""
        return SkipSpikesState(
            self.policy.load(dumped["inner"]),
            tuple(map(float, dumped["losses"]))[-self.window :],
            tuple(map(float, dumped["norms"]))[-self.window :],
        )

    def _spike(self, name: str, value: float | None, before: tuple[float, ...]) -> Skip | None:
        if value is None or len(before) < self.window // 2:
            return None
        mean = math.fsum(before) / len(before)
        squares = math.fsum([(x - mean) ** 2 for x in before])
        deviation = math.sqrt(squares / (len(before) - 1))
        limit = mean + self.sigma * deviation
        # Values that were all the same say nothing of how far the next may lie.
        if deviation == 0.0 or value <= limit:
            return None
        return Skip(
            f"{name} {value:.4g} is not within mean + {self.sigma:g} standard deviations of the "
            f"{len(before)} before ({limit:.4g}); the step was skipped",
            {"of": name, "value": value, "limit": limit, "mean": mean, "window": len(before)},
        )
