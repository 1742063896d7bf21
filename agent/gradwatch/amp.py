"""The loss scaler, looked at from outside: its scale, and the steps it suppresses.

With an optimizer that has no fused kernel, `GradScaler.step` does not call `optimizer.step` at
all when it found an inf, so no hook of the optimizer fires. The scaler's `step` is therefore
shadowed on the instance, for as long as an agent that was given the scaler lives.
"""

from __future__ import annotations

import math
import types
import weakref
from typing import TYPE_CHECKING, Any

from torch.amp.grad_scaler import OptState

from gradwatch.scaling import LossScale

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.amp import GradScaler
    from torch.optim import Optimizer

    from gradwatch.hooks import StepHooks

__all__ = ["ScalerWatch", "handed_over"]


def handed_over(scaler: GradScaler, optimizer: Optimizer) -> LossScale:
    """What `GradScaler.step` leaves to an optimizer that it calls as `step(grad_scaler=scaler)`.

    It does so for a class with `_step_supports_amp_scaling` whose `step` has that argument (the
    protocol of apex): the gradients still carry the scale unless `unscale_` was called, and the
    optimizer's `step` unscales them, records whether there is an inf, and skips where there is one.
    """
    if not scaler.is_enabled():
        return LossScale(1.0, suppressed=False)
    scale = float(scaler.get_scale())
    state = scaler._per_optimizer_states.get(id(optimizer), {})
    if state.get("stage") is OptState.UNSCALED:
        found = state.get("found_inf_per_device", {}).values()
        return LossScale(1.0, any(float(inf) for inf in found), scale, own=True)
    if scale == 0.0:  # by which the optimizer would divide: it is not called, the scaler is content
        scaler._check_inf_per_device(optimizer)
    return LossScale(scale, scale == 0.0, scale, own=True)


class ScalerWatch:
    """Stands in for `scaler.step` on one GradScaler, for all optimizers watched under it."""

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._step: Callable[..., float | None] = scaler.step
        self._hooks: weakref.WeakKeyDictionary[Optimizer, StepHooks] = weakref.WeakKeyDictionary()

    @classmethod
    def on(cls, scaler: GradScaler, optimizer: Optimizer, hooks: StepHooks) -> ScalerWatch:
        """Watch this optimizer's steps under this scaler."""
        watch = scaler.__dict__.get("step")
        if not isinstance(watch, cls):
            watch = cls(scaler)
            scaler.step = watch  # type: ignore[method-assign]
        watch._hooks[optimizer] = hooks
        return watch

    def off(self, optimizer: Optimizer) -> None:
        """Stop watching it; with the last one, `scaler.step` is what it was."""
        self._hooks.pop(optimizer, None)
        if not self._hooks and self._scaler.__dict__.get("step") is self:
            del self._scaler.step

    def scale(self) -> float:
        """The loss scale in force; NaN where the scaler is switched off."""
        return float(self._scaler.get_scale()) if self._scaler.is_enabled() else math.nan

    def scale_on_device(self) -> Tensor | float:
        """The same as the scaler's own tensor, which nobody has to wait for."""
        scale = self._scaler._scale if self._scaler.is_enabled() else None
        return math.nan if scale is None else scale

    def unscale(self, optimizer: Optimizer) -> None:
        """Unscale the gradients, unless that was done for this step or nothing was scaled yet."""
        if not self._scaler.is_enabled() or self._scaler._scale is None:
            return
        try:
            self._scaler.unscale_(optimizer)
        except RuntimeError:
            return  # it says so where unscale_ was called already

    def __call__(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """`GradScaler.step`; where it did not step, that is recorded."""
        hooks = self._hooks.get(optimizer)
        before = hooks.step if hooks else 0
        result = self._step(optimizer, *args, **kwargs)
        if hooks is not None and hooks.step == before:
            hooks.overflowed(optimizer, self.scale())
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled scaler gets its own plain `step` back."""
        return _plain_step, (self._scaler,)


def _plain_step(scaler: GradScaler) -> Callable[..., float | None]:
    return types.MethodType(type(scaler).step, scaler)
