"""The file by which Prometheus finds this process's exporter: the format of `file_sd_configs`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import urllib.parse
from typing import TYPE_CHECKING

from gradwatch import identity

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.troubles import Troubles

__all__ = ["TargetFile"]

_LOOK_SECONDS = 30.0  # between two looks whether somebody has cleaned it away


class TargetFile:
    """One exporter's target file. Used by the worker's thread: a folder that hangs holds up it.

    Its name is the host's and the port's, so what a killed process left is written over by the
    next exporter at that address. Its label tells two processes at one address apart.
    """

    def __init__(self, folder: Path, url: str, troubles: Troubles) -> None:
        host, address = identity.host(), urllib.parse.urlsplit(url)
        self.path = folder.absolute() / f"gradwatch-{host}-{address.port}.json"
        labels = {"process": f"{host}:{os.getpid()}"}
        self._text = json.dumps([{"targets": [address.netloc], "labels": labels}]) + "\n"
        self._troubles = troubles
        self._written = False
        self._look_at = -math.inf

    def keep(self, now: float) -> None:
        """Write it where it is not there, whole or not at all; one that cannot be is told once."""
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        try:
            if self._written and self.path.exists():
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(".tmp")
            draft.write_text(self._text)
            draft.replace(self.path)
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
