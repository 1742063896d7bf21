"""The ring of a process that is gone: claimed under its lock, believed as far as it proves itself.

What is read is a copy in memory, as large as the file should be: where the file is cut short, the
records that are missing show as torn.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from gradwatch import cells, identity
from gradwatch.errors import RingError
from gradwatch.layout import ENDING_AT, PAGE, header_problem, spans
from gradwatch.locks import held, holder, lock, release
from gradwatch.recorder import Ring
from gradwatch.records import RunInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["Seen", "claim", "lives", "look", "sweep"]

_RUN = TypeAdapter(RunInfo)
_MAKING_SECONDS = 60.0  # a file that was being made for so long never will be


def claim(path: Path, wanted: Callable[[Mapping[str, Any]], bool] = lambda _: True) -> Ring | None:
    """The ring at `path`, locked for us; None where a process that lives has it, or not `wanted`.

    `wanted` is asked with its metadata, before the file is read.

    Its heads are put right: a record or message that is whole and lies at the head was written,
    though the head had not moved; a head far past any record was never true.

    Raises `RingError` where the file is not a ring, or so damaged that nobody knows whose it is.
    """
    descriptor = _take(path)
    if descriptor is None:
        return None
    try:
        about = _metadata(path, descriptor)
        if not wanted(about) or (not lock(descriptor) and not _is_gone(about)):
            release(descriptor)
            return None
        ring = _copy(path, descriptor)
        # A process lets go of its lock by closing any file of its own that is this one.
        if ring.ending is None and lives(about):
            ring.close()
            return None
    except (OSError, ValueError) as error:
        release(descriptor)
        msg = f"{path} cannot be read: {error}"
        raise RingError(msg) from error
    except RingError:
        release(descriptor)
        raise
    steps, events = ring.heads
    ring.trust(_true_steps(steps, ring.steps), _true_events(events, ring.events))
    return ring


class Seen(NamedTuple):
    """A ring at a look from outside: what it says of itself, and whether its process is gone."""

    about: Mapping[str, Any]
    gone: bool


def look(path: Path) -> Seen | None:
    """Look at a ring without taking its lock; None where it cannot be read, or this process has it."""
    try:
        found = path.stat()
        if (found.st_dev, found.st_ino) in held:  # to close a file of our own lets go of its lock
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        about = _metadata(path, descriptor)
        ended = os.pread(descriptor, 8, ENDING_AT) != bytes(8)
        return Seen(about, (ended or not lives(about)) and not _is_kept(about, holder(descriptor)))
    except (OSError, ValueError, RingError):
        return None
    finally:
        os.close(descriptor)


def _is_kept(about: Mapping[str, Any], by: int | None) -> bool:
    """Whether the process that has a ring may be its own: of another machine's nobody knows."""
    return by is not None and (about["host"] != identity.host() or by == int(about["pid"]))


def sweep(folder: Path, now: float) -> None:
    """Remove the files of rings whose making was cut short by the end of their process."""
    for path in folder.glob("*.ring.new"):
        try:
            if now - path.stat().st_mtime > _MAKING_SECONDS:
                descriptor = _take(path)
                if descriptor is not None:
                    path.unlink()
                    release(descriptor)
        except (OSError, RingError):
            continue


def _take(path: Path) -> int | None:
    """A locked descriptor of the file; None where it is in use, or gone."""
    try:
        found = path.stat()
        # Asked before it is opened: closing a file of our own would let go of its lock.
        if (found.st_dev, found.st_ino) in held:
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        msg = f"cannot open the flight-recorder file {path}: {error.strerror or error}"
        raise RingError(msg) from error
    try:
        lock(descriptor)
    except OSError:
        os.close(descriptor)
        return None
    try:
        there = path.stat()
    except OSError:  # another recoverer was faster, and has removed it
        release(descriptor)
        return None
    if (there.st_dev, there.st_ino) != (found.st_dev, found.st_ino):
        release(descriptor)
        return None
    return descriptor


def _metadata(path: Path, descriptor: int) -> dict[str, Any]:
    """What the ring says of its run; a `ValueError` where that is not all there."""
    # All reading is through this very descriptor: closing another of the file would unlock it.
    header = os.pread(descriptor, PAGE, 0)
    problem = header_problem(header)
    if problem is None:
        where = spans(header).metadata
        content = os.pread(descriptor, where.stop - where.start, where.start)
        if len(content) == where.stop - where.start:
            return _of_a_run(content)
        problem = "is cut short"
    msg = f"{path} {problem}"
    raise RingError(msg)


def _of_a_run(content: bytes) -> dict[str, Any]:
    about = cells.document(cells.lenient_json(content))
    try:
        _RUN.validate_json(content, strict=True)
    except ValueError:
        about = None
    if about is None:
        msg = "its metadata do not say whose run it is"
        raise ValueError(msg)
    return about


def _copy(path: Path, descriptor: int) -> Ring:
    size = os.fstat(descriptor).st_size
    buffer = mmap.mmap(-1, max(spans(os.pread(descriptor, PAGE, 0)).size, size))
    with memoryview(buffer) as view:
        at = 0  # one read returns 2 GiB at most
        while at < size and (count := os.preadv(descriptor, [view[at:size]], at)):
            at += count
    return Ring(buffer, path, descriptor)


def lives(about: Any) -> bool:
    """Whether the ring's process is one of this machine's that still runs.

    One with this process's own id is gone: what this process writes is known to it (see `held`).
    In a container that was started again it often has the id of the one before.
    """
    pid = int(about["pid"])
    if about["host"] != identity.host() or pid == os.getpid():
        return False
    return identity.is_alive(pid, float(about["started_at"]))


def _is_gone(about: Any) -> bool:
    """Whether a ring's process has ended, where the file system knows no locks."""
    pid = int(about["pid"])
    here = about["host"] == identity.host()
    return here and (pid == os.getpid() or not identity.is_alive(pid))


def _true_steps(head: int, slots: np.ndarray[Any, np.dtype[np.void]]) -> int:
    """The head where it can be true; else the sequence number of the newest whole slot."""
    seq = slots["seq"]
    places = np.arange(1, len(slots) + 1, dtype=np.uint64)
    whole = (seq == slots["seq_end"]) & (seq > 0)
    whole &= (seq - 1) % np.uint64(len(slots)) + 1 == places
    newest = int(seq[whole].max()) if whole.any() else 0
    return head if newest <= head <= newest + len(slots) else newest


def _true_events(head: int, slots: np.ndarray[Any, np.dtype[np.void]]) -> int:
    """The same; a message past the head counts once all of its parts are there."""
    true = _true_steps(head, slots)
    if true <= head:
        return true
    last = slots[(true - 1) % len(slots)]
    return true if last["part"] + 1 == last["parts"] else max(0, true - int(last["part"]) - 1)
