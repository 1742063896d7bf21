"""Blocks of a thousand steps → one row each: what a long run's readers look at.

Pure functions. The norms are kept as a histogram whose bins are evenly spaced on a log axis, 64 to
a factor of e, so a value read back is within 0.8 % of the true one; histograms of many blocks add
up. Rank statistics within a factor of the true value are what such bins are for: Masson, Rim and
Lee 2019, "DDSketch" (PVLDB 12, 12).

The histogram's bytes: little-endian u32, of which the first is the format's version, 1, and each
other one a bin that is not empty, in the order of the bins: `(bin + 65,536) << 15 | count`, where
`bin = floor(64 · ln(norm))`. It holds the finite norms above 0, at most 32,767 in a bin.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradwatch.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "BLOCK",
    "INPUTS",
    "Distribution",
    "Histograms",
    "are_histograms",
    "bursts",
    "completed",
    "decode",
    "encode",
    "merge",
    "middles",
    "spikes",
    "summarise",
    "windowed",
]

BLOCK = 1000  # steps
VERSION = 1
BEFORE = 50  # norms, whose median a spike is measured by
WINDOW = 100  # norms, in which a burst is looked for
_BINS = 64  # to a factor of e
_OFFSET, _BITS = 1 << 16, 15
_LARGEST = float(np.finfo(np.float64).max)

# Those of the least and of the greatest number above 0.
_FIRST_BIN, _LAST_BIN = (math.floor(math.log(value) * _BINS) for value in (5e-324, _LARGEST))

Floats = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Integers = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]

# The columns of `step_records` that a summary is made of.
INPUTS = (
    "step", "time", "loss", "lr", "pre_norm", "post_norm", "threshold", "loss_scale",
    "clipped", "nonfinite", "nonfinite_loss", "skipped",
)  # fmt: skip
_VALUES = ("pre_norm", "post_norm", "threshold", "loss", "lr", "loss_scale")


class Histograms(NamedTuple):
    """The histograms of many blocks, one entry a bin, in the order of the blocks."""

    bins: Integers
    weights: Integers  # how many norms are in it
    block: Integers  # whose it is: a position among the blocks


def completed(steps: Integers, expected: int) -> list[int]:
    """The blocks that are complete once these steps are stored, of those that they touch.

    `expected` is the step that was to come next: where a gap swallowed the end of its block, that
    one is complete, too.
    """
    if not len(steps):
        return []
    end = (int(steps.max()) + 1) // BLOCK
    touched = {*np.unique(steps // BLOCK).tolist(), expected // BLOCK}
    return sorted(block for block in touched if block < end)


def summarise(records: Mapping[str, Any], starts: Sequence[int] = (0,)) -> list[dict[str, Any]]:
    """The rows of `step_summaries` for blocks of these records, without their keys.

    Args:
        records: arrays by the names in `INPUTS`, in the order of the steps; NaN where a value is
            absent or not finite, flags as 0 and 1.
        starts: where each block begins in them; a block has one record at least.
    """
    first = np.asarray(starts)
    last = np.append(first[1:], len(records["step"])) - 1
    values = np.stack([records[name] for name in _VALUES])
    known = np.isfinite(values)
    positive = known & (values > 0)
    number = {name: at for at, name in enumerate(_VALUES)}

    rows: dict[str, np.ndarray[Any, Any]] = {
        "first_step": records["step"][first],
        "last_step": records["step"][last],
        "last_time": records["time"][last],
        "steps": last + 1 - first,
        **_counts(records, known[number["pre_norm"]], first),
    }
    every, above_zero = (
        _Statistics.of(values, known, first),
        _Statistics.of(values, positive, first),
    )
    means, geomeans = every.mean(values, known, first), above_zero.geomean(values, positive, first)
    all_above = every.amount == above_zero.amount
    for name, at in number.items():
        norm = name.endswith("_norm")
        rows[name] = every.last[at]
        rows[f"{name}_min"] = (above_zero if norm else every).least[at]
        rows[f"{name}_max"] = every.greatest[at]
        if norm or name == "threshold":
            rows[f"{name}_geomean"] = geomeans[at]
            rows[f"{name}_count"] = above_zero.amount[at]
        else:
            rows[f"{name}_mean"] = means[at]
            rows[f"{name}_count"] = every.amount[at]
    rows["loss_geomean"] = np.where(all_above, geomeans, np.nan)[number["loss"]]
    del rows["pre_norm_count"]  # that is `finite` without `zeros`

    norms, lengths = values[0][positive[0]], above_zero.amount[0]
    rows["spike"], rows["burst"] = np.full((2, len(first)), np.nan)
    for which, blocks in _of_one_length(norms, lengths):
        rows["spike"][which] = spikes(blocks).max(axis=-1)
        rows["burst"][which] = bursts(blocks).max(axis=-1)
    cells: list[Sequence[Any]] = [
        [None if cell != cell else cell for cell in column.tolist()]  # noqa: PLR0124 - NaN
        for column in rows.values()
    ]
    cells.append(_histograms(norms, lengths))
    return [dict(zip([*rows, "norms"], row, strict=True)) for row in zip(*cells, strict=True)]


def _counts(records: Mapping[str, Any], finite: Flags, starts: Integers) -> dict[str, Integers]:
    """How many records of each block are of each kind."""
    skipped, nonfinite = records["skipped"] != 0, records["nonfinite"] != 0
    absent = np.isnan(records["pre_norm"]) & ~nonfinite
    kinds = {
        "finite": finite,
        "zeros": records["pre_norm"] == 0,
        "clipped": records["clipped"] != 0,
        "nonfinite": nonfinite,
        "nonfinite_loss": records["nonfinite_loss"] != 0,
        "skipped": skipped,
        "amp_overflows": absent & skipped & ~np.isnan(records["loss_scale"]),
        "no_gradient": absent & ~skipped,
    }
    counts = np.add.reduceat(np.stack([*kinds.values()]).astype(np.int64), starts, axis=1)
    return dict(zip(kinds, counts, strict=True))


class _Statistics(NamedTuple):
    """Of each column in each block, of those values that are `there`; NaN where none is."""

    amount: Integers
    least: Floats
    greatest: Floats
    last: Floats

    @classmethod
    def of(cls, values: Floats, there: Flags, starts: Integers) -> _Statistics:
        count = np.add.reduceat(there.astype(np.int64), starts, axis=1)
        kept = np.where(there, values, np.nan)
        at = np.where(there, np.arange(values.shape[1]), -1)
        at = np.maximum.reduceat(at, starts, axis=1)
        return cls(
            count,
            np.fmin.reduceat(kept, starts, axis=1),
            np.fmax.reduceat(kept, starts, axis=1),
            np.where(count > 0, np.take_along_axis(values, at, axis=1), np.nan),
        )

    def mean(self, values: Floats, there: Flags, starts: Integers) -> Floats:
        """Each value is divided before the sum: the sum of finite values need not be finite."""
        sizes = np.diff(np.append(starts, values.shape[1]))
        counts = np.repeat(np.maximum(self.amount, 1), sizes, axis=1)
        total = np.add.reduceat(np.where(there, values / counts, 0.0), starts, axis=1)
        return self._within(total)

    def geomean(self, values: Floats, there: Flags, starts: Integers) -> Floats:
        """The mean on a log axis, exp(mean(ln x)), of values above 0."""
        logs = np.log(np.where(there, values, 1.0))
        mean = np.add.reduceat(logs, starts, axis=1) / np.maximum(self.amount, 1)
        return self._within(np.exp(np.minimum(mean, math.log(_LARGEST))))

    def _within(self, means: Floats) -> Floats:
        """Without their rounding error, where that puts them outside of the values."""
        return np.where(self.amount > 0, np.clip(means, self.least, self.greatest), np.nan)


def _of_one_length(norms: Floats, lengths: Integers) -> Iterator[tuple[Integers, Floats]]:
    """Which blocks have so many norms, and their norms, a row a block; of each length above 0."""
    ends = np.cumsum(lengths)
    for length in np.unique(lengths[lengths > 0]).tolist():
        which = np.flatnonzero(lengths == length)
        yield which, norms[(ends[which] - length)[:, None] + np.arange(length)]


def encode(norms: Floats) -> bytes:
    """The histogram of finite norms above 0."""
    return _histograms(norms, np.array([len(norms)]))[0]


def _histograms(norms: Floats, lengths: Integers) -> list[bytes]:
    """Of each block; the norms of all of them stand one after the other."""
    bins = np.floor(np.log(norms) * _BINS).astype(np.int64) + _OFFSET
    keys = np.repeat(np.arange(len(lengths)), lengths) << 32 | bins
    keys, counts = np.unique(keys, return_counts=True)
    packed = (keys & (1 << 32) - 1) << _BITS | np.minimum(counts, (1 << _BITS) - 1)
    ends = np.searchsorted(keys >> 32, np.arange(len(lengths)), side="right").tolist()
    data, head = packed.astype("<u4"), VERSION.to_bytes(4, "little")
    return [head + data[start:end].tobytes() for start, end in zip([0, *ends], ends, strict=False)]


def decode(blobs: Sequence[bytes]) -> Histograms:
    """All these histograms at once. Raises `StoreError` where one is of another version."""
    versions = {int.from_bytes(blob[:4], "little") for blob in blobs}
    if versions - {VERSION}:
        msg = f"step_summaries.norms is of version {max(versions)}, this gradwatch reads {VERSION}"
        raise StoreError(msg)
    packed = np.frombuffer(b"".join([blob[4:] for blob in blobs]), "<u4")
    bins = (packed >> _BITS).astype(np.int32) - _OFFSET
    weights = (packed & ((1 << _BITS) - 1)).astype(np.int32)
    counts = [len(blob) // 4 - 1 for blob in blobs]
    return Histograms(bins, weights, np.repeat(np.arange(len(blobs), dtype=np.int32), counts))


def are_histograms(blobs: Sequence[Any], counts: Integers | None = None) -> Flags:
    """Which of these are what `encode` wrote; with `counts`, of so many norms each."""
    good = np.array([_is_framed(blob) for blob in blobs], np.bool_)
    framed = [blob if fine else encode(np.empty(0)) for blob, fine in zip(blobs, good, strict=True)]
    bins, weights, block = decode(framed)
    wrong = (bins < _FIRST_BIN) | (bins > _LAST_BIN) | (weights == 0)
    wrong[1:] |= (np.diff(bins) <= 0) & (np.diff(block) == 0)
    good[block[wrong]] = False
    if counts is not None:
        good &= np.bincount(block, weights, minlength=len(blobs)).astype(np.int64) == counts
    return good


def _is_framed(blob: Any) -> bool:
    """Whether it is as long as a histogram may be, and of this version."""
    return (
        isinstance(blob, bytes) and len(blob) % 4 == 0 and blob[:4] == VERSION.to_bytes(4, "little")
    )


def merge(histograms: Histograms) -> tuple[Floats, Integers]:
    """All of them as one: the values that bins stand for, and how often each is there."""
    if not len(histograms.bins):
        return np.empty(0), np.empty(0, np.int64)
    least = int(histograms.bins.min())
    counts = np.bincount(histograms.bins - least, histograms.weights).astype(np.int64)
    filled = np.flatnonzero(counts)
    return middles(filled + least), counts[filled]


def middles(bins: Integers) -> Floats:
    """The values that bins stand for: the geometric middle of each."""
    # That of the very last is past what a float holds.
    return np.exp(np.minimum((bins + 0.5) / _BINS, math.log(_LARGEST)))


class Distribution:
    """Values that are there `weights` times each: what a quantile and a share are of."""

    def __init__(self, values: Floats, weights: Integers) -> None:
        order = np.argsort(values, kind="stable")
        self._values = values[order]
        self._until = np.cumsum(weights[order], dtype=np.int64)
        self.count = int(self._until[-1]) if len(values) else 0

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest; NaN of none."""
        return self.quantile(0.0), self.quantile(1.0)

    def quantile(self, q: float) -> float:
        """As numpy's, of the values written out; NaN of none."""
        if not self.count:
            return math.nan
        position = q * (self.count - 1)
        low = int(position)
        at = np.searchsorted(self._until, [low, math.ceil(position)], side="right")
        below, above = self._values[at].tolist()
        return float(below + (above - below) * (position - low))

    def share(self, threshold: Any) -> Any:
        """The share above a threshold, or above each of an array of them; 0 of none."""
        if not self.count:
            return np.zeros_like(threshold, float)[()]
        until = np.concatenate([[0], self._until])
        below = until[np.searchsorted(self._values, threshold, side="right")]
        return (self.count - below) / self.count


