"""What stands before an optimizer's `step`: the way out of one that raises, and the short way in.

A kernel fails, another hook raises, somebody presses Ctrl-C: no hook of torch's is called then, and
what was set for the step must not outlive it. So `step` is shadowed on the one optimizer, as
learning-rate schedulers do it. A plain step goes to the optimizer's kernel from here (`kernels`),
between the same two hooks.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from torch.compiler import is_compiling

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.hooks import StepHooks
    from gradwatch.kernels import KernelStep

__all__ = ["guard", "unguard"]

_SHADOWED = "_gradwatch_shadows"  # on our `step`: what stood there before
_COUNTED = "_wrapped_by_lr_sched"  # on a scheduler's


def guard(optimizer: Optimizer, hooks: StepHooks, kernel: KernelStep | None) -> None:
    """Call `hooks.broken_off` wherever this optimizer's `step()` is left by an exception.

    With a `kernel`, steps that are plain are taken by it.
    """
    shadowed = vars(optimizer).get("step")
    below = getattr(shadowed, "__wrapped__", None)
    counted = hasattr(shadowed, _COUNTED) and below is type(optimizer).step
    if shadowed is not None and not counted:  # somebody's own
        kernel = None
    # Weakly, as the schedulers' does: an optimizer in a cycle is freed late, with all its state.
    reference = weakref.ref(optimizer)

    def guarded(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
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
            if shadowed is None:
                return type(optimizer).step(optimizer, *args, **kwargs)
            return shadowed(*args, **kwargs)
        except BaseException:
            hooks.broken_off(optimizer)
            raise

    @functools.wraps(shadowed or type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        if (optimizer := reference()) is None:
            msg = "step(): the optimizer is gone; keep it, not its step alone"
            raise ReferenceError(msg)
        return guarded(optimizer, *args, **kwargs)

    step.__func__ = guarded  # type: ignore[attr-defined] # what a scheduler looks for in a method
    setattr(step, _SHADOWED, shadowed)
    optimizer.step = step  # type: ignore[method-assign]


def unguard(optimizer: Optimizer) -> None:
    """Take the guard off; under what somebody has put over it since, it stays."""
    step = vars(optimizer).get("step")
    if not hasattr(step, _SHADOWED):
        return
    if (shadowed := getattr(step, _SHADOWED)) is None:
        del optimizer.step
    else:
        optimizer.step = shadowed  # type: ignore[method-assign]
