"""What pages show, as frames and numbers: no page, no chart, no store writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tsdownsample import MinMaxLTTBDownsampler

from gradwatch_monitor.recommend import History
from gradwatch_monitor.store import STEP_COLUMNS, status_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch_monitor.store import Run, Store

__all__ = [
    "Timeline",
    "clip_ratio",
    "events_table",
    "loss_chart",
    "norms_chart",
    "runs_table",
    "thin",
    "what_if",
    "what_if_curve",
]

MARKED = (
    "nonfinite_gradient",
    "nonfinite_loss",
    "grad_norm_spike",
    "loss_spike",
    "spike_skipped",
    "amp_overflow",
)


class Timeline:
    """A run's visible steps, kept up to date by reading only what is new.

    It starts from nothing again when an attempt began, which may have hidden steps that were read,
    and when steps of an earlier one were recovered.
    """

    def __init__(self, run_id: int, uid: str = "") -> None:
        self.run_id = run_id
        self.uid = uid  # a store that was deleted and made anew counts its runs from 1 again
        self._past = (-1, -1)
        self._columns: dict[str, np.ndarray[Any, Any]] = {}

    def refresh(self, store: Store) -> None:
        """Read the steps that have come since."""
        past = store.past(self.run_id)
        if past != self._past:
            self._past = past
            self._columns = store.columns(self.run_id, STEP_COLUMNS)
            return
        known = self._columns["step"]
        start = int(known[-1]) + 1 if len(known) else None
        new = store.columns(self.run_id, STEP_COLUMNS, start)
        if len(new["step"]):
            self._columns = {
                name: np.concatenate([column, new[name]]) for name, column in self._columns.items()
            }

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._columns["step"])

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """A column of the record, by step."""
        return self._columns[name]

    def history(self, run: Run) -> History:
        """What the recommendation looks at."""
        return History(
            self["pre_norm"],
            self["threshold"],
            self["clipped"],
            self["nonfinite"],
            optimizer=str(run.settings.get("optimizer", "")),
            policy=", ".join(p["policy"] for p in run.settings.get("policies", [])),
        )


def thin(y: np.ndarray[Any, Any], points: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions of about `points` values that draw the same line.

    MinMaxLTTB (Van Der Donckt et al. 2023, arXiv 2305.00332) over the finite values: extremes are
    kept. A stretch without any that is wide enough to be seen stays a gap.
    """
    if len(y) <= points:
        return np.arange(len(y))
    finite = np.flatnonzero(np.isfinite(y))
    if len(finite) <= points:
        chosen = finite
    else:
        downsampler = MinMaxLTTBDownsampler()
        kept = downsampler.downsample(np.ascontiguousarray(y[finite]), n_out=points)
        chosen = finite[np.asarray(kept, dtype=np.int64)]
    wide = np.flatnonzero(np.diff(finite) > len(y) / points)
    return np.union1d(chosen, finite[wide] + 1)


