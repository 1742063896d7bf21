"""Verbs that read: runs, show, recommend, diagnose, report. Parse and call, like the other verbs."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from gradwatch.cells import UNKNOWN
from gradwatch.errors import StoreError
from gradwatch_dashboards.terminal import (
    NOT_FOUND,
    JsonOption,
    RunArgument,
    StoreOption,
    err,
    escape,
    need,
    number,
    open_store,
    out,
    print_json,
    progress,
    when,
)
from gradwatch_dashboards.words import left_out, without_gradient

if TYPE_CHECKING:
    from gradwatch_monitor.store import Event, Finding, Run, Store, Summary

__all__ = ["diagnose", "recommend", "report", "runs", "show"]


def runs(
    store: StoreOption = None,
    limit: Annotated[
        int, typer.Option(min=1, max=10**9, help="At most so many, the latest first.")
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """List runs, the latest first."""
    with open_store(store) as opened:
        found = opened.runs(limit=limit + 1)
        more, found = len(found) > limit, found[:limit]
        rows = [_with_last_step(opened, run) for run in found]
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print(f"No runs in {escape(opened.name)} yet.")
        return
    table = Table("id", "name", "status", "steps", "last step", "started", "host", "clip", box=None)
    for row in rows:
        clip = str(row["settings"].get("clip", ""))
        last = row["last_time"]
        steps = UNKNOWN if row["steps"] is None else f"{row['steps']:,}"
        cells = (row["id"], row["name"], row["status"], steps,
                 UNKNOWN if last is None else when(last), when(row["started_at"]), row["host"],
                 clip)  # fmt: skip
        table.add_row(*(escape(str(cell)) for cell in cells))
    out.print(table)
    if more:
        out.print(f"The latest {limit}: --limit shows more.")


def show(run: RunArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show one run: counts, last values, findings, events; exit status 1 where there is a finding."""
    from gradwatch_monitor import diagnose as find  # noqa: PLC0415 - numpy and more
    from gradwatch_monitor.diagnose import ended  # noqa: PLC0415

    with open_store(store) as opened:
        found = opened.run(run)
        told = _run_dict(opened, found)
        summary = opened.summary(found.id)
        findings = find(opened, found.id)
        past = ended(opened, found.id, findings)
        events = opened.events(found.id, limit=10)
        thinned = opened.left_out(found.id)
    if as_json:
        print_json(
            {
                **told,
                **dataclasses.asdict(summary),
                "steps": summary.taken,
                "stored_steps": summary.steps,
                "thinned_steps": thinned,
                "clip_ratio": summary.clip_ratio,
                "findings": [dataclasses.asdict(f) for f in (*findings, *past)],
                "events": [dataclasses.asdict(e) for e in events],
            }
        )
    else:
        _show(found, str(told["status"]), summary, findings, events, thinned)
    if findings:
        raise typer.Exit(NOT_FOUND)


