"""What stands before an optimizer's `step`: the way past it, the way out of it, the short way in.

`step` is shadowed on the one optimizer, as learning-rate schedulers do it, for three reasons.

- A step that is to be skipped is left out: the pre-hook raises `StepLeftOut`, which is caught here,
  so the optimizer's own `step` is not called and nothing in it changes: no weight, no state, no
  counter. Hiding the gradients from `step` instead is enough for torch's own optimizers only.
- A kernel fails, another hook raises, somebody presses Ctrl-C: no hook of torch's is called then,
  and what was set for the step must not outlive it.
- A plain step goes to the optimizer's kernel from here (`kernels`), between the same two hooks.

The hooks are called from here where torch does not call them: for a class that is used like an
optimizer and never called `Optimizer.__init__`.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from torch.compiler import is_compiling

from gradwatch.leaving_out import StepLeftOut

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from gradwatch.hooks import StepHooks
    from gradwatch.kernels import KernelStep

__all__ = ["guard", "unguard"]

_SHADOWED = "_gradwatch_shadows"  # on our `step`: what stood there before
_COUNTED = "_wrapped_by_lr_sched"  # on a scheduler's
_HOOKED = "hooked"  # on a class's `step`, once torch calls hooks around it


def guard(optimizer: Optimizer, hooks: StepHooks, kernel: KernelStep | None) -> None:
    """Stand before this optimizer's `step()`; with a `kernel`, take steps that are plain by it."""
    shadowed = vars(optimizer).get("step")
    below = getattr(shadowed, "__wrapped__", None)
    counted = hasattr(shadowed, _COUNTED) and below is type(optimizer).step
    if shadowed is not None and not counted:  # somebody's own
        kernel = None
    take = _taker(hooks, kernel, shadowed, counted=counted)
    # Weakly, as the schedulers' does: an optimizer in a cycle is freed late, with all its state.
    reference = weakref.ref(optimizer)

    def guarded(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if hooks.in_guard:  # a step inside this one
            return _call(optimizer, shadowed, args, kwargs)
        hooks.in_guard = 1
        try:
            return take(optimizer, args, kwargs)
        except StepLeftOut as left:
            hooks.after_left_out(optimizer)
            return left.result
        except BaseException:
            hooks.broken_off(optimizer)
            raise
        finally:
            hooks.in_guard = 0

    @functools.wraps(shadowed or type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        if (optimizer := reference()) is None:
            msg = "step(): the optimizer is gone; keep it, not its step alone"
            raise ReferenceError(msg)
        return guarded(optimizer, *args, **kwargs)

    step.__func__ = guarded  # type: ignore[attr-defined] # what a scheduler looks for in a method
    setattr(step, _SHADOWED, shadowed)
    optimizer.step = step  # type: ignore[method-assign]


def _taker(
    hooks: StepHooks, kernel: KernelStep | None, shadowed: Any, *, counted: bool
) -> Callable[..., Any]:
    """How a step is taken: by the kernel, by torch with its hooks, or by a class that has none."""

    def take(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (
            kernel is not None
            and not (args or kwargs)
            and not is_compiling()  # torch's step then, of which it knows what to make
            and kernel.applies(optimizer)
        ):
            if counted:  # a scheduler's `step` over torch's does this, and no more
                optimizer._opt_called = True  # type: ignore[attr-defined]
            hooks.before(optimizer, (optimizer,), {})
            kernel.take(optimizer)
            hooks.after(optimizer, (optimizer,), {})
            return None
        if shadowed is not None or hasattr(type(optimizer).step, _HOOKED):
            return _call(optimizer, shadowed, args, kwargs)
        changed = hooks.before(optimizer, (optimizer, *args), kwargs)
        if changed is not None:
            (_, *positional), kwargs = changed
            args = tuple(positional)
        result = _call(optimizer, shadowed, args, kwargs)
        hooks.after(optimizer, (optimizer, *args), kwargs)
        return result

    return take


def _call(
    optimizer: Optimizer, shadowed: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if shadowed is None:
        return type(optimizer).step(optimizer, *args, **kwargs)
    return shadowed(*args, **kwargs)


def unguard(optimizer: Optimizer) -> None:
    """Take the guard off; under what somebody has put over it since, it stays."""
    step = vars(optimizer).get("step")
    if not hasattr(step, _SHADOWED):
        return
    if (shadowed := getattr(step, _SHADOWED)) is None:
        del optimizer.step
    else:
        optimizer.step = shadowed  # type: ignore[method-assign]
