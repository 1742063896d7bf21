"""The store, read: the only module that knows the database from the reader's side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import time
import urllib.parse
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from gradwatch import schema
from gradwatch.config import DEFAULT_STORE, redact, resolve_store, sqlite_path
from gradwatch.errors import (
    ConfigurationError,
    RunNotFoundError,
    StoreError,
    StoreNotFoundError,
)
from gradwatch.policies import ClipNorm
from gradwatch.secrets import scrub
from gradwatch.sinks import postgres, sqlite
from gradwatch.sinks.remedies import remedy
from gradwatch_monitor.rows import Change, Event, Finding, Run, Summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    import pandas as pd

    from gradwatch.policies import Policy

__all__ = ["STEP_COLUMNS", "Change", "Event", "Finding", "Run", "Store", "Summary", "status_of"]

# The record's columns as `steps` returns them: absent values are NaN, flags are booleans.
STEP_COLUMNS = tuple(
    c.name for c in schema.step_records.columns if c.name not in {"run_id", "attempt"}
)
_IDS = 2**63  # databases count no further
_FLAGS = {"clipped", "nonfinite", "nonfinite_loss", "skipped"}
_steps = sa.table("steps", *(sa.column(c.name, c.type) for c in schema.step_records.columns))


def _postgres_reader(url: str) -> sa.Engine:
    try:
        return postgres.reading_engine(url)
    except (ImportError, sa.exc.ArgumentError) as error:
        msg = (
            f"{redact(url)}: {scrub(str(error), url)}; pip install 'gradwatch[postgres]' brings the driver of "
            "postgresql+psycopg:// URLs"
        )
        raise StoreError(msg) from None


class Store:
    """A store opened to read. Nothing it does can hold up or change a running job.

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
                raise StoreNotFoundError(_absent(self.name))
            self._engine = _sqlite_reader(path)
        try:
            self._check(path)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The URL without its secrets."""
        return redact(self._url)

    def runs(self, *, status: str | None = None, limit: int | None = None) -> list[Run]:
        """All runs, the latest first; only those of a `status`, at most `limit`."""
        query = sa.select(schema.runs).order_by(schema.runs.c.id.desc()).limit(limit)
        if status is not None:
            query = query.where(schema.runs.c.status == status)
        with self._reading() as connection:
            return [Run(**row._mapping) for row in connection.execute(query)]

    def run(self, key: int | str) -> Run:
        """The run of that name (the latest), uid or id.

        Raises `RunNotFoundError`, saying which runs there are.
        """
        runs = schema.runs
        tests: list[sa.ColumnElement[bool]] = []
        if isinstance(key, str):
            tests += [runs.c.name == key, runs.c.uid == key]
        if (isinstance(key, int) or key.isdecimal()) and int(key) < _IDS:
            tests.append(runs.c.id == int(key))
        with self._reading() as connection:
            for test in tests:
                query = sa.select(runs).where(test).order_by(runs.c.id.desc()).limit(1)
                row = connection.execute(query).one_or_none()
                if row is not None:
                    return Run(**row._mapping)
            names = connection.execute(
                sa.select(runs.c.name).order_by(runs.c.id.desc()).limit(5)
            ).scalars()
            latest = ", ".join(names) or "none yet"
        msg = f"no run {key!r} in {self.name}; the latest are: {latest}"
        raise RunNotFoundError(msg)

    def steps(self, run_id: int, start: int | None = None, stop: int | None = None) -> pd.DataFrame:
        """The visible timeline as a frame, by step: steps in [start, stop), the record's columns."""
        import pandas as pd  # noqa: PLC0415 - only who asks for a frame needs it

        return pd.DataFrame(self.columns(run_id, STEP_COLUMNS, start, stop))

    def columns(
        self,
        run_id: int,
        names: Sequence[str],
        start: int | None = None,
        stop: int | None = None,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """The same as numpy arrays, only the columns asked for."""
        query = (
            sa.select(*(_steps.c[name] for name in names))
            .where(_steps.c.run_id == run_id)
            .order_by(_steps.c.step)
        )
        if start is not None:
            query = query.where(_steps.c.step >= start)
        if stop is not None:
            query = query.where(_steps.c.step < stop)
        with self._reading() as connection:
            sql = query.compile(connection, compile_kwargs={"literal_binds": True})
            rows = connection.exec_driver_sql(str(sql)).fetchall()
        values = list(zip(*rows, strict=True)) if rows else [()] * len(names)
        return {
            name: np.array(column, dtype=_dtype(name))
            for name, column in zip(names, values, strict=True)
        }

    def summary(self, run_id: int) -> Summary:
        """Counts and last values of a run."""
        s = _steps.c
        overflow = sa.and_(s.skipped, sa.not_(s.nonfinite), s.pre_norm.is_(None))
        with self._reading() as connection:
            counts = connection.execute(
                sa.select(
                    sa.func.count(),
                    _count(s.clipped),
                    _count(s.nonfinite),
                    _count(s.skipped),
                    _count(sa.and_(overflow, s.loss_scale.is_not(None))),
                ).where(s.run_id == run_id)
            ).one()
            last = {
                name: _last(connection, run_id, name)
                for name in ("step", "time", "loss", "pre_norm", "threshold")
            }
        steps, clipped, nonfinite, skipped, overflows = counts
        return Summary(
            steps=steps,
            clipped=clipped,
            nonfinite=nonfinite,
            skipped=skipped,
            amp_overflows=overflows,
            last_step=last["step"],
            last_time=last["time"],
            last_loss=last["loss"],
            last_pre_norm=last["pre_norm"],
            last_threshold=last["threshold"],
        )

    def last_step(self, run_id: int) -> int | None:
        """The greatest step of the visible timeline; None before the first."""
        with self._reading() as connection:
            step = _last(connection, run_id, "step")
        return None if step is None else int(step)

    def past(self, run_id: int) -> tuple[int, int]:
        """How many attempts the run has had, and how many records of all but the last are stored.

        As long as both stay the same, new steps only come at the end of the timeline.
        """
        attempts, rings = schema.attempts.c, schema.rings.c
        count = sa.select(sa.func.count()).where(attempts.run_id == run_id)
        last = (
            sa.select(attempts.attempt)
            .where(attempts.run_id == run_id)
            .order_by(attempts.position.desc())
            .limit(1)
        )
        stored = sa.select(sa.func.coalesce(sa.func.sum(rings.step_cursor), 0)).where(
            rings.run_id == run_id, rings.attempt != last.scalar_subquery()
        )
        with self._reading() as connection:
            return (
                int(connection.execute(count).scalar_one()),
                int(connection.execute(stored).scalar_one()),
            )

    def events(
        self, run_id: int, *, kind: str | None = None, limit: int | None = None
    ) -> list[Event]:
        """Events of the visible timeline, the latest first."""
        e, a = schema.events.c, schema.attempts
        own, later = a.alias(), a.alias()
        hidden = (
            sa.select(later.c.attempt)
            .join(own, own.c.run_id == later.c.run_id)
            .where(
                own.c.run_id == e.run_id,
                own.c.attempt == e.attempt,
                later.c.position > own.c.position,
                later.c.start_step <= e.step,
            )
            .exists()
        )
        names = [field.name for field in dataclasses.fields(Event)]
        query = (
            sa.select(*(e[name] for name in names))
            .where(e.run_id == run_id, ~hidden)
            .order_by(e.step.desc(), e.id.desc())
            .limit(limit)
        )
        if kind is not None:
            query = query.where(e.kind == kind)
        with self._reading() as connection:
            return [Event(**row._mapping) for row in connection.execute(query)]

    def findings(self, run_id: int) -> list[Finding]:
        """What was concluded about a run, the gravest first."""
        f = schema.findings.c
        names = [field.name for field in dataclasses.fields(Finding)]
        gravity = sa.case({"critical": 0, "warning": 1}, value=f.severity, else_=2)
        query = (
            sa.select(*(f[name] for name in names))
            .where(f.run_id == run_id)
            .order_by(gravity, f.first_step)
        )
        with self._reading() as connection:
            return [Finding(**row._mapping) for row in connection.execute(query)]

    # -- thresholds that are applied to a running job ------------------------------------------

    def changes(self, run_id: int) -> list[Change]:
        """The thresholds that were asked for, the latest first."""
        c = schema.threshold_changes.c
        names = [field.name for field in dataclasses.fields(Change)]
        query = sa.select(*(c[name] for name in names)).where(c.run_id == run_id)
        with self._reading() as connection:
            found = connection.execute(query.order_by(c.id.desc()))
            return [Change(**row._mapping) for row in found]

    def apply(
        self,
        run_id: int,
        threshold: float | None = None,
        *,
        policy: Policy[Any] | None = None,
        by: str,
        reason: str | None = None,
    ) -> Change:
        """Ask a running job to clip at `threshold`, or by `policy`, from its next step on.

        The job takes it within about a second, all ranks at one step; `changes` tells. It must
        have been started with remote control.

        Raises `ConfigurationError` where that cannot be asked of this run.
        """
        run = self.run(run_id)
        if (threshold is None) == (policy is None):
            msg = "apply takes a threshold or a policy"
            raise ConfigurationError(msg)
        if threshold is not None:
            threshold = ClipNorm(threshold).max_norm  # says what a threshold is
        if not run.is_live():
            msg = f"run {run.name!r} is not running: its status is {status_of(run)}"
            raise ConfigurationError(msg)
        if not run.settings.get("remote_control"):
            msg = (
                f"run {run.name!r} does not allow it: start the job with GRADWATCH_REMOTE_CONTROL=1 "
                "or wrap(..., remote_control=True)"
            )
            raise ConfigurationError(msg)
        values = {
            "run_id": run.id,
            "requested_at": time.time(),
            "requested_by": by,
            "reason": reason,
            "threshold": threshold,
            "policy": None if policy is None else policy.describe(),
        }
        with self._writing() as connection:
            connection.execute(sa.insert(schema.threshold_changes).values(**values))
        return self.changes(run.id)[0]

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
                raise StoreNotFoundError(_absent(self.name))
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
            with engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, sqlite3.Error) as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()
            msg = f"cannot write the store {self.name}: {scrub(reason[0], self._url)}"
            raise StoreError(msg) from error
        finally:
            engine.dispose()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """One consistent view of the database; what goes wrong becomes a `StoreError`."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except (SQLAlchemyError, sqlite3.Error, ImportError) as error:
            cause = getattr(error, "orig", None) or error
            reason = str(cause).strip().splitlines() or [type(cause).__name__]
            advice = f" ({told})" if (told := remedy(cause)) else ""
            msg = f"cannot read the store {self.name}: {scrub(reason[0], self._url)}{advice}"
            raise StoreError(msg) from error
        except StoreError as error:
            if self.name in str(error):
                raise
            msg = f"cannot read the store {self.name}: {error}"
            raise type(error)(msg) from None


def _absent(name: str) -> str:
    return (
        f"there is no store at {name}; a job that calls gradwatch.wrap makes it at its first step"
    )


def status_of(run: Run) -> str:
    """The run's status; "silent" where it says it runs and gives no sign of life."""
    return "silent" if run.status == "running" and not run.is_live() else run.status


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
        connection.execute("PRAGMA query_only=1")
        return connection

    engine = sa.create_engine(
        "sqlite://", creator=connect, poolclass=sa.pool.NullPool, json_deserializer=json.loads
    )

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def _last(connection: sa.Connection, run_id: int, name: str) -> Any:
    """The last value of a column that is not NULL; None where there is none.

    From the visible part of the latest attempt back: the view would read the whole run.
    """
    a, r = schema.attempts.c, schema.step_records.c
    parts = sa.select(a.attempt, a.start_step).where(a.run_id == run_id).order_by(a.position.desc())
    stop = _IDS - 1
    for attempt, start in connection.execute(parts).all():
        query = (
            sa.select(r[name])
            .where(r.run_id == run_id, r.attempt == attempt, r.step < stop, r[name].is_not(None))
            .order_by(r.step.desc())
            .limit(1)
        )
        found = connection.execute(query).scalar()
        if found is not None:
            return found
        stop = min(stop, start)
    return None


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(sa.case((condition, 1), else_=0)), 0)


def _dtype(name: str) -> type:
    if name == "step":
        return np.int64
    return np.bool_ if name in _FLAGS else np.float64
