"""`gradwatch …`: parse and call. Each verb loads what it needs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from gradwatch._version import __version__
from gradwatch.errors import ConfigurationError, GradwatchError
from gradwatch_dashboards import (
    control_verbs,
    grafana_verbs,
    reading_verbs,
    service_verbs,
    store_verbs,
)
from gradwatch_dashboards.terminal import NOT_FOUND, USAGE, err, out

__all__ = ["app", "main"]

app = typer.Typer(
    name="gradwatch",
    help="Training-health monitoring for PyTorch: look at runs, ask for a clipping threshold.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Take the options that come before a verb."""


for verb in (
    reading_verbs.runs,
    reading_verbs.show,
    reading_verbs.recommend,
    reading_verbs.diagnose,
    reading_verbs.report,
    control_verbs.apply,
    service_verbs.recover,
    service_verbs.monitor,
    service_verbs.ui,
    service_verbs.demo,
    service_verbs.doctor,
):
    app.command()(verb)
app.add_typer(store_verbs.app, name="store")
app.add_typer(grafana_verbs.app, name="grafana")


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
