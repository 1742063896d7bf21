"""Where a run's flight-recorder file is made."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch import schema
from gradwatch.config import redact, sqlite_path
from gradwatch.errors import RingError
from gradwatch.filesystems import network_kind
from gradwatch.recorder import Ring

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.config import Settings
    from gradwatch.records import RunInfo

__all__ = ["beside", "folders", "intruded", "make", "prefix"]

FULL_RINGS = 4  # runs of a process that have a ring of full size
SMALLER = 8  # how many times smaller the others' are, where no size is set


def folders(settings: Settings) -> list[Path]:
    """Where to try, in order: the setting, else beside an SQLite store, else a temporary folder.

    The latter comes first where the store is on a network file system: a step must not wait for
    pages that another machine keeps.
    """
    if settings.ring_dir is not None:
        return [settings.ring_dir.expanduser().absolute()]
    temporary = _temporary()
    near = beside(settings.store)
    if near is None:
        return [temporary]
    return [temporary, near] if network_kind(near.parent) else [near, temporary]


def beside(store: str) -> Path | None:
    """The folder of rings that goes with an SQLite file."""
    database = sqlite_path(store)
    return None if database is None else Path(f"{database}.rings")


def intruded(folder: Path) -> str | None:
    """Why the folder under the common temporary one is not to be trusted; None for any other."""
    if folder != _temporary() or not hasattr(os, "getuid"):
        return None
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if own and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return f"{folder} is not a folder that you alone can write; set GRADWATCH_RING_DIR to one"


def _temporary() -> Path:
    own = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"gradwatch-rings-{own}"


def make(
    run: RunInfo,
    settings: Settings,
    *,
    parameters: Sequence[str],
    ordinal: int = 1,
    durable: bool,
    report: Callable[[str, str], None],
) -> Ring:
    """The run's ring: a file in the first folder that takes one, else plain memory (said once).

    `ordinal` is the run's number in its process: where there are many, each has less to hold, and
    all of them together shall not take gigabytes.
    """
    metadata: dict[str, Any] = {
        **dataclasses.asdict(run),
        "store": redact(settings.store),
        "schema": schema.REVISION,
        "parameters": list(parameters),
    }
    steps, events = settings.ring_steps, settings.ring_events
    if ordinal > FULL_RINGS:
        chosen = settings.model_fields_set
        steps = steps if "ring_steps" in chosen else steps // SMALLER
        events = events if "ring_events" in chosen else events // SMALLER
    problem = None
    if durable or settings.ring_dir is not None:
        name = f"{prefix(run.uid)}-{run.ring[:12]}.ring"
        for folder in folders(settings):
            try:
                if folder == _temporary():
                    _make_private(folder)
                return Ring.create(folder / name, metadata, steps=steps, events=events)
            except RingError as error:
                problem = problem or error
        report("ring", f"{problem}; the last steps would not outlive a crash")
    return Ring.in_memory(metadata, steps=steps, events=events)


def prefix(uid: str) -> str:
    """What the names of a run's files begin with; those of others may, too."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", uid)[:80]


def _make_private(folder: Path) -> None:
    with contextlib.suppress(OSError):  # there already; or Ring.create says what is wrong
        folder.mkdir(mode=0o700)
    problem = intruded(folder)
    if problem is not None:
        raise RingError(problem)
