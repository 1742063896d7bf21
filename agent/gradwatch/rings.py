"""Where a run's flight-recorder file is made."""

from __future__ import annotations

import dataclasses
import os
import re
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

__all__ = ["beside", "folders", "make"]


def folders(settings: Settings) -> list[Path]:
    """Where to try, in order: the setting, else beside an SQLite store, else a temporary folder.

    The latter comes first where the store is on a network file system: a step must not wait for
    pages that another machine keeps.
    """
    if settings.ring_dir is not None:
        return [settings.ring_dir.expanduser().absolute()]
    own = os.getuid() if hasattr(os, "getuid") else "user"
    temporary = Path(tempfile.gettempdir()) / f"gradwatch-rings-{own}"
    near = beside(settings.store)
    if near is None:
        return [temporary]
    return [temporary, near] if network_kind(near.parent) else [near, temporary]


def beside(store: str) -> Path | None:
    """The folder of rings that goes with an SQLite file."""
    database = sqlite_path(store)
    return None if database is None else Path(f"{database}.rings")


def make(
    run: RunInfo,
    settings: Settings,
    *,
    parameters: Sequence[str],
    durable: bool,
    report: Callable[[str, str], None],
) -> Ring:
    """The run's ring: a file in the first folder that takes one, else plain memory (said once)."""
    metadata: dict[str, Any] = {
        **dataclasses.asdict(run),
        "store": redact(settings.store),
        "schema": schema.REVISION,
        "parameters": list(parameters),
    }
    steps, events = settings.ring_steps, settings.ring_events
    problem = None
    if durable or settings.ring_dir is not None:
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', run.uid)[:80]}-{run.ring[:12]}.ring"
        for folder in folders(settings):
            try:
                return Ring.create(folder / name, metadata, steps=steps, events=events)
            except RingError as error:
                problem = problem or error
        report("ring", f"{problem}; the last steps would not outlive a crash")
    return Ring.in_memory(metadata, steps=steps, events=events)
