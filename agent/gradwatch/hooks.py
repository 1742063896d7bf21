"""The step hooks of one optimizer: entering a step, leaving it with a record, surviving errors.

All of this runs on the training thread, and none of it raises into the training loop but what was
asked for (`on_nonfinite="raise"`). What is done to the gradient in between is in `treatment`.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.amp import handed_over
from gradwatch.deferred import IN_FLIGHT, Deferred, on_a_device
from gradwatch.errors import ConfigurationError
from gradwatch.events import encode_event
from gradwatch.fallback import clip_plainly
from gradwatch.frames import is_within_a_step, leave_to_python, only_makes_state
from gradwatch.leaving_out import Rewind, StepLeftOut, may_be_left_out
from gradwatch.recorder import FLAGS
from gradwatch.scaling import NO_SCALER, Carrier, LossScale
from gradwatch.step_log import StepLog
from gradwatch.treatment import OnNonFinite, OpenStep, Treatment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.amp import ScalerWatch
    from gradwatch.clock import Clock
    from gradwatch.notices import Notices
    from gradwatch.part import Part
    from gradwatch.policies import Policy
    from gradwatch.records import StepRecord
    from gradwatch.tape import Tape

__all__ = ["StepHooks"]

_nan = math.nan
_WATCHED = "_gradwatch_watches_it"  # marks a closure that was wrapped already


class StepHooks:
    """The pre- and post-step hooks of one optimizer, and what they remember between steps."""

    def __init__(
        self,
        optimizer: Optimizer,
        parts: list[Part],
        notices: Notices,
        *,
        on_nonfinite: OnNonFinite,
        fold: bool,
        clock: Clock,
        start: Callable[[Optimizer], Tape],
        report: Callable[[str, str], None],
    ) -> None:
        self.parts = parts
        self.notices = notices
        self.on_nonfinite = on_nonfinite
        self.tape: Tape | None = None  # there from the first step on
        self.scaler: ScalerWatch | None = None  # where the loop's scaler is known
        self.step = 0  # number of the coming step
        self.loss: Tensor | float | None = None  # of the coming step
        may_leave_out = may_be_left_out(optimizer)
        self._carrier = Carrier(
            optimizer, fold=fold, leaves_out=lambda: may_leave_out and self.in_guard > 0
        )
        self._treat = Treatment(parts, self._carrier, notices, on_nonfinite=on_nonfinite)
        self._log = StepLog(self._treat, report)
        self._deferred = Deferred(parts[0], self._carrier, self._treat)
        self._time = clock.time
        self._monotonic = clock.monotonic
        self._start = start
        self._report = report
        self._open: OpenStep | None = None
        self._nested = 0  # steps under way that are not to be looked at: super().step() inside one
        self._untaught: deque[OpenStep] = deque()  # deferred steps that are on record
        self._may_defer = False  # the gradients are on a device; seen at the first step
        # Of the call of `step()` through the guard: 0 none is under way, 1 one is, 2 `before` has
        # been called in it. The guard sets it.
        self.in_guard = 0
        self._given_scaler: Any = None  # what `step(grad_scaler=…)` was called with
        self.left_out = 0  # steps that were left out; never reset
        self._rewind = Rewind(optimizer, report)
        self._has_closure = False  # the step under way has one

    # -- the hooks -----------------------------------------------------------------------------

    def before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before `step()`. With a closure the gradient is made inside it: look there."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self.in_guard == 2 or (self._open is not None and is_within_a_step(optimizer)):
            self._nested += 1
            return None
        if closure is not None and hasattr(closure, _WATCHED):
            self._nested += 1
            return None
        self._nested = 0
        if self.in_guard:
            self.in_guard = 2
        self._given_scaler = kwargs.get("grad_scaler") if kwargs else None
        if closure is None and "closure" in kwargs and only_makes_state():
            self._nested += 1
            return None
        if not callable(closure):
            self._enter(optimizer)
            return None
        watched = self._watch(optimizer, closure)
        if len(args) > 1:
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        """After `step()`: put back what was set for it, and record."""
        if self._nested:
            self._nested -= 1
            return
        began, step = self._monotonic(), self._open
        try:
            self._carrier.restore(optimizer)
            if step is not None:
                self._close(optimizer, step, began)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            if step is not None:
                self.step = step.number + 1
            self._failed(error, lost=step is not None and not step.recorded)

    def after_left_out(self, optimizer: Optimizer) -> None:
        """Instead of `after`, where the optimizer's `step()` was not called, or left at once."""
        self._nested = 0
        self.left_out += 1
        self.after(optimizer, (), {})

    def broken_off(self, optimizer: Optimizer) -> None:
        """`step()` was left by an exception: gradients and optimizer as they were before it.

        Such a step is not on record; the next one has its number.
        """
        self._nested = 0
        if self._open is not None and self._open.by_hand is None:  # else clip() is still to count
            self._open = None
        self._carrier.restore(optimizer, broken_off=True)

    def clip(self, optimizer: Optimizer) -> Tensor:
        """Look and clip now, in place; the coming step's hook does neither again."""
        step = self._open
        if step is None or step.by_hand is None or not _still_there(optimizer, *step.by_hand):
            self._look_and_act(optimizer, by_hand=True)
            step = self._open
            if step is None:
                return torch.tensor(_nan)
            grads = [g for m in step.measured for g in m.grads]
            if not grads:
                return torch.tensor(0.0)  # what `clip_grad_norm_` returns then
            step.by_hand = grads[0], grads[0]._version
        return torch.tensor(step.pre_norm, device=step.by_hand[0].device)

    def overflowed(self, optimizer: Optimizer, loss_scale: float) -> None:
        """Record a step that a GradScaler suppressed without calling `step()`."""
        began, number = self._monotonic(), self.step
        try:
            self._ensure_tape(optimizer)
            self.settle(optimizer)
            step = OpenStep(number, self._time(), self.threshold)
            step.loss_scale = loss_scale
            self._treat.overflow(step)
            self._close(optimizer, step, began)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self.step = number + 1
            self._failed(error)

    # -- what others may see -------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """The threshold in force, NaN where there is no single one."""
        return self._treat.threshold

    @property
    def folds(self) -> bool:
        """Whether clipping happens inside the optimizer's kernel."""
        return self._carrier.folds

    @property
    def last(self) -> StepRecord | None:
        """The last record there is; None before the first."""
        return self._log.last

    def settle(self, optimizer: Optimizer | None) -> None:
        """Put on record what is still on the device; waits for it."""
        try:
            self._deferred.settle(self._write, optimizer, all_of_them=True)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._failed(error)

    def forked(self, tape: Tape) -> None:
        """In a forked child: record here from now on, and touch nothing of the parent's."""
        self._deferred.forget()
        self.tape = tape

    def load(self, policies: Sequence[tuple[Policy[Any], Any]]) -> None:
        """Go on by these policies, one a part, each with what it has learnt."""
        for part, (policy, state) in zip(self.parts, policies, strict=True):
            part.policy, part.state = policy, state
        self._treat.look_at_policies()

    def new_attempt(self, optimizer: Optimizer, tape: Tape | None = None) -> None:
        """The coming step begins a new attempt: on this tape, or one that it asks for."""
        self.settle(optimizer)
        self._untaught.clear()
        self._open = None
        self._carrier.abandon(optimizer)
        self._treat.look_anew()
        self.tape = tape

    # -- entering a step -----------------------------------------------------------------------

    def _enter(self, optimizer: Optimizer) -> None:
        step = self._open
        if step is None or step.by_hand is None or not _still_there(optimizer, *step.by_hand):
            self._look_and_act(optimizer, by_hand=False)
        else:
            self._take_over(optimizer, step)
        step = self._open
        self._raise(optimizer, step)

    def _raise(self, optimizer: Optimizer, step: OpenStep | None, result: Any = None) -> None:
        """Leave `step()` at once: by the error that was asked for, or so that it is left out."""
        if step is not None and step.error is not None:
            error = step.error
            self.after(optimizer, (), {})
            raise error
        if self._carrier.left_out:
            raise StepLeftOut(result)

    def _take_over(self, optimizer: Optimizer, step: OpenStep) -> None:
        """`clip()` has looked and clipped. What is left: an overflow, or a step to skip."""
        try:
            step.by_hand = None
            amp = self._loss_scale(optimizer)
            if amp.in_memory != 1.0:
                # clip() was called before unscale_: what it saw was this much greater.
                step.loss_scale = amp.in_memory
                step.pre_norm /= amp.in_memory
                step.post_norm /= amp.in_memory
            no_scale = amp.scale == 0.0 or (self.scaler is not None and self.scaler.scale() == 0.0)
            own_overflow = amp.own and amp.in_memory != 1.0 and not math.isfinite(step.pre_norm)
            if amp.suppressed or own_overflow or no_scale:
                step.error = None
                self._treat.overflow(step)
            self._treat.warn(step)
            own_skip = amp.own and step.flags & FLAGS.AMP_OVERFLOW and not no_scale
            if step.flags & FLAGS.SKIPPED and not own_skip:
                self._treat.skip(step)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self.step += 1
            self._failed(error)

    def _watch(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with a look and a clip after its backward pass."""
        evaluated = False
        may_skip = self._treat.may_skip and self.in_guard > 0
        if may_skip:
            self._has_closure = True
            self._rewind.begin(optimizer)

        def watched() -> Any:
            nonlocal evaluated
            loss = closure()
            try:
                if evaluated:
                    # LBFGS asks several times a step: each gradient is clipped, the first recorded.
                    self._look_again(optimizer)
                else:
                    evaluated = True
                    if self.loss is None:
                        self.loss = _scalar(loss)
                    self._enter(optimizer)
            except StepLeftOut as left:
                left.result = loss
                self._rewind.undo(optimizer)
                raise
            if may_skip:
                self._rewind.evaluated(optimizer)
            return loss

        setattr(watched, _WATCHED, True)
        return watched

    def _look_again(self, optimizer: Optimizer) -> None:
        """A further evaluation of the closure in one step."""
        step = self._open
        try:
            self._treat.look_again(optimizer, step)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._failed(error, lost=False)
            return
        self._raise(optimizer, step)

    def _look_and_act(self, optimizer: Optimizer, *, by_hand: bool) -> None:
        began = self._monotonic()
        step = None
        try:
            if self._open is not None or self._carrier.busy:
                self._open = None
                self._carrier.abandon(optimizer)
            treat = self._treat
            if treat.by_group and (new := treat.new_groups(optimizer)) is not None:
                self._report("groups", f"a parameter group was added: clipped by {new.policy}")
            tape = self.tape or self._first(optimizer)
            if self._may_defer:
                self._teach(self.step - IN_FLIGHT)
            step = self._begin(optimizer, tape)
            if not (self._may_defer and self._defer(optimizer, step, by_hand=by_hand)):
                self._treat_from_here(optimizer, step, by_hand=by_hand)
            self._open = step
            tape.overhead += self._monotonic() - began
        except Exception as error:
            if isinstance(error, ConfigurationError) and self.tape is None:
                raise  # at the first step: a wrong argument that shows only now
            self.step += not by_hand
            self._failed(error, lost=not by_hand)
            if step is None or not step.flags & (FLAGS.CLIPPED | FLAGS.SKIPPED):
                skip = self.on_nonfinite != "ignore"
                clip_plainly(optimizer, self.parts, self._carrier, self._report, skip=skip)

    def _begin(self, optimizer: Optimizer, tape: Tape) -> OpenStep:
        """The coming step, under the threshold that somebody has applied since the last."""
        number, time = self.step, self._time()
        if tape.control is None or (change := tape.control.due(number)) is None:
            return OpenStep(number, time, self._treat.threshold)
        self.settle(optimizer)  # what is to be learnt from it belongs to the policy before
        self._teach(number)
        try:
            event = self._treat.change(number, time, change)
            tape.ring.append_event(encode_event(event))  # whatever comes of this step
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            tape.control.refuse(change, f"it failed ({error!r})")
        return OpenStep(number, time, self._treat.threshold)

    def _defer(self, optimizer: Optimizer, step: OpenStep, *, by_hand: bool) -> bool:
        """Leave the step to the device, where that can be done."""
        if not by_hand:
            scale = self.scaler.scale_on_device if self.scaler is not None else None
            step.deferred = self._deferred.begin(optimizer, step, self.loss, scale)
        if not step.deferred:
            self.settle(optimizer)  # records keep their order
            self._teach(step.number)
        return step.deferred

    def _treat_from_here(self, optimizer: Optimizer, step: OpenStep, *, by_hand: bool) -> None:
        """Measure and clip; what a GradScaler found to overflow is left out."""
        amp = self._loss_scale(optimizer)
        if amp is not NO_SCALER and not math.isnan(amp.scale):
            step.loss_scale = amp.scale
        elif self.scaler is not None:
            step.loss_scale = self.scaler.scale()
        # Unscaled by a scale that has fallen to 0, every gradient is NaN.
        no_scale = step.loss_scale == 0.0
        if amp.suppressed or no_scale:
            if not amp.own or no_scale:
                for part in self.parts:
                    self._carrier.skip(*part.gradients(optimizer))
            self._treat.overflow(step)
            return
        self._treat.look(optimizer, step, amp.in_memory, self.loss)
        if amp.own and amp.in_memory != 1.0 and not math.isfinite(step.pre_norm):
            self._treat.overflow(step)  # the optimizer finds it as well, and skips
            return
        self._treat.act(optimizer, step, by_hand=by_hand)

    def _loss_scale(self, optimizer: Optimizer) -> LossScale:
        """What a GradScaler left for this step, on the optimizer or by handing itself over."""
        if self._given_scaler is not None:
            return handed_over(self._given_scaler, optimizer)
        return self._carrier.loss_scale(optimizer)

    def _first(self, optimizer: Optimizer) -> Tape:
        """Begin a tape; before it, refuse a policy that cannot clip what gradients there are."""
        for part in self.parts:
            part.refuse_sparse(optimizer)
        self._may_defer = not self._treat.by_group and on_a_device(optimizer)
        return self._ensure_tape(optimizer)

    # -- recording -----------------------------------------------------------------------------

    def _ensure_tape(self, optimizer: Optimizer) -> Tape:
        if self.tape is None:
            self.tape = self._start(optimizer)
        return self.tape

    def _close(self, optimizer: Optimizer, step: OpenStep, began: float) -> None:
        """The step is over: on record, or as soon as its numbers are here."""
        self._open = None
        if self._has_closure:
            self._has_closure = False
            self._rewind.end()
        self.step = step.number + 1
        tape = self.tape or self._ensure_tape(optimizer)
        step.ended = began
        if self._may_defer:
            if step.deferred:
                self._deferred.keep()
            self._deferred.settle(self._write, optimizer)
            self._deferred.warm = self._deferred.warm or not step.flags & FLAGS.SKIPPED
        if not step.deferred:
            step.loss = self.loss
            step.lr = optimizer.param_groups[0].get("lr")
            self._log.write(tape, step)
            if step.measured:
                self._treat.afterwards.keep(step.measured[0].params, step.measured[0].grads)
        self.loss = None
        tape.overhead += self._monotonic() - began

    def _write(self, step: OpenStep) -> None:
        if self.tape is not None:
            self._log.write(self.tape, step)
            # What is kept of it keeps no parameter alive.
            step.measured = [m._replace(params=(), tensor_norms=()) for m in step.measured]
            self._untaught.append(step)

    def _teach(self, before: int) -> None:
        """Let the policies learn from deferred steps before this number.

        At a fixed distance, not as they arrive: all ranks, and a second run, learn alike.
        """
        while self._untaught and self._untaught[0].number < before:
            step = self._untaught.popleft()
            self._treat.learn(step, step.known_loss)

    # -- when something here fails -------------------------------------------------------------

    def _failed(self, error: Exception, *, lost: bool = True) -> None:
        """Say so once, count the record that is lost, and let the training go on."""
        self._open = None
        if lost and self.tape is not None:
            self.tape.lose("error")
        self._report("hooks", f"a step could not be recorded ({type(error).__name__}: {error})")


def _still_there(optimizer: Optimizer, grad: Tensor, version: int) -> bool:
    """Whether this gradient is still the one that `clip()` saw."""
    return grad._version == version and any(
        p.grad is grad for group in optimizer.param_groups for p in group["params"]
    )


def _scalar(loss: Any) -> Tensor | float | None:
    """What a closure returned, if that is one number."""
    if isinstance(loss, torch.Tensor):
        return loss.detach() if loss.numel() == 1 and not loss.is_complex() else None
    return float(loss) if isinstance(loss, (int, float)) else None


leave_to_python(
    StepHooks.before, StepHooks.after, StepHooks._enter, StepHooks.clip, StepHooks._look_again
)
