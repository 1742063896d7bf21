"""Copying a store into another, in either direction between SQLite and PostgreSQL.

Run again it goes on where it was cut short, and adds what has come since: nothing is there twice.
Runs keep their uid and name; their ids are the target's.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa

from gradwatch import partitions, schema
from gradwatch.config import resolve_store
from gradwatch.errors import ConfigurationError, StoreError
from gradwatch.sinks import postgres, rows
from gradwatch_monitor.maintenance import Maintained, attempts
from gradwatch_monitor.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Copied", "copy"]

_BATCH = 5000
# Rows that change after they were made, by what tells one of a run from another.
_CHANGING = {
    schema.findings: ("finding",),
    schema.threshold_changes: ("requested_at", "requested_by"),
}
_ONCE = (schema.events, schema.findings, schema.threshold_changes, schema.recommendations)


@dataclasses.dataclass(slots=True)
class Copied:
    """How many rows the target did not have before."""

    runs: int = 0
    steps: int = 0
    layer_norms: int = 0
    others: int = 0


def copy(
    source: str, target: str, *, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Copied:
    """Copy every run; `progress` hears of how many runs of how many are done."""
    if resolve_store(source) == resolve_store(target):
        msg = "store copy: the two stores are the same"
        raise ConfigurationError(msg)
    copied = Copied()
    with Store(source) as from_, Maintained(target, create=True) as to:
        found = sorted(from_.runs(), key=lambda run: run.id)
        for done, run in enumerate(found):
            progress(done, len(found))
            _copy_run(from_, to, run.id, copied)
        progress(len(found), len(found))
    return copied


def _copy_run(from_: Store, to: Maintained, old: int, copied: Copied) -> None:
    with from_._reading() as reading, to.transaction() as connection:
        new, made = _run(reading, connection, old)
        copied.runs += made
        _attempts_and_rings(reading, connection, old, new)
        for table in _ONCE:
            copied.others += _copy_once(reading, connection, table, old, new)
        found = attempts(connection, new)
    for attempt in found:
        for table in (schema.step_records, schema.layer_norms):
            count = _copy_by_step(from_, to, table, (old, new), attempt)
            if table is schema.step_records:
                copied.steps += count
            else:
                copied.layer_norms += count
        _copy_summaries(from_, to, (old, new), attempt)


def _run(reading: sa.Connection, connection: sa.Connection, old: int) -> tuple[int, bool]:
    """The run's row in the target, made or brought up to date; its id there, and whether new."""
    runs = schema.runs
    row = dict(reading.execute(sa.select(runs).where(runs.c.id == old)).one()._mapping)
    del row["id"]
    known = connection.execute(
        sa.select(runs.c.id, runs.c.heartbeat_at).where(runs.c.uid == row["uid"])
    ).one_or_none()
    if known is None:
        connection.execute(sa.insert(runs).values(**row))
    elif known.heartbeat_at <= row["heartbeat_at"]:
        connection.execute(sa.update(runs).where(runs.c.id == known.id).values(**row))
    new = connection.execute(sa.select(runs.c.id).where(runs.c.uid == row["uid"])).scalar_one()
    return int(new), known is None


def _attempts_and_rings(
    reading: sa.Connection, connection: sa.Connection, old: int, new: int
) -> None:
    attempts, rings = schema.attempts, schema.rings
    for row in reading.execute(sa.select(attempts).where(attempts.c.run_id == old)).all():
        there = connection.execute(
            sa.select(attempts).where(attempts.c.run_id == new, attempts.c.attempt == row.attempt)
        ).one_or_none()
        values = {**row._mapping, "run_id": new}
        if there is None:
            connection.execute(sa.insert(attempts).values(**values))
        elif (there.start_step, there.started_at) != (row.start_step, row.started_at):
            msg = (
                f"the target has run {new} with an attempt {row.attempt} of its own, from step "
                f"{there.start_step}: the run went on in both stores"
            )
            raise StoreError(msg)
    for row in reading.execute(sa.select(rings).where(rings.c.run_id == old)).all():
        values = {**row._mapping, "run_id": new}
        moved = connection.execute(
            sa.update(rings).where(rings.c.ring == row.ring).values(**values)
        ).rowcount
        if not moved:
            connection.execute(sa.insert(rings).values(**values))


def _copy_once(
    reading: sa.Connection, connection: sa.Connection, table: sa.Table, old: int, new: int
) -> int:
    """Copy rows whose ids count anew: those that the target has no equal of."""
    names = [c.name for c in table.columns if c.name not in {"id", "run_id"}]

    def found(where: sa.Connection, run: int) -> list[dict[str, Any]]:
        query = sa.select(*(table.c[n] for n in names)).where(table.c.run_id == run)
        return [dict(row._mapping) for row in where.execute(query.order_by(table.c.id))]

    def key(row: dict[str, Any]) -> str:
        return json.dumps(row, sort_keys=True, default=repr)  # a cell may hold bytes

    there = collections.Counter(key(row) for row in found(connection, new))
    missing = []
    for row in found(reading, old):
        if there[key(row)]:
            there[key(row)] -= 1
        else:
            missing.append({**row, "run_id": new})
    for row in missing if table in _CHANGING else ():
        same = (table.c[name] == row[name] for name in _CHANGING[table])
        connection.execute(sa.delete(table).where(table.c.run_id == new, *same))
    if missing:
        connection.execute(sa.insert(table), missing)
    return len(missing)


def _copy_by_step(
    from_: Store, to: Maintained, table: sa.Table, ids: tuple[int, int], attempt: int
) -> int:
    """Copy an attempt's rows in the order of their steps, from the last step the target has."""
    old, new = ids
    with to.transaction() as connection:
        last = connection.execute(
            sa.select(sa.func.max(table.c.step)).where(
                table.c.run_id == new, table.c.attempt == attempt
            )
        ).scalar()
    query = (
        sa.select(table)
        .where(table.c.run_id == old, table.c.attempt == attempt)
        .order_by(table.c.step)
    )
    if last is not None:
        query = query.where(table.c.step >= last)
    count = 0
    query = query.execution_options(yield_per=_BATCH)
    with from_._reading() as reading, reading.execute(query) as found:
        for part in found.partitions():
            count += _store(to, table, [(new, *row[1:]) for row in part])
    return count


def _copy_summaries(from_: Store, to: Maintained, ids: tuple[int, int], attempt: int) -> None:
    """Copy the summaries of an attempt's blocks, but for those whose steps are still to come."""
    old, new = ids
    table, records = schema.step_summaries, schema.step_records.c
    with to.transaction() as connection:
        last = connection.execute(
            sa.select(sa.func.max(records.step)).where(
                records.run_id == new, records.attempt == attempt
            )
        ).scalar()
    query = sa.select(table).where(table.c.run_id == old, table.c.attempt == attempt)
    if last is not None:  # else all its steps were pruned
        query = query.where(table.c.last_step <= last)
    query = query.execution_options(yield_per=_BATCH)
    with from_._reading() as reading, reading.execute(query) as found:
        for part in found.partitions():
            _store(to, table, [(new, *row[1:]) for row in part])


def _store(to: Maintained, table: sa.Table, batch: list[tuple[Any, ...]]) -> int:
    if table is schema.step_records and to.path is None:
        times = np.array([row[3] for row in batch], float)
        with to.transaction() as connection:
            postgres.make_days(connection, partitions.days_of(times))
    with to.transaction() as connection:
        done = connection.exec_driver_sql(rows.insert_statement(connection, table), batch)
        return max(0, done.rowcount)
