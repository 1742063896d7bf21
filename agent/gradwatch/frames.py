"""What Python's frames tell of a step: who asked for it, and what no compiler is to trace.

The first two are for a step's pre-hook to call: they count frames from there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.fronts import steps_another

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["is_within_a_step", "leave_to_python", "only_makes_state", "outer_of_step"]


def is_within_a_step(optimizer: Optimizer) -> bool:
    """Whether the `step()` that a hook was called from runs inside another one of this optimizer.

    A subclass whose `step` calls `super().step()` may run the hooks at both. Called only where a
    step is open: that, or an exception that left it so.
    """
    frame = sys._getframe(2)
    wrapper = frame.f_code
    outer = frame.f_back
    while outer is not None:
        if outer.f_code is wrapper and (outer.f_locals.get("args") or (None,))[0] is optimizer:
            return True
        outer = outer.f_back
    return False


def only_makes_state() -> bool:
    """Whether this is torch.distributed.checkpoint asking an optimizer without state for some.

    It takes a step with gradients of 0 and a learning rate of 0, which is none of the job's.
    """
    frame = sys._getframe(2).f_back
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False


def outer_of_step(optimizer: Optimizer) -> Any:
    """The optimizer whose own `step` calls this one's, None where the loop calls it (or a front)."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        outer = frame.f_locals.get("self") if frame.f_code.co_name.endswith("step") else None
        if outer is not None and outer is not optimizer and steps_another(outer, optimizer):
            return outer
        frame = frame.f_back
    return None


def leave_to_python(*functions: Any) -> bool:
    """Keep torch.compile from tracing into these, and into what they call; False where it would.

    What `torch.compiler.disable` does, without importing the compiler or costing anything a call.
    A compiled `optimizer.step` calls the hooks as they are, and stays compiled itself.
    """
    dynamo = torch._C._dynamo.eval_frame
    try:
        action = dynamo._FrameAction.SKIP
        strategy = dynamo._FrameExecStrategy(action, action)
        for function in functions:
            function._torchdynamo_disable = True
            dynamo.set_code_exec_strategy(function.__code__, strategy)
    except AttributeError:  # an older torch: a compiled step is traced through, and not recorded
        return False
    return True
