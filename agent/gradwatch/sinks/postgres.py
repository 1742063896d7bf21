"""PostgreSQL as a store: short waits, few round trips, days made when they come.

Small batches without events are one statement: cursor, heartbeat and records together. Others go
by COPY into a staging table, and from there with ON CONFLICT DO NOTHING to where they belong.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa

from gradwatch import cells, partitions
from gradwatch.recorder import FLAGS
from gradwatch.sinks.rows import strict_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gradwatch.records import Batch, RunInfo
    from gradwatch.sinks.rows import Stored

__all__ = [
    "be_durable",
    "copy_steps",
    "exclude_others",
    "has_no_partition",
    "has_no_table",
    "is_small",
    "make_days",
    "reading_engine",
    "store_small",
    "writing_engine",
]

Records = np.ndarray[Any, np.dtype[np.void]]

# Where the URL does not say otherwise. A server that is gone is noticed within seconds, however
# it went: the worker delivers for all sinks.
_CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
    "application_name": "gradwatch",
    # A database of encoding SQL_ASCII would else give bytes for text.
    "client_encoding": "UTF8",
}
# A batch may be lost with the server's memory: the cursor goes with it, and the ring has it still.
_SESSION = (
    "SET synchronous_commit TO off; SET lock_timeout TO '5s'; SET statement_timeout TO '20s'; "
    "SET idle_in_transaction_session_timeout TO '60s'"
)
_ALONE = "SELECT pg_advisory_xact_lock(1735549287, 1)"  # until the transaction ends
_SMALL = 400  # records; above, COPY is faster

_NUMBERS = ("loss", "lr", "pre_norm", "post_norm", "threshold", "loss_scale")
_BITS = (FLAGS.CLIPPED, FLAGS.NONFINITE, FLAGS.NONFINITE_LOSS, FLAGS.SKIPPED)
_COLUMNS = (
    f'run_id, attempt, step, "time", {", ".join(_NUMBERS)}, '
    "clipped, nonfinite, nonfinite_loss, skipped"
)
_FINITE = ", ".join(f"nullif({name}, 'NaN')" for name in _NUMBERS)
_SELECTED = f'step, "time", {_FINITE}, {", ".join(f"flags & {bit} <> 0" for bit in _BITS)}'
_ARRAYS = ", ".join(["%s::bigint[]", *["%s::float8[]"] * 7, "%s::integer[]"])
_FIELDS = ("step", "time", *_NUMBERS, "flags")

_STORE_SMALL = f"""\
WITH moved AS (
  UPDATE rings SET step_cursor = %s, event_cursor = %s
  WHERE ring = %s AND step_cursor = %s AND event_cursor = %s RETURNING run_id, attempt
), beat AS (
  UPDATE runs SET heartbeat_at = %s FROM moved WHERE id = run_id RETURNING id
), kept AS (
  INSERT INTO step_records ({_COLUMNS})
  SELECT run_id, attempt, {_SELECTED}
  FROM beat JOIN moved ON run_id = id, unnest({_ARRAYS}) AS new ({", ".join(f'"{f}"' for f in _FIELDS)})
  ON CONFLICT DO NOTHING
)
SELECT count(*) FROM beat"""  # noqa: S608 - names of our own

_STAGE = f"""\
CREATE TEMPORARY TABLE IF NOT EXISTS staged_steps (step bigint, "time" float8,
{", ".join(f"{name} float8" for name in _NUMBERS)}, flags integer) ON COMMIT DELETE ROWS"""
_COPY = "COPY staged_steps FROM STDIN (FORMAT BINARY)"
_UNSTAGE = f"""\
INSERT INTO step_records ({_COLUMNS}) SELECT %s, %s, {_SELECTED} FROM staged_steps
ON CONFLICT DO NOTHING"""  # noqa: S608

# COPY's binary format: a header; a row is the number of fields, then of each its length and bytes.
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END = b"\xff\xff"
_COPY_ROW = np.dtype(
    [
        ("fields", ">i2"),
        *(
            part
            for name in _FIELDS
            for part in (
                (f"{name}_length", ">i4"),
                (name, {"step": ">i8", "flags": ">i4"}.get(name, ">f8")),
            )
        ),
    ]
)


def writing_engine(url: str) -> sa.Engine:
    """An engine for the one connection of this process that writes the store."""
    engine = _engine(url)

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(_SESSION)
        connection.commit()

    return engine


def reading_engine(url: str) -> sa.Engine:
    """An engine whose transactions can only read, and see one moment each.

    What is executed with the option `binary` comes as it is stored, in a third of the time that
    the same as text takes.
    """
    engine = _engine(url)

    @sa.event.listens_for(engine, "before_cursor_execute")
    def _as_stored(
        _connection: Any, cursor: Any, _statement: Any, _parameters: Any, context: Any, _many: Any
    ) -> None:
        if context.execution_options.get("binary"):
            cursor.format = 1  # psycopg.pq.Format.BINARY

    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _engine(url: str) -> sa.Engine:
    given = sa.make_url(url).query
    return sa.create_engine(
        url,
        json_serializer=strict_json,
        json_deserializer=cells.lenient_json,
        connect_args={name: v for name, v in _CONNECTION.items() if name not in given},
        pool_size=1,
    )


def exclude_others(connection: sa.Connection) -> None:
    """Wait until no other transaction is past this point, and keep others from it."""
    connection.exec_driver_sql(_ALONE)


def be_durable(connection: sa.Connection) -> None:
    """Let this transaction's end wait until it, and every one before it, is on disk."""
    connection.exec_driver_sql("SET LOCAL synchronous_commit TO on")