def _frame(
    timeline: Timeline, keep: np.ndarray[Any, np.dtype[np.int64]], points: int, **columns: Any
) -> pd.DataFrame:
    """Columns at the positions to keep, by step; where steps are missing, a row without values.

    So a line breaks where records were lost. A gap too narrow to be seen is left closed.
    """
    step = timeline["step"]
    jumps = np.diff(step)
    wide = max(1, (step[-1] - step[0]) // points) if len(step) else 1
    gaps = np.flatnonzero(jumps > wide)
    keep = np.union1d(keep, np.concatenate([gaps, gaps + 1]))
    frame = pd.DataFrame(
        {"step": step[keep], **{name: values[keep] for name, values in columns.items()}}
    )
    if not len(gaps):
        return frame
    empty = pd.DataFrame({"step": step[gaps] + 1}).reindex(columns=frame.columns)
    for name in frame.select_dtypes("bool"):
        empty[name] = False
    joined = pd.concat([frame, empty.astype(frame.dtypes)])
    return joined.sort_values("step", kind="stable", ignore_index=True)


def norms_chart(timeline: Timeline, points: int = 1500) -> pd.DataFrame:
    """Step, pre_norm, post_norm, threshold, clipped, time: thinned, for a log axis.

    A norm of 0 has no place on a log axis and is left out, as are non-finite ones.
    """
    pre = timeline["pre_norm"]
    drawable = np.where(pre > 0, pre, np.nan)
    keep = thin(np.log(drawable), points)
    names = ("time", "post_norm", "threshold", "clipped", "skipped")
    columns = {name: timeline[name] for name in names}
    return _frame(timeline, keep, points, pre_norm=drawable, **columns)


def clip_ratio(timeline: Timeline, window: int, points: int = 1500) -> pd.DataFrame:
    """Step and clip_ratio: the share of clipped steps among the last `window`, once that many."""
    clipped = timeline["clipped"].astype(np.float64)
    total = np.concatenate([[0.0], np.cumsum(clipped)])
    if len(clipped) < window:
        return pd.DataFrame({"step": np.empty(0, np.int64), "clip_ratio": np.empty(0)})
    ratio = np.full(len(clipped), np.nan)
    ratio[window - 1 :] = (total[window:] - total[:-window]) / window
    keep = window - 1 + thin(ratio[window - 1 :], points)
    return _frame(timeline, keep, points, clip_ratio=ratio)


def loss_chart(timeline: Timeline, points: int = 1500) -> pd.DataFrame:
    """Step and loss, thinned; empty where no loss was logged."""
    loss = timeline["loss"]
    if not np.isfinite(loss).any():
        return pd.DataFrame({"step": np.empty(0, np.int64), "loss": np.empty(0)})
    keep = thin(loss, points)
    return _frame(timeline, keep, points, loss=loss)


def what_if(timeline: Timeline, threshold: float) -> tuple[float, int]:
    """The share of the norms above a threshold, and how many there are: finite and above 0."""
    norms = timeline["pre_norm"]
    usable = norms[np.isfinite(norms) & (norms > 0)]
    return (float((usable > threshold).mean()) if len(usable) else 0.0), len(usable)


def what_if_curve(
    timeline: Timeline, points: int = 200, include: Sequence[float | None] = ()
) -> pd.DataFrame:
    """Threshold and clip_ratio over the range of the norms, evenly spaced on a log axis.

    `include` are thresholds that are to be among them, where they are within the range.
    """
    norms = timeline["pre_norm"]
    norms = np.sort(norms[np.isfinite(norms) & (norms > 0)])
    if not len(norms):
        return pd.DataFrame({"threshold": np.empty(0), "clip_ratio": np.empty(0)})
    grid = np.geomspace(norms[0] * 0.9, norms[-1] * 1.1, points)
    extra = [value for value in include if value and grid[0] <= value <= grid[-1]]
    grid = np.unique([*(float(f"{value:.3g}") for value in grid), *extra])
    above = len(norms) - np.searchsorted(norms, grid, side="right")
    return pd.DataFrame({"threshold": grid, "clip_ratio": above / len(norms)})


def events_table(store: Store, run_id: int, limit: int = 500) -> pd.DataFrame:
    """The latest events: step, time (UTC), kind, severity, message, parameters, origin, rank."""
    rows = [
        {
            "step": event.step,
            "time": pd.Timestamp(event.time, unit="s", tz="UTC"),
            "kind": event.kind,
            "severity": event.severity,
            "message": event.message,
            "parameters": ", ".join(event.data.get("parameters") or ()),
            "origin": event.data.get("origin") or "",
            "rank": event.rank,
        }
        for event in store.events(run_id, limit=limit)
    ]
    names = ["step", "time", "kind", "severity", "message", "parameters", "origin", "rank"]
    return pd.DataFrame(rows, columns=names)


def runs_table(store: Store, limit: int = 200) -> pd.DataFrame:
    """The latest runs, one a row, with how far each has come."""
    rows = []
    for run in store.runs(limit=limit):
        last = store.last_step(run.id)
        rows.append(
            {
                "id": run.id,
                "name": run.name,
                "status": status_of(run),
                "steps": 0 if last is None else last + 1,
                "optimizer": run.settings.get("optimizer", ""),
                "clip": run.settings.get("clip", ""),
                "started": pd.Timestamp(run.started_at, unit="s", tz="UTC"),
                "host": run.host,
                "job": run.job,
                "tags": ", ".join(f"{key}={value}" for key, value in run.tags.items()),
            }
        )
    names = ["id", "name", "status", "steps", "optimizer", "clip", "started", "host", "job", "tags"]
    return pd.DataFrame(rows, columns=names)
