"""For tests, yours too: a sink that keeps everything in memory, a clock that is set by hand."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.recorder import FLAGS, STEP_DTYPE
from gradwatch.records import Batch, Event, Finding, LayerNorms, RunInfo, RunStatus, StepRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ManualClock", "MemorySink", "run_info"]


class MemorySink:
    """A store that is a few lists: `wrap(optimizer, store=MemorySink())`.

    Call `agent.flush()` before looking, since records arrive through the worker.

    >>> import torch, gradwatch
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> sink = MemorySink()
    >>> agent = gradwatch.Agent(optimizer, store=sink, metrics_port=None)
    >>> weight.grad = torch.tensor([3.0, 0.0, 4.0])
    >>> optimizer.step()
    >>> agent.flush()
    True
    >>> [(s.step, s.pre_norm, s.clipped) for s in sink.steps]
    [(0, 5.0, True)]
    >>> agent.close()
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches: list[Batch] = []
        self.runs: list[RunInfo] = []
        self.statuses: list[RunStatus | None] = []

    def open(self, run: RunInfo) -> RunInfo:
        """Keep the run."""
        self.runs.append(run)
        return run

    def write(self, run: RunInfo, batch: Batch) -> None:  # noqa: ARG002
        """Keep the batch."""
        with self._lock:
            self._batches.append(batch)

    def heartbeat(self, run: RunInfo) -> None:
        """Do nothing."""

    def close(self, run: RunInfo, status: RunStatus | None) -> None:  # noqa: ARG002
        """Keep the status."""
        self.statuses.append(status)

    @property
    def steps(self) -> list[StepRecord]:
        """All step records so far, in order."""
        return [_record(row) for row in self.rows]

    @property
    def rows(self) -> np.ndarray[Any, np.dtype[np.void]]:
        """The same as one structured array of `recorder.STEP_DTYPE`."""
        with self._lock:
            parts = [batch.steps for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, STEP_DTYPE)

    @property
    def events(self) -> list[Event]:
        """All events so far."""
        with self._lock:
            return [event for batch in self._batches for event in batch.events]

    @property
    def findings(self) -> Sequence[Finding]:
        """All findings so far."""
        with self._lock:
            return [finding for batch in self._batches for finding in batch.findings]

    @property
    def layers(self) -> list[LayerNorms]:
        """All layer-norm samples so far."""
        with self._lock:
            return [sample for batch in self._batches for sample in batch.layers]


def run_info(**fields: Any) -> RunInfo:
    """A run with harmless values, to try a sink of your own with; `fields` replaces some."""
    values: dict[str, Any] = {
        "uid": "test-run",
        "uid_source": "fresh",
        "name": "test",
        "job": "test-job",
        "ring": "test-ring",
        "host": "localhost",
        "pid": 1,
        "rank": 0,
        "world_size": 1,
        "started_at": 1_700_000_000.0,
        "start_step": 0,
        "metrics_url": None,
        "tags": {},
        "settings": {},
    }
    return RunInfo(**{**values, **fields})


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, time: float = 1_700_000_000.0) -> None:
        self._time = time
        self._monotonic = 0.0

    def time(self) -> float:
        """Unix seconds, as set."""
        return self._time

    def monotonic(self) -> float:
        """Seconds that only `advance` moves."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass, on both clocks."""
        self._time += seconds
        self._monotonic += seconds

    def set_time(self, time: float) -> None:
        """Set the wall clock, back if you like; the monotonic one does not notice."""
        self._time = time


def _record(row: Any) -> StepRecord:
    flags = int(row["flags"])
    numbers = {name: float(row[name]) for name in StepRecord._fields[1:8]}
    return StepRecord(
        step=int(row["step"]),
        **numbers,
        clipped=bool(flags & FLAGS.CLIPPED),
        nonfinite=bool(flags & FLAGS.NONFINITE),
        nonfinite_loss=bool(flags & FLAGS.NONFINITE_LOSS),
        skipped=bool(flags & FLAGS.SKIPPED),
    )
