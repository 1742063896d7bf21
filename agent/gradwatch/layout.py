"""How a ring's file is laid out, and what its header must say to be believed.

Layout (little-endian; version 1), every part starting on a 4,096-byte page:

    header   magic "GRADWTCH", version u32, step size u32, step capacity u64, event slot size u32,
             (pad) u32, event capacity u64, metadata size u64; at byte 64 the step head u64,
             at byte 128 the event head u64; at byte 192 how the run ended u64 (an index into
             `ENDINGS`; 0: it has not said); at byte 256, on ranks other than 0, the name of rank
             0's ring, 64 bytes of ASCII, zeros after it
    metadata JSON: who the run is (see `records.RunInfo`)
    steps    capacity × 96 bytes, `STEP_DTYPE`
    events   capacity × 512 bytes, `EVENT_DTYPE`: a message is cut over consecutive slots
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping

    from gradwatch.records import RunStatus

__all__ = [
    "ENDINGS",
    "ENDING_AT",
    "EVENT_DTYPE",
    "EVENT_HEAD_AT",
    "EVENT_PAYLOAD",
    "EVENT_SLOT",
    "FLAGS",
    "HEADER",
    "LEADER_AT",
    "LEADER_BYTES",
    "PAGE",
    "STEP",
    "STEP_DTYPE",
    "STEP_HEAD_AT",
    "Spans",
    "header_problem",
    "lay_out",
    "pages",
    "plan",
    "spans",
]

_MAGIC = b"GRADWTCH"
_VERSION = 1
PAGE = 4096
HEADER = struct.Struct("<8sIIQIIQQ")
STEP_HEAD_AT = 64
EVENT_HEAD_AT = 128
ENDING_AT = 192
LEADER_AT = 256
LEADER_BYTES = 64
ENDINGS: tuple[RunStatus | None, ...] = (None, "finished", "failed")


class FLAGS:
    """The bits of a step record's `flags`."""

    CLIPPED = 1
    NONFINITE = 2
    NONFINITE_LOSS = 4
    SKIPPED = 8
    AMP_OVERFLOW = 16
    MODIFIED = 32  # the gradients were changed in place between backward and step
    CLIPPED_LATE = 64  # those of the step before were clipped after it
    ADDED_TO = 128  # these were added to those of the step before
    NO_GRADIENT = 256  # no parameter had a gradient: there is no norm, which is not a norm of 0
    NORM_SPIKE = 512  # there is an event grad_norm_spike of this step
    LOSS_SPIKE = 1024  # there is an event loss_spike of this step


STEP = struct.Struct("<QqddddddddIIQ")
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
EVENT_PAYLOAD = _EVENT_BYTES - 8 - 4 - 4 - 4 - 4 - 8
EVENT_SLOT = struct.Struct(f"<QIIII{EVENT_PAYLOAD}sQ")
EVENT_DTYPE = np.dtype(
    [
        ("seq", "<u8"),
        ("part", "<u4"),  # from 0
        ("parts", "<u4"),
        ("length", "<u4"),
        ("reserved", "<u4"),
        ("data", f"V{EVENT_PAYLOAD}"),
        ("seq_end", "<u8"),
    ]
)
_MOST_STEPS, _MOST_EVENTS, _MOST_METADATA = 2**26, 2**20, 2**26  # more is no ring of ours
if STEP.size != STEP_DTYPE.itemsize or {EVENT_SLOT.size, EVENT_DTYPE.itemsize} != {
    _EVENT_BYTES
}:  # pragma: no cover
    raise AssertionError


def pages(size: int) -> int:
    """A size in bytes, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def plan(metadata: Mapping[str, Any], steps: int, events: int) -> tuple[bytes, int]:
    """The metadata as it will stand in the file, and how large that will be."""
    meta = json.dumps(metadata, default=str).encode()
    size = PAGE + pages(len(meta)) + pages(steps * STEP.size) + pages(events * _EVENT_BYTES)
    return meta, size


def lay_out(buffer: mmap.mmap, meta: bytes, steps: int, events: int) -> None:
    """Make a new ring of this memory."""
    # Touching every page now keeps page faults out of the training steps.
    for offset in range(0, len(buffer), PAGE):
        buffer[offset] = 0
    buffer[PAGE : PAGE + len(meta)] = meta
    header = HEADER.pack(_MAGIC, _VERSION, STEP.size, steps, _EVENT_BYTES, 0, events, len(meta))
    buffer[8 : len(header)] = header[8:]
    buffer[:8] = _MAGIC


def header_problem(buffer: mmap.mmap | bytes) -> str | None:
    """What is wrong with what should be a ring's header; None where nothing is."""
    if len(buffer) < PAGE or buffer[:8] != _MAGIC:
        return "is not a flight-recorder file"
    _, version, step, steps, slot, _, events, meta = HEADER.unpack_from(buffer, 0)
    if version != _VERSION or step != STEP.size or slot != _EVENT_BYTES:
        return f"is of format version {version}; this gradwatch reads version {_VERSION}"
    if not (0 < steps <= _MOST_STEPS and 0 < events <= _MOST_EVENTS and meta <= _MOST_METADATA):
        return "has a header that was written over"
    return None


class Spans(NamedTuple):
    """Where the metadata lies in a ring's file, and how large the whole file is, in bytes."""

    metadata: slice
    size: int


def spans(header: mmap.mmap | bytes) -> Spans:
    """As a header that has no problem says."""
    _, _, step, steps, slot, _, events, meta = HEADER.unpack_from(header, 0)
    size = PAGE + pages(meta) + pages(steps * step) + pages(events * slot)
    return Spans(slice(PAGE, PAGE + meta), size)
