"""The step of torch's own fused optimizers on the CPU: their kernel, without what surrounds it.

For a small model most of `AdamW(fused=True).step()` is Python: a profiler's mark, grouping the
tensors, a tensor made for each counter of steps. The same kernel called with the same tensors and
numbers leaves the same weights and the same state, bit for bit. Whatever is out of the ordinary is
left to torch, and everything is where torch's own step turns out to do something else
(`_does_the_same`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torchs

from gradwatch.frames import leave_to_python
from gradwatch.scaling import is_fused

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KernelStep"]

_TENSORS = {torch.Tensor}
_dtype = attrgetter("dtype")
_layout = attrgetter("layout")

_Options = Mapping[str, Any]
_Kernel = Callable[..., None]
_Numbers = dict[str, Any]
# A kernel, its lists of tensors after parameters and gradients, its numbers, and what is to be counted.
_Call = tuple[_Kernel, "list[list[Tensor]]", _Numbers, "list[Tensor]"]


class KernelStep:
    """Takes the steps of one optimizer through its kernel alone; keeps nothing of them."""

    def __init__(self, optimizer: Optimizer, before: Any, after: Any) -> None:
        kind: Any = type(optimizer)
        self._call = _CALLS[kind]
        self._before, self._after = before, after
        self._step: Any = kind.step
        self._without_hooks = self._step.__wrapped__
        # What torch's step calls; somebody may put something else in its place.
        self._init_group = kind._init_group
        self._step_code = kind._optimizer_step_code
        self._namespace: dict[str, Any] = self._without_hooks.__wrapped__.__globals__
        self._name = "sgd" if kind is SGD else "adam"
        self._function = self._namespace[self._name]
        self._hooks_of_all = (
            torchs._global_optimizer_pre_hooks,
            torchs._global_optimizer_post_hooks,
        )
        self._is_profiled = torch._C._autograd._profiler_enabled
        self._modes = torch._C._len_torch_dispatch_stack
        self._one = torch.ones((), device="cpu", dtype=torch.float32)

    @classmethod
    def of(cls, optimizer: Optimizer, before: Any, after: Any) -> KernelStep | None:
        """For torch's own Adam, AdamW and SGD; None for others, and where torch has changed.

        `before` and `after` are the agent's hooks, as they were registered.
        """
        kind: Any = type(optimizer)
        return cls(optimizer, before, after) if _does_the_same(kind) else None

    def applies(self, optimizer: Optimizer) -> bool:
        """Whether torch would call its fused kernel on a CPU, and no hook but the agent's two."""
        try:
            (before,) = optimizer._optimizer_step_pre_hooks.values()
            (after,) = optimizer._optimizer_step_post_hooks.values()
            params = optimizer.param_groups[0]["params"]
            kind: Any = type(optimizer)
            own = optimizer.__dict__
            return (
                before is self._before
                and after is self._after
                and not any(self._hooks_of_all)
                and type(params) is list
                and params[0].is_cpu
                and is_fused(optimizer)
                and kind.step is self._step
                and kind._init_group is self._init_group
                and kind._optimizer_step_code is self._step_code
                and "_init_group" not in own
                and "_optimizer_step_code" not in own
                and self._namespace[self._name] is self._function
                and not self._is_profiled()
                and not self._modes()
            )
        except Exception:  # noqa: BLE001 - whatever it is, torch knows what to make of it
            return False

    def take(self, optimizer: Optimizer) -> None:
        """Step, without hooks: by the kernel, or as torch does where that might differ."""
        try:
            calls = self._calls(optimizer)
        except Exception:  # noqa: BLE001 - nothing is changed yet; the first step has no state
            self._without_hooks(optimizer)
            return
        with_grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            for kernel, tensors, numbers, counters in calls:
                if counters:
                    # A number here would be made a tensor for every one of them.
                    torch._foreach_add_(counters, self._one, alpha=1.0)
                kernel(*tensors, **numbers)
        finally:
            torch._C._set_grad_enabled(with_grad)

    def _calls(self, optimizer: Optimizer) -> list[_Call]:
        """What each group's kernel is to be called with; changes nothing."""
        left = optimizer.__dict__  # by this agent, or by a GradScaler
        divisor = left.get("grad_scale")
        if left.get("found_inf") is not None or not (divisor is None or divisor.is_cpu):
            raise _LeftToTorchError
        calls: list[_Call] = []
        for group in optimizer.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            grads = [param.grad for param in params]
            kernel, state, numbers, counters = self._call(optimizer.state, group, params)
            if (
                set(map(type, grads)) != _TENSORS
                or set(map(_layout, grads)) != {torch.strided}
                or len({*map(_dtype, grads), *map(_dtype, state[0])}) != 1
            ):
                raise _LeftToTorchError
            numbers["grad_scale"] = divisor
            calls.append((kernel, [params, grads, *state], numbers, counters))
        return calls


