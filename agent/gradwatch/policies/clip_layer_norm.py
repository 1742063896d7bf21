"""Clipping each tensor of the gradient by its own norm."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gradwatch.policies.base import Policy, positive
from gradwatch.records import Measurement, ScaleEach

__all__ = ["ClipLayerNorm"]


@dataclasses.dataclass(frozen=True)
class ClipLayerNorm(Policy[None]):
    """Scale every tensor's gradient down to the norm `max_norm`, each by itself.

    g_i ← g_i · min(1, max_norm / ‖g_i‖₂) for each parameter's gradient g_i. One exploding layer
    does not shrink the others; the direction of the whole gradient changes. A step counts as
    clipped where any tensor was, which is often: the clip ratio does not compare with that of a
    global norm.

    Args:
        max_norm: the greatest norm of one tensor let through, above 0.

    Raises:
        ConfigurationError: `max_norm` is not such a number.

    >>> m = Measurement(5.0, 2.0, [3.0, 4.0], [], [], 1.0)
    >>> ClipLayerNorm(3.2).decide(m, None).factors
    [1.0, 0.8]

    Source: the layer-wise form of arXiv 1211.5063's rule.
    """

    max_norm: float
    takes_sparse: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the argument."""
        positive(self, "max_norm")

    def init(self) -> None:
        """Nothing is learnt."""

    def decide(self, measurement: Measurement, state: None) -> ScaleEach:  # noqa: ARG002
        """One factor for each tensor."""
        limit = self.max_norm
        return ScaleEach([1.0 if n <= limit else limit / n for n in measurement.tensor_norms])
