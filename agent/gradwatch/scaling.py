"""Carrying a Decision out: in the fused optimizer's kernel, in place, or by skipping the step.

Fused Adam, AdamW, SGD and Adagrad divide gradients by `optimizer.grad_scale` inside their kernel
(it is there for `GradScaler`). Folding the clip into that number saves a pass over all gradients;
a step that needs no clipping sets nothing and is bit-identical to an unclipped one.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gradwatch.norms import Meter, combine, max_abs
from gradwatch.records import Clamp, Decision, Keep, Measurement, Scale, ScaleEach, Skip
from gradwatch.shards import full, local

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

__all__ = [
    "CLIP_EPSILON",
    "DIVISOR_LIMIT",
    "NO_SCALER",
    "Carrier",
    "LossScale",
    "is_fused",
    "reads_grad_scale",
    "real_parts",
]

CLIP_EPSILON = 1e-6  # torch's, in clip_grad_norm_
DIVISOR_LIMIT = 1e37  # a greater divisor does not fit the kernel's float32
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
_ABSENT: Any = object()


class LossScale(NamedTuple):
    """What a GradScaler left on the optimizer for this step.

    `in_memory` is the factor the gradients in memory still carry (1.0 where there is no scaler,
    and once unscaled); `suppressed`: it found an inf, and the kernel will apply nothing. `scale` is
    the scaler's own, where it is known though the gradients no longer carry it. `own`: the optimizer
    was handed the scaler itself, so it unscales, looks for infs and skips by itself.
    """

    in_memory: float
    suppressed: bool
    scale: float = math.nan
    own: bool = False


NO_SCALER = LossScale(1.0, suppressed=False)


def reads_grad_scale(optimizer: Optimizer) -> bool:
    """Whether this optimizer's kernel divides by `grad_scale`: torch's own fused ones do."""
    if not is_fused(optimizer):
        return False
    step = inspect.unwrap(type(optimizer).step)
    return any(step is inspect.unwrap(kind.step) for kind in _FUSED)


class Carrier:
    """Carries decisions out on one optimizer, and puts back what it set for the step."""

    def __init__(
        self, optimizer: Optimizer, *, fold: bool, leaves_out: Callable[[], bool] = lambda: False
    ) -> None:
        self.folds = fold and reads_grad_scale(optimizer)
        self._exact = not fold
        self._divisor: Tensor | None = None
        self._cell: Any = None  # its one number, to be written to
        # Attributes as they were, while ours stand in their place.
        self._before: dict[str, Any] = {}
        self._in_force: Tensor | None = None  # the grad_scale of the step under way
        self._hidden: list[tuple[Tensor, Tensor]] = []
        # Whether the optimizer's `step()` is not called where the step under way is to be skipped.
        self._leaves_out = leaves_out
        self.left_out = False  # the step under way is to be left out

    def loss_scale(self, optimizer: Optimizer) -> LossScale:
        """Read what a GradScaler set for this step."""
        attributes = optimizer.__dict__
        if "grad_scale" not in attributes and "found_inf" not in attributes:
            return NO_SCALER
        scale = self._in_force = attributes.get("grad_scale")
        found_inf = attributes.get("found_inf")
        in_memory = 1.0 if scale is None else float(scale)
        # By a scale that has fallen to 0 the kernel would divide.
        suppressed = in_memory == 0.0 or (found_inf is not None and bool(found_inf))
        return LossScale(in_memory, suppressed, math.nan if scale is None else in_memory)

    def can_fold(self, optimizer: Optimizer) -> bool:
        """Whether the kernel takes a divisor; a checkpoint may have brought one back that is not fused."""
        return self.folds and is_fused(optimizer)

    def left_by_scaler(self, optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
        """The same as `loss_scale`, still on the device: `grad_scale` and `found_inf`."""
        attributes = optimizer.__dict__
        scale = self._in_force = attributes.get("grad_scale")
        return scale, attributes.get("found_inf")

    def leave_to_kernel(
        self, optimizer: Optimizer, divisor: Tensor | None, unfit: Tensor | None
    ) -> None:
        """Let the kernel divide by `divisor`, and leave the step out where `unfit` is 1.0."""
        if divisor is not None:
            self._replace_grad_scale(optimizer, divisor)
        if unfit is not None:
            self._replace(optimizer, "found_inf", unfit)

    def carry_out(
        self, optimizer: Optimizer, decision: Decision, measured: Measurement, *, fold: bool
    ) -> tuple[bool, float]:
        """Do what was decided: whether that changed the gradient, and its norm then.

        `fold`: a `Scale` may be left to the optimizer's kernel. Raises `TypeError` or `ValueError`,
        with nothing changed, for what is no decision: a policy may be the user's own.
        """
        if isinstance(decision, Scale):
            return self._scale(optimizer, decision.max_norm, measured, fold=fold)
        if isinstance(decision, Keep):
            return False, measured.norm
        if isinstance(decision, Clamp):
            return _clamp(decision.limit, measured)
        if isinstance(decision, ScaleEach):
            return _scale_each(decision.factors, measured)
        if isinstance(decision, Skip):
            self.skip(measured.params, measured.grads)
            return False, math.nan
        msg = f"a policy decides Keep, Scale, ScaleEach, Clamp or Skip, not {decision!r}"  # type: ignore[unreachable]
        raise TypeError(msg)

    def skip(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """See to it that this step touches neither parameters nor state.

        It is left out where that can be done. Where `step()` is under way already, the gradients
        are hidden from it, which is enough for torch's own optimizers, fused or not, on the very
        first step too (a kernel told to skip through `found_inf` leaves fused SGD's first momentum
        buffer uninitialised).
        """
        if self._leaves_out():
            self.left_out = True
            return
        self._hidden.extend(zip(params, grads, strict=True))
        for param in params:
            param.grad = None

    def restore(self, optimizer: Optimizer, *, broken_off: bool = False) -> None:
        """After the step: gradients and `grad_scale` as they were before it.

        Where an exception has `broken_off` the step, GradScaler does not delete what it set, and
        multiplies it into its next `grad_scale`: see `abandon`.
        """
        self.left_out = False
        if self._hidden:
            for param, grad in self._hidden:
                param.grad = grad
            self._hidden.clear()
        if self._before:
            for name, value in self._before.items():
                # Under GradScaler the attribute must be there: it deletes it itself.
                if value is _ABSENT:
                    delattr(optimizer, name)
                else:
                    setattr(optimizer, name, value)
            self._before.clear()
        self._in_force = optimizer.__dict__.get("grad_scale") if broken_off else None

    @property
    def busy(self) -> bool:
        """Whether something that was set for a step still stands, though no step is open."""
        return self._in_force is not None or bool(self._hidden)

    def abandon(self, optimizer: Optimizer) -> None:
        """An exception ended the last step before `restore`: clear what it left behind.

        A `grad_scale` that was left standing is one GradScaler multiplies into its next; its
        part is divided out again. Gradients hidden at the time are gone.
        """
        left = self._in_force
        self.left_out = False
        self._hidden.clear()
        if self._before.get("found_inf") is _ABSENT:
            optimizer.__dict__.pop("found_inf", None)
        self._before.clear()
        self._in_force = None
        now = optimizer.__dict__.get("grad_scale")
        if left is None or now is None:
            return
        if now is not left:
            optimizer.grad_scale = now / left  # type: ignore[attr-defined]
        elif "found_inf" in optimizer.__dict__:
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        else:
            del optimizer.grad_scale  # type: ignore[attr-defined]

    def _scale(
        self, optimizer: Optimizer, max_norm: float, measured: Measurement, *, fold: bool
    ) -> tuple[bool, float]:
        if not max_norm > 0.0:
            msg = f"Scale({max_norm!r}): a norm is scaled to one above 0"
            raise ValueError(msg)
        if self._exact:
            return self._scale_as_torch_does(optimizer, max_norm, measured, fold=fold)
        coefficient = max_norm / (measured.norm + CLIP_EPSILON)
        if coefficient >= 1.0:
            return False, measured.norm
        divisor = measured.scale / coefficient
        if fold and divisor < DIVISOR_LIMIT and self.can_fold(optimizer):
            self._divide_in_kernel(optimizer, divisor, measured.grads[0])
        else:
            _multiply(measured.grads, coefficient)
        return True, measured.norm * coefficient

    def _divide_in_kernel(self, optimizer: Optimizer, divisor: float, like: Tensor) -> None:
        if self._divisor is None or self._divisor.device != like.device:
            cell = torch.empty(1, dtype=torch.float32, device=like.device)
            self._divisor = cell[0]
            # Writing through the memory itself costs a tenth of a torch call.
            self._cell = cell.numpy().data if like.is_cpu else cell
        self._cell[0] = divisor
        self._replace_grad_scale(optimizer, self._divisor)

    def _scale_as_torch_does(
        self, optimizer: Optimizer, max_norm: float, measured: Measurement, *, fold: bool
    ) -> tuple[bool, float]:
        """Unscale, then `clip_grad_norm_`, bit for bit; called where it changes nothing too."""
        grads = list(measured.grads)
        if not grads:
            return False, measured.norm
        limit = max_norm
        if measured.scale != 1.0:
            if fold and is_fused(optimizer):
                _multiply(grads, 1.0 / measured.scale)
                self._replace_grad_scale(optimizer, torch.ones((), device=grads[0].device))
            else:
                limit *= measured.scale
        total = full(torch.nn.utils.get_total_norm(grads, measured.norm_type))
        torch.nn.utils.clip_grads_with_norm_(measured.params, limit, total)
        coefficient = min(1.0, limit / (total.item() + CLIP_EPSILON))
        return (coefficient < 1.0, measured.norm * coefficient)

    def _replace_grad_scale(self, optimizer: Optimizer, value: Tensor) -> None:
        self._in_force = value
        self._replace(optimizer, "grad_scale", value)

    def _replace(self, optimizer: Optimizer, name: str, value: Tensor) -> None:
        self._before[name] = optimizer.__dict__.get(name, _ABSENT)
        setattr(optimizer, name, value)


def is_fused(optimizer: Optimizer) -> bool:
    """Whether every group is to be stepped by the fused kernel."""
    for group in optimizer.param_groups:  # noqa: SIM110 - a generator would cost more
        if not group.get("fused"):
            return False
    return True


def _multiply(grads: Sequence[Tensor], factor: float) -> None:
    grads = list(map(local, grads))
    with torch.no_grad():
        dense = [g for g in grads if g.layout is torch.strided]
        if dense:
            torch._foreach_mul_(dense, factor)
        if len(dense) < len(grads):
            for grad in grads:
                if grad.layout is not torch.strided:
                    grad.mul_(factor)


def real_parts(grad: Tensor) -> tuple[Tensor, ...]:
    """What a limit of elements is applied to: of a complex gradient, views of its two parts.

    Complex numbers have no order, so torch clamps none.
    """
    return (grad.real, grad.imag) if grad.is_complex() else (grad,)


def _clamp(limit: float, measured: Measurement) -> tuple[bool, float]:
    if not limit > 0.0:
        msg = f"Clamp({limit!r}): elements are clamped to a limit above 0"
        raise ValueError(msg)
    limit *= measured.scale
    parts = [part for grad in measured.grads for part in real_parts(grad)]
    if max_abs(parts) <= limit:
        return False, measured.norm
    grads = list(map(local, parts))
    with torch.no_grad():
        torch._foreach_clamp_min_(grads, -limit)
        torch._foreach_clamp_max_(grads, limit)
    return True, _norm_now(measured)


def _scale_each(factors: Sequence[float | Tensor], measured: Measurement) -> tuple[bool, float]:
    clipped = False
    norms: list[float] | None = []  # afterwards, as long as they can be inferred
    with torch.no_grad():
        for grad, factor, norm in zip(measured.grads, factors, measured.tensor_norms, strict=True):
            if isinstance(factor, float):
                if norms is not None:
                    norms.append(norm * factor)
                if factor == 1.0:
                    continue
                clipped = True
            else:
                norms = None
                if not bool(full(factor != 1.0).any()):
                    continue
                clipped = True
            grad.mul_(factor)
    if not clipped:
        return False, measured.norm
    inferred = combine(norms, measured.norm_type) if norms is not None else _norm_now(measured)
    return True, inferred


def _norm_now(measured: Measurement) -> float:
    meter = Meter(measured.norm_type)
    return meter.measure(measured.params, measured.grads, measured.scale).norm
