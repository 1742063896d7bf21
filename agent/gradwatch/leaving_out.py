"""Leaving a step out: how the optimizer's `step()` is not called, or undone where it is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradwatch.snapshot import Snapshot, size_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

__all__ = ["Rewind", "StepLeftOut", "may_be_left_out", "why_not_untouched"]

LEARNING_STEPS = 2
LEARNING_BYTES = 256 * 2**20  # no copy of more than this is made to find out how an optimizer steps


class StepLeftOut(BaseException):
    """Raised in a step's pre-hook, or in its closure, and caught by the guard around `step()`.

    Not an `Exception`, so that no `except Exception` of an optimizer holds it up.
    """

    def __init__(self, result: Any = None) -> None:
        super().__init__()
        self.result = result  # of the closure: what `step()` returns


def may_be_left_out(optimizer: Any) -> bool:
    """Whether `step()` may go uncalled: not where it talks to other ranks, which wait for this one."""
    return not type(optimizer).__module__.startswith("torch.distributed")


def why_not_untouched(optimizer: Any) -> str | None:
    """Why a step that is taken without gradients may change something after all; None: it does not."""
    inner = getattr(optimizer, "_optim_constructor", None)
    if may_be_left_out(optimizer) or inner is None or inner.__module__.startswith("torch.optim"):
        return None
    name = type(optimizer).__name__
    return (
        f"{name} communicates within step(), so a step with NaN or inf is not left out: it is taken "
        f"without gradients, in which {inner.__name__} may still apply weight decay or momentum or "
        'advance counters; use an optimizer of torch.optim inside it, or on_nonfinite="raise"'
    )


class Rewind:
    """Puts an optimizer back that had changed when the gradient in its closure became known.

    Most optimizers evaluate the closure first, and change nothing before: `step()` is just left
    then. torch's own are known to do so. Any other is looked at during its first two steps with a
    closure; where it turns out to change weights or state before an evaluation (schedule-free
    optimizers, BSAM), a copy is made at the beginning of each step. `report` is told where a step
    could not be undone.
    """

    def __init__(self, optimizer: Any, report: Callable[[str, str], None]) -> None:
        self._known = type(optimizer).__module__.startswith("torch.optim")
        self._changes_before = False
        self._looks = 0 if self._known else LEARNING_STEPS
        self._report = report
        self._snapshot: Snapshot | None = None
        self._versions: list[int] = []

    def begin(self, optimizer: Optimizer) -> None:
        """A step with a closure begins."""
        if self._known:
            return
        self._snapshot = None
        self._versions = _versions(optimizer)
        learns = self._looks > 0 and size_of(optimizer) <= LEARNING_BYTES
        if not (self._changes_before or learns):
            return
        try:
            self._snapshot = Snapshot(optimizer)
        except (RuntimeError, MemoryError) as error:  # no memory left on the device, or here
            self._report(
                "snapshot",
                f"{type(optimizer).__name__} changes its weights before it evaluates the closure, "
                f"and there is no memory for a copy of them ({error}): a step with NaN or inf in its "
                'gradient cannot be skipped; use on_nonfinite="raise" or "ignore"',
            )

    def evaluated(self, optimizer: Optimizer) -> None:
        """The closure was evaluated, and its gradient is good: learn how this optimizer steps."""
        if self._known or self._changes_before:
            return
        if self._snapshot is not None and self._looks < LEARNING_STEPS:
            self._changes_before = self._snapshot.differs()
        else:  # state may be made before the first evaluation of all; weights may not move
            self._changes_before = self._versions != _versions(optimizer)

    def end(self) -> None:
        """The step is over."""
        self._snapshot = None
        self._looks = max(0, self._looks - 1)

    def undo(self, optimizer: Optimizer) -> None:
        """The step under way is left: put back what it has changed."""
        if self._known:
            return
        if self._snapshot is not None:
            if self._snapshot.differs():
                self._changes_before = True
                self._snapshot.restore()
        elif self._versions != _versions(optimizer):
            self._changes_before = True
            self._report(
                "undo",
                f"a step with NaN or inf in its gradient could not be skipped: "
                f"{type(optimizer).__name__} had changed its weights before it evaluated the closure; "
                "from the next step on they are copied first. Go back to your last checkpoint",
            )
        self._snapshot = None


def _versions(optimizer: Optimizer) -> list[int]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        return [p._version for p in params]
    except RuntimeError:  # made in inference mode: nobody counts
        return [0] * len(params)
