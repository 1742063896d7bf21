"""The database behind a store, seen from the reader's side: opened, read, written to, let go."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Self

import sqlalchemy as sa

from gradwatch import cells, rings, schema
from gradwatch.config import DEFAULT_STORE, redact, resolve_store, sqlite_path
from gradwatch.errors import StoreError, StoreNotFoundError
from gradwatch.secrets import scrub
from gradwatch.sinks import postgres, sqlite
from gradwatch_monitor.told import telling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["Database"]


class Database:
    """A store's database, opened to read; `_writing` is for the tables that control a job.

    Args:
        url: an SQLAlchemy URL or an SQLite file's path.

    Raises:
        StoreNotFoundError: there is no such file.
        StoreRevisionError: its schema is older or newer than this version's.
        StoreError: it is something else, or cannot be reached.
    """

    def __init__(self, url: str = DEFAULT_STORE) -> None:
        self._url = resolve_store(url)
        path = sqlite_path(self._url)
        if path is None:
            self._engine = _postgres_reader(self._url)
        else:
            if not path.exists():
                raise StoreNotFoundError(_absent(self._url))
            if path.is_dir():
                msg = f"{self.name} is a folder; name the store's file in it, as in gradwatch.db"
                raise StoreError(msg)
            with telling(self._url, "cannot read the store"):
                sqlite.check_kind(path)  # before it is opened
            self._engine = _sqlite_reader(path)
        # What was met that cannot be right; whoever shows what was read tells it once.
        self.malformed = cells.Malformed()
        self._engine = cells.noting(self._engine, self.malformed)
        try:
            self._check(path)
        except BaseException as error:
            self.close()
            if isinstance(error, StoreError) and path is not None and _is_unfinished(path):
                raise StoreNotFoundError(_absent(self._url)) from None
            raise

    @property
    def name(self) -> str:
        """The URL without its secrets."""
        return redact(self._url)

    def close(self) -> None:
        """Let the connections go."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        """Use the store as a context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _check(self, path: Path | None) -> None:
        with self._reading() as connection:
            if path is not None:
                sqlite.check(path)  # its WAL may answer for a file that was written over
            found = schema.revision(connection)
            if found is None and not sa.inspect(connection).get_table_names():
                raise StoreNotFoundError(_absent(self._url))
            if found is None:
                msg = f"{self.name} is a database, but not a gradwatch store"
                raise StoreError(msg)
            schema.check(found)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """A transaction of its own; the tables that control a job are all that is written here."""
        path = sqlite_path(self._url)
        engine = (
            postgres.writing_engine(self._url)
            if path is None
            else sqlite.writing_engine(self._url, path)
        )
        try:
            with telling(self._url, "cannot write the store"), engine.begin() as connection:
                yield connection
        finally:
            if path is not None:
                # The last connection that closes would fold the WAL back, under no lock of ours.
                sqlite.checkpoint(engine, path)
                sqlite.let_go(engine.dispose, path)
            engine.dispose()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """One consistent view of the database; what goes wrong becomes a `StoreError`."""
        with telling(self._url, "cannot read the store"), self._engine.connect() as connection:
            yield connection


def _is_unfinished(path: Path) -> bool:
    """Whether it is being made, or its making was cut short: a store has no such journal later."""
    with contextlib.suppress(OSError):
        return Path(f"{path}-journal").stat().st_size > 0
    return False


def _absent(url: str) -> str:
    told = f"there is no store at {redact(url)}; a job that calls gradwatch.wrap makes it at its first step"
    left = rings.beside(url)
    if left is None or not any(left.glob("*.ring")):
        return told
    return f"{told}; {left} holds what jobs recorded: gradwatch recover stores that of killed ones"


def _postgres_reader(url: str) -> sa.Engine:
    try:
        return postgres.reading_engine(url)
    except (ImportError, sa.exc.ArgumentError) as error:
        msg = (
            f"{redact(url)}: {scrub(str(error), url)}; pip install 'gradwatch[postgres]' brings the driver of "
            "postgresql+psycopg:// URLs"
        )
        raise StoreError(msg) from None


def _sqlite_reader(path: Path) -> sa.Engine:
    """An engine whose connections can only read, and see one moment per transaction."""

    def connect() -> sqlite3.Connection:
        address = f"file:{urllib.parse.quote(str(path))}?mode=ro"
        has_wal = path.with_name(path.name + "-wal").exists()
        if not has_wal and not os.access(path.parent, os.W_OK):
            # Nobody writes here, and the index of a WAL could not be made: read it as it lies.
            address += "&immutable=1"
        connection = sqlite3.connect(
            address, uri=True, timeout=5.0, check_same_thread=False, isolation_level=None
        )
        connection.text_factory = cells.lenient_text
        connection.execute("PRAGMA query_only=1")
        return connection

    engine = sa.create_engine(
        "sqlite://",
        creator=connect,
        poolclass=sa.pool.NullPool,
        json_deserializer=cells.lenient_json,
    )

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine
