"""`gradwatch store …`: looking after a store. Parse and call, like the other verbs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from gradwatch_dashboards.terminal import (
    NOT_FOUND,
    JsonOption,
    StoreOption,
    escape,
    need,
    out,
    print_json,
    progress,
    store_url,
)

if TYPE_CHECKING:
    from gradwatch_monitor.copying import Copied
    from gradwatch_monitor.retention import Pruned

__all__ = ["app"]

app = typer.Typer(help="Look after a store.", no_args_is_help=True)


@app.command()
def migrate(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Bring a store's schema up to this version's."""
    need("alembic", extra="monitor", verb="store migrate")
    from gradwatch_monitor.migrations import migrate as migrate_store  # noqa: PLC0415

    with progress("migrating") as report:
        before, after = migrate_store(store_url(store), progress=report)
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        out.print(f"The store is at revision {after} already.")
    else:
        out.print(f"The store went from revision {before or 'none'} to {after}.")


@app.command()
def prune(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="30d", help="Days, weeks or years: 30d, 8w, 1y.")
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove steps, layer norms and events that are older, by whole days; never of a live run."""
    from gradwatch_monitor import retention  # noqa: PLC0415

    older = retention.days(older_than)
    with progress("pruning") as report:
        pruned = retention.prune(store_url(store), older, progress=report)
    _tell(
        pruned,
        f"Removed {_many(pruned.steps, 'step')}, {_many(pruned.layer_norms, 'layer norm')}, "
        f"{_many(pruned.events, 'event')} and {_many(pruned.runs, 'run')} of which nothing was left.",
        as_json=as_json,
    )


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A database URL or a file's path.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The same; made where missing.")],
    as_json: JsonOption = False,
) -> None:
    """Copy all runs into another store; run again, it adds only what is not there yet."""
    from gradwatch_monitor import copying  # noqa: PLC0415

    with progress("copying") as report:
        copied = copying.copy(source, target, progress=report)
    _tell(
        copied,
        f"Copied what was not there yet: {_many(copied.runs, 'run')}, {_many(copied.steps, 'step')}, "
        f"{_many(copied.layer_norms, 'layer norm')}, {_many(copied.others, 'other row')}.",
        as_json=as_json,
    )


@app.command()
def check(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Check that a store is whole; exit status 1 where something is wrong."""
    from gradwatch_monitor import integrity  # noqa: PLC0415

    with progress("checking") as report:
        problems = integrity.check(store_url(store), progress=report)
    if as_json:
        print_json([problem._asdict() for problem in problems])
    elif not problems:
        out.print("Nothing is wrong.")
    for problem in () if as_json else problems:
        out.print(f"{problem.kind}: {escape(problem.detail)}")
    if problems:
        raise typer.Exit(NOT_FOUND)


def _tell(done: Pruned | Copied, sentence: str, *, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        out.print(sentence)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
