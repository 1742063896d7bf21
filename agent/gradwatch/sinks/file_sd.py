"""The file by which Prometheus finds this process's exporter: the format of `file_sd_configs`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import urllib.parse
from typing import TYPE_CHECKING

from gradwatch import identity
from gradwatch.addresses import is_loopback

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from gradwatch.troubles import Troubles

__all__ = ["TargetFile"]

_LOOK_SECONDS = 30.0  # between two looks whether somebody has cleaned it away
_RUNS = "__gradwatch_runs"  # Prometheus drops labels that begin so before it stores anything


class TargetFile:
    """One exporter's target file. Used by the worker's thread: a folder that hangs holds up it.

    Its name is the address's, so what a killed process left is written over by the next exporter
    there; an address that only this host can reach is named by the host. Its label tells two
    processes at one address apart.
    """

    def __init__(self, folder: Path, url: str, troubles: Troubles) -> None:
        host, address = identity.host(), urllib.parse.urlsplit(url)
        shown = host if is_loopback(address.hostname or "") else str(address.hostname)
        name = re.sub(r"[^\w.-]", "_", f"gradwatch-{shown}-{address.port}")
        self.path = folder.absolute() / f"{name}.json"
        self._target = address.netloc
        self._process = identity.process()
        self._runs: frozenset[str] = frozenset()
        self._troubles = troubles
        self._written = False
        self._look_at = -math.inf

    def keep(self, now: float, runs: Collection[str] = ()) -> None:
        """Write it where it is not there, whole or not at all; one that cannot be is told once.

        `runs` are the uids of the process's own. What an earlier attempt at one of them has left is
        removed: the run goes on here, so nobody need miss it there.
        """
        new = frozenset(runs) - self._runs
        if now < self._look_at and not new:
            return
        self._look_at = now + _LOOK_SECONDS
        try:
            if self._written and not new and self.path.exists():
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._runs |= new
            self._write()
            if new:
                self._remove_earlier(new)
        except OSError as error:
            self._troubles.report(
                "target file",
                f"Prometheus is not told of this job: cannot write {self.path} "
                f"({error.strerror or error}); set GRADWATCH_SD_DIR to a folder that can be written",
            )
        else:
            self._written = True
            self._troubles.clear("target file", f"{self.path} is written")

    def remove(self) -> None:
        """Nobody need miss the exporter: its process ends well."""
        if self._written:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _write(self) -> None:
        labels = {"process": self._process}
        if self._runs:
            labels[_RUNS] = ",".join(sorted(self._runs))
        draft = self.path.with_name(f"{self.path.stem}-{os.getpid()}.tmp")
        try:
            draft.write_text(json.dumps([{"targets": [self._target], "labels": labels}]) + "\n")
            try:
                draft.replace(self.path)
            except PermissionError:
                # In a folder like /tmp another user's file cannot be written over: have one beside.
                mine = f"-uid{os.getuid()}" if hasattr(os, "getuid") else ""
                if not mine or self.path.stem.endswith(mine):
                    raise
                self.path = self.path.with_name(f"{self.path.stem}{mine}.json")
                draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)

    def _remove_earlier(self, runs: frozenset[str]) -> None:
        """Other files that name one of these runs; what cannot be read is not ours to judge."""
        for path in self.path.parent.glob("gradwatch-*.json"):
            if path == self.path:
                continue
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                named = json.loads(path.read_text())[0]["labels"][_RUNS].split(",")
                if not runs.isdisjoint(named):
                    path.unlink()
