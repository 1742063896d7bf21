"""Where batches of records go. A sink raises `SinkError` for what may clear up by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gradwatch.records import Batch, RunInfo, RunStatus

__all__ = [
    "BusyError",
    "CursorMovedError",
    "NotYetError",
    "NullSink",
    "RefusedError",
    "RunForgottenError",
    "Sink",
    "SinkError",
]


class SinkError(Exception):
    """The sink cannot take the batch now; it stays in the ring and is offered again."""


class NotYetError(SinkError):
    """The run that this rank belongs to is not there yet: no trouble, to be tried again."""


class BusyError(SinkError):
    """Another connection keeps us from the store: no trouble unless it lasts."""


class RefusedError(SinkError):
    """It is the records' fault, not the sink's: they would be refused again."""


class RunForgottenError(SinkError):
    """The sink has lost the run (its file was deleted): open it and hand over all again."""


class CursorMovedError(Exception):
    """Somebody else stored from this ring: go on from `steps` and `events`."""

    def __init__(self, steps: int, events: int) -> None:
        super().__init__(f"the stored cursor is at {steps}, {events}")
        self.steps = steps
        self.events = events


class Sink(Protocol):
    """Takes one run's records, in order, from the process's one worker thread."""

    def open(self, run: RunInfo) -> RunInfo:
        """Get ready for a run; returns it with the uid and name it goes by in this sink."""
        ...

    def write(self, run: RunInfo, batch: Batch) -> None:
        """Take a batch: all of it or, raising, nothing."""
        ...

    def heartbeat(self, run: RunInfo) -> None:
        """Note that the run is alive though it has no new records."""
        ...

    def close(self, run: RunInfo, status: RunStatus | None) -> None:
        """Everything in the run's ring was written. None: the run goes on in a further ring."""
        ...


class NullSink:
    """Takes everything, keeps nothing."""

    def open(self, run: RunInfo) -> RunInfo:
        """Accept the run as it is."""
        return run

    def write(self, run: RunInfo, batch: Batch) -> None:
        """Do nothing."""

    def heartbeat(self, run: RunInfo) -> None:
        """Do nothing."""

    def close(self, run: RunInfo, status: RunStatus | None) -> None:
        """Do nothing."""
