"""The verb that changes a running job: apply. Parse and call, like the other verbs."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gradwatch.errors import ConfigurationError, NotControllableError
from gradwatch_dashboards.terminal import (
    NOT_FOUND,
    JsonOption,
    RunArgument,
    StoreOption,
    err,
    escape,
    number,
    open_store,
    out,
    print_json,
    user,
)

if TYPE_CHECKING:
    from gradwatch_monitor.applying import Proposal
    from gradwatch_monitor.store import Change, Run, Store

__all__ = ["apply"]


def apply(
    run: RunArgument,
    threshold: Annotated[
        float | None, typer.Argument(metavar="[THRESHOLD]", help="The norm to clip at.")
    ] = None,
    recommended: Annotated[
        bool, typer.Option("--recommended", help="What `gradwatch recommend` says.")
    ] = False,
    policy: Annotated[
        str | None, typer.Option(metavar="POLICY", help='A policy, as "TargetRatio(cap=3)".')
    ] = None,
    undo: Annotated[
        bool,
        typer.Option(
            "--undo",
            help="What was in force before the last change; again: before the one before that.",
        ),
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why; it goes on record.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, at a terminal.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait until the job has taken or refused it.")] = True,
    timeout: Annotated[
        float, typer.Option(min=0, max=86400, help="Seconds to wait at most.")
    ] = 30.0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change the threshold of a running job that was started with remote control, or undo that."""
    if (threshold is not None) + recommended + (policy is not None) + undo != 1:
        msg = (
            "apply takes one of: a threshold, --recommended, --policy, --undo; as in "
            "`gradwatch apply my-run 0.8`"
        )
        raise ConfigurationError(msg)
    from gradwatch.policies import ClipNorm, parse  # noqa: PLC0415
    from gradwatch_monitor.applying import wait as wait_for  # noqa: PLC0415
    from gradwatch_monitor.applying import was_in_force  # noqa: PLC0415
    from gradwatch_monitor.store import obstacle  # noqa: PLC0415

    if threshold is not None:
        ClipNorm(threshold)  # says what a threshold is
    if policy is not None:
        parse(policy)  # says what a policy is, before the store is asked
    with open_store(store) as opened:
        found = opened.run(run)
        proposal = _proposal(opened, found, threshold, policy, undo=undo)
        if (told := obstacle(found)) is not None:
            raise NotControllableError(told)
        if not yes and sys.stdin.isatty() and sys.stdout.isatty():
            _confirm(opened, found, proposal)
        change = proposal.ask(opened, found.id, by=user(), reason=reason)
        if wait:
            change = wait_for(opened, found.id, change, timeout)
        before = was_in_force(opened, found.id, change) or number(change.previous)
    if as_json:
        print_json({"run": found.name, "run_id": found.id, **dataclasses.asdict(change)})
    else:
        _tell(found, change, before, proposal, waited=wait)
    if wait and change.applied_step is None:
        raise typer.Exit(NOT_FOUND)


def _confirm(store: Store, run: Run, proposal: Proposal) -> None:
    now = number(store.summary(run.id).last_threshold)
    why = f" ({proposal.why})" if proposal.why else ""
    if not typer.confirm(f"{run.name}: {now} → {proposal}{why}. Apply it?", err=True):
        err.print("gradwatch: nothing was changed")
        raise typer.Exit(NOT_FOUND)


def _proposal(
    store: Store, run: Run, threshold: float | None, policy: str | None, *, undo: bool
) -> Proposal:
    """What is to be asked: that threshold, that policy, an undo, or what is recommended."""
    from gradwatch.policies import parse  # noqa: PLC0415
    from gradwatch_monitor import recommend  # noqa: PLC0415
    from gradwatch_monitor.applying import Proposal, recommended, undoing  # noqa: PLC0415

    if threshold is not None:
        return Proposal(threshold)
    if policy is not None:
        # One that says nothing of its first threshold begins at what is in force.
        return Proposal(policy=parse(policy, initial=store.summary(run.id).last_threshold))
    return undoing(store, run.id) if undo else recommended(recommend(store, run.id))


def _tell(run: Run, change: Change, before: str, proposal: Proposal, *, waited: bool) -> None:
    """What has become of it, in a line."""
    name = escape(run.name)
    if change.applied_step is not None:
        moved = escape(f"{before} → {proposal}")
        out.print(f"{name}: {moved} from step {change.applied_step:,} on (change {change.id})")
    elif change.refused is not None:
        err.print(f"gradwatch: {name} did not take it: {escape(change.refused)}")
    elif not waited:
        out.print(f"{name}: {escape(str(proposal))} is asked for (change {change.id})")
    else:
        err.print(
            f"gradwatch: {name} has not taken it yet (change {change.id}); it stays asked for, and "
            "is taken at the job's next step"
        )
