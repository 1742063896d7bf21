"""The store, read: the only module that knows its tables from the reader's side."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from gradwatch import schema
from gradwatch.cells import LEAST, MOST, UNKNOWN, Cells, real, text, whole
from gradwatch.errors import ConfigurationError, NotControllableError, RunNotFoundError
from gradwatch.policies import ClipNorm
from gradwatch.sinks.register import followers
from gradwatch_monitor import timeline
from gradwatch_monitor.database import Database
from gradwatch_monitor.rows import Change, Event, Finding, Run, Summary
from gradwatch_monitor.timeline import RECENT, STEP_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import numpy as np
    import pandas as pd

    from gradwatch.policies import Policy
    from gradwatch_monitor.recommend import Recommendation
    from gradwatch_monitor.timeline import Blocks, Taken

__all__ = [
    "STEP_COLUMNS",
    "Change",
    "Event",
    "Finding",
    "Run",
    "Store",
    "Summary",
    "obstacle",
    "status_of",
]

_SAME_THRESHOLD = 0.1  # share by which a recommended threshold may move unsaid
_WEIGHED, _WEIGHED_WITHIN = 5, 10_000  # samples of the weights, and steps they are looked for in
_IDS = 2**63  # databases count no further
_KINDS = ("id", "name", "uid")  # what may name a run


class Store(Database):
    """A store opened to read. Nothing it does can hold up or change a running job.

    Args:
        url: an SQLAlchemy URL or an SQLite file's path.

    Raises:
        StoreNotFoundError: there is no such file.
        StoreRevisionError: its schema is older or newer than this version's.
        StoreError: it is something else, or cannot be reached.
    """

    def runs(self, *, status: str | None = None, limit: int | None = None) -> list[Run]:
        """All runs, the latest first; only those of a `status`, at most `limit`."""
        query = sa.select(schema.runs).order_by(schema.runs.c.id.desc()).limit(limit)
        if status is not None:
            query = query.where(schema.runs.c.status == status)
        with self._reading() as connection:
            rows = connection.execute(query)
            return [run for row in rows if (run := Run.of(dict(row._mapping), self.malformed))]

    def run(self, key: int | str) -> Run:
        """The run of that id, name (the latest) or uid.

        `"id:3"`, `"name:3"` and `"uid:3"` say which is meant. Without that, a number is an id, and
        other text a name, or where no run has it, a uid. Raises `RunNotFoundError`, saying which
        runs there are.
        """
        kinds, value = _meaning(key)
        with self._reading() as connection:
            for kind in kinds:
                row = _find(connection, kind, value)
                found = None if row is None else Run.of(dict(row._mapping), self.malformed)
                if found is not None:
                    return found
            others = [
                f"`{kind}:{value}`"
                for kind in ("name", "uid")
                if kind not in kinds and _find(connection, kind, value) is not None
            ]
            latest = connection.execute(
                sa.select(schema.runs.c.name).order_by(schema.runs.c.id.desc()).limit(5)
            ).scalars()
            names = ", ".join(text(name) or UNKNOWN for name in latest) or "none yet"
        meant = f"no run with the {kinds[0]} {value!r}" if len(kinds) == 1 else f"no run {key!r}"
        hint = f"; {' and '.join(others)} would find one" if others else ""
        msg = f"{meant} in {self.name}{hint}; the latest are: {names}"
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
        with self._reading() as connection:
            return timeline.columns(connection, run_id, names, start, stop)

    def long(
        self,
        run_id: int,
        names: Sequence[str],
        recent: int = RECENT,
        of_blocks: Sequence[str] | None = None,
    ) -> tuple[Blocks, dict[str, np.ndarray[Any, Any]]]:
        """The same in a time that hardly grows with the run: all but the last steps as blocks.

        `recent` steps, and up to a block more, come as they are; of a run that is no longer, all.
        `of_blocks`: those columns of the blocks that are asked for, all by default.
        """
        with self._reading() as connection:
            return timeline.read(connection, run_id, names, recent, of_blocks)

    def summary(self, run_id: int) -> Summary:
        """Counts and last values of a run, those of steps that were pruned too."""
        with self._reading() as connection:
            return timeline.summary(connection, run_id)

    def last_step(self, run_id: int) -> int | None:
        """The greatest step of the visible timeline; None before the first."""
        with self._reading() as connection:
            return timeline.last_step(connection, run_id)

    def last_taken(self, run_id: int) -> Taken | None:
        """The same step, and when it was taken; None before the first, or where all are pruned."""
        with self._reading() as connection:
            return timeline.last_taken(connection, run_id)

    def attempt_starts(self, run_id: int) -> list[int]:
        """The first step of each attempt that shows, in the order of the steps."""
        with self._reading() as connection:
            return [part.start for part in timeline.visible(connection, run_id)]

    def first_loss(self, run_id: int) -> float | None:
        """The first loss of the visible timeline, if it is among its first ten steps."""
        losses = self.columns(run_id, ("loss",), stop=10)["loss"]
        return float(losses[0]) if len(losses) and losses[0] == losses[0] else None

    def last_change(self, run_id: int) -> Event | None:
        """The event of the last threshold or policy that was applied; None without one."""
        events = self.events(run_id, kind="threshold_changed")
        return next((event for event in events if "policy" in event.data), None)

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
        stored = sa.select(rings.step_cursor).where(
            rings.run_id == run_id, rings.attempt != last.scalar_subquery()
        )
        with self._reading() as connection:
            cursors = connection.execute(stored).scalars()
            return (
                int(connection.execute(count).scalar_one()),
                sum(whole(cursor) or 0 for cursor in cursors),
            )

    def events(
        self, run_id: int, *, kind: str | None = None, limit: int | None = None
    ) -> list[Event]:
        """Events of the visible timeline, the latest first."""
        e = schema.events.c
        hidden = followers(e.run_id, e.attempt, e.step).exists()
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
            rows, whose = connection.execute(query), f"events of run {run_id}"
            found = [Event.of(dict(row._mapping), whose, self.malformed) for row in rows]
        return [event for event in found if event is not None]

    def left_out(self, run_id: int) -> int:
        """How many steps were left out evenly, because they came faster than they could be stored."""
        dropped = self.events(run_id, kind="records_dropped")
        return sum(int(event.data.get("thinned", 0)) for event in dropped)

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
            rows, whose = connection.execute(query), f"run {run_id}"
            found = [Finding.of(dict(row._mapping), whose, self.malformed) for row in rows]
        return [finding for finding in found if finding is not None]

    def note_findings(
        self, run_id: int, found: Sequence[Finding], *, keep: Collection[str]
    ) -> None:
        """Keep what was found; what is open and was not found again has ended.

        Those whose names are in `keep` are another's to end.
        """
        f = schema.findings.c
        now = time.time()
        with self._writing() as connection:
            stored = {
                row.finding: row.id
                for row in connection.execute(
                    sa.select(f.id, f.finding).where(f.run_id == run_id, f.finding.not_in(keep))
                )
            }
            for finding in found:
                if finding.finding in keep:
                    continue
                values = dataclasses.asdict(finding)
                if finding.finding in stored:
                    update = sa.update(schema.findings).where(f.id == stored[finding.finding])
                    connection.execute(update.values(**values))
                else:
                    connection.execute(sa.insert(schema.findings).values(run_id=run_id, **values))
            gone = set(stored) - {finding.finding for finding in found}
            ended = sa.update(schema.findings).where(
                f.id.in_([stored[name] for name in gone]), f.ended_at.is_(None)
            )
            connection.execute(ended.values(ended_at=now))

    def note_recommendation(self, run_id: int, last_step: int, made: Recommendation) -> None:
        """Keep a recommendation that differs from the last on record: verdict, or threshold by a tenth."""
        r = schema.recommendations.c
        low, high = made.interval or (None, None)
        with self._writing() as connection:
            last = connection.execute(
                sa.select(r.verdict, r.threshold).where(r.run_id == run_id).order_by(r.id.desc())
            ).first()
            if last is not None and last.verdict == made.verdict:
                before, now = real(last.threshold) or 0.0, made.threshold or 0.0
                if abs(now - before) <= _SAME_THRESHOLD * before:
                    return
            connection.execute(
                sa.insert(schema.recommendations).values(
                    run_id=run_id,
                    made_at=time.time(),
                    last_step=last_step,
                    verdict=made.verdict,
                    threshold=made.threshold,
                    predicted_clip_ratio=made.predicted_clip_ratio,
                    interval_low=low,
                    interval_high=high,
                    reasons=list(made.reasons),
                    policy=made.policy.describe() if made.policy is not None else None,
                )
            )

    def layers(
        self, run_id: int, samples: int = 20
    ) -> list[tuple[int, str, float | None, float | None]]:
        """The latest samples of the layer norms: step, parameter, gradient and weight norm.

        Not every sample has the weights' norms: the latest five that have are among them, however
        many others came since, if they are of the last 10,000 steps.
        """
        n, a = schema.layer_norms.c, schema.attempts.c
        latest = sa.select(a.attempt).where(a.run_id == run_id).order_by(a.position.desc()).limit(1)
        mine = (
            n.run_id == run_id,
            n.attempt == latest.scalar_subquery(),
            n.step.between(LEAST, MOST),  # what is no number sorts after all that are
        )
        steps = sa.select(n.step).where(*mine).distinct().order_by(n.step.desc())
        query = sa.select(n.step, n.parameter, n.grad_norm, n.weight_norm).order_by(n.step)
        with self._reading() as connection:
            last = connection.execute(steps.limit(samples)).scalars().all()
            if not last:
                return []
            weighed = steps.where(n.weight_norm.is_not(None), n.step > last[0] - _WEIGHED_WITHIN)
            others = connection.execute(weighed.limit(_WEIGHED)).scalars().all()
            found = connection.execute(query.where(*mine, n.step.in_({*last, *others}))).all()
        return [sample for row in found if (sample := self._sample(run_id, dict(row._mapping)))]

    def _sample(
        self, run_id: int, row: Mapping[str, Any]
    ) -> tuple[int, str, float | None, float | None] | None:
        """One parameter's norms; None where the row is not of a step."""
        read = Cells(schema.layer_norms, row, f"run {run_id}", self.malformed)
        step, grad, weight = read.whole("step"), read.real("grad_norm"), read.real("weight_norm")
        return None if step is None else (step, str(read.text("parameter")), grad, weight)

    # -- thresholds that are applied to a running job ------------------------------------------

    def changes(self, run_id: int) -> list[Change]:
        """The thresholds that were asked for, the latest first."""
        c = schema.threshold_changes.c
        names = [field.name for field in dataclasses.fields(Change)]
        query = sa.select(*(c[name] for name in names)).where(c.run_id == run_id)
        with self._reading() as connection:
            rows, whose = connection.execute(query.order_by(c.id.desc())), f"run {run_id}"
            found = [Change.of(dict(row._mapping), whose, self.malformed) for row in rows]
        return [change for change in found if change is not None]

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

        The job takes it within about a second, all ranks at one step; `changes` tells.

        Raises:
            ConfigurationError: that is no threshold.
            NotControllableError: the run has ended, or was started without remote control.
        """
        run = self.run(run_id)
        if (threshold is None) == (policy is None):
            msg = "apply takes a threshold or a policy"
            raise ConfigurationError(msg)
        if threshold is not None:
            threshold = ClipNorm(threshold).max_norm  # says what a threshold is
        if (reason_not := obstacle(run)) is not None:
            raise NotControllableError(reason_not)
        values = {
            "run_id": run.id,
            "requested_at": time.time(),
            "requested_by": _storable(by)[:255],
            "reason": None if reason is None else _storable(reason),
            "threshold": threshold,
            "policy": None if policy is None else policy.describe(),
        }
        changes = schema.threshold_changes
        with self._writing() as connection:
            made = connection.execute(sa.insert(changes).values(**values).returning(changes.c.id))
            number = made.scalar_one()
        return next(change for change in self.changes(run.id) if change.id == number)


def _meaning(key: int | str) -> tuple[tuple[str, ...], str]:
    """What a text that names a run may be, in the order to try, and its value."""
    if isinstance(key, int):
        return ("id",), str(key)
    kind, colon, value = key.partition(":")
    if colon and kind in _KINDS:
        return (kind,), value
    return (("id",) if key.isascii() and key.isdigit() else ("name", "uid")), key


def _find(connection: sa.Connection, kind: str, value: str) -> Any:
    """The latest run whose id, name or uid is this; None where there is none."""
    wanted: int | str = value
    if kind == "id":
        if not (value.isascii() and value.isdigit() and len(value) < len(str(_IDS))):
            return None
        wanted = int(value)
    elif not _may_be_stored(value):
        return None
    query = (
        sa.select(schema.runs)
        .where(schema.runs.c[kind] == wanted)
        .order_by(schema.runs.c.id.desc())
    )
    return connection.execute(query.limit(1)).one_or_none()


def _may_be_stored(key: str) -> bool:
    """Whether a text can be in a database at all: it has no NUL, and an encoding."""
    return key.isprintable() or ("\0" not in key and key.encode("utf-8", "ignore").decode() == key)


def _storable(words: str) -> str:
    """The words, with a question mark for what no database takes."""
    return words.replace("\0", "?").encode("utf-8", "replace").decode()


def obstacle(run: Run) -> str | None:
    """Why nobody can change how this run clips; None where somebody can."""
    if not run.is_live():
        return (
            f"run {run.name!r} is not running: its status is {status_of(run)}; give the threshold "
            "to its next start"
        )
    if not run.settings.get("remote_control"):
        return (
            f"run {run.name!r} does not allow it: start the job with GRADWATCH_REMOTE_CONTROL=1 "
            "or wrap(..., remote_control=True)"
        )
    return None


def status_of(run: Run) -> str:
    """The run's status; "silent" where it says it runs and gives no sign of life."""
    return "silent" if run.status == "running" and not run.is_live() else run.status