def diagnose(run: RunArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Say what is wrong with a run, on what that rests, and what to do; status 1 on a finding."""
    from gradwatch_monitor import diagnose as find  # noqa: PLC0415 - numpy and more
    from gradwatch_monitor.recommend import History  # noqa: PLC0415

    with open_store(store) as opened:
        found = opened.run(run)
        findings = find(opened, found.id)
        still = None if findings or as_json else History.of(opened, found.id).standstill()
        last = opened.last_taken(found.id)
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            steps = f"steps {finding.first_step:,} to {finding.last_step:,}"
            out.print(f"[bold]{finding.severity}: {finding.finding}[/bold] ({steps})")
            out.print(f"  {escape(finding.message)}\n  {escape(finding.advice)}")
            if source := finding.data.get("source"):
                out.print(f"  [dim]{escape(source)}[/dim]")
        if not findings:
            out.print(f"Nothing is wrong with {escape(found.name)} in its last steps.")
        if still:
            out.print(f"But {still}: where it should fall, look at the data, the learning rate and "
                      "the initialisation.")  # fmt: skip
        if last is not None:
            out.print(f"Its last step, {last.step:,}, was taken at {_age(last.time, found)}.")
    if findings:
        raise typer.Exit(NOT_FOUND)


def _show(
    found: Run,
    status: str,
    summary: Summary,
    findings: list[Finding],
    events: list[Event],
    thinned: int,
) -> None:
    table = Table(box=None, show_header=False, title=escape(found.name), title_justify="left")
    steps = f"{summary.taken:,}"
    if summary.steps != summary.taken:
        steps += f", of which {summary.steps:,} are in the store, and counted here"
    for label, value in (
        ("status", _status_in_full(found, status)),
        ("started", when(found.started_at)),
        ("host", f"{found.host}, process {UNKNOWN if found.pid is None else found.pid}"),
        ("optimizer", found.settings.get("optimizer", "")),
        ("clip", found.settings.get("clip", "")),
        ("tags", ", ".join(f"{key}={value}" for key, value in found.tags.items()) or "–"),
        ("metrics", (found.ended_at is None and found.metrics_url) or "–"),
        ("steps", steps),
        ("last step", "–" if summary.last_time is None else _age(summary.last_time, found)),
        ("clipped", _clipped(summary)),
        ("NaN or inf", f"{summary.nonfinite:,}"),
        ("skipped", f"{summary.skipped:,} ({summary.amp_overflows:,} AMP overflows)"),
        ("last finite norm", number(summary.last_pre_norm)),
        ("last finite loss", number(summary.last_loss)),
        ("threshold", number(summary.last_threshold)),
    ):
        table.add_row(label, escape(str(value)))
    out.print(table)
    if thinned:
        out.print(f"\n{left_out(thinned)}.")
    if summary.no_gradient:
        out.print(f"\n{without_gradient(summary.no_gradient)}.")
    for finding in findings:
        out.print(f"\n{finding.severity}: {escape(finding.message)} {escape(finding.advice)}")
    if events:
        out.print("\nlatest events")
        for event in events:
            out.print(f"  step {event.step:>7}  {event.severity:8}  {escape(event.message)}")


def _clipped(summary: Summary) -> str:
    """How many steps were clipped, and the clip ratio; a dash where no step has a finite norm."""
    ratio = summary.clip_ratio
    if ratio is None:
        return "–"
    told = f"{summary.clipped:,} ({100 * ratio:.1f} %)" if ratio else "0"
    if summary.finite == summary.steps:
        return told
    return f"{told}, of {summary.finite:,} steps with a finite gradient norm"


def recommend(
    run: RunArgument,
    store: StoreOption = None,
    target: Annotated[float, typer.Option(help="Share of the steps to clip.")] = 0.20,
    as_json: JsonOption = False,
) -> None:
    """Recommend a clipping threshold for the next run, with the reasons."""
    from gradwatch_monitor import recommend as recommend_run  # noqa: PLC0415

    with open_store(store) as opened:
        found = opened.run(run)
        result = recommend_run(opened, found.id, target=target)
    if as_json:
        print_json({"run": found.name, "run_id": found.id, **result.as_dict()})
        return
    out.print(f"{escape(found.name)}: {result.verdict.replace('_', ' ')}")
    out.print(escape(result.sentence))
    for reason in result.other_reasons:
        out.print(f"  - {escape(reason)}")
    if result.policy is not None:
        out.print(f"\nclip=gradwatch.{escape(str(result.policy))}")


def report(
    run: RunArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="The page.")
    ] = Path("report.html"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's report: one HTML page that needs nothing else, to attach to an experiment."""
    need("altair", "pandas", "tsdownsample", "vl_convert", "jinja2", extra="monitor", verb="report")
    from gradwatch_dashboards import report as reports  # noqa: PLC0415

    with open_store(store) as opened:
        found = opened.run(run)
        with progress("drawing") as done:
            size = reports.write(opened, found, output, done)
    path = output.absolute()
    if as_json:
        print_json({"run": found.name, "run_id": found.id, "path": str(path), "bytes": size})
    else:
        out.print(f"Report: {escape(str(path))} ({size / 1000:,.0f} kB)")


def _run_dict(store: Store, run: Run) -> dict[str, Any]:
    from gradwatch_monitor.stalls import status  # noqa: PLC0415 - numpy

    return {**dataclasses.asdict(run), "status": status(store, run), "live": run.is_live()}


def _status_in_full(run: Run, status: str) -> str:
    if status != "silent":
        return status if run.ended_at is None else f"{status}, {when(run.ended_at)}"
    return (
        f"silent since {when(run.heartbeat_at)}: if it was killed, `gradwatch recover` on "
        f"{run.host} stores what it left"
    )


def _with_last_step(store: Store, run: Run) -> dict[str, Any]:
    """The run with how far it has come; unknown where its steps cannot be read, and the others shown."""
    try:
        last = store.last_taken(run.id)
    except StoreError as error:
        err.print(f"gradwatch: {escape(run.name)}: {escape(str(error))}")
        return {**_run_dict(store, run), "steps": None, "last_time": None}
    return {
        **_run_dict(store, run),
        "steps": 0 if last is None else last.step + 1,
        "last_time": None if last is None else last.time,
    }


def _age(taken: float, run: Run) -> str:
    """When a step was taken; of a run that has not ended, also how long ago that is."""
    ago = time.time() - taken
    if run.ended_at is not None or ago < 0:
        return when(taken)
    return f"{when(taken)}, {ago:,.0f} seconds ago"
