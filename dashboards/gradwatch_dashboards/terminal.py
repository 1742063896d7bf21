"""What the verbs of the command line share: options, consoles, JSON, a word on missing extras."""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import os
import re
import socket
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import markup
from rich.console import Console

from gradwatch.cells import UNKNOWN
from gradwatch.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gradwatch_monitor.store import Store

__all__ = [
    "NOT_FOUND",
    "USAGE",
    "JsonOption",
    "RunArgument",
    "StoreOption",
    "err",
    "escape",
    "need",
    "number",
    "open_store",
    "out",
    "permit",
    "print_json",
    "progress",
    "store_url",
    "user",
    "when",
]

NOT_FOUND = 1  # also: there is a finding
USAGE = 2

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's id, name or uid; a number is an id. id:3, name:3 and uid:3 say which.",
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="The store: a database URL or a file's path [default: GRADWATCH_STORE, else "
        "gradwatch.db here].",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def store_url(store: str | None) -> str:
    """The store that was asked for, or the setting's."""
    from gradwatch.config import Settings  # noqa: PLC0415

    return Settings.load(**({} if store is None else {"store": store})).store


@contextlib.contextmanager
def open_store(store: str | None) -> Iterator[Store]:
    """That store, open for as long as the context lasts."""
    from gradwatch_monitor.store import Store  # noqa: PLC0415

    with Store(store_url(store)) as opened:
        try:
            yield opened
        finally:
            if opened.malformed:
                err.print(f"gradwatch: {escape(opened.malformed.sentence)}")


def need(*modules: str, extra: str, verb: str) -> None:
    """Say which extra a verb needs, before it fails somewhere inside."""
    from importlib.util import find_spec  # noqa: PLC0415

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        msg = f"`gradwatch {verb}` needs {', '.join(missing)}: pip install 'gradwatch[{extra}]'"
        raise ConfigurationError(msg)


def permit(address: str, *, trusted: bool) -> None:
    """Refuse an address that others reach, unless who starts it says that they may."""
    from gradwatch.addresses import is_loopback  # noqa: PLC0415

    if not trusted and not is_loopback(address):
        msg = (
            f"--address {address} is seen from other machines, and whoever reaches it sees every "
            "run, asked for no password: say --trusted-network if they all may"
        )
        raise ConfigurationError(msg)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, where that is a terminal: call it with done and total."""
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def user() -> str:
    """Who asks, as user@host."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def escape(text: str) -> str:
    """Text as text: nothing in it is markup, and no character of it commands a terminal."""
    return markup.escape(
        re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
    )


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def when(seconds: float) -> str:
    """A moment in local time; "unknown" where there is none, or none that a calendar has."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return UNKNOWN


def print_json(value: Any) -> None:
    """Print it as JSON."""
    text = json.dumps(_plain(value), indent=2, default=str)
    print(text, flush=True)  # noqa: T201 - rich would wrap it


def _plain(value: Any) -> Any:
    """JSON has no NaN: say null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
