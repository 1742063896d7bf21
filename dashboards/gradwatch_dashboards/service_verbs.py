"""Verbs that look after jobs and show them: recover, monitor, ui, demo, doctor. Parse and call."""

from __future__ import annotations

import os
from pathlib import Path  # noqa: TC003 - typer reads the annotation
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gradwatch.errors import ConfigurationError
from gradwatch_dashboards.terminal import (
    NOT_FOUND,
    JsonOption,
    StoreOption,
    err,
    escape,
    need,
    out,
    permit,
    print_json,
    progress,
    store_url,
)

if TYPE_CHECKING:
    from gradwatch.recovery import Recovered

TrustedOption = Annotated[
    bool,
    typer.Option(
        "--trusted-network",
        help="Allow an --address that others reach: all on that network may see every run.",
    ),
]

__all__ = ["demo", "doctor", "monitor", "recover", "ui"]


def recover(
    folder: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            exists=True,
            file_okay=False,
            help="Where flight-recorder files lie [default: where jobs on this machine leave them].",
        ),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store what killed jobs left in their flight recorders; exit status 1 where some cannot be."""
    from gradwatch.recovery import recover as recover_all  # noqa: PLC0415

    url = store_url(store)
    folders = [path.absolute() for path in folder] if folder else None
    with progress("recovering") as report:
        found = recover_all(url, folders, progress=report)
    if as_json:
        print_json([one._asdict() for one in found])
    elif not found:
        out.print("Nothing to recover: no job that is gone left records here for this store.")
    for one in () if as_json else found:
        _tell_recovered(one)
    if any(one.problem is not None for one in found):
        raise typer.Exit(NOT_FOUND)


def monitor(
    store: StoreOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0: any.")] = 9496,
    address: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    trusted_network: TrustedOption = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between two rounds.")
    ] = 15.0,
    as_json: JsonOption = False,
) -> None:
    """Watch a store beside its jobs: recover what killed ones left, answer Prometheus; until Ctrl-C."""
    import signal  # noqa: PLC0415

    from gradwatch.config import Settings, redact  # noqa: PLC0415
    from gradwatch_monitor.service import Service  # noqa: PLC0415

    permit(address, trusted=trusted_network)

    def report(found: Recovered) -> None:
        if as_json:
            print_json(found._asdict())
        else:
            _tell_recovered(found)

    settings = Settings.load()
    service = Service(
        store_url(store),
        address=address,
        port=port,
        interval=interval,
        report=report,
        sd_dir=settings.sd_dir,
        advertised=settings.advertised_addr,
    )
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: service.stop())
    if as_json:
        print_json({"url": service.url, "store": redact(service.store)})
    else:
        out.print(f"Monitor: {service.url}   (Ctrl-C ends it)")
    service.run()


def ui(
    store: StoreOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8501,
    address: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    trusted_network: TrustedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Open the dashboard, and stay until Ctrl-C."""
    from gradwatch.config import sqlite_path  # noqa: PLC0415
    from gradwatch_dashboards.web import serve  # noqa: PLC0415

    permit(address, trusted=trusted_network)
    need("streamlit", "altair", "pandas", "tsdownsample", extra="monitor", verb="ui")
    url = store_url(store)
    path = sqlite_path(url)
    if path is not None and not path.exists():
        err.print(
            f"gradwatch: there is no store at {escape(str(path))} yet: the first job makes it"
        )
    code = serve.run(
        url, address=address, port=port, announce=lambda page: _announce(page, url, as_json=as_json)
    )
    raise typer.Exit(code)


def demo(
    store: StoreOption = None,
    ui: Annotated[bool, typer.Option(help="Open the dashboard afterwards.")] = True,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The dashboard's port.")] = 8501,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 30,
    as_json: JsonOption = False,
) -> None:
    """Train a small model on real data, watched; then recommend and open the dashboard."""
    need("sklearn", extra="demo", verb="demo")
    from gradwatch_dashboards import demo as watched  # noqa: PLC0415

    url = store_url(store)
    result = watched.run(url, epochs=epochs, console=err if as_json else out)
    if as_json:
        print_json(result.as_dict())
    else:
        watched.tell(result, out)
    if not ui:
        return
    need("streamlit", extra="monitor", verb="demo")
    from gradwatch_dashboards.web import serve  # noqa: PLC0415

    code = serve.run(
        url,
        port=port,
        run=f"uid:{result.uid}",
        announce=lambda page: _announce(page, url, as_json=as_json),
    )
    raise typer.Exit(code)


def doctor(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Check this machine and the store; exit status 1 where something is wrong."""
    from gradwatch.config import DEFAULT_STORE  # noqa: PLC0415
    from gradwatch_dashboards import doctor as examination  # noqa: PLC0415

    try:
        url = store_url(store)
    except ConfigurationError:
        # One of the checks says what is wrong; the others are made all the same.
        url = store or DEFAULT_STORE
    checks = examination.examine(url, os.environ)
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        table = Table(box=None, show_header=False)
        table.add_column()
        table.add_column()
        table.add_column(overflow="fold")
        for check in checks:
            table.add_row(check.status, escape(check.subject), escape(check.detail))
        out.print(table)
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(NOT_FOUND)


def _tell_recovered(one: Recovered) -> None:
    """A line on what became of a flight recorder."""
    if one.problem is not None:
        err.print(f"gradwatch: {escape(one.run or one.path.name)}: {escape(one.problem)}")
        return
    at = "before its first step" if one.last_step is None else f"at step {one.last_step:,}"
    what = f"{one.steps:,} step{'s' * (one.steps != 1)} stored that had not been"
    if one.rank:
        what = f"what rank {one.rank} had to tell is stored"
    lost = f"; {one.lost:,} were overwritten or torn" if one.lost else ""
    out.print(f"{escape(str(one.run))}: {one.status} {at}; {what}{lost}")


def _announce(page: str, url: str, *, as_json: bool) -> None:
    from gradwatch.config import redact  # noqa: PLC0415

    if as_json:
        print_json({"url": page, "store": redact(url)})
    else:
        out.print(f"Dashboard: {page}   (Ctrl-C ends it)")
