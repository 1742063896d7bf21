"""The flight recorder: a ring of step records and a ring of events in a memory-mapped file.

The file outlives the process, so what the worker had not stored when the process died can be
read from it. One thread writes, without a lock; any number of readers look on.

Layout (little-endian; version 1), every part starting on a 4,096-byte page:

    header   magic "GRADWTCH", version u32, step size u32, step capacity u64, event slot size u32,
             (pad) u32, event capacity u64, metadata size u64; at byte 64 the step head u64,
             at byte 128 the event head u64; at byte 192 how the run ended u64 (an index into
             `ENDINGS`; 0: it has not said); at byte 256, on ranks other than 0, the name of rank
             0's ring, 64 bytes of ASCII, zeros after it
    metadata JSON: who the run is (see `records.RunInfo`)
    steps    capacity × 96 bytes, `STEP_DTYPE`
    events   capacity × 512 bytes, `EVENT_DTYPE`: a message is cut over consecutive slots

A record carries its sequence number (from 1) in its first and its last eight bytes, and the head
moves only after it is written: a torn record shows by numbers that differ. The magic is written
last, so a file whose making was cut short is not taken for a ring. When a ring is full the oldest
record is overwritten; readers count what they missed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from gradwatch.errors import RingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from gradwatch.records import RunStatus

__all__ = [
    "EVENT_DTYPE",
    "FLAGS",
    "PAGE",
    "STEP_DTYPE",
    "Messages",
    "NullRing",
    "Ring",
    "Spans",
    "Steps",
    "header_problem",
    "held",
    "lock",
    "release",
    "spans",
]

MAGIC = b"GRADWTCH"
VERSION = 1
PAGE = 4096
_HEADER = struct.Struct("<8sIIQIIQQ")
_STEP_HEAD_AT = 64
_EVENT_HEAD_AT = 128
_ENDING_AT = 192
_LEADER_AT = 256
_LEADER_BYTES = 64
ENDINGS: tuple[RunStatus | None, ...] = (None, "finished", "failed")


class FLAGS:
    """The bits of a step record's `flags`."""

    CLIPPED = 1
    NONFINITE = 2
    NONFINITE_LOSS = 4
    SKIPPED = 8
    AMP_OVERFLOW = 16
    MODIFIED = 32  # the gradients were changed in place between backward and step


_STEP = struct.Struct("<QqddddddddIIQ")
STEP_DTYPE = np.dtype(
    [
        ("seq", "<u8"),
        ("step", "<i8"),
        ("time", "<f8"),
        ("monotonic", "<f8"),
        ("loss", "<f8"),
        ("lr", "<f8"),
        ("pre_norm", "<f8"),
        ("post_norm", "<f8"),
        ("threshold", "<f8"),
        ("loss_scale", "<f8"),
        ("flags", "<u4"),
        ("reserved", "<u4"),
        ("seq_end", "<u8"),
    ]
)
_EVENT_BYTES = 512
_EVENT_PAYLOAD = _EVENT_BYTES - 8 - 4 - 4 - 4 - 4 - 8
_EVENT_SLOT = struct.Struct(f"<QIIII{_EVENT_PAYLOAD}sQ")
EVENT_DTYPE = np.dtype(
    [
        ("seq", "<u8"),
        ("part", "<u4"),  # from 0
        ("parts", "<u4"),
        ("length", "<u4"),
        ("reserved", "<u4"),
        ("data", f"V{_EVENT_PAYLOAD}"),
        ("seq_end", "<u8"),
    ]
)
_MOST_STEPS, _MOST_EVENTS, _MOST_METADATA = 2**26, 2**20, 2**26  # more is no ring of ours
if _STEP.size != STEP_DTYPE.itemsize or {_EVENT_SLOT.size, EVENT_DTYPE.itemsize} != {
    _EVENT_BYTES
}:  # pragma: no cover
    raise AssertionError


class Steps(NamedTuple):
    """Step records read from a ring: the good ones, the cursor to go on from, the count lost."""

    records: np.ndarray[Any, np.dtype[np.void]]
    cursor: int
    overwritten: int
    torn: int


