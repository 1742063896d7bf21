"""Many rows by few SQL statements: one INSERT stores up to 1,024 rows.

SQLite's driver releases the interpreter lock for each statement that it executes, and then waits
until the training thread releases it. With one statement per row (`executemany`), a job that takes
20,000 steps a second leaves time to store less than one row per step, and its flight recorder
overflows.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

__all__ = ["ROWS", "insert"]

# For 1,024 rows the interpreter lock is held for half a millisecond. SQLite takes 32,766 values in a
# statement, which is 2,340 rows of 14 columns.
ROWS = 1024


def insert(
    connection: sa.Connection,
    table: sa.Table,
    values: Sequence[Any],
    conflict: str = "DO NOTHING",
    *,
    columns: tuple[str, ...] = (),
) -> int:
    """Store rows in `table`; how many of them were stored.

    `values` holds the rows one after the other, each with a value for each of `columns` (by default
    all of the table's), as the driver takes it. `conflict` is what follows ON CONFLICT.
    """
    columns = columns or tuple(table.columns.keys())
    sqlite = connection.dialect.name == "sqlite"
    # The cursor itself: SQLAlchemy would take 40 µs a statement, with the interpreter lock held.
    cursor: Any = connection.connection.cursor() if sqlite else None
    stored = at = 0
    for rows in _sizes(len(values) // len(columns)):
        end = at + rows * len(columns)
        statement = _statement(table.name, columns, rows, "?" if sqlite else "%s", conflict)
        if sqlite:
            done = cursor.execute(statement, values[at:end])
        else:
            done = connection.exec_driver_sql(statement, tuple(values[at:end]))
        stored += max(0, done.rowcount)
        at = end
    return stored


def _sizes(rows: int) -> list[int]:
    """How many rows each statement stores: powers of two, so that few different ones are prepared."""
    sizes = [ROWS] * (rows // ROWS)
    rest = rows % ROWS
    return sizes + [1 << bit for bit in range(rest.bit_length() - 1, -1, -1) if rest >> bit & 1]


@functools.lru_cache(maxsize=128)
def _statement(table: str, columns: tuple[str, ...], rows: int, mark: str, conflict: str) -> str:
    row = f"({', '.join([mark] * len(columns))})"
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) "  # noqa: S608 - names of our own
        f"VALUES {', '.join([row] * rows)} ON CONFLICT {conflict}"
    )
