"""Thresholds that are applied while a run goes on: from the store, at a step boundary, on all ranks.

The worker finds what was asked for; the training thread takes it before a step. In a job of
several ranks all take it before the same step (see `LeadingControl`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any, Protocol

from gradwatch.errors import ConfigurationError
from gradwatch.policies import ClipNorm, Policy, SkipSpikes, build
from gradwatch.records import ThresholdChange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.part import Part
    from gradwatch.peers import Peers

__all__ = [
    "Control",
    "Controllable",
    "FollowingControl",
    "LeadingControl",
    "control_of",
    "replaced",
]

_CLOSED = "closed"  # stands where a change was that is not made
ANSWER_SECONDS = 30.0  # how long rank 0 waits for the others before it leaves things as they are


class Controllable(Protocol):
    """A sink in which somebody may ask for another threshold."""

    def requested(self, uid: str, after: int) -> ThresholdChange | None:
        """The first change of that run with an id above `after` that was neither taken nor refused."""
        ...

    def refuse(self, change: int, reason: str) -> None:
        """Note why a change is not made."""
        ...


def replaced(policy: Policy[Any], change: ThresholdChange) -> Policy[Any]:
    """The policy once the change is made: a constant, or the one that was asked for.

    A threshold turns any policy on the global norm into `ClipNorm`; `SkipSpikes` stays around it.
    Raises `ConfigurationError` where that cannot be had in a running job.
    """
    if isinstance(policy, SkipSpikes):
        return dataclasses.replace(policy, policy=replaced(policy.policy, change))
    if not policy.takes_sparse:  # which only those on the global norm do
        msg = f"the run clips by {policy}, which has no single threshold"
        raise ConfigurationError(msg)
    if not policy.changes_gradients:
        msg = f"the run only looks on: {policy} is kept where the optimizer is wrapped"
        raise ConfigurationError(msg)
    if change.policy is None:
        if change.threshold is None:
            msg = "neither a threshold nor a policy was given"
            raise ConfigurationError(msg)
        return ClipNorm(change.threshold, policy.norm_type)
    new = build(change.policy)
    if isinstance(new, SkipSpikes) or not (new.takes_sparse and new.changes_gradients):
        msg = f"{new} can only be chosen where the optimizer is wrapped"
        raise ConfigurationError(msg)
    if new.norm_type != policy.norm_type:
        msg = f"{new} is in norm {new.norm_type:g}, the run's records are in {policy.norm_type:g}"
        raise ConfigurationError(msg)
    return new


class Control:
    """Hands changes from the worker to the training thread of a process that is alone."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._wanted: ThresholdChange | None = None
        self.refused: list[tuple[int, str]] = []  # changes not made, and why; for the store
        self.seen = 0  # id of the last change that was taken up; never reset
        self.look_at = 0.0  # when the worker is to look again, by its clock

    # -- the worker ----------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether another change may be offered."""
        return self._wanted is None

    def offer(self, change: ThresholdChange) -> None:
        """Take up a change, or refuse it."""
        self.seen = change.id
        try:
            if len(self._parts) > 1 or self._parts[0].group is not None:
                msg = "the run clips each parameter group by a policy of its own"
                raise ConfigurationError(msg)  # noqa: TRY301 - one way to refuse
            replaced(self._parts[0].policy, change)
        except ConfigurationError as error:
            self.refuse(change, str(error))
        else:
            self._wanted = change

    def refuse(self, change: ThresholdChange, reason: str) -> None:
        """Let the store know why a change is not made."""
        self.refused.append((change.id, reason))

    def listen(self) -> None:
        """Look for what other ranks have to say."""

    # -- the training thread -------------------------------------------------------------------

    def due(self, step: int) -> ThresholdChange | None:  # noqa: ARG002 - as the others take it
        """The change to be made before this step, once."""
        change, self._wanted = self._wanted, None
        return change