def has_no_table(error: BaseException) -> bool:
    """Whether the database does not know one of the tables."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) == "42P01"


def has_no_partition(error: BaseException | None) -> bool:
    """Whether there is no partition for a record: somebody has dropped one that was there."""
    cause = getattr(error, "orig", None)
    return getattr(cause, "sqlstate", None) == "23514" and "no partition" in str(cause)


def make_days(connection: sa.Connection, days: set[int]) -> set[int]:
    """Make the partitions of these days where they are missing; all days there are."""
    there = partitions.existing(connection)
    if not days <= there:
        partitions.make(connection, days)
    return there | days


def is_small(run: RunInfo, batch: Batch) -> bool:
    """Whether a batch is one statement: a few records of a run that is alive, and nothing else."""
    more = batch.events or batch.layers or batch.findings
    return len(batch.steps) <= _SMALL and not more and not run.recovered


def store_small(engine: sa.Engine, ring: str, stored: Stored, batch: Batch, now: float) -> bool:
    """Move the cursor, store the records, note the sign of life; False where nothing was done.

    By the driver itself, without a BEGIN: a third of SQLAlchemy's time on this side, and one round
    trip instead of three.
    """
    steps = _plain(batch.steps if stored.rank == 0 else batch.steps[:0])
    # As text: a third of the driver's own time for a list.
    arrays = ["{" + str(steps[name].tolist())[1:-1] + "}" for name in _FIELDS]
    values = (*batch.last, ring, *batch.first, now, *arrays)
    with (
        contextlib.closing(engine.raw_connection()) as connection,
        _errors_of(engine, connection.invalidate),
    ):
        driver: Any = connection.driver_connection
        driver.autocommit = True
        try:
            return bool(driver.execute(_STORE_SMALL, values).fetchone()[0])
        finally:
            if not driver.closed:
                driver.autocommit = False


def copy_steps(connection: sa.Connection, stored: Stored, steps: Records) -> int:
    """Store any number of records; how many of them were not there."""
    if not len(steps) or stored.rank != 0:
        return 0
    connection.exec_driver_sql(_STAGE)
    steps = _plain(steps)
    packed = np.empty(len(steps), _COPY_ROW)
    packed["fields"] = len(_FIELDS)
    for name in _FIELDS:
        packed[name] = steps[name]
        packed[f"{name}_length"] = packed[name].itemsize
    driver: Any = connection.connection.driver_connection
    with (
        _errors_of(connection.engine, connection.invalidate),
        driver.cursor() as cursor,
        cursor.copy(_COPY) as copy,
    ):
        copy.write(_COPY_HEADER + packed.tobytes() + _COPY_END)
    return connection.exec_driver_sql(_UNSTAGE, (stored.run_id, stored.attempt)).rowcount


@contextlib.contextmanager
def _errors_of(engine: sa.Engine, let_go: Callable[[], None]) -> Iterator[None]:
    """What the driver raises, when asked past SQLAlchemy, as SQLAlchemy would raise it.

    The connection is let go of: to put one that is dead back into the pool is an error of its own.
    """
    dbapi: Any = engine.dialect.dbapi
    try:
        yield
    except dbapi.Error as error:
        let_go()
        raise sa.exc.DBAPIError(None, None, error) from error


def _plain(steps: Records) -> Records:
    """The records with NaN for whatever is not finite; a time that is none is 0."""
    plain = steps.copy()
    for name in _NUMBERS:
        plain[name][~np.isfinite(plain[name])] = np.nan
    plain["time"][~np.isfinite(plain["time"])] = 0.0
    return plain
