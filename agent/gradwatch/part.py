"""The parameter groups that one policy looks after, and what the policy has learnt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradwatch.errors import ConfigurationError
from gradwatch.norms import Meter
from gradwatch.policies import build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.policies import Policy
    from gradwatch.records import Measurement

__all__ = ["Part", "sparse_refusal"]


def sparse_refusal(policy: Policy[Any], where: str) -> str:
    """Why a policy cannot be had where gradients are sparse."""
    return (
        f"{policy} looks at every element, row or tensor of a gradient, and the gradients of "
        f"{where} are sparse: what is not in them would count as zeros. "
        "Use a policy on the global norm, as ClipNorm(1.0), or dense gradients (sparse=False)"
    )


def _kinds(policy: Policy[Any]) -> list[type]:
    """The policy's class, and that of the policy inside it."""
    inner = getattr(policy, "policy", None)
    return [type(policy), *(_kinds(inner) if inner is not None else [])]


class Part:
    """A policy with its state, over all groups of an optimizer or over one of them."""

    def __init__(self, policy: Policy[Any], group: int | None = None) -> None:
        self.policy = policy
        self.state = policy.init()
        self.wrapped_with = policy  # before any change that was applied to the running job
        self.group = group
        self._meter = Meter(policy.norm_type)

    def dump(self) -> dict[str, Any]:
        """Policy and state for a checkpoint: `applied` is there where the policy was changed."""
        dumped = {
            "policy": type(self.wrapped_with).__name__,
            "state": self.policy.dump(self.state),
        }
        if self.policy is not self.wrapped_with:
            dumped["applied"] = self.policy.describe()
        return dumped

    def loaded(self, dumped: Mapping[str, Any]) -> tuple[Policy[Any], Any]:
        """The policy and the state that `dump` wrote."""
        policy = build(dumped["applied"]) if "applied" in dumped else self.wrapped_with
        return policy, policy.load(dumped["state"])

    def take(self, policy: Policy[Any]) -> None:
        """Clip by this policy from now on. What one of its kind has learnt, it goes on with."""
        same = _kinds(policy) == _kinds(self.policy)
        state = policy.load(self.policy.dump(self.state)) if same else policy.init()
        self.policy, self.state = policy, state

    def gradients(self, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and their gradients; twice what is listed twice."""
        groups = optimizer.param_groups
        if self.group is not None:
            # A group may have been taken out of the optimizer since.
            params = groups[self.group]["params"] if self.group < len(groups) else []
        elif len(groups) == 1:
            params = groups[0]["params"]
        else:
            params = [p for group in groups for p in group["params"]]
        grads = [g for p in params if (g := p.grad) is not None]
        if len(grads) != len(params):
            params = [p for p in params if p.grad is not None]
        return params, grads

    def refuse_sparse(self, optimizer: Optimizer) -> None:
        """Raise `ConfigurationError` where there are sparse gradients the policy cannot clip."""
        if self.policy.takes_sparse:
            return
        params, grads = self.gradients(optimizer)
        for param, grad in zip(params, grads, strict=True):
            if grad.is_sparse:
                raise ConfigurationError(
                    sparse_refusal(self.policy, f"a parameter of shape {tuple(param.shape)}")
                )

    def measure(self, optimizer: Optimizer, scale: float) -> Measurement:
        """Measure the gradients, which carry `scale` as their loss scale; each of them once."""
        params, grads = self.gradients(optimizer)
        return self._meter.measure(params, grads, scale)

    def measure_these(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], scale: float
    ) -> Measurement:
        """The same for some of its gradients: those that no other part has."""
        return self._meter.measure(params, grads, scale)

    @property
    def repeats(self) -> bool:
        """Whether the optimizer lists a parameter more than once, as of the last measurement.

        A fused kernel divides the gradient by `grad_scale` at each mention and writes it back, so
        the clip is not left to it then.
        """
        return self._meter.repeats

    @property
    def threshold(self) -> float:
        """The threshold in force, NaN where there is no single one."""
        threshold = self.policy.threshold(self.state)
        return math.nan if threshold is None else threshold
