"""What share of its steps a further run would clip at another threshold, from the norms of this one.

Where a step is as long as the gradient (SGD), a clipped step is a shorter one: the run that is clipped
more takes longer over what it goes through, and one that is clipped less goes further. So its norms
are those of this run at another pace, window by window: with clip factors f(n) = min(1, c / n), a
window that took this run m steps at threshold c takes one at c' about m · mean f_c / mean f_c' steps.
Optimizers that rescale every gradient (Adam and its kind) take steps of the same length whatever the
factor: there the shares are those of this run.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gradwatch.summaries import middles

if TYPE_CHECKING:
    from gradwatch_monitor.history import History, Stretch

__all__ = ["AS_LONG_AS_THE_GRADIENT", "Repaced", "Rerun", "Same", "rerun_of", "rescales"]

Array = np.ndarray[Any, Any]

AS_LONG_AS_THE_GRADIENT = frozenset({"SGD", "ASGD"})
_RESCALE = ("Adam", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "Lion", "Muon")
_WINDOW = 50  # steps, within which the order of the norms means nothing
_AT_MOST = 400  # windows that blocks are put together to
_LEAST = 1e-300  # a norm whose inverse is a number


def rescales(optimizer: str) -> bool:
    """Whether its steps are as long whatever the gradient's scale, once it has been the same for long."""
    return any(name in optimizer for name in _RESCALE)


class Rerun(Protocol):
    """A further run, after the first `burn_in` of its steps.

    Shares are clip ratios: of the steps that have a finite norm.
    """

    def share(self, threshold: float) -> float:
        """Of its steps, those clipped at a constant threshold."""
        ...

    def threshold(self, share: float) -> float:
        """The constant that clips this share; NaN without norms."""
        ...

    def known(self, threshold: float) -> float:
        """The share of these steps of which this run's record tells anything."""
        ...


def rerun_of(history: History, burn_in: float) -> Rerun:
    """By what the run's optimizer is."""
    if history.optimizer in AS_LONG_AS_THE_GRADIENT and history.since(0.0).count:
        return Repaced(history, burn_in)
    return Same(history.since(burn_in))


class Same:
    """The norms are those of this run."""

    def __init__(self, late: Stretch) -> None:
        self._late = late

    def share(self, threshold: float) -> float:
        """Of its steps, those clipped at a constant threshold."""
        return self._late.ratio(threshold)

    def threshold(self, share: float) -> float:
        """The constant that clips this share; NaN without norms."""
        least = self._late.quantile(0.0)  # no threshold is 0, as the quantile may be
        return max(least, self._late.every.quantile(1.0 - share))

    def known(self, threshold: float) -> float:  # noqa: ARG002
        """All of them."""
        return 1.0


class Repaced:
    """The norms of this run, each window of it at the pace that the other threshold gives."""

    def __init__(self, history: History, burn_in: float) -> None:
        self._burn_in = burn_in
        late = history.since(burn_in)
        self._above_zero = late.count / late.finite if late.finite else 1.0  # the others never clip
        norms, weights, held, window = _windows(history)
        starts = np.flatnonzero(np.diff(window, prepend=-1))
        self._steps = np.add.reduceat(weights, starts)
        self._paces = np.add.reduceat(weights * np.minimum(1.0, held / norms), starts) / self._steps
        # Window by window by size, so that the norms above a threshold are one slice of each.
        self._sorted = np.sort(norms)
        order = np.lexsort((norms, window))
        norms, weights = norms[order], weights[order]
        self._ends = np.append(starts[1:], len(norms))
        self._firsts = np.arange(len(starts)) * len(norms)  # of the places of each window
        self._places = np.repeat(self._firsts, np.diff(starts, append=len(norms)))
        self._places += np.searchsorted(self._sorted, norms)
        self._weights = np.append(weights, 0.0)
        self._inverses = np.append(weights / np.maximum(norms, _LEAST), 0.0)

    def share(self, threshold: float) -> float:
        """Of its steps, those clipped at a constant threshold."""
        over, beyond = self._time(threshold)
        shares = self._above(threshold)[0]
        last = shares[-max(1, len(shares) // 10) :].mean()  # what comes after the record goes on so
        of_these = float((over @ shares + beyond * last) / (over.sum() + beyond))
        return of_these * self._above_zero

    def threshold(self, share: float) -> float:
        """The constant that clips this share, by bisection."""
        low, high = np.log(self._sorted[[0, -1]]).tolist()
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.share(math.exp(middle)) > share else (low, middle)
        return math.exp((low + high) / 2)

    def known(self, threshold: float) -> float:
        """The share of these steps of which this run's record tells anything."""
        over, beyond = self._time(threshold)
        return float(over.sum() / (over.sum() + beyond))

    @functools.lru_cache(maxsize=4)  # noqa: B019 - it lives as long as one recommendation
    def _time(self, threshold: float) -> tuple[Array, float]:
        """Steps over each window after the burn-in, and steps past the end of the record."""
        ends = np.cumsum(self._steps * self._paces / self._above(threshold)[1])
        total = float(self._steps.sum())
        first = self._burn_in * total
        over = np.diff(np.clip(ends, first, total), prepend=first)
        return over, max(0.0, total - max(first, float(ends[-1])))

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _above(self, threshold: float) -> tuple[Array, Array]:
        """Of each window the share of its norms above a threshold, and its pace there."""
        rank = np.searchsorted(self._sorted, threshold, side="right")
        from_ = np.searchsorted(self._places, self._firsts + rank)
        slices = np.column_stack([from_, self._ends]).ravel()
        some = from_ < self._ends
        clipped, inverse = (
            np.where(some, np.add.reduceat(values, slices)[::2], 0.0)
            for values in (self._weights, self._inverses)
        )
        return clipped / self._steps, (self._steps - clipped + threshold * inverse) / self._steps


def _windows(history: History) -> tuple[Array, Array, Array, Array]:
    """Norms in time order: how many each stands for, the threshold then in force, its window."""
    old = history.blocks
    count = len(old.column("steps"))
    group = np.arange(count) * min(count, _AT_MOST) // max(1, count)
    norms, weights, window = _together(old.histograms, group)
    with np.errstate(invalid="ignore"):
        held = np.sqrt(old.column("threshold_min") * old.column("threshold_max"))
    held = np.array([_of(held[group == one]) for one in range(group[-1] + 1 if count else 0)])
    usable = history._usable
    recent = history.pre_norm[usable]
    first = int(window[-1]) + 1 if len(window) else 0
    return (
        np.concatenate([norms, recent]),
        np.concatenate([weights, np.ones(len(recent))]),
        np.nan_to_num(np.concatenate([held[window], history.threshold[usable]]), nan=math.inf),
        np.concatenate([window, first + np.arange(len(recent)) // _WINDOW]),
    )


def _together(histograms: Any, group: Array) -> tuple[Array, Array, Array]:
    """The histograms of each group as one: norms, weights, group; no group without norms."""
    if not len(histograms.bins):
        return np.empty(0), np.empty(0), np.empty(0, np.int64)
    least = int(histograms.bins.min())
    width = int(histograms.bins.max()) - least + 1
    places = group[histograms.block] * width + histograms.bins - least
    counts = np.bincount(places, histograms.weights)
    filled = np.flatnonzero(counts)
    return middles(filled % width + least), counts[filled], filled // width


def _of(thresholds: Array) -> float:
    there = thresholds[np.isfinite(thresholds)]
    return float(np.exp(np.log(there).mean())) if len(there) else math.nan