class Messages(NamedTuple):
    """Event messages read from a ring: the good ones, the cursor to go on from, slots lost."""

    payloads: list[bytes]
    cursor: int
    overwritten: int
    torn: int


class Ring:
    """A flight-recorder file, or the same in plain memory where no file can be had."""

    def __init__(self, buffer: mmap.mmap, path: Path | None, descriptor: int | None) -> None:
        header = _HEADER.unpack_from(buffer, 0)
        _, _, step_size, self.step_capacity, slot_size, _, self.event_capacity, meta_size = header
        self.path = path
        self._descriptor = descriptor
        self._buffer = buffer
        self._steps_at = PAGE + _pages(meta_size)
        self._events_at = self._steps_at + _pages(self.step_capacity * step_size)
        self.metadata: Mapping[str, Any] = json.loads(buffer[PAGE : PAGE + meta_size])
        # One 8-byte store through a cast memoryview is never seen half-done by a reader.
        words = memoryview(buffer)[:PAGE].cast("Q")
        self._step_head = words[_STEP_HEAD_AT // 8 : _STEP_HEAD_AT // 8 + 1]
        self._event_head = words[_EVENT_HEAD_AT // 8 : _EVENT_HEAD_AT // 8 + 1]
        self._ending = words[_ENDING_AT // 8 : _ENDING_AT // 8 + 1]
        self.steps = np.frombuffer(buffer, STEP_DTYPE, self.step_capacity, self._steps_at)
        self.events = np.frombuffer(buffer, EVENT_DTYPE, self.event_capacity, self._events_at)
        self._step_size = step_size
        self._slot_size = slot_size
        # Record one step: `append(step, time, monotonic, loss, lr, pre_norm, post_norm, threshold,
        # loss_scale, flags)`. Absent values are NaN; `flags` is made of `FLAGS`.
        self.append = _appender(
            buffer, self._step_head, self._steps_at, step_size, self.step_capacity
        )

    @classmethod
    def create(cls, path: Path, metadata: Mapping[str, Any], *, steps: int, events: int) -> Self:
        """A new ring file, its disk space allocated for real: a full disk fails here, at once.

        (A sparse file would instead kill the process with SIGBUS at some later step.)
        Raises `RingError` where the file cannot be made.
        """
        meta, size = _plan(metadata, steps, events)
        descriptor = None
        # Under another name until it is whole and locked: whoever looks for the rings of dead
        # processes does not see it before.
        making = path.with_name(f"{path.name}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            descriptor = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            _allocate(descriptor, size)
            lock(descriptor)
            buffer = mmap.mmap(descriptor, size)
            _format(buffer, meta, steps, events)
            making.rename(path)
        except OSError as error:
            if descriptor is not None:
                making.unlink(missing_ok=True)
                release(descriptor)
            msg = f"cannot make the flight-recorder file {path}: {error.strerror or error}"
            raise RingError(msg) from error
        return cls(buffer, path, descriptor)

    @classmethod
    def in_memory(cls, metadata: Mapping[str, Any], *, steps: int, events: int) -> Self:
        """A ring that does not outlive the process, for when there is no disk to put it on."""
        meta, size = _plan(metadata, steps, events)
        buffer = mmap.mmap(-1, size)
        _format(buffer, meta, steps, events)
        return cls(buffer, None, None)

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing ring, to read. Raises `RingError` where the file is not a whole ring."""
        try:
            with path.open("rb") as file:
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            msg = f"cannot read the flight-recorder file {path}: {error}"
            raise RingError(msg) from error
        problem = header_problem(buffer)
        if problem is None and len(buffer) < spans(buffer).size:
            problem = "is cut short"
        if problem is not None:
            buffer.close()
            msg = f"{path} {problem}"
            raise RingError(msg)
        return cls(buffer, path, None)

    # -- writing: the training thread only ----------------------------------------------------

    def append_event(self, payload: bytes) -> None:
        """Record a message, cut over as many slots as it needs; an oversized one is refused."""
        parts = max(1, -(-len(payload) // _EVENT_PAYLOAD))
        if parts > self.event_capacity // 2:
            msg = f"an event of {len(payload)} bytes does not fit a ring of {self.event_capacity}"
            raise RingError(msg)
        head = self._event_head[0]
        for part in range(parts):
            piece = payload[part * _EVENT_PAYLOAD : (part + 1) * _EVENT_PAYLOAD]
            seq = head + part + 1
            slot = self._events_at + (seq - 1) % self.event_capacity * self._slot_size
            _EVENT_SLOT.pack_into(self._buffer, slot, seq, part, parts, len(piece), 0, piece, seq)
        self._event_head[0] = head + parts

    # -- writing: the worker only --------------------------------------------------------------

    def note_end(self, status: RunStatus) -> None:
        """The run has ended so, whether or not all of it gets stored before the process is gone."""
        if status in ENDINGS:
            self._ending[0] = ENDINGS.index(status)

    def note_leader(self, ring: str) -> None:
        """Whose run this ring's is: that of rank 0 with that ring."""
        name = ring.encode("ascii", "replace")[:_LEADER_BYTES]
        self._buffer[_LEADER_AT : _LEADER_AT + len(name)] = name

    def trust(self, steps: int, events: int) -> None:
        """Put the heads where the records say they are: of a ring that nobody writes any more."""
        self._step_head[0], self._event_head[0] = steps, events

    # -- reading: any thread, any process -----------------------------------------------------

    @property
    def heads(self) -> tuple[int, int]:
        """How many step records and event slots were ever written: where a reader ends."""
        return self._step_head[0], self._event_head[0]

    @property
    def place(self) -> str | None:
        """Where the records outlive the process; None: nowhere, the file was deleted or never was."""
        if self.path is None:
            return None
        try:
            self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            pass  # it may be there; who asks has not the right to see it
        return str(self.path)

    @property
    def ending(self) -> RunStatus | None:
        """How the run ended, where it had the time to say so."""
        noted = self._ending[0]
        return ENDINGS[noted] if noted < len(ENDINGS) else None

    @property
    def leader(self) -> str | None:
        """The name of rank 0's ring, on another rank that knew it."""
        noted = self._buffer[_LEADER_AT : _LEADER_AT + _LEADER_BYTES].rstrip(b"\0")
        return noted.decode("ascii", "replace") or None

    def read_steps(self, cursor: int, limit: int | None = None) -> Steps:
        """The records after `cursor` (0: from the start), at most `limit` of them."""
        head = self._step_head[0]
        first = max(cursor, head - self.step_capacity)
        last = head if limit is None else min(head, first + limit)
        index = np.arange(first, last, dtype=np.int64)
        rows = self.steps[index % self.step_capacity]
        expected = (index + 1).astype(np.uint64)
        good = (rows["seq"] == expected) & (rows["seq_end"] == expected)
        torn = int(len(rows) - np.count_nonzero(good))
        return Steps(rows[good], last, first - cursor, torn)

    def read_events(self, cursor: int) -> Messages:
        """The messages after `cursor`; one of which any part is gone or torn is left out."""
        head = self._event_head[0]
        first = max(cursor, head - self.event_capacity)
        payloads: list[bytes] = []
        pieces: list[bytes] = []
        torn = 0
        for seq in range(first + 1, head + 1):
            slot = self._events_at + (seq - 1) % self.event_capacity * self._slot_size
            start, part, parts, length, _, data, end = _EVENT_SLOT.unpack_from(self._buffer, slot)
            if start != seq or end != seq or length > _EVENT_PAYLOAD or part != len(pieces):
                torn += 1 + len(pieces)
                pieces.clear()
                continue
            pieces.append(data[:length])
            if len(pieces) == parts:
                payloads.append(b"".join(pieces))
                pieces.clear()
        return Messages(payloads, head, first - cursor, torn + len(pieces))

    def close(self, *, remove: bool = False) -> None:
        """Let the file go; with `remove`, delete it (all that it held is stored)."""
        # The memory goes with this object: another thread may be reading the heads.
        if remove and self.path is not None:
            self.path.unlink(missing_ok=True)
        if self._descriptor is not None:
            release(self._descriptor)
            self._descriptor = None


def _appender(
    buffer: mmap.mmap, head: memoryview, start: int, size: int, capacity: int
) -> Callable[..., None]:
    """`Ring.append`, a closure: with cold caches every look into an object costs about 1 µs."""
    pack_into = _STEP.pack_into

    def append(
        step: int,
        time: float,
        monotonic: float,
        loss: float,
        lr: float,
        pre_norm: float,
        post_norm: float,
        threshold: float,
        loss_scale: float,
        flags: int,
    ) -> None:
        seq = head[0] + 1
        # One pack_into for the record, then one store for the head: see the module's text.
        pack_into(
            buffer,
            start + (seq - 1) % capacity * size,
            seq,
            step,
            time,
            monotonic,
            loss,
            lr,
            pre_norm,
            post_norm,
            threshold,
            loss_scale,
            flags,
            0,
            seq,
        )
        head[0] = seq

    return append


# The rings that this process holds, by device and inode: the lock is the process's, and closing
# any descriptor of such a file would let go of it.
held: set[tuple[int, int]] = set()


def lock(descriptor: int) -> bool:
    """Take a ring for this process, until it ends or lets go; False: the file system has no locks.

    Raises `OSError` where another process has it.
    """
    locked = True
    try:
        # lockf, not flock: a forked child does not hold on to it after we are killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            raise
        locked = False
    found = os.fstat(descriptor)
    held.add((found.st_dev, found.st_ino))
    return locked


def release(descriptor: int) -> None:
    """Let go of a ring that `lock` took."""
    found = os.fstat(descriptor)
    os.close(descriptor)
    held.discard((found.st_dev, found.st_ino))


class NullRing:
    """Takes every record and keeps none: where recording is off."""

    def append(self, *fields: float) -> None:
        """Do nothing."""

    def append_event(self, payload: bytes) -> None:
        """Do nothing."""


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _plan(metadata: Mapping[str, Any], steps: int, events: int) -> tuple[bytes, int]:
    meta = json.dumps(metadata, default=str).encode()
    size = PAGE + _pages(len(meta)) + _pages(steps * _STEP.size) + _pages(events * _EVENT_BYTES)
    return meta, size


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    block = bytes(1 << 20)  # pragma: no cover - macOS: writing zeros allocates as well
    for start in range(0, size, len(block)):  # pragma: no cover
        os.write(descriptor, block[: size - start])


def _format(buffer: mmap.mmap, meta: bytes, steps: int, events: int) -> None:
    # Touching every page now keeps page faults out of the training steps.
    for offset in range(0, len(buffer), PAGE):
        buffer[offset] = 0
    buffer[PAGE : PAGE + len(meta)] = meta
    header = _HEADER.pack(MAGIC, VERSION, _STEP.size, steps, _EVENT_BYTES, 0, events, len(meta))
    buffer[8 : len(header)] = header[8:]
    buffer[:8] = MAGIC


def header_problem(buffer: mmap.mmap | bytes) -> str | None:
    """What is wrong with what should be a ring's header; None where nothing is."""
    if len(buffer) < PAGE or buffer[:8] != MAGIC:
        return "is not a flight-recorder file"
    _, version, step, steps, slot, _, events, meta = _HEADER.unpack_from(buffer, 0)
    if version != VERSION or step != _STEP.size or slot != _EVENT_BYTES:
        return f"is of format version {version}; this gradwatch reads version {VERSION}"
    if not (0 < steps <= _MOST_STEPS and 0 < events <= _MOST_EVENTS and meta <= _MOST_METADATA):
        return "has a header that was written over"
    return None


class Spans(NamedTuple):
    """Where the metadata lies in a ring's file, and how large the whole file is, in bytes."""

    metadata: slice
    size: int


def spans(header: mmap.mmap | bytes) -> Spans:
    """As a header that has no problem says."""
    _, _, step, steps, slot, _, events, meta = _HEADER.unpack_from(header, 0)
    size = PAGE + _pages(meta) + _pages(steps * step) + _pages(events * slot)
    return Spans(slice(PAGE, PAGE + meta), size)
