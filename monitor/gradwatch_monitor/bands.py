"""Bands of steps in a row: what the charts of a long run draw, as exact as its summaries are.

A band has the least, the mean, the greatest and the last value of its steps. Summarised blocks and
the latest steps, which are known one by one, become bands of one width, so that no chart looks
different where the summaries end.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pandas as pd

from gradwatch.summaries import BLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch_monitor.timeline import Blocks

__all__ = ["Bands", "Values"]

Array = np.ndarray[Any, Any]

FINEST = 100  # steps of a band, at least


class Values(NamedTuple):
    """A column in each band: NaN where it has no value, and where it is unknown."""

    least: Array
    mean: Array
    greatest: Array
    last: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Bands:
    """Bands in the order of their steps: [`step`, `to`) each, by `width` steps.

    A band begins where the one before ends, but where records are missing, and more of them than
    can be overlooked in the chart. What is left of a band beside such a gap, or at the end of the
    run, belongs to its neighbour where it is less than half a band: the range of a few steps is
    narrower than that of many, and would look like a change of the run.
    """

    step: Array
    to: Array
    width: int
    _blocks: Blocks
    _steps: Mapping[str, Array]
    _starts: Array  # of each band, the position of its first piece: of the blocks, then the steps

    @classmethod
    def of(cls, blocks: Blocks, steps: Mapping[str, Array], points: int) -> Self:
        """The bands of these blocks and the steps after them.

        There are a third of `points` at most, since each has a least, a mean and a greatest value.
        Where there are no blocks, bands are narrower than one, and half as many do.
        """
        first = np.concatenate([blocks.column("first_step"), steps["step"]])
        stop = np.concatenate([blocks.column("last_step"), steps["step"]]) + 1
        span = int(stop[-1] - first[0])
        whole = len(steps["step"]) < len(first)
        width = _width(span, points // 3, BLOCK) if whole else _width(span, points // 6, FINEST)
        gap = first[1:] - stop[:-1] >= max(1, span // points)
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(first // width) > 0) | gap]))
        starts = _joined(starts, first, stop, np.append(True, gap), width)
        # Too few missing steps to be seen leave no gap.
        to = np.where(np.append(gap, True), stop, np.append(first[1:], stop[-1:]))
        ends = np.append(starts[1:], len(first)) - 1
        return cls(first[starts], to[ends], width, blocks, steps, starts)

    def frame(self, **columns: Array) -> pd.DataFrame:
        """step, to and these columns, a row a band; where records are missing, one without values."""
        frame = pd.DataFrame({"step": self.step, "to": self.to, **columns})
        gaps = self.step[1:] > self.to[:-1]
        empty = pd.DataFrame({"step": self.to[:-1][gaps], "to": self.step[1:][gaps]})
        joined = pd.concat([frame, empty]) if len(empty) else frame
        return joined.sort_values("step", kind="stable", ignore_index=True)

    def columns(self, name: str, *, geometric: bool) -> dict[str, Array]:
        """The values of a column for a frame: its name with _min, _mean or _geomean, _max, _last."""
        kinds = ("min", "geomean" if geometric else "mean", "max", "last")
        values = self.values(name, geometric=geometric)
        return {f"{name}_{kind}": column for kind, column in zip(kinds, values, strict=True)}

    def values(self, name: str, *, geometric: bool) -> Values:
        """A column of the record, with its arithmetic mean or its geometric one.

        The geometric mean is that of the values above 0; the others, too, are above 0 then.
        """
        old, new = self._blocks.column, self._steps[name]
        counts = old("finite") - old("zeros") if name == "pre_norm" else old(f"{name}_count")
        means = old(f"{name}_geomean" if geometric else f"{name}_mean")
        kept = np.isfinite(new) & (new > 0) if geometric else np.isfinite(new)
        least, greatest, last, mean = (
            np.concatenate([column, new])
            for column in (old(f"{name}_min"), old(f"{name}_max"), old(name), means)
        )
        if geometric:
            mean = np.log(_above_zero(mean))
            least, greatest = _above_zero(least), _above_zero(greatest)
        least = np.fmin.reduceat(least, self._starts)
        greatest = np.fmax.reduceat(greatest, self._starts)
        mean = self._mean(mean, np.concatenate([counts, kept]))
        mean = np.clip(np.exp(mean) if geometric else mean, least, greatest)
        last = self._last(last)
        return Values(least, mean, greatest, _above_zero(last) if geometric else last)

    def total(self, name: str) -> Array:
        """How many steps of each band: "steps", or those with this flag of the record."""
        new = np.ones(len(self._steps["step"])) if name == "steps" else self._steps[name]
        return self._sum(np.concatenate([self._blocks.column(name), new]))

    @property
    def finite(self) -> Array:
        """How many steps of each band have a finite gradient norm."""
        new = np.isfinite(self._steps["pre_norm"])
        return self._sum(np.concatenate([self._blocks.column("finite"), new]))

    def _sum(self, values: Array) -> Array:
        return np.add.reduceat(values.astype(float), self._starts)

    def _mean(self, means: Array, counts: Array) -> Array:
        """The mean of the values that pieces are the means of; NaN where it cannot be known."""
        sizes = np.diff(np.append(self._starts, len(means)))
        alone = np.repeat(sizes == 1, sizes) & np.isnan(counts)  # that count is not needed
        counts = np.where(alone, 1.0, counts)
        total = self._sum(counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            # Divided first: the sum of what is finite need not be.
            parts = np.where(counts == 0, 0.0, means * (counts / np.repeat(total, sizes)))
        return np.where(total == 0, np.nan, self._sum(parts))

    def _last(self, values: Array) -> Array:
        at = np.where(np.isfinite(values), np.arange(len(values)), -1)
        at = np.maximum.reduceat(at, self._starts)
        return np.where(at < 0, np.nan, values[at])


def _width(span: int, at_most: int, least: int) -> int:
    """How many steps bands have: `least` or 2, 5, 10, … times that, for `at_most` of a span."""
    for power in itertools.count():
        for factor in (1, 2, 5):
            width: int = least * factor * 10**power
            if span <= width * at_most:
                return width
    raise AssertionError  # pragma: no cover - the counting has no end


def _joined(starts: Array, first: Array, stop: Array, gap_before: Array, width: int) -> Array:
    """The starts of the bands that are left where narrow ones are part of their neighbours."""
    kept = np.ones(len(starts), bool)
    ends = np.append(starts[1:], len(first)) - 1
    alone = np.append(gap_before[starts], True)  # nothing to join to before this one
    for i in np.flatnonzero(stop[ends] - first[starts] < width // 2):
        if not alone[i]:
            kept[i] = False
        elif not alone[i + 1]:
            kept[i + 1] = False
    return starts[kept]


def _above_zero(values: Array) -> Array:
    return np.where(values > 0, values, np.nan)
