"""Registering a run: its row, a free name, the attempt it begins, its ring's cursor."""

from __future__ import annotations

import dataclasses
import os
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from gradwatch import identity
from gradwatch.records import Event
from gradwatch.schema import attempts, rings, runs, step_records
from gradwatch.sinks import NotYetError
from gradwatch.sinks.rows import Stored

if TYPE_CHECKING:
    from gradwatch.records import RunInfo, RunStatus

__all__ = ["LIVE_SECONDS", "Registration", "bury", "followers", "register"]

LIVE_SECONDS = 60.0  # a running run whose heartbeat is older is taken for gone


class Registration(NamedTuple):
    """The run as the store knows it, where its records go, and the cursor of its ring."""

    run: RunInfo
    stored: Stored
    resumed: Event | None  # to be stored where a known run goes on


def register(connection: sa.Connection, run: RunInfo, now: float) -> Registration:
    """Find or make the run, and begin an attempt of it; once a ring, however often called.

    Call it inside a transaction that excludes other writers, or two runs may get one name.
    """
    mine = connection.execute(
        sa.select(rings.c.run_id, rings.c.attempt, runs.c.name, runs.c.uid)
        .join(runs, runs.c.id == rings.c.run_id)
        .where(rings.c.ring == run.ring)
    ).one_or_none()
    if mine:
        run = dataclasses.replace(run, name=mine.name, uid=mine.uid)
        return Registration(run, Stored(mine.run_id, mine.attempt, run.rank), None)
    if run.leader is not None:
        return _join(connection, run, run.leader)
    if run.recovered and run.rank != 0:
        msg = (
            f"rank {run.rank} was killed before it knew which run of its job's rank 0 it belongs to"
        )
        raise NotYetError(msg)

    known = connection.execute(sa.select(runs).where(runs.c.uid == run.uid)).one_or_none()
    if known and run.uid_source == "launcher" and not _is_the_same(run, known, now):
        # The launcher's id names the whole job: a second script in it is not a resumed run.
        run = dataclasses.replace(run, uid=f"{run.uid}-{uuid.uuid4().hex[:8]}")
        known = None
    if known is None:
        run = dataclasses.replace(run, name=_free_name(connection, run.name, now))
        stored, resumed = Stored(_insert_run(connection, run, now), 1), None
    else:
        run = dataclasses.replace(run, name=known.name)
        stored = _go_on(connection, run, known.id, now)
        resumed = _resumed(run, stored, now)
    connection.execute(
        sa.insert(attempts).values(
            run_id=stored.run_id,
            attempt=stored.attempt,
            start_step=run.start_step,
            started_at=run.started_at,
            position=_position(connection, run, stored),
        )
    )
    _insert_ring(connection, run, stored)
    return Registration(run, stored, resumed)


def _join(connection: sa.Connection, run: RunInfo, leader: str) -> Registration:
    """The run and attempt of rank 0's ring; `NotYetError` where it is not in this store yet."""
    found = connection.execute(
        sa.select(rings.c.run_id, rings.c.attempt, runs.c.name, runs.c.uid)
        .join(runs, runs.c.id == rings.c.run_id)
        .where(rings.c.ring == leader)
    ).one_or_none()
    if found is None:
        msg = f"the run that rank {run.rank} belongs to is not in this store yet"
        raise NotYetError(msg)
    stored = Stored(found.run_id, found.attempt, run.rank)
    _insert_ring(connection, run, stored)
    return Registration(dataclasses.replace(run, name=found.name, uid=found.uid), stored, None)


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
            **_columns(run),
        )
    )
    return int(connection.execute(sa.select(runs.c.id).where(runs.c.uid == run.uid)).scalar_one())


def _go_on(connection: sa.Connection, run: RunInfo, run_id: int, now: float) -> Stored:
    if not run.recovered:
        connection.execute(
            sa.update(runs)
            .where(runs.c.id == run_id)
            .values(status="running", ended_at=None, heartbeat_at=now, **_columns(run))
        )
    last = connection.execute(
        sa.select(sa.func.max(attempts.c.attempt)).where(attempts.c.run_id == run_id)
    ).scalar()
    return Stored(run_id, (last or 0) + 1)


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


def _resumed(run: RunInfo, stored: Stored, now: float) -> Event:
    return Event(
        "run_resumed",
        run.start_step,
        now,
        "info",
        f"attempt {stored.attempt} goes on from step {run.start_step}",
        {"attempt": stored.attempt, "host": run.host, "pid": run.pid},
        run.rank,
    )


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


def _is_the_same(run: RunInfo, known: Any, now: float) -> bool:
    """Whether this is the known run again: it neither ended well nor goes on."""
    if run.recovered:
        return bool(known.name == run.name)
    if known.status != "running":
        return bool(known.status != "finished")
    if known.host == identity.host():
        return known.pid == os.getpid() or not identity.is_alive(known.pid)
    return bool(known.heartbeat_at <= now - LIVE_SECONDS)


def _columns(run: RunInfo) -> dict[str, Any]:
    return {
        "job": run.job,
        "host": run.host,
        "pid": run.pid,
        "world_size": run.world_size,
        "tags": dict(run.tags),
        "settings": dict(run.settings),
        "metrics_url": run.metrics_url,
    }
