"""The way out of a step that raises: no hook of torch's is called there.

A kernel fails, another hook raises, somebody presses Ctrl-C: what was set for the step must not
outlive it. So `step` is shadowed on the one optimizer, as learning-rate schedulers do it.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

__all__ = ["guard", "unguard"]

_SHADOWED = "_gradwatch_shadows"  # on our `step`: what stood there before


def guard(optimizer: Optimizer, broken_off: Callable[[Optimizer], None]) -> None:
    """Call `broken_off` wherever this optimizer's `step()` is left by an exception."""
    shadowed = vars(optimizer).get("step")
    # Weakly, as the schedulers' does: an optimizer in a cycle is freed late, with all its state.
    reference = weakref.ref(optimizer)

    def guarded(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            if shadowed is None:
                return type(optimizer).step(optimizer, *args, **kwargs)
            return shadowed(*args, **kwargs)
        except BaseException:
            broken_off(optimizer)
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
