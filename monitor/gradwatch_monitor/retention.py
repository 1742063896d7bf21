"""Retention: what is older than so many days goes, by whole days (UTC), never from a live run.

On PostgreSQL a day without steps of a live run is dropped as a whole. A run that ended before and
of which neither steps nor events are left goes too, with all that was concluded about it.
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import TYPE_CHECKING

import sqlalchemy as sa

from gradwatch import cells, partitions, schema
from gradwatch.errors import ConfigurationError
from gradwatch.sinks import blocks
from gradwatch.sinks.register import LIVE_SECONDS
from gradwatch.sinks.rows import Stored
from gradwatch.summaries import BLOCK
from gradwatch_monitor import timeline
from gradwatch_monitor.maintenance import Maintained, attempts

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pruned", "days", "prune"]

_BATCH = 5000  # rows a transaction: a job that writes meanwhile waits for milliseconds
_UNITS = {"d": 1, "w": 7, "y": 365}


@dataclasses.dataclass(frozen=True, slots=True)
class Pruned:
    """What went: everything before `before` (Unix seconds), so many rows and whole runs."""

    before: float
    steps: int
    layer_norms: int
    events: int
    runs: int
    partitions: tuple[str, ...]


def days(text: str) -> int:
    """A number of days, from text like 30d, 8w or 1y. Raises `ConfigurationError`."""
    found = re.fullmatch(r"(\d{1,5})([dwy])", text.strip())
    if found is None or int(found[1]) == 0:
        msg = f"--older-than {text!r}: right would be a number of days, weeks or years: 30d, 8w, 1y"
        raise ConfigurationError(msg)
    return int(found[1]) * _UNITS[found[2]]


def prune(
    url: str,
    older_than_days: int,
    *,
    now: float | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Pruned:
    """Remove what is older; `progress` hears of how many runs of how many were looked at."""
    now = time.time() if now is None else now
    before = (now // partitions.DAY_SECONDS - older_than_days) * partitions.DAY_SECONDS
    with Maintained(url) as store:
        ended, live = _runs(store, now)
        for run_id in ended:
            _sum_up(store, run_id, before)
        dropped = _drop_days(store, live, before) if store.path is None else {}
        steps, layers, events, gone = sum(dropped.values()), 0, 0, 0
        for done, run_id in enumerate(ended):
            progress(done, len(ended))
            steps += _delete(store, schema.step_records, run_id, before)
            layers += _delete_layers(store, run_id)
            events += _delete(store, schema.events, run_id, before)
            gone += _forget(store, run_id, before)
        progress(len(ended), len(ended))
    return Pruned(before, steps, layers, events, gone, tuple(dropped))


def _runs(store: Maintained, now: float) -> tuple[list[int], list[int]]:
    """The ids of the runs that may be touched, and of those that are live."""
    runs = schema.runs.c
    live = sa.and_(runs.status == "running", runs.heartbeat_at > now - LIVE_SECONDS)
    with store.transaction() as connection:
        found = connection.execute(sa.select(runs.id, live).order_by(runs.id)).all()
    return [run for run, lives in found if not lives], [run for run, lives in found if lives]


def _sum_up(store: Maintained, run_id: int, before: float) -> None:
    """Summaries of what goes: of blocks that have none (a run's last), or that an attempt cuts.

    One of which steps have gone before stays as it is.
    """
    records, summaries = schema.step_records.c, schema.step_summaries.c
    with store.transaction() as connection:
        for part in timeline.visible(connection, run_id):
            mine = (records.run_id == run_id, records.attempt == part.attempt)
            # Those that there are, not all up to the last: a step may be far away from the others.
            block = sa.cast((records.step - records.step % BLOCK) / BLOCK, sa.BigInteger)
            going = (
                sa.select(block)
                .distinct()
                .where(*mine, records.time < before, records.step < part.stop)
            )
            old = {
                found
                for one in connection.execute(going).scalars()
                if (found := cells.whole(one)) is not None
            }
            if not old:
                continue
            whole = {
                row.block
                for row in connection.execute(
                    sa.select(summaries.block).where(
                        summaries.run_id == run_id,
                        summaries.attempt == part.attempt,
                        sa.or_(
                            summaries.last_step < part.stop,
                            summaries.first_step
                            < sa.select(sa.func.min(records.step))
                            .where(*mine, records.step >= summaries.block * BLOCK)
                            .scalar_subquery(),
                        ),
                    )
                )
            }
            wanted = sorted(old - whole)
            blocks.store(connection, Stored(run_id, part.attempt), wanted, until=part.stop)


def _drop_days(store: Maintained, live: list[int], before: float) -> dict[str, int]:
    """Drop whole partitions; each with how many steps were in it.

    DETACH … CONCURRENTLY waits for who uses the table and keeps nobody from it.
    """
    with store.statements() as connection:
        for left in partitions.pending(connection):  # a prune before was cut short
            connection.exec_driver_sql(f"ALTER TABLE step_records DETACH PARTITION {left} FINALIZE")
        for left in partitions.detached(connection):
            connection.exec_driver_sql(f"DROP TABLE {left}")
    with store.transaction() as connection:
        there = partitions.existing(connection)
    last = before // partitions.DAY_SECONDS
    dropped: dict[str, int] = {}
    for day in sorted(day for day in there if day < last):
        table = sa.table(partitions.name(day), sa.column("run_id"))
        with store.transaction() as connection:
            used = sa.select(table.c.run_id).where(table.c.run_id.in_(live)).limit(1)
            if live and connection.execute(used).first():
                continue
            count = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
        with store.statements() as connection:
            connection.exec_driver_sql(
                f"ALTER TABLE step_records DETACH PARTITION {table.name} CONCURRENTLY"
            )
            connection.exec_driver_sql(f"DROP TABLE {table.name}")
        dropped[table.name] = count
    return dropped


def _delete(store: Maintained, table: sa.Table, run_id: int, before: float) -> int:
    """Delete a run's older rows by batches; how many."""
    key = sa.tuple_(*table.primary_key.columns)
    old = (
        sa.select(*table.primary_key.columns)
        .where(table.c.run_id == run_id, table.c.time < before)
        .limit(_BATCH)
    )
    total, batch = 0, _BATCH
    while batch == _BATCH:
        with store.transaction() as connection:
            batch = connection.execute(
                sa.delete(table).where(table.c.run_id == run_id, key.in_(old))
            ).rowcount
        total += batch
    return total


def _delete_layers(store: Maintained, run_id: int) -> int:
    """Delete samples from before the oldest step that each attempt has left; they have no time."""
    layers, records = schema.layer_norms.c, schema.step_records.c
    total = 0
    with store.transaction() as connection:
        for attempt in attempts(connection, run_id):
            oldest = connection.execute(
                sa.select(sa.func.min(records.step)).where(
                    records.run_id == run_id, records.attempt == attempt
                )
            ).scalar()
            if (
                oldest is not None and cells.whole(oldest) is None
            ):  # not one of its steps is a number
                continue
            mine = sa.and_(layers.run_id == run_id, layers.attempt == attempt)
            old = mine if oldest is None else sa.and_(mine, layers.step < oldest)
            total += connection.execute(sa.delete(schema.layer_norms).where(old)).rowcount
    return total


def _forget(store: Maintained, run_id: int, before: float) -> bool:
    """Remove a run that ended before, of which nothing is left; whether it was one."""
    with store.transaction() as connection:
        beat = connection.execute(
            sa.select(schema.runs.c.heartbeat_at).where(schema.runs.c.id == run_id)
        ).scalar_one()
        beat = cells.real(beat)
        if beat is None or beat >= before:  # one whose end is unknown stays
            return False
        for table in (schema.step_records, schema.events):
            if connection.execute(
                sa.select(table.c.run_id).where(table.c.run_id == run_id).limit(1)
            ).first():
                return False
        for table in reversed(schema.metadata.sorted_tables):
            column = table.c.id if table is schema.runs else table.c.run_id
            connection.execute(sa.delete(table).where(column == run_id))
    return True
