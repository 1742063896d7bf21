"""Thinning: of the steps of a job that is faster than its store, one in `every` is stored.

Which ones follows from the step's number alone: one of each `every` consecutive steps, at a place
within them that changes from one group to the next as random numbers do. A fixed place would show a
loop whose steps alternate (two kinds of batches) as if all of its steps were of one kind. Nothing
else decides, so ratios of the stored steps are those of all steps. Events are not thinned.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.records import Event

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["STRETCH", "Thinning", "event", "joined", "sampled"]

STRETCH = ("thinned", "every", "first_step", "last_step")  # the data of an event of thinned steps
_BATCH = 0.125  # of the ring: stored by one batch, at most,
_ROWS = 1_000  # or so many, where that is more
_MOST = 1024  # steps of which one is stored
_BEHIND = 0.25  # of the ring: the store may be behind by so much
_LATE = 0.5  # of the ring: it may be full before there is a second batch to see
_CALM = 30  # batches in a row, before each of which hardly a step waited


class Thinning:
    """Of how many steps one is stored, by how many of them wait. Begins anew with each process."""

    def __init__(self, capacity: int) -> None:
        self.every = 1
        self.rows = max(_ROWS, int(_BATCH * capacity))  # stored by one batch, at most
        self._capacity = capacity
        self._before = math.inf  # steps that waited before the last batch; inf: not known
        self._grown = 0
        self._calm = 0

    def plan(self, waiting: int) -> int:
        """Of how many steps the next batch stores one; so many steps wait now.

        As few as came during the last batch allow, where a quarter of the ring waits, more than one
        batch takes, and what waits grows though the store takes batches: two in a row, or one where
        half of the ring waits. Half as many once the store has kept up for long.
        """
        behind = waiting > max(_BEHIND * self._capacity, self.rows * self.every)
        came = (
            int(waiting - self._before) + self.rows * self.every if waiting >= self._before else 0
        )
        self._grown = self._grown + 1 if behind and waiting >= self._before else 0
        self._calm = self._calm + 1 if waiting <= self.rows * self.every else 0
        self._before = waiting
        if self._grown > 1 or (self._grown and waiting > _LATE * self._capacity):
            self.every = min(1 << (-(-came // self.rows) - 1).bit_length(), _MOST)
        elif self._calm > _CALM and self.every > 1:
            self.every //= 2
            self._calm = 0
        return self.every

    def failed(self) -> None:
        """The store did not take the batch: that steps wait does not say that it is slow."""
        self._grown, self._before = 0, math.inf


def sampled(
    steps: np.ndarray[Any, np.dtype[np.signedinteger[Any]]], every: int
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of these step numbers are stored: one in `every`.

    >>> sampled(np.arange(12), 4).reshape(3, 4).sum(axis=1).tolist()
    [1, 1, 1]
    """
    mixed = (steps // every).astype(np.uint64)
    # The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit depends on all bits.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
    place = (mixed ^ mixed >> np.uint64(31)) % np.uint64(every)
    return np.asarray(steps % every == place.astype(np.int64))


def event(stretch: Mapping[str, int], time: float) -> Event:
    """A stretch of thinned steps as an event: `thinned` of them are not on record."""
    thinned, every, first, last = (stretch[name] for name in STRETCH)
    return Event(
        "records_dropped",
        first,
        time,
        "warning",
        f"of the steps {first:,} to {last:,}, {thinned:,} were left out evenly: the job takes steps "
        f"faster than the store takes records, and at least one step in {every:,} is on record",
        dict(stretch),
        0,
    )


def joined(stretch: Mapping[str, Any], following: Mapping[str, int]) -> dict[str, int] | None:
    """Two stretches as one; None where the first is none."""
    values = [value for name in STRETCH if isinstance(value := stretch.get(name), int)]
    if len(values) < len(STRETCH):
        return None
    thinned, every, first, _ = values
    return {
        "thinned": thinned + following["thinned"],
        "every": max(every, following["every"]),
        "first_step": first,
        "last_step": following["last_step"],
    }
