"""The database sink: a batch and the ring's cursor in one transaction, so nothing is stored twice.

The cursor in the database is the truth. A batch that does not begin where it stands is refused:
somebody else has stored from this ring.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from gradwatch import partitions, schema
from gradwatch.config import redact, sqlite_path
from gradwatch.errors import StoreError
from gradwatch.records import ThresholdChange
from gradwatch.schema import rings, runs
from gradwatch.secrets import scrub
from gradwatch.sinks import (
    BusyError,
    CursorMovedError,
    RefusedError,
    RunForgottenError,
    SinkError,
    blocks,
    postgres,
    resume,
    rows,
    sqlite,
)
from gradwatch.sinks.register import bury, register
from gradwatch.sinks.remedies import is_refused, may_pass, remedy
from gradwatch.troubles import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gradwatch.records import Batch, RunInfo, RunStatus
    from gradwatch.sinks.register import Registration

__all__ = ["DatabaseSink"]

_BUSY_SECONDS = 0.5  # how long the worker waits for another writer; then it goes on with its rings


class DatabaseSink:
    """Stores runs in the database at `url`, created there if missing."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self.url = url
        self._clock = clock
        self._path = sqlite_path(url)
        self._engine: sa.Engine | None = None
        self._stored: dict[str, rows.Stored] = {}  # by ring
        self._file: tuple[int, ...] | None = None  # which file the connection is to, as we left it
        self._cursors: dict[str, tuple[int, int]] = {}  # by ring: what the store said or was told
        self._tails: dict[str, blocks.Records | None] = {}  # by ring: see `blocks.tail`
        self._days: set[int] = set()  # partitions that are there
        self._overtaken: set[str] = set()  # rings whose run another process records as well
        self._forgotten = f"the store {redact(url)} was deleted or emptied; the run is stored anew"

    # -- the Sink protocol ---------------------------------------------------------------------

    def open(self, run: RunInfo) -> RunInfo:
        """Register the run (or a further attempt of it); the store settles its uid and name."""
        with self._transaction(durable=True) as connection:
            if self._path is None:
                postgres.exclude_others(connection)
            schema.create(connection)
            registered = register(connection, run, self._clock())
            if registered.resumed is not None:
                rows.insert_events(connection, registered.stored, [registered.resumed])
        self._stored[run.ring] = registered.stored
        if not run.recovered:
            _tell(registered)
        return registered.run

    def write(self, run: RunInfo, batch: Batch) -> None:
        """Store the batch and move the ring's cursor, in one transaction."""
        try:
            self._write(run, batch)
        except SinkError as error:
            if not postgres.has_no_partition(error.__cause__):
                raise
            self._write(run, batch)  # the failure has made us forget which days there are
        self._cursors[run.ring] = batch.last
        self._checkpoint()

    def _write(self, run: RunInfo, batch: Batch) -> None:
        stored, complete = self._stored[run.ring], blocks.completed_by(run, batch)
        if self._path is None:
            self._make_days(batch)
            small = not complete and postgres.is_small(run, batch)
            if small and self._write_small(run, batch):
                self._tails.pop(run.ring, None)
                return
        tail = self._tails.pop(run.ring, None)
        with self._transaction() as connection:
            self._move_cursor(connection, run.ring, batch)
            insert = postgres.copy_steps if self._path is None else rows.insert_steps
            all_new = insert(connection, stored, batch.steps) == len(batch.steps)
            at_hand = batch.steps if tail is None else np.concatenate([tail, batch.steps])
            blocks.store(connection, stored, complete, at_hand if all_new else None)
            rows.insert_events(connection, stored, batch.events)
            rows.insert_layers(connection, stored, batch.layers)
            for finding in batch.findings:
                rows.upsert_finding(connection, stored, finding, self._clock())
            if not run.recovered:
                self._beat(connection, stored)
        if all_new:
            self._tails[run.ring] = blocks.tail(at_hand)

    def heartbeat(self, run: RunInfo) -> None:
        """Say that the run is alive."""
        with self._transaction() as connection:
            self._check_cursor(connection, run.ring)
            self._beat(connection, self._stored[run.ring])

    def close(self, run: RunInfo, status: RunStatus | None) -> None:
        """Note how the run ended. The ring's cursor stays: its file may outlive it.

        Raises `CursorMovedError` where the database has lost what it had taken (its server was
        killed): the ring has it still, and must not be removed.
        """
        stored = self._stored[run.ring]
        with self._transaction(durable=True) as connection:
            self._check_cursor(connection, run.ring)
            hidden = self._note_hidden(connection, run)
            if run.recovered:
                bury(connection, run, stored, status)
            elif status is not None and run.rank == 0:
                self._beat(connection, stored, status=status, ended_at=self._clock())
            else:
                self._beat(connection, stored)
        if hidden is not None:
            logger.warning("gradwatch: run %s: %s", run.name, hidden)
        del self._stored[run.ring]
        self._cursors.pop(run.ring, None)
        self._tails.pop(run.ring, None)
        if not self._stored:
            self._checkpoint(final=True)
            self.dispose()

    def look_around(self, run: RunInfo) -> None:
        """See whether another process has begun to record the run, and say so once."""
        if run.rank == 0 and run.ring not in self._overtaken:
            with self._transaction() as connection:
                hidden = self._note_hidden(connection, run, goes_on=True)
            if hidden is not None:
                self._overtaken.add(run.ring)
                logger.warning("gradwatch: run %s: %s", run.name, hidden)

    def requested(self, uid: str, after: int) -> ThresholdChange | None:
        """The first change of that run above that id that was neither taken nor refused."""
        changes = schema.threshold_changes
        query = (
            sa.select(changes)
            .join(runs, runs.c.id == changes.c.run_id)
            .where(
                runs.c.uid == uid,
                changes.c.id > after,
                changes.c.applied_at.is_(None),
                changes.c.refused.is_(None),
            )
            .order_by(changes.c.id)
            .limit(1)
        )
        with self._transaction() as connection:
            found = connection.execute(query).one_or_none()
        if found is None:
            return None
        return ThresholdChange(
            found.id, found.threshold, found.policy, found.requested_by, found.reason
        )

    def refuse(self, change: int, reason: str) -> None:
        """Note why a change is not made."""
        changes = schema.threshold_changes
        with self._transaction() as connection:
            connection.execute(
                sa.update(changes).where(changes.c.id == change).values(refused=reason)
            )

    def dispose(self) -> None:
        """Let the connection go; the next transaction makes another."""
        self._dispose(fold=self._path is None or self._file == sqlite.look(self._path))

    def _dispose(self, *, fold: bool) -> None:
        """`fold`: the last connection may fold the WAL back; nothing is known to be wrong."""
        if self._engine is not None:
            if self._path is None or fold:
                self._engine.dispose()
            else:
                sqlite.let_go(self._engine.dispose, self._path)
            self._engine = None
        self._days = set()  # somebody may have dropped one

    # -- inside a transaction ------------------------------------------------------------------

    def _move_cursor(self, connection: sa.Connection, ring: str, batch: Batch) -> None:
        """From where the batch begins to where it ends; or say where the cursor is."""
        (step, event), (next_step, next_event) = batch.first, batch.last
        moved = connection.execute(
            sa.update(rings)
            .where(rings.c.ring == ring, rings.c.step_cursor == step, rings.c.event_cursor == event)
            .values(step_cursor=next_step, event_cursor=next_event)
        ).rowcount
        if moved:
            return
        self._raise_moved(connection, ring)

    def _check_cursor(self, connection: sa.Connection, ring: str) -> None:
        """Raise where the cursor is not where this sink left it."""
        expected = self._cursors.get(ring)
        if expected is not None and self._cursor(connection, ring) != expected:
            self._raise_moved(connection, ring)

    def _raise_moved(self, connection: sa.Connection, ring: str) -> NoReturn:
        at = self._cursors[ring] = self._cursor(connection, ring)
        raise CursorMovedError(*at)

    def _cursor(self, connection: sa.Connection, ring: str) -> tuple[int, int]:
        at = connection.execute(
            sa.select(rings.c.step_cursor, rings.c.event_cursor).where(rings.c.ring == ring)
        ).one_or_none()
        if at is None:
            raise RunForgottenError(self._forgotten)
        return at.step_cursor, at.event_cursor

    def _beat(self, connection: sa.Connection, stored: rows.Stored, **values: object) -> None:
        found = connection.execute(
            sa.update(runs)
            .where(runs.c.id == stored.run_id)
            .values(heartbeat_at=self._clock(), **values)
        ).rowcount
        if not found:
            raise RunForgottenError(self._forgotten)

    def _note_hidden(
        self, connection: sa.Connection, run: RunInfo, *, goes_on: bool = False
    ) -> str | None:
        """Note, if it is so, that a later attempt hides steps of this ring that it did not know of."""
        stored = self._stored[run.ring]
        if run.rank != 0:
            return None
        found = resume.came_late(connection, stored, self._clock(), goes_on=goes_on)
        if found is None:
            return None
        attempt, event = found
        rows.insert_events(connection, stored._replace(attempt=attempt), [event])
        return event.message

    # -- on PostgreSQL -------------------------------------------------------------------------

    def _make_days(self, batch: Batch) -> None:
        """Make the partitions that the batch needs, in a transaction of their own."""
        days = partitions.days_of(batch.steps["time"])
        if not days <= self._days:
            with self._transaction() as connection:
                self._days = postgres.make_days(connection, days)

    def _write_small(self, run: RunInfo, batch: Batch) -> bool:
        """Whether the batch was stored by one statement, which is a transaction by itself."""
        with self._connected() as engine:
            return postgres.store_small(
                engine, run.ring, self._stored[run.ring], batch, self._clock()
            )

    # -- the connection ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sa.Connection]:
        """All or nothing; on SQLite excluding other writers.

        `durable`: its end waits for the disk, where the database does not do so anyway.
        """
        with self._connected() as engine, engine.begin() as connection:
            if self._path is not None and self._file is None:  # it was made just now
                self._file = sqlite.look(self._path)
            if durable and self._path is None:
                postgres.be_durable(connection)
            yield connection

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sa.Engine]:
        """The engine, fit to be used. What goes wrong with it becomes a `SinkError`."""
        try:
            yield self._current_engine()
        except (SQLAlchemyError, sqlite3.Error, StoreError, OSError, ImportError) as error:
            self._dispose(fold=False)
            if "no such table" in str(error) or postgres.has_no_table(error):
                raise RunForgottenError(self._forgotten) from error
            cause = getattr(error, "orig", None) or error
            reason = str(cause).strip().splitlines() or [type(cause).__name__]
            told = scrub(reason[0], self.url)
            advice = remedy(cause)
            msg = f"cannot write the store {redact(self.url)}: {told}"
            kind = (
                BusyError if may_pass(cause) else RefusedError if is_refused(cause) else SinkError
            )
            raise kind(f"{msg} ({advice})" if advice else msg) from error

    def _current_engine(self) -> sa.Engine:
        """The engine; another where its file was deleted, replaced or written over meanwhile."""
        if self._path is not None and self._file != (found := sqlite.look(self._path)):
            self.dispose()
            sqlite.check(self._path)
            self._file = found
        if self._engine is None:
            self._engine = (
                postgres.writing_engine(self.url)
                if self._path is None
                else sqlite.writing_engine(self.url, self._path, patience=_BUSY_SECONDS)
            )
        return self._engine

    def _checkpoint(self, *, final: bool = False) -> None:
        """Fold the WAL back into the file, where it is time and the file is still ours."""
        if self._engine is None or self._path is None or not self._is_intact(self._path):
            return
        if sqlite.checkpoint(self._engine, self._path, final=final):
            left = sqlite.look(self._path)
            if left is not None and self._file is not None and left[:2] == self._file[:2]:
                self._file = left  # else it was replaced just now: to be noticed at the next look

    def _is_intact(self, path: Path) -> bool:
        """Whether the file is as it was left, or else a database still."""
        if self._file == sqlite.look(path):
            return True
        try:
            sqlite.check(path)
            return path.stat().st_size > 0
        except (sqlite3.Error, OSError):
            return False


def _tell(registered: Registration) -> None:
    """In the job's log: which run it is, where that is another than was asked for; where it goes on."""
    run, told, resumed = registered.run, registered.told, registered.resumed
    if told is not None:
        asked_for = run.uid_source == "setting"
        logger.log(logging.WARNING if asked_for else logging.INFO, "gradwatch: %s", told)
    if resumed is not None:
        expected = resumed.data["start_by"] == "state"
        logger.log(
            logging.INFO if expected else logging.WARNING,
            "gradwatch: run %s (%s): %s", run.name, run.uid, resumed.message,
        )  # fmt: skip
