"""What a store returns: one frozen record a kind of row."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from gradwatch.sinks.register import LIVE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    pid: int
    world_size: int
    tags: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics_url: str | None

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


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """Counts over a run's visible timeline, and its last values (None where there is none).

    All but `taken` are about the steps that the store has: a prune removes some.
    """

    steps: int
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
        """Clipped steps over all steps; None before the first."""
        return self.clipped / self.steps if self.steps else None


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
