"""`gradwatch grafana …`: bringing the dashboards to a Grafana server. Parse and call."""

from __future__ import annotations

import os
from pathlib import Path  # noqa: TC003 - typer reads the annotation
from typing import Annotated

import typer

from gradwatch.errors import ConfigurationError
from gradwatch_dashboards.terminal import JsonOption, escape, need, out, print_json

__all__ = ["app"]

_TOKEN = "GRAFANA_TOKEN"  # noqa: S105 - the variable's name

app = typer.Typer(help="Bring the dashboards to Grafana.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Make typer keep the verb's name though there is only one."""


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        msg = f"--token-file {path}: no text that can be read"
        raise ConfigurationError(msg) from None


@app.command()
def push(
    url: Annotated[str, typer.Option("--url", metavar="URL", help="Where Grafana is.")],
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help=f"A file with the token of a service account [default: {_TOKEN}].",
        ),
    ] = None,
    prometheus_url: Annotated[
        str | None,
        typer.Option(
            "--prometheus-url",
            metavar="URL",
            help="Where Grafana reaches Prometheus [default: as it is there; "
            "for a new data source http://127.0.0.1:9090].",
        ),
    ] = None,
    ui_url: Annotated[
        str | None,
        typer.Option(
            "--ui-url",
            metavar="URL",
            help="Where people reach `gradwatch ui`, for links [default: as it is there; "
            "for a new dashboard http://127.0.0.1:8501].",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make or update data source, folder and dashboards; done again, it changes nothing."""
    need("grafana_client", extra="grafana", verb="grafana push")
    from gradwatch_dashboards.grafana import push as pushing  # noqa: PLC0415

    for option, value in (
        ("--url", url),
        ("--prometheus-url", prometheus_url),
        ("--ui-url", ui_url),
    ):
        if value is not None:
            pushing.checked(option, value)
    token = os.environ.get(_TOKEN, "") if token_file is None else _read(token_file)
    if not token.strip():
        where = f"{_TOKEN} is not set" if token_file is None else f"{token_file} is empty"
        msg = (
            f"no Grafana token: {where}. Administration → Service accounts makes one, with the role "
            f"Admin for the data source; put it into {_TOKEN} or a file for --token-file"
        )
        raise ConfigurationError(msg)
    done = []
    with pushing.connect(url, token.strip()) as api:
        for one in pushing.push(api, prometheus=prometheus_url, ui=ui_url, dry_run=dry_run):
            done.append(one._asdict())
            if not as_json:
                would = "would be " if dry_run and one.state != "as it was" else ""
                out.print(f"{one.kind:11} {escape(one.name):24} {would}{one.state}")
    if as_json:
        print_json({"url": url, "dry_run": dry_run, "pushed": done})
