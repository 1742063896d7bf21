"""`gradwatch …`: parse and call. Each verb loads what it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import sys
import time
from pathlib import Path  # noqa: TC003 - typer reads the annotation
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from gradwatch.errors import ConfigurationError, GradwatchError
from gradwatch_dashboards import store_verbs
from gradwatch_dashboards.terminal import (
    NOT_FOUND,
    USAGE,
    JsonOption,
    StoreOption,
    err,
    need,
    out,
    print_json,
    progress,
    store_url,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradwatch.recovery import Recovered
    from gradwatch_monitor.store import Event, Finding, Run, Store, Summary

__all__ = ["app", "main"]

app = typer.Typer(
    name="gradwatch",
    help="Training-health monitoring for PyTorch: look at runs, ask for a clipping threshold.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(store_verbs.app, name="store")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, uid or id.")]


def main() -> None:
    """Run the command line; errors of gradwatch become one line and an exit status."""
    try:
        app()
    except ConfigurationError as error:
        err.print(f"gradwatch: {escape(str(error))}")
        sys.exit(USAGE)
    except GradwatchError as error:
        err.print(f"gradwatch: {escape(str(error))}")
        sys.exit(NOT_FOUND)
    except BrokenPipeError:  # `gradwatch runs | head`
        sys.stderr.close()
        sys.exit(0)


# -- verbs -------------------------------------------------------------------------------------


@app.command()
def runs(
    store: StoreOption = None,
    limit: Annotated[
        int, typer.Option(min=1, max=10**9, help="At most so many, the latest first.")
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """List runs, the latest first."""
    with _open(store) as opened:
        found = opened.runs(limit=limit)
        rows = [{**_run_dict(run), "steps": _steps(opened, run)} for run in found]
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print(f"No runs in {escape(opened.name)} yet.")
        return
    table = Table("id", "name", "status", "steps", "started", "host", "clip", box=None)
    for row in rows:
        clip = str(row["settings"].get("clip", ""))
        cells = (row["id"], row["name"], row["status"], f"{row['steps']:,}",
                 _when(row["started_at"]), row["host"], clip)  # fmt: skip
        table.add_row(*(escape(str(cell)) for cell in cells))
    out.print(table)


@app.command()
def show(run: RunArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show one run: counts, last values, findings, events; exit status 1 where there is a finding."""
    with _open(store) as opened:
        found = opened.run(run)
        summary = opened.summary(found.id)
        findings = opened.findings(found.id)
        events = opened.events(found.id, limit=10)
    if as_json:
        print_json(
            {
                **_run_dict(found),
                **dataclasses.asdict(summary),
                "clip_ratio": summary.clip_ratio,
                "findings": [dataclasses.asdict(f) for f in findings],
                "events": [dataclasses.asdict(e) for e in events],
            }
        )
    else:
        _show(found, summary, findings, events)
    if any(finding.ended_at is None for finding in findings):
        raise typer.Exit(NOT_FOUND)


def _show(found: Run, summary: Summary, findings: list[Finding], events: list[Event]) -> None:
    table = Table(box=None, show_header=False, title=escape(found.name), title_justify="left")
    ratio = summary.clip_ratio
    for label, value in (
        ("status", _status_in_full(found)),
        ("started", _when(found.started_at)),
        ("host", f"{found.host}, process {found.pid}"),
        ("optimizer", found.settings.get("optimizer", "")),
        ("clip", found.settings.get("clip", "")),
        ("tags", ", ".join(f"{key}={value}" for key, value in found.tags.items()) or "–"),
        ("metrics", found.metrics_url or "–"),
        ("steps", f"{summary.steps:,}"),
        ("clipped", f"{summary.clipped:,}" + (f" ({100 * ratio:.1f} %)" if ratio else "")),
        ("NaN or inf", f"{summary.nonfinite:,}"),
        ("skipped", f"{summary.skipped:,} ({summary.amp_overflows:,} AMP overflows)"),
        ("last norm", _number(summary.last_pre_norm)),
        ("last loss", _number(summary.last_loss)),
        ("threshold", _number(summary.last_threshold)),
    ):
        table.add_row(label, escape(str(value)))
    out.print(table)
    for finding in findings:
        out.print(f"\n{finding.severity}: {escape(finding.message)} {escape(finding.advice)}")
    if events:
        out.print("\nlatest events")
        for event in events:
            out.print(f"  step {event.step:>7}  {event.severity:8}  {escape(event.message)}")


@app.command()
def recommend(
    run: RunArgument,
    store: StoreOption = None,
    target: Annotated[float, typer.Option(help="Share of the steps to clip.")] = 0.20,
    as_json: JsonOption = False,
) -> None:
    """Recommend a clipping threshold for the next run, with the reasons."""
    from gradwatch_monitor import recommend as recommend_run  # noqa: PLC0415

    with _open(store) as opened:
        found = opened.run(run)
        result = recommend_run(opened, found.id, target=target)
    if as_json:
        print_json({"run": found.name, "run_id": found.id, **result.as_dict()})
        return
    out.print(f"{escape(found.name)}: {result.verdict.replace('_', ' ')}")
    out.print(escape(result.sentence))
    for reason in result.reasons:
        out.print(f"  - {escape(reason)}")
    if result.policy is not None:
        out.print(f"\nclip=gradwatch.{escape(str(result.policy))}")


