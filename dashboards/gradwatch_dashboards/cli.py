"""`gradwatch …`: parse and call. Each verb loads what it needs."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from typing import Annotated

import typer

from gradwatch._version import __version__
from gradwatch.errors import ConfigurationError, GradwatchError
from gradwatch_dashboards import (
    control_verbs,
    grafana_verbs,
    reading_verbs,
    service_verbs,
    store_verbs,
)
from gradwatch_dashboards.terminal import NOT_FOUND, USAGE, err, escape, out

__all__ = ["app", "main"]

app = typer.Typer(
    name="gradwatch",
    help="Training-health monitoring for PyTorch: look at runs, ask for a clipping threshold.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


_debug = False  # until `--debug` is read


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


def _set_debug(wanted: bool) -> None:
    global _debug  # noqa: PLW0603 - an option of the process, read where its errors end
    _debug = wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of an error: what a report of a fault in gradwatch needs.",
            callback=_set_debug,
        ),
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
    """Run the command line; an error becomes one line and an exit status, whatever it is."""
    for stream in (sys.stdout, sys.stderr):
        # A name in the store may hold what the terminal's encoding does not have.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _set_debug(False)
    try:
        app()
    except BrokenPipeError:  # `gradwatch runs | head`
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if _debug:
            raise
        _tell(error)
        sys.exit(USAGE if isinstance(error, ConfigurationError) else NOT_FOUND)


def _tell(error: Exception) -> None:
    """One line: what gradwatch says itself, what the system says, or that there is a fault."""
    if isinstance(error, GradwatchError):
        told = str(error)
    elif isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f": {error.filename}"
        told = f"{error.strerror}{place}"
    else:
        again = shlex.join(["gradwatch", "--debug", *sys.argv[1:]])
        told = (
            f"this is a fault of gradwatch itself ({type(error).__name__}: {error}). Please report "
            f"it with what this prints: {again}"
        )
    with contextlib.suppress(OSError):  # there may be nobody to tell
        err.print(f"gradwatch: {escape(told)}")
