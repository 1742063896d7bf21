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
    from collections.abc import Mapping, Sequence

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


def summarise(records: Mapping[str, Any]) -> dict[str, Any]:
    """The row of `step_summaries` for these records, without its key.

    Args:
        records: arrays by the names in `INPUTS`, in the order of the steps, one record at least;
            NaN where a value is absent or not finite, flags as 0 and 1.
    """
    norms, losses = _finite(records["pre_norm"]), _finite(records["loss"])
    thresholds, post = _finite(records["threshold"]), _finite(records["post_norm"])
    rates, scales = _finite(records["lr"]), _finite(records["loss_scale"])
    positive, post_positive = norms[norms > 0], post[post > 0]
    skipped, nonfinite = records["skipped"] != 0, records["nonfinite"] != 0
    overflow = skipped & ~nonfinite & np.isnan(records["pre_norm"])
    burst = bursts(positive)
    return {
        "first_step": int(records["step"][0]),
        "last_step": int(records["step"][-1]),
        "last_time": float(records["time"][-1]),
        "steps": len(records["step"]),
        "finite": len(norms),
        "zeros": int((norms == 0).sum()),
        "clipped": int((records["clipped"] != 0).sum()),
        "nonfinite": int(nonfinite.sum()),
        "nonfinite_loss": int((records["nonfinite_loss"] != 0).sum()),
        "skipped": int(skipped.sum()),
        "amp_overflows": int((overflow & ~np.isnan(records["loss_scale"])).sum()),
        "no_gradient": int((np.isnan(records["pre_norm"]) & ~nonfinite & ~skipped).sum()),
        "pre_norm": _last(norms),
        "post_norm": _last(post),
        "threshold": _last(thresholds),
        "loss": _last(losses),
        "lr": _last(rates),
        "loss_scale": _last(scales),
        "pre_norm_min": _least(positive),
        "pre_norm_geomean": _geomean(positive),
        "pre_norm_max": _greatest(norms),
        "post_norm_min": _least(post_positive),
        "post_norm_geomean": _geomean(post_positive),
        "post_norm_max": _greatest(post),
        "post_norm_count": len(post_positive),
        "threshold_min": _least(thresholds),
        "threshold_geomean": _geomean(thresholds[thresholds > 0]),
        "threshold_max": _greatest(thresholds),
        "threshold_count": int((thresholds > 0).sum()),
        "loss_min": _least(losses),
        "loss_mean": _mean(losses),
        "loss_geomean": _geomean(losses) if (losses > 0).all() else None,
        "loss_max": _greatest(losses),
        "loss_count": len(losses),
        "lr_min": _least(rates),
        "lr_mean": _mean(rates),
        "lr_max": _greatest(rates),
        "lr_count": len(rates),
        "loss_scale_min": _least(scales),
        "loss_scale_mean": _mean(scales),
        "loss_scale_max": _greatest(scales),
        "loss_scale_count": len(scales),
        "spike": float(spikes(positive).max()) if len(positive) else None,
        "burst": float(burst.max()) if len(burst) else None,
        "norms": encode(positive),
    }


def encode(norms: Floats) -> bytes:
    """The histogram of finite norms above 0."""
    bins, counts = np.unique(np.floor(np.log(norms) * _BINS).astype(np.int64), return_counts=True)
    packed = (bins + _OFFSET) << _BITS | np.minimum(counts, (1 << _BITS) - 1)
    return np.concatenate([[VERSION], packed]).astype("<u4").tobytes()


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
    """Each norm in units of the median of the 50 before it; the first 50, of their own median."""
    if not len(norms):
        return np.empty(0)
    level = np.full(len(norms), _medians(norms[:BEFORE]))
    if len(norms) > BEFORE:
        level[BEFORE:] = _medians(np.lib.stride_tricks.sliding_window_view(norms[:-1], BEFORE))
    with np.errstate(over="ignore"):
        return np.asarray(np.minimum(norms / level, _LARGEST))


def _medians(values: Floats) -> Floats:
    """Along the last axis; numpy's own may overflow on the way to a mean of two."""
    low, high = (values.shape[-1] - 1) // 2, values.shape[-1] // 2
    sorted_there = np.partition(values, [low, high], axis=-1)
    below, above = sorted_there[..., low], sorted_there[..., high]
    return np.asarray(below + (above - below) / 2)


def bursts(norms: Floats) -> Floats:
    """How far norms jump up within about 100 steps: log(q98 / median) of each such window."""
    high, middle = windowed(np.log(norms), [0.98, 0.5])
    return np.asarray(high - middle)


def windowed(values: Floats, q: Sequence[float]) -> Floats:
    """Quantiles of windows of about 100 values in a row: an array of (quantiles, windows)."""
    if not len(values):
        return np.empty((len(q), 0))
    count = max(1, len(values) // WINDOW)
    length, longer = divmod(len(values), count)
    cut = longer * (length + 1)  # so many windows are longer by one: as np.array_split does it
    parts = (values[:cut].reshape(-1, length + 1), values[cut:].reshape(-1, length))
    return np.hstack([np.quantile(part, q, axis=1) for part in parts if len(part)])


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _last(values: Floats) -> float | None:
    return float(values[-1]) if len(values) else None


def _least(values: Floats) -> float | None:
    return float(values.min()) if len(values) else None


def _greatest(values: Floats) -> float | None:
    return float(values.max()) if len(values) else None


def _mean(values: Floats) -> float | None:
    # Each value is divided before the sum: the sum of finite values need not be finite.
    return _within(float((values / len(values)).sum()), values) if len(values) else None


def _geomean(values: Floats) -> float | None:
    """The mean on a log axis, exp(mean(ln x)); all values have to be above 0."""
    if not len(values):
        return None
    mean = min(float(np.log(values).mean()), math.log(_LARGEST))  # rounded up, it may be past that
    return _within(math.exp(mean), values)


def _within(mean: float, values: Floats) -> float:
    """The mean without its rounding error where that puts it outside of the values."""
    return min(max(mean, float(values.min())), float(values.max()))
