"""The step of torch's own fused optimizers on the CPU: their kernel, without what surrounds it.

For a small model most of `AdamW(fused=True).step()` is Python: hooks, grouping the tensors, a
kernel for each counter of steps. The same kernel called with the same tensors and numbers leaves
the same weights and the same state, bit for bit. Whatever is out of the ordinary is left to torch,
and everything is where torch's own step turns out to do something else (`_does_the_same`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torchs

from gradwatch.frames import leave_to_python
from gradwatch.scaling import is_fused

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KernelStep"]

_where = attrgetter("is_cpu", "layout")
_DENSE = {(True, torch.strided)}
_TENSORS = {torch.Tensor}


class KernelStep:
    """Takes the steps of one optimizer through its kernel alone."""

    def __init__(self, optimizer: Optimizer) -> None:
        kind = type(optimizer)
        self.on = True  # until the agent takes its hooks off
        self._state_of, self._call = _KERNELS[kind]
        self._step = kind.step  # somebody may put another in its place
        self._without_hooks = kind.step.__wrapped__  # type: ignore[attr-defined]
        self._hooks_of_all = (
            torchs._global_optimizer_pre_hooks,
            torchs._global_optimizer_post_hooks,
        )
        self._is_profiled = torch._C._autograd._profiler_enabled
        self._seen: list[Any] = []  # the whole state, and what else the next two follow from
        self._states: list[list[list[Tensor]]] = []  # each group's lists for the kernel
        self._steps: list[Tensor] = []
        self._counters = _Counters()

    @classmethod
    def of(cls, optimizer: Optimizer) -> KernelStep | None:
        """For torch's own Adam, AdamW and SGD; None for others, and where torch has changed."""
        kind: Any = type(optimizer)
        return cls(optimizer) if _does_the_same(kind) else None

    def applies(self, optimizer: Optimizer) -> bool:
        """Whether it is the fused kernel's step on a CPU, with no hook but the agent's two."""
        before, after = self._hooks_of_all
        params = optimizer.param_groups[0]["params"]
        return (
            self.on
            and len(optimizer._optimizer_step_pre_hooks) == 1
            and len(optimizer._optimizer_step_post_hooks) == 1
            and not before
            and not after
            and type(optimizer).step is self._step
            and is_fused(optimizer)
            and bool(params)
            and params[0].is_cpu
            and not self._is_profiled()
        )

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
            self._counters.count()
            for kernel, tensors, numbers in calls:
                kernel(*tensors, **numbers)
        finally:
            torch._C._set_grad_enabled(with_grad)

    def _calls(self, optimizer: Optimizer) -> list[_Call]:
        """What each group's kernel is to be called with; changes nothing."""
        left = optimizer.__dict__  # by this agent, or by a GradScaler
        divisor = left.get("grad_scale")
        if left.get("found_inf") is not None or not (divisor is None or divisor.is_cpu):
            raise _LeftToTorchError
        groups: list[_Group] = []
        seen = list(chain.from_iterable(map(dict.values, optimizer.state.values())))
        for group in optimizer.param_groups:
            params, grads = _with_gradients(group)
            if not params:
                continue
            if set(map(type, grads)) != _TENSORS:
                raise _LeftToTorchError
            groups.append((group, params, grads))
            seen += params
            seen += (group.get("amsgrad"), group.get("momentum") != 0)
        if len(seen) != len(self._seen) or not all(map(is_, seen, self._seen)):
            self._look_up(optimizer, groups)
            self._seen = seen
        self._counters.see(self._steps)
        calls: list[_Call] = []
        for (options, params, grads), tensors in zip(groups, self._states, strict=True):
            kernel, numbers = self._call(options)
            numbers["grad_scale"] = divisor
            calls.append((kernel, [params, grads, *tensors], numbers))
        return calls

    def _look_up(self, optimizer: Optimizer, groups: Sequence[_Group]) -> None:
        """Find every parameter's state."""
        for _, _, grads in groups:
            if set(map(_where, grads)) != _DENSE:
                raise _LeftToTorchError
        found = [
            self._state_of(group, [optimizer.state.get(param, {}) for param in params])
            for group, params, _ in groups
        ]
        self._states = [tensors for tensors, _ in found]
        self._steps = [step for _, steps in found for step in steps]


_IS_LEFT_TO_PYTHON = leave_to_python(KernelStep.applies, KernelStep.take)


def _with_gradients(group: _Options) -> tuple[list[Tensor], list[Tensor]]:
    params = group["params"]
    grads = [grad for param in params if (grad := param.grad) is not None]
    if len(grads) < len(params):
        params = [param for param in params if param.grad is not None]
    return params, grads


