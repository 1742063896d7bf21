"""How a run takes its steps, and after how long without a step its loop counts as stalled."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "LEAST_SECONDS",
    "RECENT",
    "Pace",
    "PaceKeeper",
    "longest_pause",
    "pace_of",
    "within_attempts",
]

RECENT = 1000  # intervals between steps, of which the median is the usual step time
LEAST_SECONDS = 30.0  # no loop counts as stalled before
_TIMES_THE_USUAL = 10.0
_TIMES_THE_LONGEST = 1.5  # an evaluation does not always take equally long


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """The usual time of a run's steps and its longest pause so far, both in seconds."""

    usual: float
    longest: float

    @property
    def patience(self) -> float:
        """Seconds without a step from which on the loop counts as stalled.

        `max(30, 10 * usual, 1.5 * longest)`: a loop that evaluates for five minutes now and then has
        paused for as long before, so only the first such pause counts as a stall.

        >>> Pace(usual=0.01, longest=0.3).patience
        30.0
        >>> Pace(usual=12.0, longest=15.0).patience
        120.0
        >>> Pace(usual=0.01, longest=300.0).patience
        450.0
        """
        return max(LEAST_SECONDS, _TIMES_THE_USUAL * self.usual, _TIMES_THE_LONGEST * self.longest)


def pace_of(
    steps: np.ndarray[Any, Any],
    times: np.ndarray[Any, Any],
    *,
    starts: Sequence[int] = (),
    longest: float = 0.0,
) -> Pace | None:
    """The pace of consecutive records; None of fewer than two, which show no interval.

    Args:
        steps: their step numbers, shape (n,), increasing. Where records are missing, the interval
            between two is divided by the steps it spans.
        times: when each step was taken, Unix seconds, shape (n,).
        starts: first steps of attempts. What lies between two attempts is no pause of the loop.
        longest: the longest pause that is known from before these records.
    """
    within = within_attempts(steps, starts)
    spans = np.diff(steps)[within]
    seconds = np.maximum(np.diff(times)[within], 0.0)  # a clock may be set back
    if not len(seconds):
        return None
    usual = float(np.median(seconds[-RECENT:] / spans[-RECENT:]))
    return Pace(usual, max(longest, longest_pause(spans, seconds, usual)))


class PaceKeeper:
    """The pace of a run whose records come in batches: it keeps the last ones and the longest pause."""

    def __init__(self) -> None:
        self._longest = 0.0
        self.begin_attempt()

    def begin_attempt(self) -> None:
        """What lies between the last record and the next is no pause of the loop."""
        self._steps, self._times = np.empty(0, np.int64), np.empty(0)

    def add(self, steps: np.ndarray[Any, Any], times: np.ndarray[Any, Any]) -> None:
        """Take in records that follow those before, as in `pace_of`."""
        self._steps = np.concatenate([self._steps, steps])
        self._times = np.concatenate([self._times, times])
        new = slice(-len(steps) - 1, None)
        spans, seconds = np.diff(self._steps[new]), np.diff(self._times[new])
        if np.all(
            spans == 1
        ):  # no record is missing: the usual time, which costs more, is not asked
            self._longest = float(np.max(seconds, initial=self._longest))
        elif (pace := self.pace()) is not None:
            self._longest = pace.longest
        self._steps, self._times = self._steps[-RECENT - 1 :], self._times[-RECENT - 1 :]

    def pace(self) -> Pace | None:
        """The pace so far; None before the second step."""
        return pace_of(self._steps, self._times, longest=self._longest)


def longest_pause(
    spans: np.ndarray[Any, Any], seconds: np.ndarray[Any, Any], usual: float | np.ndarray[Any, Any]
) -> float:
    """The longest of these intervals, less the time of the steps that have no record.

    Args:
        spans: the steps that each interval spans, shape (n,): 1 where no record is missing.
        seconds: how long each interval is, shape (n,).
        usual: seconds of a step, or of a step of each interval, shape (n,).
    """
    return max(0.0, float(np.max(seconds - (spans - 1) * usual, initial=0.0)))


def within_attempts(steps: np.ndarray[Any, Any], starts: Sequence[int]) -> np.ndarray[Any, Any]:
    """Which intervals between `steps` lie within one attempt, and lead forwards: shape (n - 1,)."""
    forwards: np.ndarray[Any, Any] = np.diff(steps) > 0
    for start in starts:
        forwards &= ~((steps[:-1] < start) & (steps[1:] >= start))
    return forwards
