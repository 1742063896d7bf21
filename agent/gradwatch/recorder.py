"""The flight recorder: a ring of step records and a ring of events in a memory-mapped file.

The file outlives the process, so what the worker had not stored when the process died can be
read from it. One thread writes, without a lock; any number of readers look on. `layout` has the
bytes.

A record carries its sequence number (from 1) in its first and its last eight bytes, and the head
moves only after it is written: a torn record shows by numbers that differ. The magic is written
last, so a file whose making was cut short is not taken for a ring. When a ring is full the oldest
record is overwritten; readers count what they missed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from gradwatch.errors import RingError
from gradwatch.layout import (
    ENDING_AT,
    ENDINGS,
    EVENT_DTYPE,
    EVENT_HEAD_AT,
    EVENT_PAYLOAD,
    EVENT_SLOT,
    FLAGS,
    HEADER,
    LEADER_AT,
    LEADER_BYTES,
    PAGE,
    STEP,
    STEP_DTYPE,
    STEP_HEAD_AT,
    header_problem,
    lay_out,
    pages,
    plan,
    spans,
)
from gradwatch.locks import lock, release

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from gradwatch.records import RunStatus

__all__ = [
    "EVENT_DTYPE", "FLAGS", "STEP_DTYPE", "WITHIN_LOCK", "Messages", "NullRing", "Ring", "Steps",
]  # fmt: skip

# Records at a time that numpy works on without releasing the interpreter lock (more than 500 values,
# and it does). Whoever releases it beside a training loop that never pauses waits 5 ms to have it back.
WITHIN_LOCK = 500


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
        header = HEADER.unpack_from(buffer, 0)
        _, _, step_size, self.step_capacity, slot_size, _, self.event_capacity, meta_size = header
        self.path = path
        self._descriptor = descriptor
        self._buffer = buffer
        self._steps_at = PAGE + pages(meta_size)
        self._events_at = self._steps_at + pages(self.step_capacity * step_size)
        self.metadata: Mapping[str, Any] = json.loads(buffer[PAGE : PAGE + meta_size])
        # One 8-byte store through a cast memoryview is never seen half-done by a reader.
        words = memoryview(buffer)[:PAGE].cast("Q")
        self._step_head = words[STEP_HEAD_AT // 8 : STEP_HEAD_AT // 8 + 1]
        self._event_head = words[EVENT_HEAD_AT // 8 : EVENT_HEAD_AT // 8 + 1]
        self._ending = words[ENDING_AT // 8 : ENDING_AT // 8 + 1]
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
        meta, size = plan(metadata, steps, events)
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
            lay_out(buffer, meta, steps, events)
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
        meta, size = plan(metadata, steps, events)
        buffer = mmap.mmap(-1, size)
        lay_out(buffer, meta, steps, events)
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
        parts = max(1, -(-len(payload) // EVENT_PAYLOAD))
        if parts > self.event_capacity // 2:
            msg = f"an event of {len(payload)} bytes does not fit a ring of {self.event_capacity}"
            raise RingError(msg)
        head = self._event_head[0]
        for part in range(parts):
            piece = payload[part * EVENT_PAYLOAD : (part + 1) * EVENT_PAYLOAD]
            seq = head + part + 1
            slot = self._events_at + (seq - 1) % self.event_capacity * self._slot_size
            EVENT_SLOT.pack_into(self._buffer, slot, seq, part, parts, len(piece), 0, piece, seq)
        self._event_head[0] = head + parts

    # -- writing: the worker only --------------------------------------------------------------

    def note_end(self, status: RunStatus) -> None:
        """The run has ended so, whether or not all of it gets stored before the process is gone."""
        if status in ENDINGS:
            self._ending[0] = ENDINGS.index(status)

    def note_leader(self, ring: str) -> None:
        """Whose run this ring's is: that of rank 0 with that ring."""
        name = ring.encode("ascii", "replace")[:LEADER_BYTES]
        self._buffer[LEADER_AT : LEADER_AT + len(name)] = name

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
        noted = self._buffer[LEADER_AT : LEADER_AT + LEADER_BYTES].rstrip(b"\0")
        return noted.decode("ascii", "replace") or None

    def read_steps(self, cursor: int, limit: int | None = None) -> Steps:
        """The records after `cursor` (0: from the start), at most `limit` of them."""
        head = self._step_head[0]
        first = max(cursor, head - self.step_capacity)
        last = head if limit is None else min(head, first + limit)
        at, count = first % self.step_capacity, last - first
        rows = self.steps[at : at + count]
        # A copy, however it lies: the training thread may come round and overwrite it.
        rows = np.concatenate([rows, self.steps[: count - len(rows)]])
        expected = np.arange(first + 1, last + 1, dtype=np.uint64)
        good = (rows["seq"] == expected) & (rows["seq_end"] == expected)
        torn = count - int(np.count_nonzero(good))
        return Steps(rows[good] if torn else rows, last, first - cursor, torn)

    def read_events(self, cursor: int) -> Messages:
        """The messages after `cursor`; one of which any part is gone or torn is left out."""
        head = self._event_head[0]
        first = max(cursor, head - self.event_capacity)
        payloads: list[bytes] = []
        pieces: list[bytes] = []
        torn = 0
        for seq in range(first + 1, head + 1):
            slot = self._events_at + (seq - 1) % self.event_capacity * self._slot_size
            start, part, parts, length, _, data, end = EVENT_SLOT.unpack_from(self._buffer, slot)
            if start != seq or end != seq or length > EVENT_PAYLOAD or part != len(pieces):
                torn += 1 + len(pieces)
                pieces.clear()
                continue
            pieces.append(data[:length])
            if len(pieces) == parts:
                payloads.append(b"".join(pieces))
                pieces.clear()
        return Messages(payloads, head, first - cursor, torn + len(pieces))

    def set_aside(self) -> None:
        """Give the file a name under which nobody looks for rings, if that is allowed."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path = self.path.rename(f"{self.path}.aside")

    def close(self, *, remove: bool = False) -> None:
        """Let the file go; with `remove`, delete it (all that it held is stored) if that is allowed."""
        # The memory goes with this object: another thread may be reading the heads.
        if remove and self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        if self._descriptor is not None:
            release(self._descriptor)
            self._descriptor = None


def _appender(
    buffer: mmap.mmap, head: memoryview, start: int, size: int, capacity: int
) -> Callable[..., None]:
    """`Ring.append`, a closure: with cold caches every look into an object costs about 1 µs."""
    pack_into = STEP.pack_into

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


class NullRing:
    """Takes every record and keeps none: where recording is off."""

    def append(self, *fields: float) -> None:
        """Do nothing."""

    def append_event(self, payload: bytes) -> None:
        """Do nothing."""


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    block = bytes(1 << 20)  # pragma: no cover - macOS: writing zeros allocates as well
    for start in range(0, size, len(block)):  # pragma: no cover
        os.write(descriptor, block[: size - start])
