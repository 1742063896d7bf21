"""One ring on its way to the sinks: how far each has come, and what is asked for it."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

from gradwatch.habits import ClippedAfterStep, ClippedTwice, NotZeroed
from gradwatch.sinks import NotYetError
from gradwatch.thinning import Thinning
from gradwatch.troubles import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.control import Control
    from gradwatch.peers import Peers
    from gradwatch.recorder import Ring
    from gradwatch.records import Finding, RunInfo, RunStatus
    from gradwatch.sinks import Sink

__all__ = ["Channel", "Outlet"]

_PATIENCE_SECONDS = 2.0  # how long the training thread waits for the store, once a ring, if it asks


class Outlet:
    """One sink's view of a ring: how far it has come, and when it may be tried again."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self.sink = sink
        self.run: RunInfo | None = None  # as the sink knows it, once opened
        self.steps = 0
        self.events = 0
        self.stored = 0  # step records handed over; never reset
        self.failures = 0  # in a row
        self.failing_since = 0.0
        self.passing = False  # the last failure may pass by itself: nothing to tell yet
        self.problem: str | None = None  # what the last failure was, for who reads it
        self.error: Exception | None = None  # the last failure; None once it is over
        self.retry_at = 0.0
        self.beat_at = 0.0
        self.ended = False

    def start_over(self) -> None:
        """The sink has lost the run: to be opened and fed again, from all that the ring holds."""
        self.run = None
        self.steps = self.events = 0

    def end(self, status: RunStatus | None) -> bool:
        """Tell the sink, which has all, that the run has ended."""
        if self.run is not None:
            self.sink.close(self.run, status)
        self.ended = True
        return True

    def reached(self, target: tuple[int, int]) -> bool:
        """Whether the sink has all up to these heads of the ring."""
        return self.steps >= target[0] and self.events >= target[1]


class Channel:
    """The tape of one run: written by the training thread, emptied by the worker."""

    def __init__(
        self,
        run: RunInfo,
        ring: Ring,
        store: Sink,
        metrics: Sink,
        *,
        parameters: Callable[[], Sequence[str]],
        peers: Peers | None = None,
        control: Control | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.run = run
        # The store may say that the attempt begins elsewhere than the ring counts from.
        self._counted_from = run.start_step
        self.offset = 0  # from the ring's step numbers to the run's, once that is known
        self._placed = threading.Event()
        if run.after is None and run.uid_source not in {"setting", "launcher"}:
            self._placed.set()
        self._patience = _PATIENCE_SECONDS
        # Whether steps of the run are to be stored first; what keeps those from the store.
        self.held_back: Callable[[], bool] = lambda: False
        self.held_by: Callable[[], Exception | None] = lambda: None
        self.parameters = parameters  # what the ring's metadata calls the parameters
        self.ring = ring
        self._peers = peers
        self.control = control
        self.settle = settle  # puts steps on the tape that are on a device still
        self.store = Outlet("store", store)
        self.metrics = Outlet("metrics", metrics)
        self.habits = (ClippedTwice(), ClippedAfterStep(), NotZeroed())
        self.findings: list[Finding] = []  # not in the store yet
        self.thinning = Thinning(ring.step_capacity)
        self.overhead = 0.0  # seconds in the hooks; the training thread adds to it
        self.look_at = 0.0  # when to see again whether the ring's file is there
        self.look_around_at = 0.0  # when to see again whether another process records the run
        self.urgent = False  # somebody waits: do not let a failing store rest
        self.closing = False
        self.status: RunStatus | None = None
        self.deadline = 0.0
        self.closed = threading.Event()
        self.complete = False  # once closed: whether all of the ring was stored
        self._told_incomplete = False
        self._lost: dict[str, int] = {}  # never reset
        self._overwritten = 0  # the greatest count of them that was told
        self.failed_told = 0  # of the steps that could not be recorded: those the store knows of

    def end(self, status: RunStatus | None, deadline: float) -> None:
        """Ask the worker to store what is left, until the deadline, and to end the run."""
        self.status = status
        if status is not None:
            self.ring.note_end(status)
        self.deadline = deadline
        self.urgent = self.closing = True

    def find_leader(self) -> None:
        """On a rank other than 0: whose run this is. Raises `NotYetError` while it is unknown."""
        if self.run.rank == 0 or self.run.leader is not None or self._peers is None:
            return
        leader = self._peers.leader()
        if leader is None:
            msg = f"rank 0 has not begun the run that rank {self.run.rank} belongs to"
            raise NotYetError(msg)
        self.ring.note_leader(leader)
        self.run = dataclasses.replace(self.run, leader=leader)

    def place(self, start_step: int) -> None:
        """The store has said at which step the ring's records begin."""
        self.offset = start_step - self._counted_from
        self._placed.set()

    def origin(self, timeout: float) -> int | None:
        """From the ring's step numbers to the run's; None as long as it is not known.

        Waits for it, `timeout` seconds at most, and `_PATIENCE_SECONDS` in all.
        """
        if not self._placed.is_set():
            timeout = min(timeout, self._patience)
            self._patience -= timeout
            if not self._placed.wait(timeout):
                return None
        return self.offset

    def lose(self, reason: str, count: int = 1) -> None:
        """Count records that will not reach the store."""
        self._lost[reason] = self._lost.get(reason, 0) + count

    def failed_untold(self) -> int:
        """Steps that could not be recorded, of which the store does not know."""
        return self._lost.get("error", 0) - self.failed_told

    def tell_incomplete(self) -> None:
        """Say once that the run has ended with records that the store lacks, and where they are."""
        if self.run.recovered or self._told_incomplete:
            return  # another job's stays for the next who looks
        self._told_incomplete = True
        place = self.ring.place
        where = (
            f"`gradwatch recover` stores the rest, from {place}" if place else "the rest is lost"
        )
        logger.warning(
            "gradwatch: run %s ended before all of it was stored; %s", self.run.name, where
        )

    # -- what the exporter reads ---------------------------------------------------------------

    def backlog(self) -> int:
        """Step records in the ring that the store does not have yet."""
        capacity: int = self.ring.step_capacity
        return min(self._waiting(), capacity)

    def overhead_seconds(self) -> float:
        """Time spent in the hooks on the training thread."""
        return self.overhead

    def dropped(self) -> dict[str, int]:
        """Records lost to the store, by reason; those overwritten since, before the store is told.

        Never less than it was.
        """
        overwritten = max(0, self._waiting() - self.ring.step_capacity)
        lost = self._lost.get("ring_full", 0) + overwritten
        self._overwritten = max(self._overwritten, lost)
        return {**self._lost, **({"ring_full": self._overwritten} if self._overwritten else {})}

    def _waiting(self) -> int:
        try:
            return max(0, self.ring.heads[0] - self.store.steps)
        except ValueError:  # the ring was let go of
            return 0
