"""Who this run is: uid, name and job, from the user, the launcher, or made up."""

from __future__ import annotations

import itertools
import os
import re
import socket
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "Ids",
    "Launcher",
    "UidSource",
    "default_name",
    "host",
    "is_alive",
    "launcher",
    "numbered",
    "process",
    "rank_and_world",
    "run_uid",
]

_LONGEST = 240  # characters; the store's columns have 255, and may need some for a suffix

UidSource = Literal["state", "setting", "launcher", "fresh"]


class Launcher(NamedTuple):
    """The job this process belongs to, and whether that id survives a restart of the job."""

    id: str
    survives_restart: bool


def launcher(environ: Mapping[str, str]) -> Launcher:
    """The job id of torchelastic or Slurm, else one for this process."""
    elastic = environ.get("TORCHELASTIC_RUN_ID", "")
    if elastic and elastic != "none":  # "none" is what torchrun says where nobody named the job
        return Launcher(f"torchelastic-{elastic}"[:_LONGEST], survives_restart=True)
    slurm = environ.get("SLURM_ARRAY_JOB_ID") or environ.get("SLURM_JOB_ID")
    if slurm:
        task = environ.get("SLURM_ARRAY_TASK_ID")
        return Launcher(f"slurm-{slurm}_{task}" if task else f"slurm-{slurm}", True)
    return Launcher(f"{host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}", survives_restart=False)


def run_uid(
    job: Launcher, *, setting: str | None, ordinal: Callable[[str], int]
) -> tuple[str, UidSource]:
    """The run's uid and where it is from: the setting, the launcher, or fresh.

    `ordinal` gives the number of this run among those of the process under an id, from 1: later
    ones add it, so that the second optimizer of a job is told from its first in every start of the
    job.
    """
    if setting:
        return numbered(setting, ordinal(setting)), "setting"
    if job.survives_restart:
        return numbered(job.id, ordinal(job.id)), "launcher"
    return uuid.uuid4().hex, "fresh"


def numbered(uid: str, ordinal: int) -> str:
    """The uid of the run with that number of those under one id."""
    return uid if ordinal == 1 else f"{uid}-{ordinal}"


class Ids:
    """The run ids that are used in this process, and by how many runs."""

    def __init__(self) -> None:
        self._given: Counter[str] = Counter()  # never reset
        self._open: set[str] = set()

    def next(self, uid: str) -> int:
        """The number of a run under an id that names the process: how many there have been."""
        self._given[uid] += 1
        return self._given[uid]

    def free(self, uid: str) -> int:
        """The least number with which no run is open under an id that names this very run."""
        return next(n for n in itertools.count(1) if numbered(uid, n) not in self._open)

    def opened(self, uid: str) -> None:
        """A run has that uid from now on."""
        self._open.add(uid)

    def closed(self, uid: str) -> None:
        """It has ended; takes no lock."""
        self._open.discard(uid)


def default_name(argv: list[str] | None = None) -> str:
    """The script's name without its ending; "notebook" or "python" where there is no script."""
    script = (sys.argv if argv is None else argv)[:1]
    stem = Path(script[0]).stem if script and script[0] not in {"", "-", "-c", "-m"} else ""
    if stem in {"ipykernel_launcher", "colab_kernel_launcher"}:
        return "notebook"
    if stem == "__main__":
        stem = Path(script[0]).parent.name
    # A file name need not be text in any encoding; a database takes nothing else.
    return stem.encode("utf-8", "replace").decode()[:_LONGEST] or "python"


def process() -> str:
    """This process by host and pid, as Prometheus is told of it."""
    return f"{host()}:{os.getpid()}"


def host() -> str:
    """This machine's name."""
    return socket.gethostname() or "localhost"


def rank_and_world(environ: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and the world's size: torch.distributed's, else the launcher's."""
    from torch import distributed  # noqa: PLC0415 - torch is there by now; this module is not

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    try:
        return int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1


_CLOCK_SLACK = 60.0  # seconds that the clock may have been set by since


def is_alive(pid: int, at: float | None = None) -> bool:
    """Whether a process of this machine with that id runs; one that did `at` that Unix time."""
    if at is not None and (began := _began(pid)) is not None and began > at + _CLOCK_SLACK:
        return False  # the id was given to another since
    if _state(pid) in {"Z", "X"}:
        return False  # it has ended; nobody has asked how
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # it is there, and somebody else's
    return True


def _stat(pid: int) -> list[str]:
    """What proc_pid_stat(5) tells of a process, from field 3 on; nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return []


def _state(pid: int) -> str | None:
    return next(iter(_stat(pid)), None)


def _began(pid: int) -> float | None:
    """When a process began, in Unix seconds; None where unknown."""
    try:
        ticks = int(_stat(pid)[19])
        booted = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
        return float(booted[1]) + ticks / os.sysconf("SC_CLK_TCK") if booted else None
    except (OSError, ValueError, IndexError):
        return None