class LeadingControl(Control):
    """On rank 0 of several: makes a change only once every rank is ready, all at one step.

    Rank 0 puts the change up in the key-value store. Every other rank's worker finds it there; its
    training thread puts up the step it is at, and from then on waits before each step for rank 0's
    word on that step: wait, go or drop. Rank 0 says go once it has come to the greatest of these
    steps itself. No rank ever waits while no change is under way, and none is made where a rank
    does not answer.
    """

    def __init__(self, parts: Sequence[Part], peers: Peers, world_size: int) -> None:
        super().__init__(parts)
        self._peers = peers
        self._others = range(1, world_size)
        self._round = 0
        self._deadline: float | None = None  # while a change is under way
        self._told = -1  # the last step that the others were told to wait at

    def due(self, step: int) -> ThresholdChange | None:
        """The change to be made before this step; tells the other ranks."""
        change = self._wanted
        if change is None or self._told == step:  # looked at again: the word on it was given
            return None
        key = f"change/{self._round}"
        if self._deadline is None:
            self._deadline = time.monotonic() + ANSWER_SECONDS
            told = {**dataclasses.asdict(change), "policy": change.policy and dict(change.policy)}
            self._peers.put(key, json.dumps({"change": told, "from": step}))
        verdict = "wait"
        if time.monotonic() > self._deadline:
            verdict = "drop"
        else:
            at = [self._peers.look(f"{key}/ready/{rank}") for rank in self._others]
            if all(at) and step >= max(int(there) for there in at if there):
                verdict = "go"
        heard = self._peers.put(f"{key}/{step}", verdict)
        if verdict == "wait":
            self._told = step
            return None
        if verdict == "drop":
            self._peers.put(key, _CLOSED)
            reason = (
                f"not all of the other {len(self._others)} ranks answered; "
                "they need remote control too"
            )
            self.refuse(change, reason)
        self._round += 1
        self._deadline = self._wanted = None
        return change if verdict == "go" and heard else None


class FollowingControl(Control):
    """On the other ranks: makes a change when rank 0 does."""

    def __init__(self, parts: Sequence[Part], peers: Peers, rank: int) -> None:
        super().__init__(parts)
        self._peers = peers
        self._rank = rank
        self._round = 0
        self._from = 0
        self._ready = False

    @property
    def idle(self) -> bool:
        """Never: changes come from rank 0."""
        return False

    def refuse(self, change: ThresholdChange, reason: str) -> None:
        """Rank 0 answers for all."""

    def listen(self) -> None:
        """Look whether rank 0 has put a change up."""
        if self._wanted is None and (found := self._peers.look(f"change/{self._round}")):
            if found == _CLOSED:
                self._round += 1
                return
            told = json.loads(found)
            self._from = told["from"]
            self._wanted = ThresholdChange(**told["change"])

    def due(self, step: int) -> ThresholdChange | None:
        """The change to be made before this step, as rank 0 says."""
        change = self._wanted
        if change is None:
            return None
        key = f"change/{self._round}"
        if not self._ready:
            if self._peers.look(key) == _CLOSED:  # found too late
                self._end()
                return None
            self._ready = True
            self._peers.put(f"{key}/ready/{self._rank}", str(step))
        if step < self._from:
            return None
        verdict = self._peers.wait(f"{key}/{step}", 2 * ANSWER_SECONDS)
        if verdict == "wait":
            return None
        self._end()
        return change if verdict == "go" else None

    def _end(self) -> None:
        self._round += 1
        self._ready, self._wanted = False, None


def control_of(
    parts: Sequence[Part], peers: Peers | None, rank: int, world_size: int
) -> Control | None:
    """The control of a process; None on a rank that knows no others."""
    if world_size == 1:
        return Control(parts)
    if peers is None:
        return None
    return (
        LeadingControl(parts, peers, world_size)
        if rank == 0
        else FollowingControl(parts, peers, rank)
    )
