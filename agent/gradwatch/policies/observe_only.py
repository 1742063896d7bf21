"""Looking on: measure and record, change nothing."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gradwatch.policies.base import Policy, positive
from gradwatch.records import Keep, Measurement

__all__ = ["ObserveOnly"]


@dataclasses.dataclass(frozen=True)
class ObserveOnly(Policy[None]):
    """Change nothing at all: the run's parameters are bit-identical to an unwatched run's.

    A non-finite step is recorded and let through (`on_nonfinite="skip"` becomes "ignore"; only
    an explicit "raise" still raises).

    Args:
        norm_type: p of the norm that is recorded, above 0.

    Raises:
        ConfigurationError: `norm_type` is not such a number.

    >>> ObserveOnly().changes_gradients
    False
    """

    norm_type: float = 2.0
    changes_gradients: ClassVar[bool] = False
    ahead: ClassVar[bool] = True  # there is no threshold

    def __post_init__(self) -> None:
        """Check the argument."""
        positive(self, "norm_type", finite=False)

    def init(self) -> None:
        """Nothing is learnt."""

    def decide(self, measurement: Measurement, state: None) -> Keep:  # noqa: ARG002
        """Keep the gradient."""
        return Keep()
