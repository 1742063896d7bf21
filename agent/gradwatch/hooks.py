"""One optimizer step as the hooks see it: look, decide, carry out, record.

All of this runs on the training thread, and none of it raises into the training loop but what was
asked for (`on_nonfinite="raise"`). It is the hot path: what is rare is kept out of line.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Literal

import torch

from gradwatch.errors import ConfigurationError, NonFiniteGradientError, RingError
from gradwatch.events import encode_event
from gradwatch.fallback import clip_plainly
from gradwatch.norms import combine
from gradwatch.part import Part
from gradwatch.recorder import FLAGS
from gradwatch.records import Scale, Skip, StepRecord
from gradwatch.scaling import Carrier

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.clock import Clock
    from gradwatch.notices import Notices
    from gradwatch.records import Event, Measurement
    from gradwatch.tape import Tape

__all__ = ["OnNonFinite", "StepHooks"]

OnNonFinite = Literal["skip", "raise", "ignore"]
_nan = math.nan
_WATCHED = "_gradwatch_watches_it"  # marks a closure that was wrapped already


class _OpenStep:
    """A step between the first look at it and its record."""

    __slots__ = (
        "by_hand",
        "error",
        "flags",
        "loss_scale",
        "measured",
        "messages",
        "post_norm",
        "pre_norm",
        "threshold",
        "time",
    )

    def __init__(self, time: float, threshold: float) -> None:
        self.time = time
        self.threshold = threshold
        self.pre_norm = self.post_norm = self.loss_scale = _nan
        self.flags = 0
        self.measured: list[Measurement] = []  # one a part
        self.messages: list[bytes] = []
        self.error: NonFiniteGradientError | None = None  # to raise once recorded
        self.by_hand: tuple[Tensor, int] | None = None  # a gradient clip() saw, and its version


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
        self.scaler_scale: Callable[[], float] | None = None  # where the loop's scaler is known
        self.step = 0  # number of the coming step
        self.loss: Tensor | float | None = None  # of the coming step
        self.tape: Tape | None = None  # there from the first step on
        self._only = parts[0] if len(parts) == 1 else None
        self._by_group = parts[0].group is not None
        self._wants_loss = any(part.policy.wants_loss for part in parts)
        self._carrier = Carrier(optimizer, fold=fold)
        self._time = clock.time
        self._monotonic = clock.monotonic
        self._start = start
        self._report = report
        self._open: _OpenStep | None = None
        self._nested = 0  # calls of super().step() that are under way inside a step()
        self._last: tuple[Any, ...] | None = None

    # -- the hooks -----------------------------------------------------------------------------

    def before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before `step()`. With a closure the gradient is made inside it: look there."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self._open is not None and _is_within_a_step(optimizer):
            self._nested += 1
            return None
        if closure is not None and hasattr(closure, _WATCHED):
            self._nested += 1
            return None
        self._nested = 0
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
        began, number = self._monotonic(), self.step
        try:
            self._carrier.restore(optimizer)
            if self._open is not None:
                self._record(optimizer, self._open, began)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._failed(error, lost=self.step == number)

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
                return torch.tensor(step.pre_norm)
            step.by_hand = grads[0], grads[0]._version
        return torch.tensor(step.pre_norm, device=step.by_hand[0].device)

    def overflowed(self, optimizer: Optimizer, loss_scale: float) -> None:
        """Record a step that a GradScaler suppressed without calling `step()`."""
        began = self._monotonic()
        try:
            self._ensure_tape(optimizer)
            step = self._open = _OpenStep(self._time(), self.threshold)
            step.loss_scale = loss_scale
            self._note_overflow(step)
            self._record(optimizer, step, began)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._failed(error)

    # -- what others may see -------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """The threshold in force, NaN where there is no single one."""
        return self._only.threshold if self._only is not None else _nan

    @property
    def folds(self) -> bool:
        """Whether clipping happens inside the optimizer's kernel."""
        return self._carrier.folds

    @property
    def last(self) -> StepRecord | None:
        """The last step's record; None before the first."""
        if self._last is None:
            return None
        step, time, _, *numbers, flags = self._last
        bits = (FLAGS.CLIPPED, FLAGS.NONFINITE, FLAGS.NONFINITE_LOSS, FLAGS.SKIPPED)
        return StepRecord(step, time, *numbers, *(bool(flags & bit) for bit in bits))

    def new_attempt(self, optimizer: Optimizer, tape: Tape | None = None) -> None:
        """The coming step begins a new attempt: on this tape, or one that it asks for."""
        self._open = None
        self._carrier.abandon(optimizer)
        self.tape = tape

    # -- entering a step -----------------------------------------------------------------------

    def _enter(self, optimizer: Optimizer) -> None:
        step = self._open
        if step is None or step.by_hand is None or not _still_there(optimizer, *step.by_hand):
            self._look_and_act(optimizer, by_hand=False)
        else:
            self._take_over(optimizer, step)
        step = self._open
        if step is not None and step.error is not None:
            error = step.error
            self.after(optimizer, (), {})
            raise error

    def _take_over(self, optimizer: Optimizer, step: _OpenStep) -> None:
        """`clip()` has looked and clipped. What is left: an overflow, or a step to skip."""
        try:
            step.by_hand = None
            amp = self._carrier.loss_scale(optimizer)
            if amp.in_memory != 1.0:
                # clip() was called before unscale_: what it saw was this much greater.
                step.loss_scale = amp.in_memory
                step.pre_norm /= amp.in_memory
                step.post_norm /= amp.in_memory
            if amp.suppressed:
                step.error = None
                self._note_overflow(step)
            if step.flags & FLAGS.SKIPPED:
                self._skip(step)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._failed(error)

    def _watch(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with a look and a clip after its backward pass."""
        evaluated = False

        def watched() -> Any:
            nonlocal evaluated
            loss = closure()
            if evaluated:
                # LBFGS asks several times a step: every gradient is clipped, the first recorded.
                self._clip_again(optimizer)
            else:
                evaluated = True
                if self.loss is None:
                    self.loss = _scalar(loss)
                self._enter(optimizer)
            return loss

        setattr(watched, _WATCHED, True)
        return watched

    def _clip_again(self, optimizer: Optimizer) -> None:
        try:
            for part in self.parts:
                measured = part.measure(optimizer, 1.0)
                if measured.finite:
                    decision = part.policy.decide(measured, part.state)
                    self._carrier.carry_out(optimizer, decision, measured, fold=False)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._failed(error, lost=False)

    # -- look, decide, carry out ---------------------------------------------------------------

    def _look_and_act(self, optimizer: Optimizer, *, by_hand: bool) -> None:
        began = self._monotonic()
        step = None
        try:
            if self._open is not None or self._carrier.busy:
                self._open = None
                self._carrier.abandon(optimizer)
            if self._by_group and len(optimizer.param_groups) > len(self.parts):
                self._take_in_new_groups(optimizer)
            tape = self.tape or self._first(optimizer)
            step = _OpenStep(self._time(), self.threshold)
            amp = self._carrier.loss_scale(optimizer)
            if amp.in_memory != 1.0:
                step.loss_scale = amp.in_memory
            elif self.scaler_scale is not None:
                step.loss_scale = self.scaler_scale()
            if amp.suppressed:
                for part in self.parts:
                    self._carrier.skip(*part.gradients(optimizer))
                self._note_overflow(step)
            else:
                self._look(optimizer, step, amp.in_memory)
                self._act(optimizer, step, by_hand=by_hand)
            self._open = step
            tape.overhead += self._monotonic() - began
        except ConfigurationError:  # at the first step: a wrong argument that shows only now
            raise
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._failed(error, lost=not by_hand)
            if step is None or not step.flags & (FLAGS.CLIPPED | FLAGS.SKIPPED):
                self._clip_plainly(optimizer)

    def _take_in_new_groups(self, optimizer: Optimizer) -> None:
        """Groups that were added since the wrap: each gets the last policy, for itself."""
        last = self.parts[-1].policy
        for group in range(len(self.parts), len(optimizer.param_groups)):
            self.parts.append(Part(last, group))
        self._only = None
        self._report(
            "groups", f"a parameter group was added; it is clipped as the last one, by {last}"
        )

    def _first(self, optimizer: Optimizer) -> Tape:
        """Begin a tape; before it, refuse a policy that cannot clip what gradients there are."""
        for part in self.parts:
            part.refuse_sparse(optimizer)
        return self._ensure_tape(optimizer)

    def _look(self, optimizer: Optimizer, step: _OpenStep, scale: float) -> None:
        """Measure every part; `pre_norm` is the norm of all together."""
        if self._only is not None:
            measured = self._only.measure(optimizer, scale)
            step.measured.append(measured)
            step.pre_norm = measured.norm
        else:
            step.measured = [part.measure(optimizer, scale) for part in self.parts]
            norms = [measured.norm for measured in step.measured]
            step.pre_norm = combine(norms, step.measured[0].norm_type)
        if self._wants_loss and self.loss is not None:
            loss = float(self.loss)
            step.measured = [measured._replace(loss=loss) for measured in step.measured]
        grads = step.measured[0].grads
        try:
            if grads and grads[0]._version > 0 and grads[-1]._version > 0:
                step.flags |= FLAGS.MODIFIED
        except RuntimeError:  # made in inference mode: nobody counts
            pass

    def _act(self, optimizer: Optimizer, step: _OpenStep, *, by_hand: bool) -> None:
        """Decide and carry out, or deal with a non-finite gradient; note what is worth noting."""
        if math.isfinite(step.pre_norm):
            event = self.notices.gradient(self.step, step.time, step.pre_norm, step.measured)
            self._clip(optimizer, step, by_hand=by_hand)
        else:
            event = self._nonfinite(optimizer, step, by_hand=by_hand)
        if event is not None:
            step.messages.append(encode_event(event))
        if event is not None or self.notices.samples(self.step, step.measured):
            step.messages += self.notices.layers(self.step, step.measured, optimizer)

    def _clip(self, optimizer: Optimizer, step: _OpenStep, *, by_hand: bool) -> None:
        decisions = [
            part.policy.decide(measured, part.state)
            for part, measured in zip(self.parts, step.measured)  # noqa: B905 - made as long
        ]
        for decision in decisions:
            if isinstance(decision, Skip):
                step.flags |= FLAGS.SKIPPED
                event = self.notices.skipped(self.step, step.time, decision)
                step.messages.append(encode_event(event))
                if not by_hand:
                    self._skip(step)
                return
        fold = False
        if self._only is not None:
            fold = not by_hand
            if type(decision) is Scale:  # a threshold that takes the norm itself into account
                step.threshold = decision.max_norm
        norms = []
        for decision, measured in zip(decisions, step.measured):  # noqa: B905
            clipped, norm = self._carrier.carry_out(optimizer, decision, measured, fold=fold)
            norms.append(norm)
            if clipped:
                step.flags |= FLAGS.CLIPPED
        step.post_norm = norms[0] if len(norms) == 1 else combine(norms, measured.norm_type)

    def _nonfinite(self, optimizer: Optimizer, step: _OpenStep, *, by_hand: bool) -> Event:
        faults = self.notices.faults(step.measured, optimizer)
        skipped = self.on_nonfinite != "ignore"
        step.flags |= FLAGS.NONFINITE
        event = self.notices.nonfinite(self.step, step.time, faults, step.measured, skipped=skipped)
        if skipped:
            step.flags |= FLAGS.SKIPPED
            if not by_hand:
                self._skip(step)
        if self.on_nonfinite == "raise":
            step.error = NonFiniteGradientError(
                f"step {self.step}: {event.message}", step=self.step, parameters=faults
            )
        return event

    def _skip(self, step: _OpenStep) -> None:
        for measured in step.measured:
            self._carrier.skip(measured.params, measured.grads)

    def _note_overflow(self, step: _OpenStep) -> None:
        """Routine under a GradScaler: not a non-finite gradient, and no alert."""
        step.pre_norm = step.post_norm = _nan
        step.flags = FLAGS.SKIPPED | FLAGS.AMP_OVERFLOW
        event = self.notices.overflow(self.step, step.time, step.loss_scale)
        step.messages = [encode_event(event)]

    # -- recording -----------------------------------------------------------------------------

    def _ensure_tape(self, optimizer: Optimizer) -> Tape:
        if self.tape is None:
            self.tape = self._start(optimizer)
        return self.tape

    def _record(self, optimizer: Optimizer, step: _OpenStep, began: float) -> None:
        self._open = None
        tape = self.tape or self._ensure_tape(optimizer)
        loss, known, self.loss = _nan, self.loss, None
        if known is not None:
            loss = known = float(known)
            self._note_loss(step, loss)
        number, pre = self.step, step.pre_norm
        lr = optimizer.param_groups[0].get("lr")
        record = (
            number,
            step.time,
            self._monotonic(),
            loss,
            lr if type(lr) is float else _number(lr),
            pre,
            step.post_norm,
            step.threshold,
            step.loss_scale,
            step.flags,
        )
        tape.ring.append(*record)
        self._last = record
        self.step = number + 1
        if math.isfinite(pre):
            for part, measured in zip(self.parts, step.measured, strict=True):
                part.state = part.policy.update(part.state, measured.norm, known)
        for message in step.messages:
            try:
                tape.ring.append_event(message)
            except RingError as error:
                self._report("event", f"an event is not on record: {error}")
        tape.overhead += self._monotonic() - began

    def _note_loss(self, step: _OpenStep, loss: float) -> None:
        event = self.notices.loss(self.step, step.time, loss)
        if event is not None:
            step.messages.append(encode_event(event))
        if not math.isfinite(loss):
            step.flags |= FLAGS.NONFINITE_LOSS

    # -- when something here fails -------------------------------------------------------------

    def _failed(self, error: Exception, *, lost: bool = True) -> None:
        """Say so once, count the record that is lost, and let the training go on."""
        self._open = None
        if lost:
            self.step += 1
            if self.tape is not None:
                self.tape.lose("error")
        self._report("hooks", f"a step could not be recorded ({type(error).__name__}: {error})")

    def _clip_plainly(self, optimizer: Optimizer) -> None:
        """Clip with torch's own functions, where ours failed before they changed anything."""
        try:
            skip = self.on_nonfinite != "ignore"
            undone = clip_plainly(optimizer, self.parts, self._carrier, skip=skip)
        except Exception as error:  # noqa: BLE001 - the border with the training loop
            self._report("clip", f"a step went unclipped ({type(error).__name__}: {error})")
        else:
            if undone:
                self._report("clip", f"a step went unclipped by {', '.join(undone)}")


def _still_there(optimizer: Optimizer, grad: Tensor, version: int) -> bool:
    """Whether this gradient is still the one that `clip()` saw."""
    return grad._version == version and any(
        p.grad is grad for group in optimizer.param_groups for p in group["params"]
    )


def _is_within_a_step(optimizer: Optimizer) -> bool:
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


def _scalar(loss: Any) -> Tensor | float | None:
    """What a closure returned, if that is one number."""
    if isinstance(loss, torch.Tensor):
        return loss.detach() if loss.numel() == 1 and not loss.is_complex() else None
    return float(loss) if isinstance(loss, (int, float)) else None


def _number(value: Any) -> float:
    """A number, or NaN for what is none (an optimizer that finds its own learning rate)."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return _nan


def _leave_to_python(*functions: Any) -> None:
    """Keep torch.compile from tracing into these, and into what they call.

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
        return


_leave_to_python(
    StepHooks.before, StepHooks.after, StepHooks._enter, StepHooks._clip_again, StepHooks.clip
)
