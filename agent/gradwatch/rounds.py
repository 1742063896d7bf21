"""Several optimizers in one run: what each of them did in a step, put together to one record.

A round is one step of the job: each optimizer steps at most once in it, one after another in the
loop, or each in the middle of the backward pass as soon as its gradient is there. Its record has the
norm over all gradients, and the flags that any of the optimizers' steps has. It is written when all
have stepped, or, where some take no step (their layers were not used, a scaler left them out), when
one of them steps that comes before the last in the order of their steps.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from gradwatch.errors import RingError
from gradwatch.events import BadGradient, encode_event, encode_layers, encode_names, layers_of
from gradwatch.names import ParameterNames
from gradwatch.norms import combine
from gradwatch.notices import Notices
from gradwatch.recorder import FLAGS
from gradwatch.records import StepRecord
from gradwatch.tape import NullTape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.control import Control
    from gradwatch.hooks import StepHooks
    from gradwatch.recorder import NullRing, Ring
    from gradwatch.records import Event
    from gradwatch.tape import Tape

__all__ = ["Rounds"]

# The norms of gradients, those of weights, and the names where they are not the tape's.
_Layers = tuple[list[float], list[float] | None, list[str] | None]

_nan = math.nan
_ONCE = frozenset({"amp_overflow"})  # events that are of the step, whichever optimizer tells them


class Rounds:
    """The rounds of one run, written to its tape; each of its optimizers has a `member` of it."""

    def __init__(self, hooks: Sequence[StepHooks], report: Callable[[str, str], None]) -> None:
        self.last: StepRecord | None = None
        self.tape: Tape = NullTape()
        self._members = {one: _Member(self, one) for one in hooks}
        self._report = report
        self._norm_type = hooks[0].parts[0].policy.norm_type
        # What is told of the gradients of all of them, as of one.
        self._notices = Notices(ParameterNames(None), None)
        for one in hooks:
            one.notices.to_join = {}
            one.notices.bad_gradients = self._notices.bad_gradients
        self._open: dict[int, dict[_Member, tuple[Any, ...]]] = {}  # records, by number
        self._layers: dict[int, dict[_Member, _Layers]] = {}  # samples, by number
        self._told: dict[str, int] = {}  # the last step of which such an event was told
        self._order: list[_Member] = []  # in which the optimizers step in a round

    def on(self, tape: Tape) -> None:
        """Write to this tape from now on."""
        self.tape = tape
        self._open.clear()
        self._layers.clear()
        for member in self._members.values():
            member.shift, member.delivered = 0, -1

    def member(self, hooks: StepHooks) -> Tape:
        """Where this optimizer's hooks write."""
        return self._members[hooks]

    def record(self, member: _Member, step: tuple[Any, ...]) -> None:
        """What one optimizer did in a round."""
        number = step[0] + member.shift
        if not self._is_next(member, self._open.get(number, {})):
            member.shift += 1  # it took no step in the round that is open: this one is the next
            number += 1
        self._open.setdefault(number, {})[member] = step
        member.delivered = number
        for earlier in sorted(self._open):
            steps = self._open[earlier]
            absent = [one for one in self._members.values() if one not in steps]
            if (absent and earlier >= number) or any(one.is_to_come(earlier) for one in absent):
                return
            self._write(earlier, self._open.pop(earlier))
            for one in absent:
                one.shift = max(one.shift, earlier + 1 - one.hooks.step)

    def event(self, member: _Member, payload: bytes) -> None:
        """An event of one optimizer, or a sample of its layers, which waits for the others'."""
        if (layers := layers_of(payload)) is not None:
            number, grads, weights, names = layers
            number += member.shift
            sample = self._layers.setdefault(number, {})
            sample[member] = grads, weights, names
            if len(sample) == len(self._members):
                self._write_layers(number)
            return
        body = json.loads(payload)
        if member.shift:
            body["step"] += member.shift
            payload = json.dumps(body).encode()
        if body.get("kind") in _ONCE:
            if self._told.get(body["kind"]) == body["step"]:
                return
            self._told[body["kind"]] = body["step"]
        self.tape.ring.append_event(payload)

    def finish(self) -> None:
        """Write the rounds that are not over: the run ends."""
        for number in sorted(self._open):
            self._write(number, self._open.pop(number))
        for number in sorted(self._layers):
            self._write_layers(number)

    def _is_next(self, member: _Member, steps: dict[_Member, Any]) -> bool:
        """Whether it steps after those of this round, as it did before; learns what is new."""
        order, last = self._order, next(reversed(steps), None)
        if member not in order:
            order.insert(len(order) if last is None else order.index(last) + 1, member)
            return True
        return last is None or order.index(member) > order.index(last)

    def _write(self, number: int, steps: dict[_Member, tuple[Any, ...]]) -> None:
        for earlier in sorted(n for n in self._layers if n < number):
            self._write_layers(earlier)
        record = self._together(number, list(steps.values()))
        event = self._event(record, steps)
        if event is not None and event.kind == "grad_norm_spike":
            record = (*record[:-1], record[-1] | FLAGS.NORM_SPIKE)
        self.tape.ring.append(*record)
        if event is not None:
            self._append(encode_event(event))
        step, time, _, *numbers, flags = record
        bits = (FLAGS.CLIPPED, FLAGS.NONFINITE, FLAGS.NONFINITE_LOSS, FLAGS.SKIPPED)
        self.last = StepRecord(step, time, *numbers, *(bool(flags & bit) for bit in bits))

    def _write_layers(self, number: int) -> None:
        sample = self._layers.pop(number)
        grads: list[float] = []
        weights: list[float] = []
        names: list[str] = []
        for member in self._members.values():
            introduced = member.hooks.notices.introduced
            absent = [_nan] * len(introduced)
            g, w, n = sample.get(member, (absent, None, None))
            grads += g
            weights += [_nan] * len(g) if w is None else w
            names += introduced if n is None else n
        known = any(w is not None for _, w, _ in sample.values())
        renamed = any(n is not None for _, _, n in sample.values())
        payload = encode_layers(
            number, grads, weights if known else None, encode_names(names) if renamed else None
        )
        self._append(payload)

    def _append(self, payload: bytes) -> None:
        try:
            self.tape.ring.append_event(payload)
        except RingError as error:
            self._report("event", f"an event is not on record: {error}")

    def _event(
        self, record: tuple[Any, ...], steps: dict[_Member, tuple[Any, ...]]
    ) -> Event | None:
        """What the gradients of all optimizers in a round show together."""
        number, time, *_, norm, _, _, _, flags = record
        notices, first = self._notices, next(iter(self._members)).notices
        notices.rank, notices.alone, notices.origin = first.rank, first.alone, first.origin
        bad: list[BadGradient] = []
        finite = 0
        for member, (local, *_, its) in steps.items():
            found = (member.hooks.notices.to_join or {}).pop(local, None)
            if found is not None and its & FLAGS.NONFINITE:
                bad.append(found)
            elif not its & FLAGS.NO_GRADIENT:
                finite += len(member.hooks.notices.introduced)
        if flags & FLAGS.NONFINITE:
            event = None
            if bad:
                event = notices.nonfinite(number, time, BadGradient.joined(bad, finite, len(steps)))
            if notices.rank == 0:
                notices.warn(
                    number,
                    event.message if event is not None else "",
                    skipped=bool(flags & FLAGS.SKIPPED),
                )
            return event
        if not math.isfinite(norm):
            return None
        return notices.spike(number, time, norm) if norm else notices.zero(number, time, finite)

    def _together(self, number: int, steps: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """One record of several: `(step, time, monotonic, loss, lr, …, flags)` as `Ring.append` has it."""
        _, times, ends, losses, rates, pre, post, _, scales, flags = zip(*steps, strict=True)
        together = 0
        for one in flags:
            together |= one
        # Without a gradient is the step only where all of them are.
        if not all(one & FLAGS.NO_GRADIENT for one in flags):
            together &= ~FLAGS.NO_GRADIENT
        with_gradient = [i for i, one in enumerate(flags) if not one & FLAGS.NO_GRADIENT]
        norm = self._norm([pre[i] for i in with_gradient])
        if not math.isfinite(norm):  # a step counts as clipped only where its norm is known
            together &= ~FLAGS.CLIPPED
        return (
            number,
            min(times),
            max(ends),
            _known(losses),
            rates[0],
            norm,
            self._norm([post[i] for i in with_gradient]),
            _nan,  # each optimizer clips by a threshold of its own
            _known(scales),
            together,
        )

    def _norm(self, norms: list[float]) -> float:
        return combine(norms, self._norm_type) if norms else _nan


class _Member:
    """The tape of one optimizer: it is its ring as well."""

    control: Control | None = None  # a threshold that is applied from outside would be which one's?

    def __init__(self, rounds: Rounds, hooks: StepHooks) -> None:
        self.hooks = hooks
        self.shift = 0  # rounds that it took no step in: to be added to its own count of steps
        self.delivered = -1  # the last round of which its record is here
        self._rounds = rounds

    def is_to_come(self, number: int) -> bool:
        """Whether it has stepped in that round and the record is on its way still."""
        return self.delivered < number < self.hooks.step + self.shift

    @property
    def overhead(self) -> float:
        """Seconds spent in the hooks of all optimizers."""
        return self._rounds.tape.overhead

    @overhead.setter
    def overhead(self, seconds: float) -> None:
        self._rounds.tape.overhead = seconds

    @property
    def ring(self) -> Ring | NullRing:
        """What takes the records."""
        return self  # type: ignore[return-value] # append and append_event are all that hooks use

    def append(self, *record: Any) -> None:
        """One optimizer's step."""
        self._rounds.record(self, record)

    def append_event(self, payload: bytes) -> None:
        """One optimizer's event."""
        self._rounds.event(self, payload)

    def lose(self, reason: str, count: int = 1) -> None:
        """Count records that will not reach the store."""
        self._rounds.tape.lose(reason, count)


def _known(values: Sequence[float]) -> float:
    """The first that is no NaN."""
    return next((value for value in values if not math.isnan(value)), _nan)
