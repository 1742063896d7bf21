"""Queries on a run's visible timeline: its steps, and of a long run the summaries of its blocks.

The last 20,000 steps are read as they are, what lies before as blocks of a thousand. A block
without a summary, or one that a later attempt cuts, is summarised here, from its records.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import sqlalchemy as sa

from gradwatch import schema
from gradwatch.cells import (
    LARGEST,
    LEAST,
    MOST,
    flags,
    malformed_in,
    numbers,
    whole,
    whole_numbers,
)
from gradwatch.schema import step_records, step_summaries
from gradwatch.sinks import blocks
from gradwatch.sinks.rows import Stored
from gradwatch.summaries import BLOCK, Histograms, are_histograms, decode
from gradwatch_monitor.rows import Summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "RECENT",
    "STEP_COLUMNS",
    "Blocks",
    "Part",
    "Taken",
    "columns",
    "last_step",
    "last_taken",
    "read",
    "summary",
    "visible",
]

Columns = dict[str, np.ndarray[Any, Any]]

RECENT = 20_000  # steps that are read as they are
STEP_COLUMNS = tuple(c.name for c in step_records.columns if c.name not in {"run_id", "attempt"})
_END = 2**63 - 1
_FLAGS = {"clipped", "nonfinite", "nonfinite_loss", "skipped"}
_COUNTS = {"steps", "finite", "zeros", "amp_overflows", "first_step", "last_step", *_FLAGS}
_PARTS = {"finite", "zeros", "amp_overflows", *_FLAGS}  # of the steps of a block
_KEY = ("attempt", "block")
_NUMBERS = tuple(c.name for c in step_summaries.columns if c.name not in {"run_id", "norms", *_KEY})
_ALWAYS = ("first_step", "last_step", "steps")
_COUNTED = (
    "finite",
    "clipped",
    "nonfinite",
    "skipped",
    "amp_overflows",
    "no_gradient",
    "last_time",
    "loss",
    "pre_norm",
    "threshold",
)
_TOGETHER = 100  # blocks that are summarised at a time
_steps = sa.table("steps", *(sa.column(c.name, c.type) for c in step_records.columns))


class Blocks(NamedTuple):
    """Summarised blocks in the order of their steps: arrays by the columns of `step_summaries`."""

    columns: Mapping[str, np.ndarray[Any, Any]]
    histograms: Histograms

    @classmethod
    def none(cls) -> Self:
        """No blocks at all."""
        return cls({name: np.empty(0, _block_dtype(name)) for name in _NUMBERS}, decode([]))

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """One of them."""
        return self.columns[name]

    def only(self, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> Self:
        """Those of them that are marked."""
        bins, weights, block = self.histograms
        of_kept = kept[block]
        place = np.cumsum(kept, dtype=np.int32) - 1
        return type(self)(
            {name: column[kept] for name, column in self.columns.items()},
            Histograms(bins[of_kept], weights[of_kept], place[block[of_kept]]),
        )

    @property
    def steps(self) -> int:
        """How many steps they have together."""
        return int(self.columns["steps"].sum())


class Part(NamedTuple):
    """The steps of an attempt that show: [start, stop)."""

    attempt: int
    start: int
    stop: int


class Taken(NamedTuple):
    """A step, and when it was taken, in Unix seconds."""

    step: int
    time: float


def columns(
    connection: sa.Connection,
    run_id: int,
    names: Sequence[str],
    start: int | None = None,
    stop: int | None = None,
) -> Columns:
    """Columns of the visible steps in [start, stop), by step; NaN where a value is absent.

    Part by part: asked of the view, SQLite would go by its upper bound and not by `stop`.
    """
    r = step_records.c
    rows: list[Any] = []
    for part in visible(connection, run_id):
        query = (
            sa.select(*(r[name] for name in names))
            .where(r.run_id == run_id, r.attempt == part.attempt)
            .where(r.step < (part.stop if stop is None else min(stop, part.stop)))
            .order_by(r.step)
        )
        if start is not None:
            query = query.where(r.step >= start)
        rows += _rows(connection, query)
    values = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    return _arrays(connection, run_id, dict(zip(names, values, strict=True)))


def _arrays(connection: sa.Connection, run_id: int, values: Mapping[str, Sequence[Any]]) -> Columns:
    """Columns of `step_records` as arrays; cells that cannot be right are noted."""
    malformed = malformed_in(connection)
    found: Columns = {}
    kept = None
    for name, column in values.items():
        note = functools.partial(malformed.note, f"step_records.{name}", f"run {run_id}")
        if name == "step":
            found[name], kept = whole_numbers(column)
            if kept is not None:
                note()
        else:
            found[name] = (flags if name in _FLAGS else numbers)(column, note)
    return found if kept is None else {name: column[kept] for name, column in found.items()}


def read(
    connection: sa.Connection,
    run_id: int,
    names: Sequence[str],
    recent: int = RECENT,
    of_blocks: Sequence[str] | None = None,
) -> tuple[Blocks, Columns]:
    """The run but for some `recent` steps as blocks, and these steps as `columns` gives them.

    `of_blocks`: the columns of the blocks, all by default; what orders and counts them is there
    in any case.
    """
    parts = visible(connection, run_id)
    edge = _edge(connection, run_id, parts, recent)
    old = _blocks(connection, run_id, parts, edge, of_blocks)
    return old, columns(connection, run_id, names, edge)


def summary(connection: sa.Connection, run_id: int) -> Summary:
    """Counts and last values of a run."""
    parts = visible(connection, run_id)
    edge = _edge(connection, run_id, parts, RECENT)
    old = _blocks(connection, run_id, parts, edge, _COUNTED, norms=False)
    s = _steps.c
    overflow = sa.and_(s.skipped, sa.not_(s.nonfinite), s.pre_norm.is_(None))
    counts = {
        "steps": sa.func.count(),
        "finite": sa.func.count(s.pre_norm),
        "clipped": _count(s.clipped),
        "nonfinite": _count(s.nonfinite),
        "skipped": _count(s.skipped),
        "amp_overflows": _count(sa.and_(overflow, s.loss_scale.is_not(None))),
    }
    absent = _count(_without_gradient(s)).label("no_gradient")
    found = connection.execute(
        sa.select(absent, *(count.label(name) for name, count in counts.items())).where(
            s.run_id == run_id, s.step >= edge
        )
    ).one()
    total = {name: int(old.column(name).sum()) + found._mapping[name] for name in counts}
    total["no_gradient"] = found.no_gradient + _absent_in(old)
    news = {
        f"last_{name}": _last(connection, run_id, parts, name, edge)
        for name in ("step", "time", "loss", "pre_norm", "threshold")
    }
    olds = {"last_step": "last_step", "last_time": "last_time", "last_loss": "loss",
            "last_pre_norm": "pre_norm", "last_threshold": "threshold"}  # fmt: skip
    for name, column in olds.items():
        if news[name] is None:
            news[name] = _last_of(old.column(column))
    return Summary(**total, **news)


def _without_gradient(record: Any) -> sa.ColumnElement[bool]:
    """The condition for a step without any gradient, as `ratio.without_gradient` has it."""
    explained = sa.or_(record.nonfinite, record.skipped)
    return sa.and_(record.pre_norm.is_(None), sa.not_(explained))


def _absent_in(old: Blocks) -> int:
    """How many steps of these blocks had no gradient.

    Of a block that an older version summed up, and whose records are gone, only the steps without a
    finite norm that no other reason can explain are counted.
    """
    column = old.column
    explained = column("nonfinite") + column("skipped")
    at_least = (column("steps") - column("finite") - explained).clip(min=0)
    known = column("no_gradient")
    return int(np.where(np.isnan(known), at_least, known).sum())


def last_step(connection: sa.Connection, run_id: int) -> int | None:
    """The greatest step of the visible timeline; None before the first."""
    found = _last(connection, run_id, visible(connection, run_id), "step")
    return None if found is None else int(found)


def last_taken(connection: sa.Connection, run_id: int) -> Taken | None:
    """The last step of the visible timeline, and when it was taken; None before the first."""
    r = step_records.c
    for part in reversed(visible(connection, run_id)):
        found = connection.execute(
            sa.select(r.step, r.time)
            .where(r.run_id == run_id, r.attempt == part.attempt, r.step < part.stop)
            .order_by(r.step.desc())
            .limit(1)
        ).first()
        if found is not None:
            return Taken(int(found.step), float(found.time))
    return None


# -- parts of the timeline -------------------------------------------------------------------------


def visible(connection: sa.Connection, run_id: int) -> list[Part]:
    """The visible parts, in the order of their steps."""
    a = schema.attempts.c
    query = sa.select(a.attempt, a.start_step).where(a.run_id == run_id)
    parts, stop = [], _END
    for row in connection.execute(query.order_by(a.position.desc())).all():
        attempt, start = whole(row.attempt), whole(row.start_step)
        if attempt is None or start is None:
            malformed_in(connection).note("attempts.start_step", f"run {run_id}")
        if attempt is None:
            continue
        if start is None:  # it began with its first record at the latest
            start = _first(connection, run_id, attempt)
        parts.append(Part(attempt, start, stop))
        stop = min(stop, start)
    return parts[::-1]


def _first(connection: sa.Connection, run_id: int, attempt: int) -> int:
    r = step_records.c
    mine = sa.select(r.step).where(r.run_id == run_id, r.attempt == attempt)
    found = connection.execute(mine.order_by(r.step).limit(1)).scalar()
    first = whole(found)
    return _END if first is None else first


def _last(
    connection: sa.Connection, run_id: int, parts: list[Part], name: str, edge: int = 0
) -> Any:
    """The last number in a column, not before the step `edge`; None without one.

    From the visible part of the latest attempt back: the view would read the whole run.
    """
    r = step_records.c
    # What is no number sorts after all that are, and so does PostgreSQL's NaN.
    least, most = (LEAST, MOST) if name == "step" else (-LARGEST, LARGEST)
    for part in reversed(parts):
        query = (
            sa.select(r[name])
            .where(r.run_id == run_id, r.attempt == part.attempt, r.step < part.stop)
            .where(r.step >= edge, r[name].between(least, most))
            .order_by(r.step.desc())
            .limit(1)
        )
        found = connection.execute(query).scalar()
        if found is not None:
            return found
    return None


def _edge(connection: sa.Connection, run_id: int, parts: list[Part], recent: int) -> int:
    """The step from which on steps are read as they are: that of a block, or 0."""
    last = _last(connection, run_id, parts, "step")
    if last is None:  # nothing is left but summaries
        return _END // BLOCK * BLOCK
    edge = max(0, int(last + 1 - recent) // BLOCK * BLOCK)
    r, s = step_records.c, step_summaries.c
    for part in parts:
        first = connection.execute(
            sa.select(r.step)
            .where(r.run_id == run_id, r.attempt == part.attempt, r.step.between(edge, MOST))
            .order_by(r.step)
            .limit(1)
        ).scalar()
        pruned = connection.execute(  # after the edge, but only the summary is left
            sa.select(s.block)
            .where(s.run_id == run_id, s.attempt == part.attempt)
            .where(s.block.between(edge // BLOCK, MOST // BLOCK - 1))
            .where(s.last_step < part.stop, s.first_step < (_END if first is None else first))
            .order_by(s.block.desc())
            .limit(1)
        ).scalar()
        edge = edge if pruned is None else (int(pruned) + 1) * BLOCK
    return edge


# -- blocks ----------------------------------------------------------------------------------------


def _blocks(
    connection: sa.Connection,
    run_id: int,
    parts: list[Part],
    edge: int,
    wanted: Sequence[str] | None = None,
    *,
    norms: bool = True,
) -> Blocks:
    """What shows before the step `edge`, a multiple of a block's length, by blocks."""
    if edge == 0:
        return Blocks.none()
    table = step_summaries.c
    wanted = _NUMBERS if wanted is None else tuple(dict.fromkeys([*_ALWAYS, *wanted]))
    names = (*_KEY, *wanted, *(["norms"] if norms else []))
    query = sa.select(*(table[name] for name in names)).where(
        table.run_id == run_id, table.block < edge // BLOCK
    )
    found = _rows(connection, query)
    values = dict(zip(names, zip(*found, strict=True) if found else [()] * len(names), strict=True))
    stored, good = _summary_arrays(connection, run_id, values)
    stops = {part.attempt: part.stop for part in parts}
    shown = good & (
        stored["last_step"]
        < np.array([stops.get(one, 0) for one in stored["attempt"].tolist()], np.int64)
    )
    missing = [
        row
        for part in parts
        for row in _summarised(
            connection,
            run_id,
            part,
            stored["block"][shown & (stored["attempt"] == part.attempt)],
            edge,
        )
    ]
    columns = {
        name: np.concatenate(
            [stored[name][shown], np.array([row[name] for row in missing], _block_dtype(name))]
        )
        for name in wanted
    }
    order = np.argsort(columns["first_step"], kind="stable")
    blobs = [b for b, kept in zip(values["norms"], shown, strict=True) if kept] if norms else []
    blobs += [row["norms"] for row in missing] if norms else []
    return Blocks(
        {name: column[order] for name, column in columns.items()},
        decode([blobs[i] for i in order] if norms else []),
    )


