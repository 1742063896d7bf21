"""What pages show, as frames and numbers: no page, no chart, no store writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tsdownsample import MinMaxLTTBDownsampler

from gradwatch.errors import StoreError
from gradwatch.summaries import BLOCK
from gradwatch_monitor.applying import outcomes
from gradwatch_monitor.bands import Bands
from gradwatch_monitor.diagnose import concluded
from gradwatch_monitor.evidence import BURN_IN
from gradwatch_monitor.history import COLUMNS, History, facts, first_of
from gradwatch_monitor.ratio import clip_ratios
from gradwatch_monitor.stalls import status
from gradwatch_monitor.timeline import RECENT, Blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch_monitor.applying import Applied, Outcome
    from gradwatch_monitor.history import Stretch
    from gradwatch_monitor.rows import Event, Finding
    from gradwatch_monitor.store import Run, Store

__all__ = [
    "MARKS_AT_MOST",
    "Timeline",
    "changes_table",
    "clip_ratio",
    "event_marks",
    "events_table",
    "loss_chart",
    "lr_chart",
    "moment",
    "nonfinite_stretches",
    "norms_chart",
    "runs_table",
    "thin",
    "what_if",
    "what_if_curve",
    "window_of",
]

# Of the record, what is drawn and what the recommendation looks at.
_COLUMNS = (
    "step", "time", "loss", "lr", "pre_norm", "post_norm", "threshold", "loss_scale", "clipped",
    "nonfinite", "nonfinite_loss", "skipped",
)  # fmt: skip
POINTS = 1500  # of a line, at most; bands have three values each, and are a third as many
_SHARE = 0.01  # of a band's steps with NaN or inf, from which on it is drawn
_DRAWN = tuple(name for name in _COLUMNS if name not in {"time", "skipped"})
_DETAILED = 50_000  # steps of a run that is drawn from all of them, not from its blocks
_STRETCH = 10  # steps in a row with NaN or inf, from which on they are drawn as one
MARKS_AT_MOST = 200  # of a kind


class Timeline:
    """A run's visible steps, kept up to date by reading only what is new.

    Of a long run, all but the last steps are blocks of a thousand. It starts from nothing again
    when an attempt began, which may have hidden steps that were read, when steps of an earlier one
    were recovered, and when so many have come that it holds more than it needs.
    """

    def __init__(self, run_id: int, uid: str = "") -> None:
        self.run_id = run_id
        self.uid = uid  # a store that was deleted and made anew counts its runs from 1 again
        self.blocks = Blocks.none()
        self._past = (-1, -1)
        self._first_loss: float | None = None
        self._change: Event | None = None  # the last that was applied
        self._findings: list[Finding] = []
        self._columns: dict[str, np.ndarray[Any, Any]] = {}
        self._older: dict[str, np.ndarray[Any, Any]] | None = None  # the blocks' steps, to be drawn

    def refresh(self, store: Store) -> None:
        """Read the steps that have come since."""
        self._change = store.last_change(self.run_id)
        self._findings = concluded(store, self.run_id)
        past = store.past(self.run_id)
        if past != self._past or len(self["step"]) > 2 * RECENT:
            self._past = past
            self.blocks, self._columns = store.long(self.run_id, _COLUMNS)
            self._first_loss = store.first_loss(self.run_id) if self.blocks.steps else None
            self._older = self._detail(store)
            return
        known = self._columns["step"]
        start = int(known[-1]) + 1 if len(known) else None
        new = store.columns(self.run_id, _COLUMNS, start)
        if len(new["step"]):
            self._columns = {
                name: np.concatenate([column, new[name]]) for name, column in self._columns.items()
            }

    def _detail(self, store: Store) -> dict[str, np.ndarray[Any, Any]] | None:
        """What is drawn of the blocks' steps, where they are few and all of them are left."""
        if not self.blocks.steps or len(self) > _DETAILED:
            return None
        steps = self["step"]
        stop = int(steps[0]) if len(steps) else None
        older = store.columns(self.run_id, _DRAWN, stop=stop)
        return older if len(older["step"]) == self.blocks.steps else None

    def __len__(self) -> int:
        """How many steps there are."""
        return self.blocks.steps + len(self._columns["step"])

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """A column of the record, by step: of the last steps, where there are blocks."""
        return self._columns[name]

    @property
    def last_step(self) -> int:
        """The greatest step; there has to be one."""
        return int(np.concatenate([self.blocks.column("last_step"), self["step"]])[-1])

    def history(self, run: Run) -> History:
        """What the recommendation looks at."""
        first = first_of(self.blocks, self["step"])
        return self._history(**facts(run, first, self._change, self._findings))

    def _history(self, **told: Any) -> History:
        norms, threshold, clipped, nonfinite, loss = (self[name] for name in COLUMNS)
        blocks, first = self.blocks, self._first_loss
        return History(
            norms, threshold, clipped, nonfinite, loss, blocks=blocks, first_loss=first, **told
        )

    @property
    def late(self) -> Stretch:
        """The run after its first fifth, as `recommend` sees it."""
        return self._history().since(BURN_IN)

    def bands(self, points: int = POINTS) -> Bands | None:
        """What charts draw of a run that is longer than what is read step by step; else None."""
        first = first_of(self.blocks, self["step"])
        if first is None:
            return None
        edge = (self.last_step + 1 - RECENT) // BLOCK * BLOCK  # as where the run is read anew
        if not self.blocks.steps and edge <= first:
            return None
        if self._older is None or len(self) > _DETAILED:
            return Bands.of(self.blocks, self._columns, points)
        pieces = {name: np.concatenate([self._older[name], self[name]]) for name in _DRAWN}
        return Bands.of(Blocks.none(), pieces, points)

    @property
    def has_nonfinite_loss(self) -> bool:
        """Whether a loss was logged that was NaN or inf."""
        return bool(self.blocks.column("nonfinite_loss").any() or self["nonfinite_loss"].any())

    def outcomes(self, store: Store, changes: Sequence[Applied]) -> list[Outcome]:
        """What came of each change; a block that one falls into is read step by step."""
        names = ("step", "pre_norm", "clipped")
        first, last = (self.blocks.column(f"{end}_step") for end in ("first", "last"))
        at = np.array([change.step for change in changes])[:, None]
        cut = np.asarray(((first < at) & (at <= last)).any(axis=0))
        pieces = [
            store.columns(self.run_id, names, int(start), int(stop) + 1)
            for start, stop in zip(first[cut], last[cut], strict=True)
        ]
        pieces.append({name: self[name] for name in names})
        columns = (np.concatenate([piece[name] for piece in pieces]) for name in names)
        return outcomes(changes, *columns, blocks=self.blocks.only(np.logical_not(cut)))


