"""Bringing a store's schema up to this version's: Alembic, beside the agent that only creates."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from gradwatch import schema
from gradwatch.config import redact, resolve_store, sqlite_path
from gradwatch.errors import StoreError, StoreNotFoundError
from gradwatch.secrets import scrub
from gradwatch.sinks import blocks, postgres, sqlite
from gradwatch.sinks.rows import Stored
from gradwatch_monitor.maintenance import Maintained
from gradwatch_monitor.migrations.filling import fill

if TYPE_CHECKING:
    from collections.abc import Callable

    from alembic.config import Config

__all__ = ["configuration", "migrate"]


def configuration(connection: sa.Connection) -> Config:
    """Alembic's configuration for a store that is connected."""
    from alembic.config import Config  # noqa: PLC0415 - a heavy import for one verb

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config


def migrate(
    url: str, *, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> tuple[str | None, str]:
    """Bring the store's schema to this version's, in one transaction; the revisions before, after.

    What the records tell of summaries that an older version made is filled in afterwards, in short
    transactions: where that is cut short, `migrate` goes on with it when it is called again.
    `progress` hears of how many attempts of how many have their summaries, then of how many blocks
    of how many were looked at.
    Raises `StoreNotFoundError` where there is no such file, `StoreError` where it is not a store.
    """
    from alembic import command  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    url = resolve_store(url)
    path = sqlite_path(url)
    if path is not None and not path.exists():
        msg = f"there is no store at {redact(url)}"
        raise StoreNotFoundError(msg)
    engine = postgres.writing_engine(url) if path is None else sqlite.writing_engine(url, path)
    try:
        if path is not None:
            sqlite.check(path)
        with engine.begin() as connection:
            if path is None:
                connection.exec_driver_sql("SET LOCAL statement_timeout TO 0")
                postgres.be_durable(connection)
                postgres.exclude_others(connection)
            before = schema.revision(connection)
            if before is None and sa.inspect(connection).get_table_names():
                msg = f"{redact(url)} is somebody else's database: it has tables, but no store"
                raise StoreError(msg)
            if before != schema.REVISION:
                command.upgrade(configuration(connection), "head")
            if before is not None and before < "0003":
                _summarise(connection, progress)
            after = schema.revision(connection) or ""
    except (sa.exc.SQLAlchemyError, sqlite3.Error, CommandError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        reason = scrub(str(cause).strip().splitlines()[0], url)
        msg = f"{redact(url)} cannot be migrated: {reason}"
        raise StoreError(msg) from None
    finally:
        engine.dispose()
    with Maintained(url) as store:
        fill(store, progress)
    return before, after


def _summarise(connection: sa.Connection, progress: Callable[[int, int], None]) -> None:
    """Make the summaries of all that is stored."""
    attempts = schema.attempts.c
    found = connection.execute(sa.select(attempts.run_id, attempts.attempt)).all()
    for done, (run_id, attempt) in enumerate(found):
        progress(done, len(found))
        blocks.fill(connection, Stored(run_id, attempt))
    progress(len(found), len(found))