def spikes(norms: Floats) -> Floats:
    """Each norm in units of the median of the 50 before it; the first 50, of their own median.

    Along the last axis.
    """
    if not norms.size:
        return np.empty(norms.shape)
    level = np.repeat(_medians(norms[..., :BEFORE])[..., None], norms.shape[-1], axis=-1)
    if norms.shape[-1] > BEFORE:
        before = np.lib.stride_tricks.sliding_window_view(norms[..., :-1], BEFORE, axis=-1)
        level[..., BEFORE:] = _medians(before)
    with np.errstate(over="ignore"):
        return np.asarray(np.minimum(norms / level, _LARGEST))


def _medians(values: Floats) -> Floats:
    """Along the last axis; numpy's own may overflow on the way to a mean of two."""
    low, high = (values.shape[-1] - 1) // 2, values.shape[-1] // 2
    sorted_there = np.partition(values, [low, high], axis=-1)
    below, above = sorted_there[..., low], sorted_there[..., high]
    return np.asarray(below + (above - below) / 2)


def bursts(norms: Floats) -> Floats:
    """How far norms jump up within about 100 steps: log(q98 / median) of each such window.

    Along the last axis.
    """
    high, middle = windowed(np.log(norms), [0.98, 0.5])
    return np.asarray(high - middle)


def windowed(values: Floats, q: Sequence[float]) -> Floats:
    """Quantiles of windows of about 100 values in a row, along the last axis: (quantiles, ..., windows)."""
    *others, size = values.shape
    if not size:
        return np.empty((len(q), *others, 0))
    count = max(1, size // WINDOW)
    length, longer = divmod(size, count)
    cut = longer * (length + 1)  # so many windows are longer by one: as np.array_split does it
    parts = (
        values[..., :cut].reshape(*others, -1, length + 1),
        values[..., cut:].reshape(*others, -1, length),
    )
    found = [np.quantile(part, q, axis=-1) for part in parts if part.size]
    return np.concatenate(found, axis=-1)
