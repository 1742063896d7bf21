"""Thresholds applied to a running job: what to ask for, what is on record, what came of it."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.cells import UNKNOWN
from gradwatch.errors import ConfigurationError, NotControllableError
from gradwatch.policies import ClipNorm, Policy, TargetRatio, build
from gradwatch.summaries import Distribution, merge
from gradwatch_monitor.ratio import clip_ratio
from gradwatch_monitor.timeline import Blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch_monitor.recommend import Recommendation
    from gradwatch_monitor.store import Change, Store

__all__ = [
    "Applied",
    "Outcome",
    "Proposal",
    "Stated",
    "applied",
    "in_force",
    "last_in_force",
    "outcomes",
    "recommended",
    "undoing",
    "wait",
    "wanted",
    "was_in_force",
    "why_not",
]

AT_LEAST = 50  # steps since a change, before its clip ratio is told
_POLL_SECONDS = 0.1
_SAME = 0.05  # by which share thresholds differ that are not worth a change
_STATED = re.compile(r"recommended \((\w+)\): ([\d.]+) % of the steps, ([\d.]+)–([\d.]+) %")
_UNDONE = re.compile(r"undo of change (\d+)(?:;|$)")
_END = 2**63 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Proposal:
    """What is to be asked of a running job: a constant `threshold`, or a `policy`."""

    threshold: float | None = None
    policy: Policy[Any] | None = None
    why: str | None = None

    def __str__(self) -> str:
        """The constant, or the policy as one would write it."""
        constant = self.threshold
        if type(self.policy) is ClipNorm and self.policy.norm_type == 2.0:
            constant = self.policy.max_norm
        return str(self.policy) if constant is None else f"{constant:.6g}"

    def ask(self, store: Store, run_id: int, *, by: str, reason: str | None = None) -> Change:
        """Ask the job for it; raises as `Store.apply` does."""
        if self.why is None and reason and (_UNDONE.match(reason) or _STATED.match(reason)):
            reason = f"as they say: {reason}"  # else it would be read as what it sounds like
        why = "; ".join(part for part in (self.why, reason) if part)
        return store.apply(run_id, self.threshold, policy=self.policy, by=by, reason=why or None)


@dataclasses.dataclass(frozen=True, slots=True)
class Applied:
    """A change that the job made, on the visible timeline.

    `before` and `after` are policies as `Policy.describe` gives them, `old` and `new` their
    thresholds at that step (None where there is no single one).
    """

    change: int
    step: int
    time: float
    by: str
    reason: str | None
    old: float | None
    new: float | None
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]
    clip: str


@dataclasses.dataclass(frozen=True, slots=True)
class Stated:
    """What a recommendation promised when it was applied; on record in the change's reason."""

    verdict: str
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        """The words that `read` knows."""
        ratio, low, high = (f"{100 * value:.1f}" for value in (self.ratio, self.low, self.high))
        return f"recommended ({self.verdict}): {ratio} % of the steps, {low}–{high} %"

    @classmethod
    def read(cls, reason: str | None) -> Stated | None:
        """What `str` wrote at the beginning of a reason; None where it did not."""
        if (found := _STATED.match(reason or "")) is None:
            return None
        ratio, low, high = (round(float(number) / 100, 5) for number in found.groups()[1:])
        return cls(found[1], ratio, low, high)

    @classmethod
    def of(cls, recommendation: Recommendation) -> Stated:
        """The interval of a constant; of a policy that follows the norms, its band."""
        if recommendation.verdict == "use_policy":
            return cls(recommendation.verdict, recommendation.target, *recommendation.band)
        ratio, interval = recommendation.predicted_clip_ratio, recommendation.interval
        if ratio is None or interval is None:
            msg = f"a recommendation without numbers: {recommendation.verdict}"
            raise ValueError(msg)
        return cls(recommendation.verdict, ratio, *interval)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a change: the clip ratio from its step to the next change's, or to now.

    `would` is the share that a constant would have clipped of the steps before it (None of a policy
    that moves its threshold), `stated` what was promised where it was recommended. `steps` are those
    with a finite norm; `ratio` is None before `AT_LEAST` of them.
    """

    applied: Applied
    steps: int
    ratio: float | None
    would: float | None
    stated: Stated | None

    def __str__(self) -> str:
        """In a sentence, with its numbers."""
        if self.ratio is None:
            return f"{self.steps:,} steps since then: too few to tell"
        told = f"{100 * self.ratio:.0f} % of the {self.steps:,} steps since then were clipped"
        if self.stated is None:
            return told
        kept = "as stated" if self.kept else "not as stated"
        return f"{told}, {kept} ({100 * self.stated.low:.0f}–{100 * self.stated.high:.0f} %)"

    @property
    def kept(self) -> bool | None:
        """Whether the clip ratio is what was stated; None where nothing was, or it is too early."""
        if self.stated is None or self.ratio is None:
            return None
        return self.stated.low <= self.ratio <= self.stated.high


def recommended(recommendation: Recommendation) -> Proposal:
    """To do what is recommended; what that promises goes on record.

    Raises `NotControllableError` where there is nothing to apply.
    """
    if (obstacle := why_not(recommendation)) is not None:
        raise NotControllableError(obstacle)
    return Proposal(policy=recommendation.policy, why=str(Stated.of(recommendation)))


def wanted(change: Change) -> str:
    """What was asked for, as one would write it."""
    if change.policy is None:
        return "–" if change.threshold is None else str(Proposal(change.threshold))
    try:
        return str(Proposal(policy=build(change.policy)))
    except ConfigurationError:  # the row is from a version that has more policies
        return str(change.policy.get("policy"))


def why_not(recommendation: Recommendation) -> str | None:
    """Why a recommendation is nothing to apply to the running job; None where it is."""
    verdict, policy = recommendation.verdict, recommendation.policy
    if verdict not in {"change", "use_policy"} or policy is None:
        told = "; ".join(recommendation.reasons)
        return f"nothing to apply, the verdict is “{verdict.replace('_', ' ')}”: {told}"
    if in_force(recommendation):
        held = recommendation.current_policy
        if isinstance(policy, ClipNorm):
            held = f"{recommendation.current_threshold:.4g}"
        return f"nothing to apply: {held} is in force already, which is as good as {policy}"
    return None


def in_force(recommendation: Recommendation) -> bool:
    """Whether what is as good as the recommended is in force: it was applied before."""
    policy, held = recommendation.policy, recommendation.current_threshold
    if recommendation.verdict == "use_policy" and isinstance(policy, TargetRatio):
        return recommendation.current_policy == type(policy).__name__
    if recommendation.verdict != "change" or not isinstance(policy, ClipNorm) or held is None:
        return False
    return abs(policy.max_norm / held - 1) < _SAME


def applied(store: Store, run_id: int) -> list[Applied]:
    """The changes that the job made, by step. One on a timeline that was given up is none."""
    events = store.events(run_id, kind="threshold_changed")
    return [
        Applied(
            change=event.data["change"],
            step=event.step,
            time=event.time,
            by=event.data.get("requested_by", UNKNOWN),
            reason=event.data.get("reason"),
            old=event.data.get("from"),
            new=event.data.get("to"),
            before=event.data.get("before"),
            after=event.data["policy"],
            clip=event.data.get("clip", UNKNOWN),
        )
        for event in reversed(events)
        if "change" in event.data and "policy" in event.data
    ]


def last_in_force(changes: Sequence[Applied]) -> Applied | None:
    """The last change that no undo has taken back: what the next undo is about.

    So undo walks back, one change at a time; an undo is not itself undone.
    """
    stack: list[Applied] = []
    for change in changes:
        undone = _UNDONE.match(change.reason or "")
        if undone is None:
            stack.append(change)
        else:
            while stack and stack.pop().change != int(undone[1]):
                pass
    return stack[-1] if stack else None


def undoing(store: Store, run_id: int) -> Proposal:
    """To go back to what was in force before the last change that is still standing.

    A policy that was replaced by one of another kind has forgotten what it had learnt: it begins
    again at the threshold that was in force.

    Raises `NotControllableError` where nothing was applied, or a change is still waiting.
    """
    waiting = [c.id for c in store.changes(run_id) if c.applied_at is None and c.refused is None]
    if waiting:
        msg = f"change {waiting[0]} has not been taken yet: undo once it has"
        raise NotControllableError(msg)
    last = last_in_force(applied(store, run_id))
    if last is None:
        msg = f"run {store.run(run_id).name!r} clips as its script says: there is nothing to undo"
        raise NotControllableError(msg)
    return Proposal(policy=_before(last), why=f"undo of change {last.change}")


def _before(change: Applied) -> Policy[Any]:
    if change.before is None:
        msg = f"what was in force before change {change.change} is not on record; name a threshold"
        raise NotControllableError(msg)
    # SkipSpikes stays where it is: what is asked for is the policy inside.
    before, after = (d.get("inner", d) for d in (change.before, change.after))
    if before["policy"] != after["policy"] and "initial" in before and change.old is not None:
        before = {**before, "initial": change.old}
    try:
        return build(before)
    except ConfigurationError:
        msg = f"the job's own {before['policy']} cannot be put back from outside; name a threshold"
        raise NotControllableError(msg) from None


def was_in_force(store: Store, run_id: int, change: Change) -> str | None:
    """The policy that a change replaced, as one would write it; None before it was taken.

    One that moves its threshold is told with where that stood.
    """
    taken = [one for one in applied(store, run_id) if one.change == change.id]
    if not taken or taken[-1].before is None:
        return None
    before, old = taken[-1].before, taken[-1].old
    try:
        proposal = Proposal(policy=build(before.get("inner", before)))
    except ConfigurationError:
        return None
    if old is None or type(proposal.policy) is ClipNorm:
        return str(proposal)
    return f"{proposal} at {old:.4g}"


def wait(store: Store, run_id: int, change: Change, seconds: float) -> Change:
    """The change once the job has taken or refused it, or as it is when the time is over."""
    deadline = time.monotonic() + seconds
    while change.applied_at is None and change.refused is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        change = next(c for c in store.changes(run_id) if c.id == change.id)
        if change.applied_at is None and not store.run(run_id).is_live():
            break
    return change


def outcomes(
    changes: Sequence[Applied],
    step: np.ndarray[Any, Any],
    pre_norm: np.ndarray[Any, Any],
    clipped: np.ndarray[Any, Any],
    *,
    blocks: Blocks | None = None,
) -> list[Outcome]:
    """What came of each change, over the steps with a finite norm.

    `blocks` are those of the steps that are not among the others; no change falls into one.
    """
    usable = np.isfinite(pre_norm)
    step, pre_norm, clipped = step[usable], pre_norm[usable], clipped[usable]
    old = Blocks.none() if blocks is None else blocks
    first = old.column("first_step")
    count = old.column("finite")
    found = []
    ends = [*(change.step for change in changes), _END][1:]
    for change, end in zip(changes, ends, strict=True):
        since, within = (step >= change.step) & (step < end), (first >= change.step) & (first < end)
        steps = int(since.sum()) + int(count[within].sum())
        both = int(clipped[since].sum()) + int(old.column("clipped")[within].sum())
        before, past = step < change.step, old.only(first < change.step)
        found.append(
            Outcome(
                change,
                steps,
                clip_ratio(both, steps) if steps >= AT_LEAST else None,
                _share(change.new, pre_norm[before], past) if _is_constant(change) else None,
                Stated.read(change.reason),
            )
        )
    return found


def _is_constant(change: Applied) -> bool:
    after = change.after.get("inner", change.after)
    return bool(after["policy"] == ClipNorm.__name__)


def _share(threshold: float | None, norms: np.ndarray[Any, Any], past: Blocks) -> float | None:
    """Of the norms before, those above a threshold."""
    values, weights = merge(past.histograms)
    zeros = int(past.column("zeros").sum())  # which are in no histogram
    every = Distribution(
        np.concatenate([[0.0], values, norms]),
        np.concatenate([[zeros], weights, np.ones(len(norms), np.int64)]),
    )
    return float(every.share(threshold)) if threshold and every.count else None