def thin(
    y: np.ndarray[Any, Any], points: int, x: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions of about `points` values that draw the same line; at `x`, or evenly apart.

    MinMaxLTTB (Van Der Donckt et al. 2023, arXiv 2305.00332) over the finite values: extremes are
    kept, and so are both ends. A stretch without any that is wide enough to be seen stays a gap.
    """
    if len(y) <= points:
        return np.arange(len(y))
    at = np.arange(len(y)) if x is None else x
    finite = np.flatnonzero(np.isfinite(y))
    if len(finite) <= points:
        chosen = finite
    else:
        drawn = [np.ascontiguousarray(values[finite]) for values in ((y,) if x is None else (x, y))]
        chosen = finite[MinMaxLTTBDownsampler().downsample(*drawn, n_out=points).astype(np.int64)]
    wide = (np.diff(finite) > 1) & (np.diff(at[finite]) > (at[-1] - at[0] + 1) / points)
    return np.union1d(chosen, [*(finite[np.flatnonzero(wide)] + 1), 0, len(y) - 1])


def _frame(
    columns: dict[str, Any], keep: np.ndarray[Any, np.dtype[np.int64]], points: int
) -> pd.DataFrame:
    """Columns at the positions to keep, by step; where steps are missing, a row without values.

    So a line breaks where records were lost. A gap too narrow to be seen is left closed, and so is
    one that is no wider than twice what one in ten is, as they are where steps were thinned evenly.
    """
    step = columns["step"]
    wide = max(1, (step[-1] - step[0]) // points) if len(step) else 1
    jumps = np.diff(step)
    usual = np.quantile(jumps, 0.9, method="lower") if len(jumps) else 1
    gaps = np.flatnonzero(jumps > (wide if usual <= 1 else max(wide, 2 * usual)))
    keep = np.union1d(keep, np.concatenate([gaps, gaps + 1]))
    frame = pd.DataFrame({name: values[keep] for name, values in columns.items()})
    if not len(gaps):
        return frame
    empty = pd.DataFrame({"step": step[gaps] + 1}).reindex(columns=frame.columns)
    for name in frame.select_dtypes("bool"):
        empty[name] = False
    joined = pd.concat([frame, empty.astype(frame.dtypes)])
    return joined.sort_values("step", kind="stable", ignore_index=True)


def norms_chart(timeline: Timeline, points: int = POINTS) -> pd.DataFrame:
    """Step, pre_norm, post_norm, threshold, clipped, time: thinned, for a log axis.

    A norm of 0 has no place on a log axis and is left out, as are non-finite ones. Of a long run,
    bands (step, to) with _min, _geomean, _max and _last of each.
    """
    names = ("pre_norm", "post_norm", "threshold")
    if (bands := timeline.bands(points)) is not None:
        pre, post, limit = (bands.columns(name, geometric=True) for name in names)
        return bands.frame(**pre, **post, **limit)
    shown = ("step", "pre_norm", "time", "post_norm", "threshold", "clipped", "skipped")
    columns = {name: timeline[name] for name in shown}
    norms = columns["pre_norm"]
    columns["pre_norm"] = np.where(norms > 0, norms, np.nan)
    keep = thin(np.log(columns["pre_norm"]), points)
    for name in ("post_norm", "threshold"):
        keep = np.union1d(keep, _corners(columns[name], points // 2))
    return _frame(columns, keep, points)


def _corners(values: np.ndarray[Any, Any], points: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions of about `points` values that draw the same line: where it moves, if it seldom does."""
    moves = np.flatnonzero(np.diff(values) != 0)
    moves = np.union1d(moves, moves + 1)
    return moves if len(moves) <= points else thin(values, points)


def nonfinite_stretches(timeline: Timeline) -> pd.DataFrame:
    """First and last step of each stretch of at least ten in a row with NaN or inf in the gradient.

    Of a long run, the bands in which at least ten and a hundredth of the steps had, and the `share`.
    """
    if (bands := timeline.bands()) is not None:
        count, steps = bands.total("nonfinite"), bands.total("steps")
        bad = (count >= _STRETCH) & (count >= _SHARE * steps)
        columns = {"step": bands.step, "to": bands.to - 1, "share": count / steps}
        frame = pd.DataFrame(columns)[bad]
        goes_on = (frame["step"] == frame["to"].shift() + 1) & (frame["share"] == 1)
        stretch = (~(goes_on & (frame["share"].shift() == 1))).cumsum()
        frame = frame.groupby(stretch).agg({"step": "first", "to": "last", "share": "first"})
        return frame.reset_index(drop=True)
    bad = timeline["nonfinite"].astype(np.int8)
    edges = np.diff(bad, prepend=0, append=0)
    start, stop = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    step = timeline["step"]
    frame = pd.DataFrame({"step": step[start], "to": step[stop]})
    return frame[frame["to"] - frame["step"] >= _STRETCH - 1].reset_index(drop=True)


def window_of(timeline: Timeline, window: int) -> int:
    """Over how many steps the clip ratio is drawn: `window`, or those of a long run's bands."""
    bands = timeline.bands()
    return window if bands is None else bands.width


def clip_ratio(timeline: Timeline, window: int, points: int = POINTS) -> pd.DataFrame:
    """Step and clip_ratio: clipped steps over those with a finite gradient norm.

    Among the last `window` steps, once there are that many. Of a long run, in each band (step, to).
    """
    if (bands := timeline.bands(points)) is not None:
        ratio = clip_ratios(bands.total("clipped"), bands.finite)
        return bands.frame(clip_ratio=ratio) if np.isfinite(ratio).any() else _nothing("clip_ratio")
    flags = timeline["clipped"], np.isfinite(timeline["pre_norm"])
    if len(flags[0]) < window:
        return _nothing("clip_ratio")
    ratio = clip_ratios(*(_rolling_sum(values, window) for values in flags))
    if not np.isfinite(ratio).any():
        return _nothing("clip_ratio")
    columns = {"step": timeline["step"][window - 1 :], "clip_ratio": ratio}
    return _frame(columns, thin(ratio, points), points)


def _rolling_sum(flags: np.ndarray[Any, Any], window: int) -> np.ndarray[Any, Any]:
    """How many of each `window` in a row are set."""
    total = np.concatenate([[0], np.cumsum(flags)])
    return np.asarray(total[window:] - total[:-window])


def loss_chart(timeline: Timeline, points: int = POINTS) -> pd.DataFrame:
    """Step and loss, thinned; empty where no finite one was logged.

    Steps without one are left out, as where each tenth is logged; one that was NaN is a gap. Of a
    long run, bands (step, to) with loss_min, loss_mean, loss_geomean, loss_max and loss_last.
    """
    if (bands := timeline.bands(points)) is not None:
        columns = bands.columns("loss", geometric=False)
        columns["loss_geomean"] = bands.values("loss", geometric=True).mean
        known = np.isfinite(columns["loss_min"])
        if not known.any():
            return _nothing("loss")
        frame = bands.frame(**columns, logged=known | (bands.total("nonfinite_loss") > 0))
        return frame[frame.pop("logged") != False].reset_index(drop=True)  # noqa: E712 - NaN in gaps
    loss, bad = timeline["loss"], timeline["nonfinite_loss"]
    if not np.isfinite(loss).any():
        return _nothing("loss")
    logged = np.flatnonzero(np.isfinite(loss) | bad)
    keep = logged[thin(loss[logged], points, timeline["step"][logged])]
    return _frame({"step": timeline["step"], "loss": loss}, keep, points)


def lr_chart(timeline: Timeline, points: int = POINTS) -> pd.DataFrame:
    """Step and lr, thinned; empty where the optimizer has none.

    Of a long run, bands (step, to) with lr_min, lr_mean, lr_max and lr_last.
    """
    if (bands := timeline.bands(points)) is not None:
        columns = bands.columns("lr", geometric=False)
        known = np.isfinite(columns["lr_min"]).any()
        return bands.frame(**columns) if known else _nothing("lr")
    rates = timeline["lr"]
    if not np.isfinite(rates).any():
        return _nothing("lr")
    return _frame({"step": timeline["step"], "lr": rates}, thin(rates, points), points)


def _nothing(name: str) -> pd.DataFrame:
    return pd.DataFrame({"step": np.empty(0, np.int64), name: np.empty(0)})


def what_if(timeline: Timeline, threshold: float) -> tuple[float, int]:
    """The clip ratio at a threshold, and of how many steps it is.

    They are those with a finite norm after the run's first fifth, which a recommendation rests on.
    """
    late = timeline.late
    return late.ratio(threshold), late.finite


def what_if_curve(
    timeline: Timeline, points: int = 200, include: Sequence[float | None] = ()
) -> pd.DataFrame:
    """Threshold and clip_ratio over the range of the norms above 0, evenly spaced on a log axis.

    The steps are those of `what_if`.
    `include` are thresholds that are to be among them, where they are within the range.
    """
    late = timeline.late
    if not late.count:
        return pd.DataFrame({"threshold": np.empty(0), "clip_ratio": np.empty(0)})
    least, greatest = late.distribution.range
    grid = np.geomspace(least * 0.9, greatest * 1.1, points)
    extra = [value for value in include if value and grid[0] <= value <= grid[-1]]
    grid = np.unique([*(float(f"{value:.3g}") for value in grid), *extra])
    return pd.DataFrame({"threshold": grid, "clip_ratio": late.every.share(grid)})


def events_table(store: Store, run_id: int, limit: int = 500) -> pd.DataFrame:
    """The latest events: step, time (UTC), kind, severity, message, parameters, origin, rank."""
    return _events_frame(store.events(run_id, limit=limit))


def event_marks(store: Store, run_id: int, kinds: Iterable[str]) -> pd.DataFrame:
    """The same for what charts mark: of each kind the latest, `MARKS_AT_MOST` of them."""
    found = (store.events(run_id, kind=kind, limit=MARKS_AT_MOST) for kind in kinds)
    return _events_frame([event for of_kind in found for event in of_kind])


def _events_frame(events: Sequence[Event]) -> pd.DataFrame:
    rows = [
        {
            "step": event.step,
            "time": moment(event.time),
            "kind": event.kind,
            "severity": event.severity,
            "message": event.message,
            "parameters": ", ".join(event.data.get("parameters") or ()),
            "origin": event.data.get("origin") or "",
            "rank": event.rank,
        }
        for event in events
    ]
    names = ["step", "time", "kind", "severity", "message", "parameters", "origin", "rank"]
    return pd.DataFrame(rows, columns=names)


def changes_table(changes: Sequence[Applied]) -> pd.DataFrame:
    """The changes that the job made, by step: step, time (UTC), from, to, by, reason, clip."""
    rows = [
        {
            "step": change.step,
            "time": moment(change.time),
            "from": change.old,
            "to": change.new,
            "clip": change.clip,
            "by": change.by,
            "reason": change.reason or "",
        }
        for change in changes
    ]
    return pd.DataFrame(rows, columns=["step", "time", "from", "to", "clip", "by", "reason"])


def moment(seconds: float) -> pd.Timestamp:
    """A moment in UTC; NaT where it is unknown, or none that a calendar has."""
    try:
        return pd.Timestamp(seconds, unit="s", tz="UTC")
    except (ValueError, OverflowError):
        return pd.NaT  # type: ignore[return-value]


def runs_table(store: Store, limit: int = 200) -> pd.DataFrame:
    """The latest runs, one a row, with how far each has come."""
    rows = []
    for run in store.runs(limit=limit):
        try:
            last = store.last_taken(run.id)
            steps = 0 if last is None else last.step + 1
        except StoreError:  # a part of the file is damaged: the other runs are shown all the same
            last, steps = None, None
        rows.append(
            {
                "uid": run.uid,
                "id": run.id,
                "name": run.name,
                "status": status(store, run),
                "steps": steps,
                "last step": None if last is None else moment(last.time),
                "optimizer": run.settings.get("optimizer", ""),
                "clip": run.settings.get("clip", ""),
                "started": moment(run.started_at),
                "host": run.host,
                "job": run.job,
                "tags": ", ".join(f"{key}={value}" for key, value in run.tags.items()),
            }
        )
    names = ["uid", "id", "name", "status", "steps", "last step", "optimizer", "clip", "started", "host",
             "job", "tags"]  # fmt: skip
    frame = pd.DataFrame(rows, columns=names)
    frame["last step"] = pd.to_datetime(frame["last step"], utc=True)
    return frame
