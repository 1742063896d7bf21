"""Registering a run: its row, a free name, the attempt it begins, its ring's cursor."""

from __future__ import annotations

import dataclasses
import os
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from gradwatch import identity
from gradwatch.schema import attempts, rings, runs, step_records
from gradwatch.sinks import NotYetError, resume
from gradwatch.sinks.rows import Stored

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.records import Event, RunInfo, RunStatus

__all__ = ["LIVE_SECONDS", "Registration", "bury", "followers", "register"]

LIVE_SECONDS = 60.0  # a running run whose heartbeat is older is taken for gone


_COUNTERS = "optimizer_steps_before"  # in `runs.settings`: by attempt, where that was not 0


class Registration(NamedTuple):
    """The run as the store knows it, and where its records go."""

    run: RunInfo
    stored: Stored
    resumed: Event | None = None  # to be stored where a known run goes on
    told: str | None = None  # for the job's log, where the run is another than was asked for


def register(connection: sa.Connection, run: RunInfo, now: float) -> Registration:
    """Find or make the run, and begin an attempt of it; once a ring, however often called.

    The run that is returned has the uid, the name and the start step that the store has settled.
    Call it inside a transaction that excludes other writers, or two runs may get one name.
    """
    mine = _of_ring(connection, run.ring)
    if mine is not None:
        return Registration(_settled(run, mine), Stored(mine.run_id, mine.attempt, run.rank))
    if run.leader is not None:
        return _join(connection, run, run.leader)
    if run.recovered and run.rank != 0:
        msg = (
            f"rank {run.rank} was killed before it knew which run of its job's rank 0 it belongs to"
        )
        raise NotYetError(msg)

    if run.after is not None and (before := _of_ring(connection, run.after)) is not None:
        run = dataclasses.replace(run, uid=before.uid)  # which the store may have settled since
    known = connection.execute(sa.select(runs).where(runs.c.uid == run.uid)).one_or_none()
    told = None
    if known and (why := _another(run, known, now)) is not None:
        uid = f"{run.uid}-{uuid.uuid4().hex[:8]}"
        told = f"run id {run.uid!r} {why}: this process is a run of its own, {uid!r}"
        run, known = dataclasses.replace(run, uid=uid), None
    if known is None:
        run = dataclasses.replace(run, name=_free_name(connection, run.name, now))
        stored, resumed = Stored(_insert_run(connection, run, now), 1), None
        position = 1.0
    else:
        run = dataclasses.replace(run, name=known.name)
        stored = Stored(known.id, _next_attempt(connection, known.id))
        position = _position(connection, run, stored)
        counters = known.settings.get(_COUNTERS, {})
        began = resume.start(connection, run, known.id, position, counters)
        _go_on(connection, run, stored, known.settings, now)
        run = dataclasses.replace(run, start_step=began.step)
        resumed = resume.resumed(run, stored, began, now)
    connection.execute(
        sa.insert(attempts).values(
            run_id=stored.run_id,
            attempt=stored.attempt,
            start_step=run.start_step,
            started_at=run.started_at,
            position=position,
        )
    )
    _insert_ring(connection, run, stored)
    return Registration(run, stored, resumed, told)


def _of_ring(connection: sa.Connection, ring: str) -> Any:
    """The attempt that a ring belongs to, with its run's uid and name; None where it is not known."""
    return connection.execute(
        sa.select(rings.c.run_id, rings.c.attempt, runs.c.name, runs.c.uid, attempts.c.start_step)
        .join(runs, runs.c.id == rings.c.run_id)
        .join(
            attempts,
            sa.and_(attempts.c.run_id == rings.c.run_id, attempts.c.attempt == rings.c.attempt),
        )
        .where(rings.c.ring == ring)
    ).one_or_none()


def _settled(run: RunInfo, found: Any) -> RunInfo:
    return dataclasses.replace(
        run, name=found.name, uid=found.uid, start_step=int(found.start_step)
    )


def _join(connection: sa.Connection, run: RunInfo, leader: str) -> Registration:
    """The run and attempt of rank 0's ring; `NotYetError` where it is not in this store yet."""
    found = _of_ring(connection, leader)
    if found is None:
        msg = f"the run that rank {run.rank} belongs to is not in this store yet"
        raise NotYetError(msg)
    stored = Stored(found.run_id, found.attempt, run.rank)
    _insert_ring(connection, run, stored)
    return Registration(_settled(run, found), stored)


def _insert_ring(connection: sa.Connection, run: RunInfo, stored: Stored) -> None:
    connection.execute(
        sa.insert(rings).values(
            ring=run.ring,
            run_id=stored.run_id,
            attempt=stored.attempt,
            rank=run.rank,
            host=run.host,
            path=run.settings.get("ring"),
            step_cursor=0,
            event_cursor=0,
        )
    )


def _insert_run(connection: sa.Connection, run: RunInfo, now: float) -> int:
    connection.execute(
        sa.insert(runs).values(
            uid=run.uid,
            name=run.name,
            started_at=run.started_at,
            heartbeat_at=run.started_at if run.recovered else now,
            status="running",
            **_columns(run, _counted(run, 1, {})),
        )
    )
    return int(connection.execute(sa.select(runs.c.id).where(runs.c.uid == run.uid)).scalar_one())


