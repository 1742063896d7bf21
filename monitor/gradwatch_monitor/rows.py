"""What a store returns: one frozen record a kind of row.

A cell that cannot be right (see `gradwatch.cells`) is unknown there: NaN for a time, None for a
count, "unknown" for a text, left out of a mapping. A row without what tells it from others (its id,
or the step that it is of) is no record.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any, Self

from gradwatch import schema
from gradwatch.cells import Cells
from gradwatch.sinks.register import LIVE_SECONDS
from gradwatch_monitor.ratio import clip_ratio
from gradwatch_monitor.shapes import event_data, is_policy, run_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.cells import Malformed

__all__ = ["Change", "Event", "Finding", "Run", "Summary"]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One row of `runs`: times in Unix seconds, `status` as the agent left it."""

    id: int
    uid: str
    name: str
    job: str
    started_at: float
    ended_at: float | None
    heartbeat_at: float
    status: str
    host: str
    pid: int | None
    world_size: int | None
    tags: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics_url: str | None

    @classmethod
    def of(cls, row: Mapping[str, Any], malformed: Malformed) -> Self | None:
        """The run of that row; None where the row has no id."""
        read = Cells(schema.runs, row, f"run {row['id']}", malformed)
        run_id = read.whole("id")
        if run_id is None:
            return None
        settings = run_settings(read.document("settings") or {}, lambda: read.bad("settings"))
        return cls(
            id=run_id,
            uid=str(read.text("uid")),
            name=str(read.text("name")),
            job=str(read.text("job")),
            started_at=_time(read, "started_at"),
            ended_at=read.real("ended_at"),
            heartbeat_at=_time(read, "heartbeat_at"),
            status=str(read.text("status")),
            host=str(read.text("host")),
            pid=read.whole("pid"),
            world_size=read.whole("world_size"),
            tags=read.document("tags") or {},
            settings=settings,
            metrics_url=read.text("metrics_url"),
        )

    def is_live(self, now: float | None = None) -> bool:
        """Whether it runs and has shown a sign of life in the last minute."""
        now = time.time() if now is None else now
        return self.status == "running" and now - self.heartbeat_at < LIVE_SECONDS


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One row of `events` on the visible timeline."""

    id: int
    step: int
    time: float
    rank: int | None
    kind: str
    severity: str
    message: str
    data: Mapping[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any], owner: str, malformed: Malformed) -> Self | None:
        """The event of that row; None where it is not of a step."""
        read = Cells(schema.events, row, owner, malformed)
        event, step = read.whole("id"), read.whole("step")
        if event is None or step is None:
            return None
        return cls(
            id=event,
            step=step,
            time=_time(read, "time"),
            rank=read.whole("rank"),
            kind=str(read.text("kind")),
            severity=str(read.text("severity")),
            message=str(read.text("message")),
            data=event_data(read.document("data") or {}, lambda: read.bad("data")),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One row of `findings`."""

    finding: str
    severity: str
    first_step: int
    last_step: int
    found_at: float
    ended_at: float | None
    message: str
    advice: str
    data: Mapping[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any], owner: str, malformed: Malformed) -> Self | None:
        """The finding of that row; None where it is not of any steps."""
        read = Cells(schema.findings, row, owner, malformed)
        first, last = read.whole("first_step"), read.whole("last_step")
        if first is None or last is None:
            return None
        return cls(
            finding=str(read.text("finding")),
            severity=str(read.text("severity")),
            first_step=first,
            last_step=last,
            found_at=_time(read, "found_at"),
            ended_at=read.real("ended_at"),
            message=str(read.text("message")),
            advice=str(read.text("advice")),
            data=read.document("data") or {},
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """Counts over a run's visible timeline, and its last values (None where there is none).

    All but `taken` are about the steps that the store has: a prune removes some. `finite` steps have
    a finite gradient norm; in `no_gradient` steps no parameter had a gradient.
    """

    steps: int
    finite: int
    no_gradient: int
    clipped: int
    nonfinite: int
    skipped: int
    amp_overflows: int
    last_step: int | None
    last_time: float | None
    last_loss: float | None
    last_pre_norm: float | None
    last_threshold: float | None

    @property
    def taken(self) -> int:
        """How far the run has come, in steps: the number of the last one, from 0, plus 1."""
        return 0 if self.last_step is None else self.last_step + 1

    @property
    def clip_ratio(self) -> float | None:
        """Clipped steps over those with a finite gradient norm; None without such a step."""
        return clip_ratio(self.clipped, self.finite)


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One row of `threshold_changes`: taken where `applied_at` is set, or `refused`, or waiting."""

    id: int
    requested_at: float
    requested_by: str
    reason: str | None
    threshold: float | None
    policy: Mapping[str, Any] | None
    applied_at: float | None
    applied_step: int | None
    previous: float | None
    refused: str | None

    @classmethod
    def of(cls, row: Mapping[str, Any], owner: str, malformed: Malformed) -> Self | None:
        """The change of that row; None where the row has no id."""
        read = Cells(schema.threshold_changes, row, owner, malformed)
        change, threshold = read.whole("id"), read.real("threshold")
        policy = None if row["policy"] is None else read.document("policy")
        if policy is not None and not is_policy(policy):
            read.bad("policy")
            policy = None
        if change is None:
            return None
        return cls(
            id=change,
            requested_at=_time(read, "requested_at"),
            requested_by=str(read.text("requested_by")),
            reason=read.text("reason"),
            threshold=_known(threshold),
            policy=policy,
            applied_at=read.real("applied_at"),
            applied_step=read.whole("applied_step"),
            previous=_known(read.real("previous")),
            refused=read.text("refused"),
        )


def _time(read: Cells, name: str) -> float:
    """A moment in Unix seconds; NaN where it is unknown."""
    found = read.real(name)
    return math.nan if found is None else found


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