@app.command()
def apply(
    run: RunArgument,
    threshold: Annotated[
        float | None, typer.Argument(metavar="[THRESHOLD]", help="The norm to clip at.")
    ] = None,
    recommended: Annotated[
        bool, typer.Option("--recommended", help="What `gradwatch recommend` says.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why; it goes on record.")] = None,
    wait: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds to wait until the job has taken it.")
    ] = 10.0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Apply another threshold to a running job that was started with remote control."""
    if (threshold is None) != recommended:
        msg = "apply takes a threshold, or --recommended"
        raise ConfigurationError(msg)
    with _open(store) as opened:
        found = opened.run(run)
        policy = None
        if recommended:
            from gradwatch_monitor import recommend as recommend_run  # noqa: PLC0415

            result = recommend_run(opened, found.id)
            policy = result.policy
            if policy is None:
                msg = f"{found.name}: {result.verdict.replace('_', ' ')}; there is nothing to apply"
                raise GradwatchError(msg)
            reason = reason or f"recommended: {result.verdict}"
        change = opened.apply(found.id, threshold, policy=policy, by=_user(), reason=reason)
        deadline = time.monotonic() + wait
        while change.applied_at is None and change.refused is None and time.monotonic() < deadline:
            time.sleep(0.1)
            (change,) = (c for c in opened.changes(found.id) if c.id == change.id)
    if as_json:
        print_json({"run": found.name, "run_id": found.id, **dataclasses.asdict(change)})
    elif change.applied_step is not None:
        to = _number(change.threshold) if policy is None else str(policy)
        before = _number(change.previous)
        out.print(
            f"{escape(found.name)}: from step {change.applied_step:,} on {escape(to)} (before: {before})"
        )
    elif change.refused is not None:
        err.print(f"gradwatch: {escape(found.name)} did not take it: {escape(change.refused)}")
    else:
        err.print(f"gradwatch: {escape(found.name)} has not taken it yet; it stays asked for")
    if change.applied_step is None:
        raise typer.Exit(NOT_FOUND)


@app.command()
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


@app.command()
def monitor(
    store: StoreOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0: any.")] = 9496,
    address: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between two rounds.")
    ] = 15.0,
    as_json: JsonOption = False,
) -> None:
    """Watch a store beside its jobs: recover what killed ones left, answer Prometheus; until Ctrl-C."""
    import signal  # noqa: PLC0415

    from gradwatch.config import redact  # noqa: PLC0415
    from gradwatch_monitor.service import Service  # noqa: PLC0415

    def report(found: Recovered) -> None:
        if as_json:
            print_json(found._asdict())
        else:
            _tell_recovered(found)

    service = Service(
        store_url(store), address=address, port=port, interval=interval, report=report
    )
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: service.stop())
    if as_json:
        print_json({"url": service.url, "store": redact(service.store)})
    else:
        out.print(f"Monitor: {service.url}   (Ctrl-C ends it)")
    service.run()


@app.command()
def ui(
    store: StoreOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8501,
    address: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    as_json: JsonOption = False,
) -> None:
    """Open the dashboard, and stay until Ctrl-C."""
    from gradwatch_dashboards.web import serve  # noqa: PLC0415

    need("streamlit", "altair", "pandas", "tsdownsample", extra="monitor", verb="ui")
    url = store_url(store)
    code = serve.run(
        url, address=address, port=port, announce=lambda page: _announce(page, url, as_json=as_json)
    )
    raise typer.Exit(code)


@app.command()
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
        run=result.run,
        announce=lambda page: _announce(page, url, as_json=as_json),
    )
    raise typer.Exit(code)


@app.command()
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


# -- what verbs share --------------------------------------------------------------------------


@contextlib.contextmanager
def _open(store: str | None) -> Iterator[Store]:
    from gradwatch_monitor.store import Store  # noqa: PLC0415

    with Store(store_url(store)) as opened:
        yield opened


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


def _run_dict(run: Run) -> dict[str, Any]:
    from gradwatch_monitor.store import status_of  # noqa: PLC0415

    return {**dataclasses.asdict(run), "status": status_of(run), "live": run.is_live()}


def _status_in_full(run: Run) -> str:
    status = str(_run_dict(run)["status"])
    if status != "silent":
        return status if run.ended_at is None else f"{status}, {_when(run.ended_at)}"
    return (
        f"silent since {_when(run.heartbeat_at)}: if it was killed, `gradwatch recover` on "
        f"{run.host} stores what it left"
    )


def _steps(store: Store, run: Run) -> int:
    last = store.last_step(run.id)
    return 0 if last is None else last + 1


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
