"""Clipping by the global norm (Pascanu, Mikolov, Bengio 2013, arXiv 1211.5063)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gradwatch.policies.base import Policy, positive
from gradwatch.records import Measurement, Scale

__all__ = ["ClipNorm"]


@dataclasses.dataclass(frozen=True)
class ClipNorm(Policy[None]):
    """Scale the whole gradient down where its norm is above `max_norm`.

    g ← g · min(1, max_norm / (‖g‖_p + 1e-6)), with ‖g‖_p over all parameters together: what
    `torch.nn.utils.clip_grad_norm_` does, with the direction of the gradient kept.

    Args:
        max_norm: the greatest norm let through, above 0, in the gradient's own unit.
        norm_type: p, above 0; `float("inf")` is the greatest absolute element.

    Raises:
        ConfigurationError: an argument is not such a number.

    >>> ClipNorm(1.0).max_norm
    1.0

    Source: arXiv 1211.5063; `torch.nn.utils.clip_grad_norm_`.
    """

    max_norm: float
    norm_type: float = 2.0
    ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        positive(self, "max_norm")
        positive(self, "norm_type", finite=False)

    def init(self) -> None:
        """Nothing is learnt."""

    def decide(self, measurement: Measurement, state: None) -> Scale:  # noqa: ARG002
        """Scale to `max_norm`."""
        return Scale(self.max_norm)

    def threshold(self, state: None) -> float:  # noqa: ARG002
        """`max_norm`."""
        return self.max_norm
