"""Finished steps, written to the flight recorder: one record each, and what is told beside it."""

from __future__ import annotations

import math
from math import isfinite
from typing import TYPE_CHECKING, Any

from gradwatch.errors import RingError
from gradwatch.events import encode_event
from gradwatch.recorder import FLAGS
from gradwatch.records import StepRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.tape import Tape
    from gradwatch.treatment import OpenStep, Treatment

__all__ = ["StepLog", "number"]

_nan = math.nan


class StepLog:
    """Writes steps in their order, on the training thread."""

    def __init__(self, treat: Treatment, report: Callable[[str, str], None]) -> None:
        self._treat = treat
        self._report = report
        self._last: tuple[Any, ...] | None = None

    @property
    def last(self) -> StepRecord | None:
        """The last step's record; None before the first."""
        if self._last is None:
            return None
        step, time, _, *numbers, flags = self._last
        bits = (FLAGS.CLIPPED, FLAGS.NONFINITE, FLAGS.NONFINITE_LOSS, FLAGS.SKIPPED)
        return StepRecord(step, time, *numbers, *(bool(flags & bit) for bit in bits))

    def write(self, tape: Tape, step: OpenStep) -> None:
        """Record a step of which everything is known, and let the policies learn from it."""
        loss = known = step.loss
        if known is None:
            loss = _nan
        else:
            loss = known = float(known)
            event = self._treat.notices.loss(step.number, step.time, loss)
            if event is not None:
                step.messages = [*step.messages, encode_event(event)]
                if event.kind == "loss_spike":
                    step.flags |= FLAGS.LOSS_SPIKE
            if not isfinite(loss):
                step.flags |= FLAGS.NONFINITE_LOSS
        lr = step.lr
        self._last = record = (
            step.number,
            step.time,
            step.ended,
            loss,
            lr if type(lr) is float else number(lr),
            step.pre_norm,
            step.post_norm,
            step.threshold,
            step.loss_scale,
            step.flags,
        )
        tape.ring.append(*record)
        step.recorded = True
        if step.deferred:
            step.known_loss = known
        else:
            self._treat.learn(step, known)
        for message in step.messages:
            try:
                tape.ring.append_event(message)
            except RingError as error:
                self._report("event", f"an event is not on record: {error}")


def number(value: Any) -> float:
    """A number, or NaN for what is none (an optimizer that finds its own learning rate)."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return _nan
