"""Whether a run's loop hangs: it says that it runs, and takes no step.

Its process lives, so its heartbeat goes on and does not show it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.pace import LEAST_SECONDS, Pace, longest_pause, pace_of, within_attempts
from gradwatch_monitor.rows import Finding
from gradwatch_monitor.store import status_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch_monitor.rows import Run
    from gradwatch_monitor.store import Store
    from gradwatch_monitor.timeline import Blocks

__all__ = ["Stall", "as_finding", "stall_of", "status"]

_AROUND = 2  # blocks before and after one, by which its own steps are timed


@dataclasses.dataclass(frozen=True, slots=True)
class Stall:
    """A live run whose last step is too long ago. Times in Unix seconds, durations in seconds."""

    step: int  # its last
    time: float  # when that was taken
    seconds: float  # from then to the run's last sign of life
    pace: Pace  # how it took its steps before


def stall_of(store: Store, run: Run, now: float | None = None) -> Stall | None:
    """The stall of a run; None where it takes steps, has ended, is silent or has taken but one step.

    A run stalls from `Pace.patience` on: ten times its usual step time, one and a half times its
    longest pause so far, and 30 seconds at least. The time without a step is counted up to the
    run's last heartbeat: both are of the job's own clock, and a job that cannot reach the store
    gives neither steps nor heartbeats.

    Args:
        store: where the run is.
        run: its row, as of now.
        now: Unix seconds by which the run is live or silent; default: the present.
    """
    if not run.is_live(now):
        return None
    last = store.last_taken(run.id)
    if last is None or run.heartbeat_at - last.time < LEAST_SECONDS:
        return None
    pace, seconds = _pace(store, run.id), run.heartbeat_at - last.time
    if pace is None or seconds < pace.patience:
        return None
    return Stall(last.step, last.time, seconds, pace)


def status(store: Store, run: Run, now: float | None = None) -> str:
    """The run's status as people are shown it: "stalled" and "silent" stand in no table."""
    return "stalled" if stall_of(store, run, now) is not None else status_of(run)


def as_finding(stall: Stall, run: Run, before: Finding | None = None) -> Finding:
    """The finding `stalled`; `before` is the one that is open already."""
    taken = dt.datetime.fromtimestamp(stall.time, dt.UTC)
    return Finding(
        finding="stalled",
        severity="critical",
        first_step=stall.step,
        last_step=stall.step,
        found_at=time.time() if before is None else before.found_at,
        ended_at=None,
        message=(
            f"no step has been taken for {stall.seconds:,.0f} seconds: the last was step "
            f"{stall.step:,}, at {taken:%Y-%m-%d %H:%M:%S} UTC; a step usually takes "
            f"{_duration(stall.pace.usual)}, and the longest pause so far was "
            f"{_duration(stall.pace.longest)}."
        ),
        advice=(
            f"The process lives. `py-spy dump --pid {run.pid}` on {run.host} shows where the loop "
            "stands: in an evaluation or a checkpoint, which is no fault, in a data loader that "
            "waits for its files, or in a collective operation that waits for another rank."
        ),
        data={
            "seconds": stall.seconds,
            "last_step_at": stall.time,
            "usual_step_seconds": stall.pace.usual,
            "longest_pause_seconds": stall.pace.longest,
            "stalled_after_seconds": stall.pace.patience,
            "source": "the times of the run's own steps",
        },
    )


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:,.3g} ms" if seconds < 1.0 else f"{seconds:,.1f} s"


def _pace(store: Store, run_id: int) -> Pace | None:
    blocks, recent = store.long(run_id, ("step", "time"), of_blocks=("last_time",))
    starts = store.attempt_starts(run_id)
    before = [blocks.column(name)[-1:] for name in ("last_step", "last_time")]
    return pace_of(
        np.concatenate([before[0], recent["step"]]),
        np.concatenate([before[1], recent["time"]]),
        starts=starts,
        longest=_long_ago(blocks, starts),
    )


def _long_ago(blocks: Blocks, starts: Sequence[int]) -> float:
    """About the longest pause within the blocks: what one took longer than those around it.

    A pause that comes less often than every 20,000 steps, as an evaluation may, is in none of the
    steps that are read as they are.
    """
    last, ended = blocks.column("last_step"), blocks.column("last_time")
    within = within_attempts(last, starts)
    steps, seconds = np.diff(last)[within], np.diff(ended)[within]
    if not len(steps):
        return 0.0
    padded = np.pad(seconds / steps, _AROUND, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * _AROUND + 1)
    return longest_pause(steps + 1, seconds, np.median(around, axis=1))