class _LeftToTorchError(Exception):
    """Something is out of the ordinary."""


class _Counters:
    """Counts an optimizer's steps in the memory of its counters, one for each parameter.

    As exact as adding 1 to the tensors, for a hundredth of the time.
    """

    def __init__(self) -> None:
        self._places: list[int] = []
        self._cells: list[Any] = []

    def see(self, counters: Sequence[Tensor]) -> None:
        """These are to be counted; they are looked into where their memory is another than before."""
        places = [counter.data_ptr() for counter in counters]
        if places == self._places:  # the cells keep it: nothing else can have come there
            return
        for counter in counters:
            if not (counter.is_cpu and counter.dtype is torch.float32 and counter.numel() == 1):
                raise _LeftToTorchError
        self._cells = [counter.detach().numpy().reshape(1).data for counter in counters]
        self._places = places

    def count(self) -> None:
        """One step more."""
        for cell in self._cells:
            cell[0] += 1.0


# -- what each kernel is called with ---------------------------------------------------------------

_Options = Mapping[str, Any]
_Group = tuple[_Options, "list[Tensor]", "list[Tensor]"]  # with its parameters and gradients
_Kernel = tuple["Callable[..., None]", dict[str, Any]]  # with its numbers
_Call = tuple["Callable[..., None]", "list[list[Tensor]]", dict[str, Any]]
_State = tuple["list[list[Tensor]]", "list[Tensor]"]  # what the kernel takes, what is to be counted


def _adam_state(group: _Options, states: Sequence[Mapping[str, Tensor]]) -> _State:
    steps = [state["step"] for state in states]
    maxima = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
    averages = [state["exp_avg"] for state in states]
    return [averages, [state["exp_avg_sq"] for state in states], maxima, steps], steps


def _adam(group: _Options, *, decoupled: bool = False) -> _Kernel:
    if group["differentiable"]:  # which torch refuses
        raise _LeftToTorchError
    beta1, beta2 = group["betas"]
    decoupled = group.get("decoupled_weight_decay", decoupled)
    return torch._fused_adamw_ if decoupled else torch._fused_adam_, {
        "lr": group["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": group["weight_decay"],
        "eps": group["eps"],
        "amsgrad": group["amsgrad"],
        "maximize": group["maximize"],
    }


def _sgd_state(group: _Options, states: Sequence[Mapping[str, Tensor]]) -> _State:
    if group["momentum"] == 0:
        return [[]], []
    buffers = [state["momentum_buffer"] for state in states]
    if set(map(type, buffers)) != _TENSORS:  # None before the first step
        raise _LeftToTorchError
    return [buffers], []


def _sgd(group: _Options) -> _Kernel:
    if group["foreach"]:  # which SGD takes for more than `fused`
        raise _LeftToTorchError
    return torch._fused_sgd_, {
        "weight_decay": group["weight_decay"],
        "momentum": group["momentum"],
        "lr": group["lr"],
        "dampening": group["dampening"],
        "nesterov": group["nesterov"],
        "maximize": group["maximize"],
        "is_first_step": False,
    }


_KERNELS: dict[type[Optimizer], Any] = {
    Adam: (_adam_state, _adam),
    AdamW: (_adam_state, functools.partial(_adam, decoupled=True)),
    SGD: (_sgd_state, _sgd),
}


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
        hooked = Optimizer.profile_hook_step(_does_the_same)
        return (
            _IS_LEFT_TO_PYTHON
            and kind in _KERNELS
            and kind.step.__code__ is hooked.__code__
            and all(_try(kind, options) for options in _TRIED[kind])
        )
    except Exception:  # noqa: BLE001 - a torch that is not as this was written for
        return False


def _try(kind: type[Optimizer], options: Mapping[str, Any]) -> bool:
    ends = []
    for by_kernel in (True, False):
        weight = torch.linspace(-1.0, 1.0, 5, device="cpu", dtype=torch.float32).requires_grad_()
        optimizer: Any = kind([weight], lr=0.1, fused=True, **options)  # type: ignore[call-arg]
        way = KernelStep(optimizer)
        for step in range(4):
            weight.grad = (weight.detach() + step).cos()
            divisor = torch.full((), 3.0, device="cpu", dtype=torch.float32)
            optimizer.grad_scale = None if step % 2 else divisor
            (way.take if by_kernel else way._without_hooks)(optimizer)
        ends.append([weight.detach(), *optimizer.state[weight].values()])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