def _summary_arrays(
    connection: sa.Connection, run_id: int, values: Mapping[str, Sequence[Any]]
) -> tuple[Columns, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Columns of `step_summaries` as arrays, and which rows can be right: of the others the steps are read."""
    malformed = malformed_in(connection)
    found: Columns = {}
    good = np.ones(len(values["block"]), np.bool_)
    for name, column in values.items():
        if name in _COUNTS or name in _KEY:
            found[name], there = whole_numbers(column)
            good &= True if there is None else there
        elif name != "norms":
            note = functools.partial(malformed.note, f"step_summaries.{name}", f"run {run_id}")
            found[name] = numbers(column, note)
    good &= found["first_step"] // BLOCK == found["block"]
    good &= found["last_step"] // BLOCK == found["block"]
    good &= found["first_step"] <= found["last_step"]
    # On PostgreSQL a step can be there twice.
    good &= (found["steps"] > 0) & (found["steps"] <= 2 * BLOCK)
    for name in found.keys() & _PARTS:
        good &= (found[name] >= 0) & (found[name] <= found["steps"])
    if "norms" in values:
        norms = None
        if {"finite", "zeros"} <= found.keys():
            norms = found["finite"] - found["zeros"]
        good &= are_histograms(values["norms"], norms)
    if not good.all():
        malformed.note("step_summaries", f"run {run_id}")
    return found, good


def _summarised(
    connection: sa.Connection, run_id: int, part: Part, have: np.ndarray[Any, Any], edge: int
) -> Iterator[dict[str, Any]]:
    """The rows of the blocks of a part that are not among those we `have`, from its records."""
    stored = Stored(run_id, part.attempt)
    r = step_records.c
    within = sa.select(r.step).where(
        r.run_id == run_id, r.attempt == part.attempt, r.step < min(part.stop, edge)
    )
    first = connection.execute(within.order_by(r.step).limit(1)).scalar()
    if first is None:
        return
    last = connection.execute(within.order_by(r.step.desc()).limit(1)).scalar_one()
    ends = int(first) // BLOCK - 1, int(last) // BLOCK + 1
    known = np.sort(have[(have > ends[0]) & (have < ends[1])])
    borders = [ends[0], *known.tolist(), ends[1]]
    for before, after in itertools.pairwise(borders):
        block: int | None = before + 1
        # By what is there, not block by block: a step may be far away from all others.
        while block is not None and block < after:
            following = within.where(r.step >= block * BLOCK).order_by(r.step).limit(1)
            found = connection.execute(following).scalar()
            block = None if found is None else int(found) // BLOCK
            if block is None or block >= after:
                break
            stop = min(block + _TOGETHER, after)
            records = blocks.records_of(
                connection, stored, block * BLOCK, min(stop * BLOCK, part.stop)
            )
            yield from blocks.rows_of(records)
            block = stop


def _rows(connection: sa.Connection, query: sa.Select[Any]) -> Sequence[Any]:
    """All rows of a query that has many, as the driver gives them: in half the time."""
    sql = query.compile(connection, compile_kwargs={"literal_binds": True})
    with connection.exec_driver_sql(str(sql), execution_options={"binary": True}) as found:
        return found.cursor.fetchall() if found.cursor is not None else ()


def _last_of(values: np.ndarray[Any, Any]) -> Any:
    there = values[np.isfinite(values)]
    return there[-1].item() if len(there) else None


def _block_dtype(name: str) -> type:
    return np.int64 if name in _COUNTS else np.float64


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(sa.case((condition, 1), else_=0)), 0)
