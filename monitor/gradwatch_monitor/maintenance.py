"""A store opened to be looked after: short writing transactions beside the jobs that use it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

import sqlalchemy as sa

from gradwatch import schema
from gradwatch.config import redact, resolve_store, sqlite_path
from gradwatch.errors import StoreError, StoreNotFoundError
from gradwatch.sinks import postgres, sqlite
from gradwatch_monitor.told import telling

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Maintained", "attempts"]


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
            with telling(self._url, "cannot write the store"):
                if self.path is not None:
                    sqlite.check(self.path)  # nothing is written into what is no database
            self._begin(create=create)
        except BaseException:
            self._let_go()
            raise

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """All or nothing."""
        with telling(self._url, "cannot write the store"), self._engine.begin() as connection:
            if self.path is None:
                connection.exec_driver_sql("SET LOCAL statement_timeout TO 0")
                postgres.be_durable(connection)
            yield connection

    @contextlib.contextmanager
    def statements(self) -> Iterator[sa.Connection]:
        """Statements that are a transaction each, as some of PostgreSQL's have to be."""
        engine = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        with telling(self._url, "cannot write the store"), engine.connect() as connection:
            if self.path is None:  # to wait for a reader is no failure
                connection.exec_driver_sql("SET statement_timeout TO 0")
                connection.exec_driver_sql("SET lock_timeout TO 0")
            yield connection

    def checkpoint(self) -> None:
        """Fold SQLite's WAL back where it has grown: between the transactions of a long task."""
        if self.path is not None:
            sqlite.checkpoint(self._engine, self.path)

    def __enter__(self) -> Self:
        """Use it as a context."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Fold SQLite's WAL back where nothing went wrong, and let the connection go."""
        if kind is not None:
            self._let_go()
            return
        if self.path is not None:
            sqlite.checkpoint(self._engine, self.path, final=True)
        self._engine.dispose()

    def _let_go(self) -> None:
        """Without writing to what may be damaged."""
        if self.path is None:
            self._engine.dispose()
        else:
            sqlite.let_go(self._engine.dispose, self.path)

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


def attempts(connection: sa.Connection, run_id: int) -> Sequence[int]:
    """The numbers of a run's attempts."""
    found = sa.select(schema.attempts.c.attempt).where(schema.attempts.c.run_id == run_id)
    return connection.execute(found).scalars().all()
