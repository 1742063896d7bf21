"""Filling in the columns that revision 0004 added to `step_summaries`, from the records.

A few blocks a transaction, so that a job that writes meanwhile waits for milliseconds. A row that
is filled in has its counts, so one that was cut short goes on where it was. A block stays as it is
where one of its records is gone: its columns are unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from gradwatch.schema import step_summaries
from gradwatch.sinks import blocks
from gradwatch.sinks.rows import Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch_monitor.maintenance import Maintained

__all__ = ["COLUMNS", "fill"]

COLUMNS = (
    "post_norm", "lr", "loss_scale", "pre_norm_geomean", "post_norm_geomean", "threshold_geomean",
    "loss_geomean", "lr_min", "lr_mean", "lr_max", "loss_scale_min", "loss_scale_mean",
    "loss_scale_max", "post_norm_count", "threshold_count", "loss_count", "lr_count",
    "loss_scale_count", "no_gradient",
)  # fmt: skip
_TOGETHER = 20  # blocks a transaction
_KEY = tuple(step_summaries.primary_key.columns)
_EMPTY = step_summaries.c.lr_count.is_(None)


def fill(store: Maintained, progress: Callable[[int, int], None]) -> int:
    """Fill in every row that can be; how many were. `progress` hears of blocks looked at, of all."""
    with store.transaction() as connection:
        query = sa.select(sa.func.count()).select_from(step_summaries).where(_EMPTY)
        total = connection.execute(query).scalar_one()
    done = filled = 0
    after: Sequence[int] | None = None
    while True:
        with store.transaction() as connection:
            found = _next(connection, after)
            rows = [row for one in found if (row := _completed(connection, one)) is not None]
            if rows:
                connection.execute(_UPDATE, rows)
        if not found:
            break
        store.checkpoint()
        after = tuple(found[-1])[: len(_KEY)]
        done, filled = done + len(found), filled + len(rows)
        progress(done, max(done, total))
    return filled


def _next(connection: sa.Connection, after: Sequence[int] | None) -> Sequence[Any]:
    """Some of the rows that lack the columns, by their key, from that one on."""
    c = step_summaries.c
    query = sa.select(*_KEY, c.first_step, c.last_step, c.steps).where(_EMPTY).order_by(*_KEY)
    if after is not None:
        query = query.where(sa.tuple_(*_KEY) > sa.tuple_(*after))
    return connection.execute(query.limit(_TOGETHER)).all()


def _completed(connection: sa.Connection, row: Any) -> dict[str, Any] | None:
    """The columns of that row, from its records; None where not all of them are there."""
    stored = Stored(row.run_id, row.attempt)
    records = blocks.records_of(connection, stored, row.first_step, row.last_step + 1)
    if len(records["step"]) != row.steps:
        return None
    (made,) = blocks.rows_of(records)
    key = {f"of_{column.name}": getattr(row, column.name) for column in _KEY}
    return {**key, "of_steps": row.steps, **{name: made[name] for name in COLUMNS}}


# The steps, too: the agent may have made the row anew meanwhile, of more of them.
_UPDATE = (
    sa.update(step_summaries)
    .where(*(column == sa.bindparam(f"of_{column.name}") for column in _KEY))
    .where(step_summaries.c.steps == sa.bindparam("of_steps"))
    .values({name: sa.bindparam(name) for name in COLUMNS})
)
