"""Where a run goes on: the step at which a further attempt of it begins, and what that hides.

A state (`Agent.load_state_dict`) says at which step. A job that was started again under its run id
without one goes on where its optimizer was, if that counts its own steps and was loaded; otherwise
after the last step on record, so that nothing recorded leaves the timeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import sqlalchemy as sa

from gradwatch.records import Event
from gradwatch.schema import attempts, events, rings, step_records, step_summaries
from gradwatch.summaries import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gradwatch.records import RunInfo
    from gradwatch.sinks.rows import Stored

__all__ = ["Start", "came_late", "resumed", "start"]

_END = 2**63 - 1
# Steps that no optimizer counts: left out, or without any gradient.
_UNAPPLIED = sa.or_(
    step_records.c.skipped,
    sa.and_(step_records.c.pre_norm.is_(None), sa.not_(step_records.c.nonfinite)),
)


class Start(NamedTuple):
    """At which step an attempt begins, what says so, and how many steps it hides, by attempt."""

    step: int
    why: Literal["state", "optimizer", "last_step"]
    hidden: Mapping[int, int] = {}


class _Part(NamedTuple):
    """The steps [start, stop) of an attempt, those of it that show."""

    attempt: int
    start: int
    stop: int


class _Count(NamedTuple):
    """How many steps are stored, and how many of them no optimizer has counted."""

    steps: int
    unapplied: int


def start(
    connection: sa.Connection,
    run: RunInfo,
    run_id: int,
    position: float,
    counters: Mapping[str, int],
) -> Start:
    """Where an attempt of a known run begins that comes at `position` among the others.

    `counters` has by attempt what the optimizer had counted before it, where that was not 0.
    """
    parts = _visible(connection, run_id, position)
    step, why = _begin(connection, run, run_id, parts, counters)
    hidden = {
        part.attempt: count
        for part in parts
        if (count := _count(connection, run_id, part, max(step, part.start), part.stop).steps)
    }
    return Start(step, why, hidden)


def resumed(run: RunInfo, stored: Stored, began: Start, now: float) -> Event:
    """The event that a run goes on: from which step, by what, and how many steps that hides."""
    hidden = sum(began.hidden.values())
    if began.why == "state":
        by = "as the loaded state says"
    elif began.why == "optimizer":
        by = f"where the loaded optimizer is: it has applied {run.counter:,} steps"
    elif began.step == 0:
        by = "no step of the run is on record"
    else:
        by = "after the last step on record: no state was loaded"
    data = {
        "attempt": stored.attempt,
        "host": run.host,
        "pid": run.pid,
        "start_step": began.step,
        "start_by": began.why,
        "optimizer_steps": run.counter,
        "hidden_steps": hidden,
        "hidden": {str(attempt): count for attempt, count in began.hidden.items()},
    }
    message = f"attempt {stored.attempt} goes on from step {began.step:,}, {by}{_told(hidden)}"
    return Event("run_resumed", began.step, now, "info", message, data, run.rank)


def came_late(
    connection: sa.Connection, stored: Stored, now: float, *, goes_on: bool = False
) -> tuple[int, Event] | None:
    """That steps of this attempt are hidden by a later one which did not know of them.

    The attempt that hides them, and the event to be stored there; None where all that is hidden
    has been told. `goes_on`: the attempt takes further steps.
    """
    by = _hider(connection, stored)
    if by is None:
        return None
    own = _Part(stored.attempt, by.start_step, _END)
    hidden = _count(connection, stored.run_id, own, own.start, own.stop).steps
    untold = hidden - _told_before(connection, stored)
    if untold <= 0:
        return None
    shown = (
        f"the timeline shows attempt {by.attempt} from step {by.start_step:,} on, and step_records "
        "has both"
    )
    if goes_on:
        message = (
            f"attempt {stored.attempt} still takes steps although attempt {by.attempt} has begun: "
            f"two processes record under one run id; {shown}. Give each process its own "
            "GRADWATCH_RUN_ID"
        )
    else:
        message = (
            f"{untold:,} step{'s' * (untold != 1)} of attempt {stored.attempt} reached the store "
            f"after attempt {by.attempt} had begun; {shown}"
        )
    data = {"attempt": stored.attempt, "hidden_by": by.attempt, "hidden_steps": untold}
    return by.attempt, Event("steps_hidden", by.start_step, now, "warning", message, data, 0)


# -- where it begins -------------------------------------------------------------------------------


def _begin(
    connection: sa.Connection,
    run: RunInfo,
    run_id: int,
    parts: list[_Part],
    counters: Mapping[str, int],
) -> tuple[int, Literal["state", "optimizer", "last_step"]]:
    if run.after is not None:
        origin = connection.execute(
            sa.select(attempts.c.start_step)
            .join(
                rings,
                sa.and_(rings.c.run_id == attempts.c.run_id, rings.c.attempt == attempts.c.attempt),
            )
            .where(rings.c.ring == run.after, rings.c.run_id == run_id)
        ).scalar()
        if origin is not None:
            return int(origin) + run.start_step, "state"
    elif run.uid_source not in {"setting", "launcher"}:
        return run.start_step, "state"
    elif run.counter is not None:
        found = _where_it_was(connection, run_id, parts, counters, run.counter)
        if found is not None:
            return found, "optimizer"
    return _after_all(connection, run_id, parts), "last_step"


def _after_all(connection: sa.Connection, run_id: int, parts: list[_Part]) -> int:
    """After the last step of the timeline; not before an attempt began that has no steps yet."""
    last = next(
        (last for part in reversed(parts) if (last := _last(connection, run_id, part)) is not None),
        -1,
    )
    return max([last + 1, *(part.start for part in parts[-1:])])


def _where_it_was(
    connection: sa.Connection,
    run_id: int,
    parts: list[_Part],
    counters: Mapping[str, int],
    counter: int,
) -> int | None:
    """The step that an optimizer comes to which has applied so many; None where nobody knows.

    That is in the latest attempt that did not begin beyond it. Steps that are not on record count
    as applied; where the optimizer has come further than the record, after the last step.
    """
    for part in reversed(parts):
        applied = counter - counters.get(str(part.attempt), 0)
        if applied < 0:
            continue
        end = _last(connection, run_id, part)
        end = part.start if end is None else end + 1
        at, step = part.start, part.start + applied
        while at <= step < end:  # what was not applied up to here moves it on
            at, step = step + 1, step + _count(connection, run_id, part, at, step + 1).unapplied
        if step < end or part is not parts[-1]:
            return min(step, end)
        return _after_all(connection, run_id, parts)
    return None


def _visible(connection: sa.Connection, run_id: int, before: float) -> list[_Part]:
    """What shows of the attempts before a position, in the order of their steps."""
    query = (
        sa.select(attempts.c.attempt, attempts.c.start_step)
        .where(attempts.c.run_id == run_id, attempts.c.position < before)
        .order_by(attempts.c.position.desc())
    )
    parts, stop = [], _END
    for attempt, first in connection.execute(query).all():
        if first < stop:
            parts.append(_Part(attempt, first, stop))
        stop = min(stop, first)
    return parts[::-1]


def _last(connection: sa.Connection, run_id: int, part: _Part) -> int | None:
    """The last step of a part that is stored, pruned ones included."""
    r, s = step_records.c, step_summaries.c
    found = [
        connection.execute(query).scalar()
        for query in (
            sa.select(sa.func.max(r.step)).where(
                r.run_id == run_id, r.attempt == part.attempt, r.step < part.stop
            ),
            sa.select(sa.func.max(s.last_step)).where(
                s.run_id == run_id, s.attempt == part.attempt, s.last_step < part.stop
            ),
        )
    ]
    return max((int(step) for step in found if step is not None), default=None)


# -- how many --------------------------------------------------------------------------------------


def _count(connection: sa.Connection, run_id: int, part: _Part, start: int, stop: int) -> _Count:
    """The stored steps [start, stop) of an attempt: whole blocks by their summaries."""
    s = step_summaries.c
    blocks = connection.execute(
        sa.select(s.block, s.steps, s.skipped, s.finite, s.nonfinite, s.amp_overflows)
        .where(s.run_id == run_id, s.attempt == part.attempt)
        .where(s.first_step >= start, s.last_step < stop)
        .order_by(s.block)
    ).all()
    steps = sum(row.steps for row in blocks)
    without_gradient = (
        max(0, row.steps - row.finite - row.nonfinite - row.amp_overflows) for row in blocks
    )
    unapplied = sum(row.skipped for row in blocks) + sum(without_gradient)
    r = step_records.c
    for first, end in _between([row.block for row in blocks], start, stop):
        found = connection.execute(
            sa.select(
                sa.func.count(), sa.func.coalesce(sa.func.sum(sa.case((_UNAPPLIED, 1), else_=0)), 0)
            ).where(r.run_id == run_id, r.attempt == part.attempt, r.step >= first, r.step < end)
        ).one()
        steps, unapplied = steps + int(found[0]), unapplied + int(found[1])
    return _Count(steps, unapplied)


def _between(blocks: list[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The ranges of [start, stop) that are in none of these blocks."""
    at = start
    for block in blocks:
        if at < block * BLOCK:
            yield at, block * BLOCK
        at = (block + 1) * BLOCK
    if at < stop:
        yield at, stop