_IS_LEFT_TO_PYTHON = leave_to_python(KernelStep.applies, KernelStep.take)


class _LeftToTorchError(Exception):
    """Something is out of the ordinary."""


# -- what each kernel is called with ---------------------------------------------------------------


def _adam(state: Mapping[Tensor, Any], group: _Options, params: list[Tensor]) -> _Call:
    if group["foreach"] or group["capturable"] or group["differentiable"]:
        raise _LeftToTorchError
    beta1, beta2 = group["betas"]
    if isinstance(beta1, torch.Tensor) or isinstance(beta2, torch.Tensor):
        raise _LeftToTorchError
    states = [state[param] for param in params]
    steps = [of["step"] for of in states]
    tensors = [
        [of["exp_avg"] for of in states],
        [of["exp_avg_sq"] for of in states],
        [of["max_exp_avg_sq"] for of in states] if group["amsgrad"] else [],
        steps,
    ]
    numbers = {
        "lr": group["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": group["weight_decay"],
        "eps": group["eps"],
        "amsgrad": group["amsgrad"],
        "maximize": group["maximize"],
    }
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    return kernel, tensors, numbers, steps


def _sgd(state: Mapping[Tensor, Any], group: _Options, params: list[Tensor]) -> _Call:
    if group["foreach"]:  # which it takes for more than `fused`
        raise _LeftToTorchError
    buffers = []
    if group["momentum"] != 0:
        buffers = [state[param]["momentum_buffer"] for param in params]
        if set(map(type, buffers)) != _TENSORS:  # None before the first step
            raise _LeftToTorchError
    numbers = {
        "weight_decay": group["weight_decay"],
        "momentum": group["momentum"],
        "lr": group["lr"],
        "dampening": group["dampening"],
        "nesterov": group["nesterov"],
        "maximize": group["maximize"],
        "is_first_step": False,
    }
    return torch._fused_sgd_, [buffers], numbers, []


_CALLS: dict[type[Optimizer], Any] = {Adam: _adam, AdamW: _adam, SGD: _sgd}


# -- whether that is what torch does ---------------------------------------------------------------

_TRIED: dict[type[Optimizer], list[dict[str, Any]]] = {
    Adam: [{}, {"weight_decay": 0.1, "maximize": True}],
    AdamW: [{}, {"amsgrad": True, "betas": (0.5, 0.6), "eps": 1e-3}],
    SGD: [{}, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}],
}


@functools.cache
def _does_the_same(kind: type[Optimizer]) -> bool:
    """Whether steps by the kernel leave what torch's own do; tried out, once a process."""
    try:
        return (
            _IS_LEFT_TO_PYTHON
            and kind in _CALLS
            and _is_torchs_own(kind.step)
            and all(_try(kind, options) for options in _TRIED[kind])
        )
    except Exception:  # noqa: BLE001 - a torch that is not as this was written for
        return False


def _is_torchs_own(step: Any) -> bool:
    """Whether it is torch's method in torch's two wrappers, and nothing of somebody else's."""
    hooked, with_grad_mode = (
        Optimizer.profile_hook_step(_is_torchs_own),
        torchs._use_grad_for_differentiable(_is_torchs_own),
    )
    method = step.__wrapped__.__wrapped__
    return (
        step.__code__ is hooked.__code__
        and step.__wrapped__.__code__ is with_grad_mode.__code__
        and method.__globals__["__name__"] in {"torch.optim.adam", "torch.optim.sgd"}
        and method.__code__.co_name == "step"
    )


def _try(kind: type[Optimizer], options: Mapping[str, Any]) -> bool:
    ends = []
    for by_kernel in (True, False):
        weight = torch.linspace(-1.0, 1.0, 5, device="cpu", dtype=torch.float32).requires_grad_()
        optimizer: Any = kind([weight], lr=0.1, fused=True, **options)  # type: ignore[call-arg]
        way = KernelStep(optimizer, None, None)
        for step in range(4):
            weight.grad = (weight.detach() + step).cos()
            divisor = torch.full((), 3.0, device="cpu", dtype=torch.float32)
            optimizer.grad_scale = None if step % 2 else divisor
            (way.take if by_kernel else way._without_hooks)(optimizer)
        ends.append([weight.detach(), *optimizer.state[weight].values()])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
