"""One run's numbers for Prometheus, counted in numpy as batches of records arrive."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gradwatch import metrics
from gradwatch.layout import FLAGS
from gradwatch.pace import PaceKeeper
from gradwatch.sinks.exposition import RunLines

if TYPE_CHECKING:
    from gradwatch.records import Batch, RunInfo

__all__ = ["Peak", "Series", "Vitals"]

_BOUNDS = np.array(metrics.NORM_BUCKETS)
_FLAG_COUNTERS = {
    "gradwatch_clipped_steps_total": FLAGS.CLIPPED,
    "gradwatch_nonfinite_steps_total": FLAGS.NONFINITE,
    "gradwatch_no_gradient_steps_total": FLAGS.NO_GRADIENT,
    "gradwatch_nonfinite_loss_steps_total": FLAGS.NONFINITE_LOSS,
    "gradwatch_skipped_steps_total": FLAGS.SKIPPED,
    "gradwatch_amp_overflow_steps_total": FLAGS.AMP_OVERFLOW,
    "gradwatch_grad_norm_spikes_total": FLAGS.NORM_SPIKE,
    "gradwatch_loss_spikes_total": FLAGS.LOSS_SPIKE,
}
_FIELD_GAUGES = {
    "gradwatch_last_grad_norm_pre_clip": "pre_norm",
    "gradwatch_last_grad_norm_post_clip": "post_norm",
    "gradwatch_clip_threshold": "threshold",
    "gradwatch_learning_rate": "lr",
    "gradwatch_loss": "loss",
    "gradwatch_loss_scale": "loss_scale",
    "gradwatch_last_step_timestamp_seconds": "time",
}
_HISTOGRAMS = {
    "gradwatch_grad_norm_pre_clip": "pre_norm",
    "gradwatch_grad_norm_post_clip": "post_norm",
}
_PEAKS = {"gradwatch_max_grad_norm_pre_clip": "pre_norm", "gradwatch_max_loss": "loss"}


class Vitals(Protocol):
    """What the agent knows of itself, read at scrape time."""

    def backlog(self) -> int:
        """Records in the ring, not in the store yet."""
        ...

    def overhead_seconds(self) -> float:
        """Time spent in the hooks on the training thread."""
        ...

    def dropped(self) -> dict[str, int]:
        """Records lost to the store, by reason."""
        ...


class Peak:
    """The greatest value of the last `metrics.PEAK_SECONDS`, and of up to a quarter more.

    A value stays for at least that long whoever asks, so that every scraper sees a peak of one step.
    """

    _SLOTS = 4
    _SLOT_SECONDS = metrics.PEAK_SECONDS / _SLOTS

    def __init__(self) -> None:
        # The number of a stretch of time and the greatest value in it; the last is under way.
        self._slots: deque[tuple[int, float]] = deque(maxlen=self._SLOTS + 1)

    def add(self, value: float, now: float) -> None:
        """Take in a finite value that came at `now`, by a clock that never goes back."""
        slot = int(now // self._SLOT_SECONDS)
        if self._slots and self._slots[-1][0] == slot:
            value = max(value, self._slots.pop()[1])
        self._slots.append((slot, value))

    def value(self, now: float) -> float | None:
        """The greatest value; None where none has come for so long."""
        oldest = int(now // self._SLOT_SECONDS) - self._SLOTS
        return max((value for slot, value in self._slots if slot >= oldest), default=None)


class Series:
    """One run's counts. They start at 0 with the process and never go back."""

    def __init__(self, run: RunInfo) -> None:
        self.run = run
        self.lines = RunLines(run)
        self.vitals: Vitals | None = None
        self.ended_at: float | None = None
        self.failed = False
        self.told_active = False  # a scraper was told that the run goes on
        self.counters = dict.fromkeys(
            ("gradwatch_steps_total", "gradwatch_finite_gradient_steps_total", *_FLAG_COUNTERS), 0
        )
        self.buckets = {name: np.zeros(len(_BOUNDS) + 1, dtype=np.int64) for name in _HISTOGRAMS}
        self.sums = dict.fromkeys(_HISTOGRAMS, 0.0)
        self._gauges: dict[str, float] = {}
        self._peaks = {name: Peak() for name in _PEAKS}
        self._pace = PaceKeeper()

    def go_on(self, run: RunInfo, vitals: Vitals | None) -> None:
        """A further attempt at the run begins in this process."""
        self.run, self.vitals, self.ended_at, self.failed = run, vitals, None, False
        self.lines = RunLines(run)
        self._pace.begin_attempt()

    def add(self, batch: Batch, now: float) -> None:
        """Count a batch in that came at `now`."""
        steps = batch.steps
        if not len(steps):
            return
        finite = {name: _finite(steps[name]) for name in ("pre_norm", "post_norm", "loss")}
        self._count(steps, finite)
        for name, field in _FIELD_GAUGES.items():
            if (at := _last_finite(steps[field])) is not None:
                self._gauges[name] = float(steps[field][at])
        if (at := _last_finite(steps["loss"])) is not None:
            self._gauges["gradwatch_last_finite_loss_timestamp_seconds"] = float(steps["time"][at])
        for name, field in _PEAKS.items():
            if len(finite[field]):
                self._peaks[name].add(float(finite[field].max()), now)
        self._pace.add(steps["step"], steps["time"])

    def gauges(self, now: float) -> dict[str, float]:
        """The gauges that have a value, all of them finite."""
        found = dict(self._gauges)
        for name, peak in self._peaks.items():
            value = peak.value(now)
            if value is not None:
                found[name] = value
        if (pace := self._pace.pace()) is not None:
            found["gradwatch_stalled_after_seconds"] = pace.patience
        return found

    def _count(self, steps: np.ndarray[Any, Any], finite: dict[str, np.ndarray[Any, Any]]) -> None:
        self.counters["gradwatch_steps_total"] += len(steps)
        self.counters["gradwatch_finite_gradient_steps_total"] += len(finite["pre_norm"])
        there = int(np.bitwise_or.reduce(steps["flags"]))
        for name, flag in _FLAG_COUNTERS.items():
            if there & flag:
                self.counters[name] += int(np.count_nonzero(steps["flags"] & flag))
        for name, field in _HISTOGRAMS.items():
            where = np.searchsorted(_BOUNDS, finite[field], side="left")
            self.buckets[name] += np.bincount(where, minlength=len(_BOUNDS) + 1)
            total = self.sums[name] + float(finite[field].sum())
            self.sums[name] = total if math.isfinite(total) else self.sums[name]


def _finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    finite: np.ndarray[Any, Any] = values[np.isfinite(values)]
    return finite


def _last_finite(values: np.ndarray[Any, Any]) -> int | None:
    """Where the last finite value is; it most often is the last of all."""
    if math.isfinite(values[-1]):
        return -1
    finite = np.flatnonzero(np.isfinite(values))
    return int(finite[-1]) if len(finite) else None
