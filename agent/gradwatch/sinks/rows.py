"""Records as rows: what a batch becomes in the tables."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from gradwatch import schema, thinning
from gradwatch.recorder import FLAGS, WITHIN_LOCK
from gradwatch.sinks import bulk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.records import Event, Finding, LayerNorms

__all__ = [
    "Stored",
    "insert_events",
    "insert_layers",
    "insert_statement",
    "insert_steps",
    "strict_json",
    "upsert_finding",
]

_NUMBERS = ("loss", "lr", "pre_norm", "post_norm", "threshold", "loss_scale")
_BITS = (FLAGS.CLIPPED, FLAGS.NONFINITE, FLAGS.NONFINITE_LOSS, FLAGS.SKIPPED)
_EVENT_COLUMNS = (
    "run_id", "attempt", "step", "time", "rank", "kind", "severity", "message", "data",
)  # fmt: skip
_STRETCH_SECONDS = 60.0  # from the first batch of thinned steps that an event tells of to the last
OWN_EVENTS = frozenset({"nonfinite_loss", "loss_spike", "records_dropped"})


class Stored(NamedTuple):
    """Where a ring's records go. The steps on record are those of rank 0."""

    run_id: int
    attempt: int
    rank: int = 0


def insert_steps(
    connection: sa.Connection, stored: Stored, steps: np.ndarray[Any, np.dtype[np.void]]
) -> int:
    """Store step records; how many of them were not there."""
    if stored.rank != 0:
        return 0
    # As many at a time as one statement stores: the interpreter lock is held for a short time only.
    return sum(
        bulk.insert(
            connection, schema.step_records, _step_values(stored, steps[start : start + bulk.ROWS])
        )
        for start in range(0, len(steps), bulk.ROWS)
    )


def insert_events(connection: sa.Connection, stored: Stored, events: Sequence[Event]) -> None:
    """Store events; of another rank than 0 only those that are its own, not the gradient's."""
    if stored.rank != 0:
        events = [event for event in events if event.kind in OWN_EVENTS]
    events = [event for event in events if not _lengthens(connection, stored, event)]
    values = [
        value
        for event in events
        for value in (
            stored.run_id,
            stored.attempt,
            event.step,
            event.time,
            event.rank,
            event.kind,
            event.severity,
            event.message,
            strict_json(event.data),
        )
    ]
    bulk.insert(connection, schema.events, values, columns=_EVENT_COLUMNS)
    for event in events:
        if event.kind == "threshold_changed":
            _settle(connection, stored, event)


def _lengthens(connection: sa.Connection, stored: Stored, event: Event) -> bool:
    """Add thinned steps to the event of those before, if that is young: there is one a minute."""
    if "thinned" not in event.data or event.kind != "records_dropped":
        return False
    e = schema.events.c
    last = connection.execute(
        sa.select(e.id, e.time, e.data)
        .where(e.run_id == stored.run_id, e.kind == event.kind, e.attempt == stored.attempt)
        .order_by(e.step.desc(), e.id.desc())
        .limit(1)
    ).first()
    if last is None or not 0 <= event.time - last.time < _STRETCH_SECONDS:
        return False
    stretch = thinning.joined(last.data, event.data)
    if stretch is None:
        return False
    message = thinning.event(stretch, last.time).message
    connection.execute(
        sa.update(schema.events).where(e.id == last.id).values(message=message, data=stretch)
    )
    return True


def _settle(connection: sa.Connection, stored: Stored, event: Event) -> None:
    """A threshold was taken: confirm the request, and say in `runs.settings` how the run clips."""
    changes, runs = schema.threshold_changes, schema.runs
    connection.execute(
        sa.update(changes)
        .where(changes.c.id == event.data["change"], changes.c.run_id == stored.run_id)
        .values(applied_at=event.time, applied_step=event.step, previous=event.data["from"])
    )
    settings = connection.execute(
        sa.select(runs.c.settings).where(runs.c.id == stored.run_id)
    ).scalar_one()
    news = {"clip": event.data["clip"], "policies": [event.data["policy"]]}
    connection.execute(
        sa.update(runs).where(runs.c.id == stored.run_id).values(settings={**settings, **news})
    )


def insert_layers(connection: sa.Connection, stored: Stored, samples: Sequence[LayerNorms]) -> None:
    """Store samples of the layer norms."""
    if stored.rank != 0:
        return
    found = [
        (stored.run_id, stored.attempt, sample.step, name, _finite(grad), _finite(weight))
        for sample in samples
        for name, grad, weight in zip(
            sample.parameters, sample.grad_norms, sample.weight_norms, strict=True
        )
        if grad == grad or weight == weight  # noqa: PLR0124 - absent altogether where both are NaN
    ]
    bulk.insert(connection, schema.layer_norms, [*itertools.chain.from_iterable(found)])


def upsert_finding(connection: sa.Connection, stored: Stored, finding: Finding, now: float) -> None:
    """Store a finding, or bring the one of that name up to date."""
    news = {
        "severity": finding.severity,
        "last_step": finding.last_step,
        "ended_at": None,
        "message": finding.message,
        "advice": finding.advice,
        "data": dict(finding.data),
    }
    insert = _insert(connection, schema.findings).values(
        run_id=stored.run_id,
        finding=finding.finding,
        first_step=finding.first_step,
        found_at=now,
        **news,
    )
    connection.execute(
        insert.on_conflict_do_update(index_elements=["run_id", "finding"], set_=news)
    )


def strict_json(value: Any) -> str:
    """JSON as the standard has it: non-finite numbers as null, other objects as their text."""
    return json.dumps(_plain(value), default=str, allow_nan=False)


def _step_values(stored: Stored, steps: np.ndarray[Any, np.dtype[np.void]]) -> list[Any]:
    """The records as rows, one after the other, for SQLite's driver, which stores NaN as NULL.

    Only int, float and str: for anything else, None and bool too, it asks an adapter, which takes
    twice as long as storing the row.
    """
    pieces = [steps[start : start + WITHIN_LOCK] for start in range(0, len(steps), WITHIN_LOCK)]
    return [value for piece in pieces for value in _piece(stored, piece)]


def _piece(stored: Stored, steps: np.ndarray[Any, np.dtype[np.void]]) -> list[Any]:
    table = np.empty((len(steps), len(schema.step_records.columns)), object)
    table[:, 0], table[:, 1] = stored.run_id, stored.attempt
    table[:, 2] = steps["step"]
    table[:, 3] = np.where(np.isfinite(steps["time"]), steps["time"], 0.0)  # of a damaged file
    for column, name in enumerate(_NUMBERS, start=4):
        values = steps[name]
        table[:, column] = np.where(np.isinf(values), np.nan, values)
    for column, bit in enumerate(_BITS, start=4 + len(_NUMBERS)):
        table[:, column] = (steps["flags"] & bit != 0).astype(np.int64)
    return table.ravel().tolist()


def insert_statement(connection: sa.Connection, table: sa.Table) -> str:
    """An INSERT of all columns for the driver's executemany: a third of SQLAlchemy's own time."""
    columns = table.columns.keys()
    mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
    marks = ", ".join([mark] * len(columns))
    return (
        f"INSERT INTO {table.name} ({', '.join(columns)}) "  # noqa: S608 - names of our own
        f"VALUES ({marks}) ON CONFLICT DO NOTHING"
    )


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    """An INSERT that may say ON CONFLICT, in this database's dialect."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    return dialect.insert(table)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
