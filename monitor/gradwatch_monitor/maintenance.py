"""A store opened to be looked after: short writing transactions beside the jobs that use it."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, Self

import sqlalchemy as sa

from gradwatch import schema
from gradwatch.config import redact, resolve_store, sqlite_path
from gradwatch.errors import StoreError, StoreNotFoundError
from gradwatch.secrets import scrub
from gradwatch.sinks import postgres, sqlite
from gradwatch.sinks.remedies import remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Maintained"]


class Maintained:
    """A store of this version's revision; made where it is missing, if that is asked for.

    Raises `StoreNotFoundError`, `StoreRevisionError`, or `StoreError` for all that goes wrong.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        self._url = resolve_store(url)
        self.name = redact(self._url)
        self.path = sqlite_path(self._url)
        if self.path is not None and not create and not self.path.exists():
            msg = f"there is no store at {self.name}"
            raise StoreNotFoundError(msg)
        self._engine = (
            postgres.writing_engine(self._url)
            if self.path is None
            else sqlite.writing_engine(self._url, self.path)
        )
        try:
            with self._told():
                if self.path is not None:
                    sqlite.check(self.path)  # nothing is written into what is no database
            self._begin(create=create)
        except BaseException:
            self._engine.dispose()
            raise

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """All or nothing."""
        with self._told(), self._engine.begin() as connection:
            if self.path is None:
                connection.exec_driver_sql("SET LOCAL statement_timeout TO 0")
                postgres.be_durable(connection)
            yield connection

    @contextlib.contextmanager
    def statements(self) -> Iterator[sa.Connection]:
        """Statements that are a transaction each, as some of PostgreSQL's have to be."""
        engine = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        with self._told(), engine.connect() as connection:
            if self.path is None:  # to wait for a reader is no failure
                connection.exec_driver_sql("SET statement_timeout TO 0")
                connection.exec_driver_sql("SET lock_timeout TO 0")
            yield connection

    def __enter__(self) -> Self:
        """Use it as a context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Fold SQLite's WAL back, and let the connection go."""
        if self.path is not None:
            sqlite.checkpoint(self._engine, self.path, final=True)
        self._engine.dispose()

    def _begin(self, *, create: bool) -> None:
        with self.transaction() as connection:
            if create:
                if self.path is None:
                    postgres.exclude_others(connection)
                schema.create(connection)
                return
            found = schema.revision(connection)
            if found is None:
                msg = f"{self.name} is a database, but not a gradwatch store"
                raise StoreError(msg)
            schema.check(found)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.SQLAlchemyError, sqlite3.Error, ImportError, OSError) as error:
            cause = getattr(error, "orig", None) or error
            reason = scrub(
                (str(cause).strip().splitlines() or [type(cause).__name__])[0], self._url
            )
            advice = f" ({told})" if (told := remedy(cause)) else ""
            msg = f"cannot write the store {self.name}: {reason}{advice}"
            raise StoreError(msg) from error
        except StoreError as error:
            if self.name in str(error):
                raise
            msg = f"{self.name}: {error}"
            raise type(error)(msg) from None