def _go_on(
    connection: sa.Connection,
    run: RunInfo,
    stored: Stored,
    before: Mapping[str, Any],
    now: float,
) -> None:
    """Bring the row of a known run up to date, whose settings were these `before`."""
    values: dict[str, Any] = {"settings": {**before, **_counted(run, stored.attempt, before)}}
    if not run.recovered:
        values = {
            "status": "running",
            "ended_at": None,
            "heartbeat_at": now,
            **_columns(run, _counted(run, stored.attempt, before)),
        }
    connection.execute(sa.update(runs).where(runs.c.id == stored.run_id).values(**values))


def _next_attempt(connection: sa.Connection, run_id: int) -> int:
    last = connection.execute(
        sa.select(sa.func.max(attempts.c.attempt)).where(attempts.c.run_id == run_id)
    ).scalar()
    return int(last or 0) + 1


def _counted(run: RunInfo, attempt: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """What optimizers had counted before each attempt, this one included, as `runs.settings` has it."""
    counters = dict(before.get(_COUNTERS, {}))
    if run.counter:
        counters[str(attempt)] = run.counter
    return {_COUNTERS: counters} if counters else {}


def bury(connection: sa.Connection, run: RunInfo, stored: Stored, status: RunStatus | None) -> None:
    """Note how a recovered run ended and when: at its last step; not where it has gone on since."""
    later = followers(stored.run_id, stored.attempt)
    if run.rank != 0 or status is None or connection.execute(later.limit(1)).one_or_none():
        return
    last = (
        sa.select(step_records.c.time)
        .where(step_records.c.run_id == stored.run_id, step_records.c.attempt == stored.attempt)
        .order_by(step_records.c.step.desc())
        .limit(1)
    )
    connection.execute(
        sa.update(runs)
        .where(runs.c.id == stored.run_id, runs.c.status == "running")
        .values(status=status, ended_at=connection.execute(last).scalar() or run.started_at)
    )


def followers(run_id: Any, attempt: Any, step: Any = None) -> sa.Select[tuple[int]]:
    """The attempts of a run that come after this one; with `step`, those that hide it there."""
    own, later = attempts.alias(), attempts.alias()
    found = (
        sa.select(later.c.attempt)
        .join(own, own.c.run_id == later.c.run_id)
        .where(
            own.c.run_id == run_id,
            own.c.attempt == attempt,
            later.c.position > own.c.position,
        )
    )
    return found if step is None else found.where(later.c.start_step <= step)


def _position(connection: sa.Connection, run: RunInfo, stored: Stored) -> float:
    """After all others; of a recovered attempt: by when it began, which may be before others."""
    others = sa.select(attempts.c.position).where(attempts.c.run_id == stored.run_id)
    before = others
    if run.recovered:
        before = others.where(attempts.c.started_at <= run.started_at)
    last = connection.execute(before.order_by(attempts.c.position.desc()).limit(1)).scalar()
    low = 0.0 if last is None else float(last)
    after = others.where(attempts.c.position > low).order_by(attempts.c.position).limit(1)
    high = connection.execute(after).scalar()
    return low + 1 if high is None else (low + float(high)) / 2


def _free_name(connection: sa.Connection, name: str, now: float) -> str:
    """`name`, or with -2, -3, … where live runs have it."""
    running = connection.execute(
        sa.select(runs.c.name, runs.c.host, runs.c.pid).where(
            runs.c.status == "running", runs.c.heartbeat_at > now - LIVE_SECONDS
        )
    )
    live = {
        row.name for row in running if row.host != identity.host() or identity.is_alive(row.pid)
    }
    candidate, ordinal = name, 1
    while candidate in live:
        ordinal += 1
        candidate = f"{name}-{ordinal}"
    return candidate


def _another(run: RunInfo, known: Any, now: float) -> str | None:
    """Why this is another run than the known one of that uid; None where it is that run again."""
    recorder = f"process {known.pid} on {known.host}"
    if run.uid_source == "launcher" and not _is_the_same(run, known, now):
        # The launcher's id names the whole job: a second script in it is not a resumed run.
        ended = known.status == "finished"
        return f"is that of a run that {'has finished' if ended else f'{recorder} records'}"
    if run.uid_source == "setting" and not run.recovered and _is_going_on_here(known, now):
        return f"is in use: {recorder} is recording run {known.name!r} under it"
    return None


def _is_going_on_here(known: Any, now: float) -> bool:
    """Whether another process of this machine is recording the run."""
    return bool(
        known.status == "running"
        and known.host == identity.host()
        and known.pid != os.getpid()
        and known.heartbeat_at > now - LIVE_SECONDS
        and identity.is_alive(known.pid, known.heartbeat_at)
    )


def _is_the_same(run: RunInfo, known: Any, now: float) -> bool:
    """Whether this is the known run of a launcher's job again: it neither ended well nor goes on."""
    if run.recovered:
        return bool(known.name == run.name)
    if known.status != "running":
        return bool(known.status != "finished")
    if known.host == identity.host():
        return known.pid == os.getpid() or not identity.is_alive(known.pid)
    return bool(known.heartbeat_at <= now - LIVE_SECONDS)


def _columns(run: RunInfo, counted: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "job": run.job,
        "host": run.host,
        "pid": run.pid,
        "world_size": run.world_size,
        "tags": dict(run.tags),
        "settings": {**run.settings, **counted},
        "metrics_url": run.metrics_url,
    }
