"""Adaptive gradient clipping: each unit's gradient against its own weight (Brock et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from gradwatch.policies.base import Policy, positive
from gradwatch.records import Measurement, ScaleEach

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdaptiveGradientClip"]

_SMALLEST_NORM = 1e-6  # of a unit's gradient, as published


@dataclasses.dataclass(frozen=True)
class AdaptiveGradientClip(Policy[None]):
    """Hold every unit's gradient below a share of its weight (AGC).

    A unit is a row: one output of a weight of shape (outputs, …); a bias or another vector is one
    unit as a whole. With M = clipping · max(‖w‖₂, eps): where ‖g‖₂ > M,
    g ← g · M / max(‖g‖₂, 1e-6).

    The final layer is usually left out: give it a parameter group and a policy of its own,
    `clip=[AdaptiveGradientClip(), ObserveOnly()]`. A step counts as clipped where any unit was,
    which is often: the clip ratio does not compare with that of a global norm.

    Args:
        clipping: λ, the greatest ratio of gradient to weight, above 0.
        eps: the least weight norm reckoned with, above 0, so that new zeros can grow.

    Raises:
        ConfigurationError: an argument is not such a number.

    >>> import torch
    >>> weight, gradient = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.1]])
    >>> m = Measurement(0.1, 2.0, [0.1], [weight], [gradient], 1.0)
    >>> AdaptiveGradientClip(0.01).decide(m, None).factors
    [tensor([[0.5000]])]

    Source: arXiv 2102.06171; as in deepmind's nfnets and timm's `agc.py`.
    """

    clipping: float = 0.01
    eps: float = 1e-3
    takes_sparse: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        positive(self, "clipping")
        positive(self, "eps")

    def init(self) -> None:
        """Nothing is learnt."""

    def decide(self, measurement: Measurement, state: None) -> ScaleEach:  # noqa: ARG002
        """A factor for each unit of each tensor."""
        factors = []
        for param, grad in zip(measurement.params, measurement.grads, strict=True):
            greatest = _unit_norms(param).clamp(min=self.eps) * self.clipping
            norms = _unit_norms(grad) / measurement.scale
            factor = greatest / norms.clamp(min=_SMALLEST_NORM)
            factors.append(factor.where(norms > greatest, 1.0))
        return ScaleEach(factors)


def _unit_norms(tensor: Tensor) -> Tensor:
    """The L2 norm of each row, in float32 or wider and of a shape that broadcasts; 0-d of a vector."""
    import torch  # noqa: PLC0415 - who only names the policy, as a command does, has no need of it

    dtype = torch.promote_types(tensor.dtype, torch.float32)
    rows = tuple(range(1, tensor.ndim)) or None
    norms: Tensor = torch.linalg.vector_norm(
        tensor.detach(), dim=rows, keepdim=bool(rows), dtype=dtype
    )
    return norms
