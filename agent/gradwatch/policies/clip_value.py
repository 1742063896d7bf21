"""Clipping each element of the gradient by its value."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gradwatch.policies.base import Policy, positive
from gradwatch.records import Clamp, Measurement

__all__ = ["ClipValue"]


@dataclasses.dataclass(frozen=True)
class ClipValue(Policy[None]):
    """Clamp every element of the gradient: g ← clamp(g, -clip_value, clip_value).

    What `torch.nn.utils.clip_grad_value_` does; it refuses complex gradients, of which the real and
    the imaginary parts are clamped here, each by itself. It changes the gradient's direction, and the
    limit is one of elements, not of the norm: thresholds of the two do not compare. The
    post-clip norm is measured, since it cannot be inferred.

    Args:
        clip_value: the greatest absolute element let through, above 0.

    Raises:
        ConfigurationError: `clip_value` is not such a number.

    >>> ClipValue(0.5).clip_value
    0.5

    Source: `torch.nn.utils.clip_grad_value_`.
    """

    clip_value: float
    takes_sparse: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the argument."""
        positive(self, "clip_value")

    def init(self) -> None:
        """Nothing is learnt."""

    def decide(self, measurement: Measurement, state: None) -> Clamp:  # noqa: ARG002
        """Clamp to `clip_value`."""
        return Clamp(self.clip_value)
