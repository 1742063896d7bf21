"""The partitions of `step_records` on PostgreSQL: one a day (UTC), made when its first record comes.

Two more take what no sane clock says: everything before 2020, and from 2100 on. There is no default
partition: attaching a day would lock it against all readers.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection

__all__ = [
    "DAY_SECONDS",
    "day_named",
    "days_of",
    "detached",
    "existing",
    "make",
    "make_outer",
    "name",
    "pending",
]

DAY_SECONDS = 86_400
_FIRST = 18_262  # 2020-01-01, in days since 1970
_END = 47_482  # 2100-01-01
_PARENT = "step_records"
_LOCK = "SELECT pg_advisory_xact_lock(1735549287, 2)"

# One that is on its way out (a DETACH that was cut short) takes no records any more.
_EXISTING = text(
    "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
    "WHERE i.inhparent = 'step_records'::regclass AND NOT i.inhdetachpending"
)

_PENDING = text(
    "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
    "WHERE i.inhparent = 'step_records'::regclass AND i.inhdetachpending"
)
_DETACHED = text(
    "SELECT c.relname FROM pg_class c WHERE c.relkind = 'r' AND pg_table_is_visible(c.oid) "
    "AND c.relname LIKE 'step_records_%' "
    "AND NOT EXISTS (SELECT 1 FROM pg_inherits i WHERE i.inhrelid = c.oid)"
)


def days_of(times: np.ndarray[Any, np.dtype[np.float64]]) -> set[int]:
    """The days, counted from 1970, whose partitions records of these Unix times need."""
    days = times[np.isfinite(times)] // DAY_SECONDS
    if len(days) and days.min() == days.max():
        days = days[:1]
    return {int(day) for day in days[(days >= _FIRST) & (days < _END)]}


def name(day: int) -> str:
    """The partition's name, as in `step_records_20260131`."""
    date = dt.date(1970, 1, 1) + dt.timedelta(days=day)
    return f"{_PARENT}_{date:%Y%m%d}"


def day_named(table: str) -> int | None:
    """The day of a partition of that name; None for the two outer ones."""
    date = table.removeprefix(f"{_PARENT}_")
    if len(date) != 8 or not date.isdecimal():
        return None
    found = dt.date(int(date[:4]), int(date[4:6]), int(date[6:]))
    return (found - dt.date(1970, 1, 1)).days


def existing(connection: Connection) -> set[int]:
    """The days that have a partition."""
    days = {day_named(table) for table in connection.execute(_EXISTING).scalars()}
    return {day for day in days if day is not None}


def pending(connection: Connection) -> list[str]:
    """The partitions whose DETACH was cut short; PostgreSQL takes no other before it is done."""
    return [*connection.execute(_PENDING).scalars()]


def detached(connection: Connection) -> list[str]:
    """The tables that were partitions, and were to be dropped."""
    found = connection.execute(_DETACHED).scalars()
    return [table for table in found if day_named(table) is not None]


def make(connection: Connection, days: Collection[int]) -> None:
    """Make the partitions that are missing; whoever comes at the same moment waits and finds them.

    In a transaction of its own, committed at once. Made beside the parent and attached, a
    partition takes a SHARE UPDATE EXCLUSIVE lock on it, which neither readers nor writers notice;
    CREATE TABLE … PARTITION OF would have to wait for all of them. The CHECK spares the scan.
    """
    connection.exec_driver_sql(_LOCK)
    for day in sorted(set(days) - existing(connection)):
        table, start, stop = name(day), day * DAY_SECONDS, (day + 1) * DAY_SECONDS
        for statement in (
            (
                f"CREATE TABLE IF NOT EXISTS {table} (LIKE {_PARENT}, "
                f'CONSTRAINT in_range CHECK ("time" >= {start} AND "time" < {stop}))'
            ),
            f"ALTER TABLE {_PARENT} ATTACH PARTITION {table} FOR VALUES FROM ({start}) TO ({stop})",
            f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS in_range",
        ):
            connection.exec_driver_sql(statement)


def make_outer(connection: Connection) -> None:
    """Make the two that take absurd times, beside a parent that is new."""
    for suffix, start, stop in (
        ("before", "MINVALUE", _FIRST * DAY_SECONDS),
        ("after", _END * DAY_SECONDS, "MAXVALUE"),
    ):
        connection.exec_driver_sql(
            f"CREATE TABLE {_PARENT}_{suffix} PARTITION OF {_PARENT} "
            f"FOR VALUES FROM ({start}) TO ({stop})"
        )
