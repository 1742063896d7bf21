"""Is a store whole? Damaged pages, rows of runs that are not there, steps missing or twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from gradwatch import schema
from gradwatch.cells import LEAST, MOST, document, whole
from gradwatch.config import sqlite_path
from gradwatch.errors import StoreError, StoreNotFoundError
from gradwatch.summaries import BLOCK
from gradwatch_monitor.malformed import misfits
from gradwatch_monitor.shapes import event_data
from gradwatch_monitor.store import Store
from gradwatch_monitor.timeline import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Problem", "check"]

_STEPS_LOST = ("ring_full", "torn", "error", "thinned")  # in the data of a `records_dropped` event


class Problem(NamedTuple):
    """One thing that is wrong."""

    kind: str
    detail: str


def check(
    url: str, *, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> list[Problem]:
    """Everything that is wrong; `progress` hears of how many attempts of how many were looked at.

    Raises `StoreNotFoundError` where there is no store.
    """
    try:
        store = Store(url)
    except StoreNotFoundError:
        raise
    except StoreError as error:
        return [Problem("store", str(error))]
    with store:
        try:
            with store._reading() as connection:
                return [*_examine(connection, store, progress)]
        except StoreError as error:  # damaged so that it cannot be read to its end
            return [Problem("store", str(error))]


def _examine(
    connection: sa.Connection, store: Store, progress: Callable[[int, int], None]
) -> Iterator[Problem]:
    if sqlite_path(store._url) is not None:
        for (told,) in connection.exec_driver_sql("PRAGMA integrity_check(20)"):
            if told != "ok":
                yield Problem("damage", told)
        for table, _, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            yield Problem("orphan", f"{table} has a row of a run that is not in {parent}")
    yield from _orphans(connection)
    for misfit in misfits(connection):
        yield Problem("malformed", f"{misfit.sentence}: readers take them as unknown")
    attempts, runs = schema.attempts, schema.runs
    found = connection.execute(
        sa.select(attempts.c.run_id, attempts.c.attempt, attempts.c.start_step, runs.c.name)
        .join(runs, runs.c.id == attempts.c.run_id)
        .order_by(attempts.c.run_id, attempts.c.attempt)
    ).all()
    for done, (run_id, attempt, start, name) in enumerate(found):
        progress(done, len(found))
        where = f"run {name!r} (id {run_id}), attempt {attempt}"
        yield from _gaps(connection, run_id, attempt, start, where)
        shown = {part.attempt: part.stop for part in visible(connection, run_id)}
        yield from _stale(connection, run_id, attempt, shown.get(attempt, 0), where)
    progress(len(found), len(found))


def _orphans(connection: sa.Connection) -> Iterator[Problem]:
    """Rows that belong to no attempt; found by skipping from attempt to attempt along the key."""
    attempts = schema.attempts
    known = {
        tuple(row) for row in connection.execute(sa.select(attempts.c.run_id, attempts.c.attempt))
    }
    for table in (schema.step_records, schema.step_summaries, schema.layer_norms):
        pair = sa.tuple_(table.c.run_id, table.c.attempt)
        at: tuple[int, int] | None = None
        while True:
            query = sa.select(table.c.run_id, table.c.attempt).order_by(
                table.c.run_id, table.c.attempt
            )
            if at is not None:
                query = query.where(pair > sa.tuple_(*at))
            row = connection.execute(query.limit(1)).one_or_none()
            if row is None:
                break
            at = (row.run_id, row.attempt)
            if at not in known:
                yield Problem(
                    "orphan",
                    f"{table.name} has rows of attempt {at[1]} of run {at[0]}: no such one",
                )


def _gaps(
    connection: sa.Connection, run_id: int, attempt: int, start: Any, where: str
) -> Iterator[Problem]:
    """Steps between the first that is left and what the flight recorders' cursors say."""
    records, rings = schema.step_records.c, schema.rings.c
    mine = (records.run_id == run_id, records.attempt == attempt)
    count, distinct, first, last = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count(records.step.distinct()),
            sa.func.min(records.step),
            sa.func.max(records.step),
        ).where(*mine, records.step.between(LEAST, MOST))
    ).one()
    if count > distinct:
        yield Problem("doubled", f"{where}: {count - distinct} steps are there twice")
    stored = connection.execute(
        sa.select(sa.func.max(rings.step_cursor)).where(
            rings.run_id == run_id,
            rings.attempt == attempt,
            rings.rank == 0,
            rings.step_cursor.between(0, MOST),
        )
    ).scalar()
    if first is None:  # none was recorded, or all were pruned
        return
    events = schema.events.c
    dropped = connection.execute(
        sa.select(events.data).where(
            events.run_id == run_id,
            events.attempt == attempt,
            events.kind == "records_dropped",
            events.rank == 0,
        )
    ).all()
    known = [event_data(document(data) or {}, lambda: None) for (data,) in dropped]
    told = {why: sum(int(data.get(why, 0)) for data in known) for why in _STEPS_LOST}
    lost = sum(told.values())
    start = whole(start) or 0
    first, last = int(first), int(last)
    # What could not be recorded never was in a flight recorder, and did not move its cursor.
    end = last + 1 if stored is None else max(last + 1, start + stored + told["error"])
    missing = end - first - distinct
    if missing > lost:
        yield Problem(
            "missing",
            f"{where}: {missing - lost} of the steps {first} to {end - 1} are not there, though "
            "they were stored",
        )


def _stale(
    connection: sa.Connection, run_id: int, attempt: int, stop: int, where: str
) -> Iterator[Problem]:
    """Summaries of fewer of the steps that show than there are; of more, where some were pruned."""
    records, summaries = schema.step_records.c, schema.step_summaries.c
    block = (records.step - records.step % BLOCK) / BLOCK
    counted = (
        sa.select(sa.cast(block, sa.BigInteger).label("block"), sa.func.count().label("steps"))
        .where(records.run_id == run_id, records.attempt == attempt, records.step < stop)
        .group_by(block)
        .subquery()
    )
    stale = connection.execute(
        sa.select(summaries.block)
        .join(counted, counted.c.block == summaries.block)
        .where(
            summaries.run_id == run_id,
            summaries.attempt == attempt,
            summaries.steps < counted.c.steps,
        )
        .order_by(summaries.block)
    ).scalars()
    for found in stale:
        first = found * BLOCK
        yield Problem(
            "summary",
            f"{where}: the summary of the steps {first} to {first + BLOCK - 1} lacks some of them; "
            "without its row in step_summaries readers look at the steps themselves",
        )
