"""The parameter groups that one policy looks after, and what the policy has learnt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradwatch.norms import Meter

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.policies import Policy
    from gradwatch.records import Measurement

__all__ = ["Part"]


class Part:
    """A policy with its state, over all groups of an optimizer or over one of them."""

    def __init__(self, policy: Policy[Any], group: int | None = None) -> None:
        self.policy = policy
        self.state = policy.init()
        self._group = group
        self._meter = Meter(policy.norm_type)

    def gradients(self, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and their gradients."""
        groups = optimizer.param_groups
        if self._group is not None:
            params = groups[self._group]["params"]
        elif len(groups) == 1:
            params = groups[0]["params"]
        else:
            params = [p for group in groups for p in group["params"]]
        grads = [g for p in params if (g := p.grad) is not None]
        if len(grads) != len(params):
            params = [p for p in params if p.grad is not None]
        return params, grads

    def measure(self, optimizer: Optimizer, scale: float) -> Measurement:
        """Measure the gradients, which carry `scale` as their loss scale."""
        params, grads = self.gradients(optimizer)
        return self._meter.measure(params, grads, scale)

    @property
    def threshold(self) -> float:
        """The threshold in force, NaN where there is no single one."""
        threshold = self.policy.threshold(self.state)
        return math.nan if threshold is None else threshold
