"""Rings → sinks: read what is new, hand it over, try again later where a sink fails.

Each sink has a cursor of its own, so a store that fails holds up nothing but itself. (One that
hangs holds up the worker, never the training.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING, Any, cast

from gradwatch.events import decode
from gradwatch.recorder import WITHIN_LOCK
from gradwatch.records import Batch, Event, LayerNorms
from gradwatch.sinks import (
    BusyError,
    CursorMovedError,
    NotYetError,
    RefusedError,
    RunForgottenError,
    SinkError,
)
from gradwatch.thinning import STRETCH, event, sampled
from gradwatch.troubles import logger
from gradwatch.turns import BEHIND, Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.channel import Channel, Outlet
    from gradwatch.clock import Clock
    from gradwatch.control import Controllable
    from gradwatch.recorder import Steps
    from gradwatch.records import Finding
    from gradwatch.troubles import Troubles

__all__ = ["Delivery"]

_LOST = {
    "ring_full": "steps overwritten in a full flight recorder",
    "torn": "steps torn",
    "error": "steps that could not be recorded",
    "events": "blocks of events overwritten or torn",
}
_BATCH_STEPS = 20_000  # of a run that is over, for the store
_LISTEN_SECONDS = 0.5  # between two looks for a threshold that somebody has applied
_RING_SECONDS = 30.0  # between two looks whether the flight-recorder file is still there
_AROUND_SECONDS = 30.0  # between two looks whether another process records the run too
_RETRY_SECONDS = 5.0  # the longest pause between two tries of a sink that failed


class Delivery:
    """Serves channels, one at a time, on the worker's thread."""

    def __init__(self, clock: Clock, troubles: Troubles) -> None:
        self.heartbeat = 60.0  # seconds between two signs of life of a run that records nothing
        self.retry = 1.0  # seconds until the first retry; doubles with every failure
        self.patience = 2.0  # seconds that others may keep us from the store, unmentioned
        self.turns = Turns()
        self._clock = clock
        self._troubles = troubles

    def serve(self, channel: Channel) -> None:
        """Deliver all that is new in this channel's ring, and end it if that was asked for."""
        try:
            behind = channel.ring.heads[0] - channel.store.steps > BEHIND
            with self.turns.short() if behind else contextlib.nullcontext():
                self._serve(channel)
        except Exception as error:  # noqa: BLE001 - a bug here must not end the worker
            self._troubles.report("worker", f"the worker failed ({type(error).__name__}: {error})")
            if channel.closing:  # nor let a run that ends wait for ever
                channel.closed.set()

    def _serve(self, channel: Channel) -> None:
        urgent, channel.urgent = channel.urgent, False
        store, metrics = channel.store, channel.metrics
        if channel.control is not None:
            channel.control.listen()
        store_is_due = urgent or self._clock.monotonic() >= store.retry_at
        if store_is_due:
            self._try(channel, store, self._open)
        # After the store, which settles the run's name; but not only if it could.
        self._try(channel, metrics, self._open)
        self._try(channel, metrics, self._feed)
        if store_is_due:
            self._try(channel, store, self._feed)
            if channel.control is not None:
                self._try(channel, store, self._listen)
            self._try(channel, store, self._look_around)
        self._look_for_the_ring(channel)
        if channel.closing:
            self._finish(channel)

    def _look_for_the_ring(self, channel: Channel) -> None:
        """Say once that the file was deleted: nothing else would show it before a crash."""
        path, now = channel.ring.path, self._clock.monotonic()
        if path is None or channel.run.recovered or now < channel.look_at:
            return
        channel.look_at = now + _RING_SECONDS
        if channel.ring.place is None:
            self._troubles.report(
                f"deleted {path}",
                f"the flight-recorder file {path} was deleted: steps reach the store as before, but "
                "those it does not have yet would not outlive a crash, until the job starts anew; "
                "set GRADWATCH_RING_DIR to a folder that nobody cleans",
            )

    def _try(
        self, channel: Channel, outlet: Outlet, act: Callable[[Channel, Outlet], bool]
    ) -> None:
        """Do it, and note how it went; only work that the sink did shows that it works again."""
        try:
            worked = act(channel, outlet)
        except CursorMovedError as moved:  # not where we left it: go on from there
            outlet.steps, outlet.events = moved.steps, moved.events
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's; the others go on
            self._failed(channel, outlet, error)
        else:
            if worked and outlet.failures:
                outlet.failures, outlet.retry_at, outlet.passing = 0, 0.0, False
                outlet.error = None
                if not channel.run.recovered:
                    self._troubles.clear(_fault(outlet), f"the {outlet.name} takes records again")

    def _failed(self, channel: Channel, outlet: Outlet, error: Exception) -> None:
        """To be tried again, later each time, and said once."""
        now = self._clock.monotonic()
        if not outlet.failures:
            outlet.failing_since = now
        outlet.failures += 1
        if outlet is channel.store:
            channel.thinning.failed()
        outlet.error = error
        outlet.retry_at = now + min(_RETRY_SECONDS, self.retry * 2.0**outlet.failures)
        if isinstance(error, RunForgottenError):
            outlet.start_over()
            if channel.control is not None:
                channel.control.seen = 0  # a new store counts anew
        lasted = now - outlet.failing_since
        outlet.passing = isinstance(error, BusyError) and lasted < self.patience
        known = isinstance(error, SinkError)
        message = str(error) if known else f"the {outlet.name} failed ({error!r})"
        where = channel.ring.place or "memory, and would not outlive a crash"
        outlet.problem = f"{message}; records are kept in {where}"
        if channel.run.recovered:
            self._leave(channel, outlet, error, message)
        elif not isinstance(error, NotYetError) and not outlet.passing:
            self._troubles.report(_fault(outlet), outlet.problem)

    def _leave(self, channel: Channel, outlet: Outlet, error: Exception, message: str) -> None:
        """A ring that somebody left, not stored: that the store is down its own runs tell."""
        if isinstance(error, NotYetError):
            channel.deadline = -math.inf  # at the next look its run may be there
        elif isinstance(error, RefusedError) or not isinstance(error, SinkError):
            channel.ring.set_aside()
            channel.deadline = -math.inf
            outlet.problem = (
                f"{message}; it would never be stored, and was set aside as {channel.ring.path}: "
                "a newer gradwatch may store it, under its old name"
            )
            self._troubles.report(f"ring {channel.run.ring}", outlet.problem)

    def _open(self, channel: Channel, outlet: Outlet) -> bool:
        if outlet.run is not None:
            return False
        if outlet is channel.store:
            if channel.held_back():
                if (error := channel.held_by()) is not None:
                    raise error
                return False
            channel.find_leader()
        outlet.run = outlet.sink.open(channel.run)
        if outlet is channel.store:
            channel.run = outlet.run
            channel.place(outlet.run.start_step)
            channel.look_around_at = self._clock.monotonic() + _AROUND_SECONDS
        return True

    def _feed(self, channel: Channel, outlet: Outlet) -> bool:
        """Whether anything was handed over."""
        if outlet.run is None:
            return False
        worked = False
        is_store = outlet is channel.store
        failed = channel.failed_untold() if is_store else 0
        # What is recorded from here on waits for the next look: a fast job never lets up, and its
        # other sink and the other runs have their turn too.
        target = channel.ring.heads
        while not outlet.reached(target) or failed or (is_store and channel.findings):
            batch = self._batch(channel, outlet, failed)
            try:
                outlet.sink.write(outlet.run, batch)
            except CursorMovedError as moved:
                outlet.steps, outlet.events = moved.steps, moved.events
                continue
            worked = True
            outlet.steps, outlet.events = batch.last
            outlet.stored += len(batch.steps)
            outlet.beat_at = self._clock.monotonic() + self.heartbeat
            if is_store:
                channel.failed_told += failed
                failed = 0
                del channel.findings[: len(batch.findings)]
                for reason, count in batch.dropped.items():
                    channel.lose(reason, count)
            else:
                self._inspect(channel, batch)
            if channel.run.recovered:
                return True  # batch by batch: the process's own runs come first
        if self._clock.monotonic() >= outlet.beat_at and not channel.run.recovered:
            outlet.sink.heartbeat(outlet.run)
            outlet.beat_at = self._clock.monotonic() + self.heartbeat
            worked = True
        return worked

    def _listen(self, channel: Channel, outlet: Outlet) -> bool:
        """Look whether somebody has applied another threshold; whether one was refused."""
        control, sink = channel.control, outlet.sink
        if control is None or outlet.run is None:
            return False
        controllable = cast("Controllable", sink)  # wrap has checked that
        worked = bool(control.refused)
        while control.refused:
            controllable.refuse(*control.refused[0])
            del control.refused[0]
        now = self._clock.monotonic()
        if control.idle and now >= control.look_at:
            control.look_at = now + _LISTEN_SECONDS
            wanted = controllable.requested(outlet.run.uid, control.seen)
            if wanted is not None:
                control.offer(wanted)
        return worked

    def _look_around(self, channel: Channel, outlet: Outlet) -> bool:
        """See now and then whether another process records the run too."""
        now, look = self._clock.monotonic(), getattr(outlet.sink, "look_around", None)
        if look is None or outlet.run is None or channel.run.recovered:
            return False
        if now < channel.look_around_at:
            return False
        channel.look_around_at = now + _AROUND_SECONDS
        look(outlet.run)
        return True

    def _batch(self, channel: Channel, outlet: Outlet, failed: int) -> Batch:
        steps, every = self._read(channel, outlet)
        # The ring's step numbers become the run's, as the store has settled them.
        offset = channel.offset if outlet is channel.store else 0
        if offset:
            steps = steps._replace(records=steps.records.copy())
            steps.records["step"] += offset
        messages = channel.ring.read_events(outlet.events)
        events: list[Event] = []
        layers: list[LayerNorms] = []
        unreadable = 0
        # The exporter has no use for them, and reading them twice would cost as much again.
        for payload in messages.payloads if outlet is channel.store else ():
            item = decode(payload, channel.parameters())
            if item is not None and offset:
                item = dataclasses.replace(item, step=item.step + offset)
            if isinstance(item, LayerNorms):
                layers.append(item)
            elif item is not None:
                events.append(item)
            else:
                unreadable += 1
        lost = {
            "ring_full": steps.overwritten,
            "torn": steps.torn,
            "events": messages.overwritten + messages.torn + unreadable,
        }
        dropped = {reason: count for reason, count in lost.items() if count}
        if dropped:
            events.append(self._records_dropped(channel, steps.records, dropped))
        if failed:
            events.append(self._records_dropped(channel, steps.records[-1:], {"error": failed}))
        records = steps.records
        if every > 1 and len(records):
            records = records[sampled(records["step"], every)]
            thinned = len(steps.records) - len(records)
            if thinned:
                dropped["thinned"] = thinned
                first, last = (int(steps.records["step"][at]) for at in (0, -1))
                stretch = dict(zip(STRETCH, (thinned, every, first, last), strict=True))
                events.append(event(stretch, self._clock.time()))
        return Batch(
            records,
            events,
            layers,
            [_moved(f, offset) for f in channel.findings] if outlet is channel.store else (),
            (outlet.steps, outlet.events),
            (steps.cursor, messages.cursor),
            dropped,
        )

    def _read(self, channel: Channel, outlet: Outlet) -> tuple[Steps, int]:
        """The steps that come next for this sink, and of how many of them one is to be stored."""
        ring = channel.ring
        whole = channel.closing or channel.run.recovered  # no more steps come: all are stored
        if outlet is not channel.store:
            return ring.read_steps(outlet.steps, WITHIN_LOCK), 1
        if whole or channel.run.rank != 0:
            return ring.read_steps(outlet.steps, _BATCH_STEPS), 1
        every = channel.thinning.plan(ring.heads[0] - outlet.steps)
        return ring.read_steps(outlet.steps, channel.thinning.rows * every), every

    def _records_dropped(self, channel: Channel, records: Any, dropped: dict[str, int]) -> Event:
        step = int(records["step"][0]) if len(records) else channel.run.start_step
        where = "around" if "error" in dropped else "before"
        shown = ", ".join(f"{count} {_LOST[reason]}" for reason, count in dropped.items())
        return Event(
            "records_dropped",
            step,
            self._clock.time(),
            "warning",
            f"not everything {where} step {step} reached the store: {shown}",
            dict(dropped),
            channel.run.rank,
        )

    def _inspect(self, channel: Channel, batch: Batch) -> None:
        if channel.run.rank != 0:
            return
        for finding in filter(None, (habit.observe(batch.steps) for habit in channel.habits)):
            channel.findings.append(finding)
            logger.warning("gradwatch: %s %s", finding.message, finding.advice)

    def _finish(self, channel: Channel) -> None:
        store = channel.store
        # Open still: nothing has been stored, or the store has failed since.
        told = store.reached(channel.ring.heads) and not channel.failed_untold()
        stored = store.run is not None and told
        if stored and not store.ended:
            self._try(channel, store, lambda _, outlet: outlet.end(channel.status))
        complete = stored and store.ended
        if not complete and self._clock.monotonic() < channel.deadline:
            # Tried again at the next look, until the deadline; what others left is not urgent.
            channel.urgent = not channel.run.recovered
            return
        if channel.metrics.run is not None:
            self._try(channel, channel.metrics, lambda _, outlet: outlet.end(channel.status))
        channel.complete = complete
        channel.ring.close(remove=complete)
        if not complete:
            if store.passing and store.problem is not None:  # there was no time to see it last
                self._troubles.report(_fault(store), store.problem)
            channel.tell_incomplete()
        channel.closed.set()


def _moved(finding: Finding, offset: int) -> Finding:
    """The finding, seen in a ring, with the run's step numbers."""
    first, last = finding.first_step + offset, finding.last_step + offset
    return dataclasses.replace(finding, first_step=first, last_step=last) if offset else finding


def _fault(outlet: Outlet) -> str:
    return f"{outlet.name} {id(outlet.sink)}"