# -- what is hidden --------------------------------------------------------------------------------


def _hider(connection: sa.Connection, stored: Stored) -> Any:
    """The later attempt that hides the most of this one, and its start step; None without one."""
    own, later = attempts.alias(), attempts.alias()
    return connection.execute(
        sa.select(later.c.attempt, later.c.start_step)
        .join(own, own.c.run_id == later.c.run_id)
        .where(own.c.run_id == stored.run_id, own.c.attempt == stored.attempt)
        .where(later.c.position > own.c.position)
        .order_by(later.c.start_step, later.c.position)
        .limit(1)
    ).one_or_none()


def _told_before(connection: sa.Connection, stored: Stored) -> int:
    """How many hidden steps of an attempt have been told."""
    found = connection.execute(
        sa.select(events.c.kind, events.c.data).where(
            events.c.run_id == stored.run_id,
            events.c.kind.in_(("run_resumed", "steps_hidden")),
        )
    ).all()
    told = 0
    for kind, data in found:
        if kind == "run_resumed":
            told += int(data.get("hidden", {}).get(str(stored.attempt), 0))
        elif data.get("attempt") == stored.attempt:
            told += int(data.get("hidden_steps", 0))
    return told


def _told(hidden: int) -> str:
    if not hidden:
        return ""
    steps = f"{hidden:,} later step{'s' * (hidden != 1)} of earlier attempts"
    return f"; the timeline no longer shows {steps}, which step_records has"
