"""One optimizer of a run, instrumented in place: its hooks, and all that stands before its methods."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from gradwatch.amp import ScalerWatch
from gradwatch.frames import outer_of_step
from gradwatch.guard import guard, unguard
from gradwatch.hooks import StepHooks
from gradwatch.kernels import KernelStep
from gradwatch.leaving_out import why_not_untouched
from gradwatch.tape import NullTape
from gradwatch.two_pass import TwoPass
from gradwatch.unseen import Unseen

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.amp import GradScaler
    from torch.optim import Optimizer

    from gradwatch.fronts import Watched
    from gradwatch.notices import Notices
    from gradwatch.part import Part
    from gradwatch.pipeline import Pipeline
    from gradwatch.tape import Tape
    from gradwatch.treatment import OnNonFinite

__all__ = ["Watch"]


class Watch:
    """The optimizer is held weakly: it keeps its agent alive, not the other way round.

    `begin` gives the tape at the first step; `gone` is called when the garbage collector has taken
    the optimizer, in any thread and in the middle of anything.
    """

    def __init__(
        self,
        watched: Watched,
        parts: list[Part],
        notices: Notices,
        pipeline: Pipeline,
        *,
        on_nonfinite: OnNonFinite,
        fold: bool,
        scaler: GradScaler | None,
        begin: Callable[[StepHooks], Tape],
        gone: Callable[[StepHooks], None],
    ) -> None:
        optimizer, outer = watched
        self._optimizer = weakref.ref(optimizer)
        self._begin_tape = begin
        self._report = pipeline.troubles.report
        self.hooks = StepHooks(
            optimizer,
            parts,
            notices,
            on_nonfinite=on_nonfinite,
            fold=fold,
            clock=pipeline.clock,
            start=self._begin,
            report=self._report,
        )
        self.scaler = ScalerWatch.on(scaler, optimizer, self.hooks) if scaler else None
        self.hooks.scaler = self.scaler
        before, after = self.hooks.before, self.hooks.after
        # A class that is only used like an optimizer has no hooks: the guard calls ours.
        has_hooks = hasattr(optimizer, "_optimizer_step_pre_hooks")
        self._handles = (
            (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))
            if has_hooks
            else ()
        )
        # No kernel where a run is to be as torch's own, to the letter.
        guard(optimizer, self.hooks, KernelStep.of(optimizer, before, after) if fold else None)
        self._two_pass = (
            TwoPass.around(outer, self.hooks, self._report) if outer is not None else None
        )
        if on_nonfinite == "skip" and (why := why_not_untouched(optimizer)) is not None:
            self._report("not left out", why)
        self.unseen = Unseen(optimizer, self._report)
        pipeline.await_step(self.unseen)
        # The pipeline ends every run at exit; this one is for an optimizer that goes before.
        self._finalizer = weakref.finalize(optimizer, gone, self.hooks)
        self._finalizer.atexit = False

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, None where it is gone."""
        return self._optimizer()

    def introduce(self) -> list[str]:
        """The names of its parameters for a flight recorder that begins, in its order."""
        optimizer = self._optimizer()
        return [] if optimizer is None else self.hooks.notices.introduce(optimizer)

    def settle(self) -> None:
        """Put on record the last steps, where their numbers are on a device still."""
        self.hooks.settle(self._optimizer())

    def clip(self) -> Tensor | None:
        """Clip its gradients now, in place; their norm before, None where the optimizer is gone."""
        optimizer = self._optimizer()
        if optimizer is None:
            return None
        if self.scaler is not None:
            self.scaler.unscale(optimizer)
        return self.hooks.clip(optimizer)

    def off(self) -> None:
        """Take everything off the optimizer."""
        self._finalizer.detach()
        if self._two_pass is not None:
            self._two_pass.off()
        for handle in self._handles:
            handle.remove()
        if (optimizer := self._optimizer()) is not None:
            unguard(optimizer)
            self.hooks.new_attempt(optimizer, NullTape())
            if self.scaler is not None:
                self.scaler.off(optimizer)

    def _begin(self, optimizer: Optimizer) -> Tape:
        self.unseen.seen()
        if self._two_pass is None and (outer := outer_of_step(optimizer)) is not None:
            ours, theirs = type(optimizer).__name__, type(outer).__name__
            self._report(
                "outer",
                f"step() of the wrapped {ours} is called by the step() of {theirs}: what {theirs} does "
                "to the gradient before it is recorded as well, and what it does to the weights is not "
                f"left out where a step is skipped. Wrap the {theirs} instead",
            )
        return self._begin_tape(self.hooks)
