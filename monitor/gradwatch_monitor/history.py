"""A run's norms and flags as `recommend` looks at them, in a time that is flat in their number.

The last steps one by one, what lies before as blocks of a thousand with a histogram each; a run of
up to some 20,000 steps, or one that is made from arrays, has no blocks and is exact.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from gradwatch.summaries import (
    BLOCK,
    Distribution,
    Histograms,
    bursts,
    merge,
    middles,
    spikes,
    windowed,
)
from gradwatch_monitor.diagnose import concluded, signs, window_of
from gradwatch_monitor.diagnosis.rates import STILL, relative_to_norm
from gradwatch_monitor.ratio import clip_ratio
from gradwatch_monitor.timeline import Blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch_monitor.diagnosis import Sign
    from gradwatch_monitor.rows import Event, Finding, Run
    from gradwatch_monitor.store import Store

__all__ = ["COLUMNS", "History", "Losses", "Stretch", "facts", "first_of"]

COLUMNS = ("pre_norm", "threshold", "clipped", "nonfinite", "loss")

_OF_BLOCKS = (
    "finite", "zeros", "clipped", "nonfinite", "threshold", "threshold_min", "threshold_max",
    "loss_min", "loss_max", "spike", "burst",
)  # fmt: skip
Array = np.ndarray[Any, Any]
_LOSSES = 50  # below which nothing is said of them
_BEGINNING = 10  # a record that begins before this step begins where the run did


class Losses(NamedTuple):
    """What the losses of a run say of its progress."""

    first: float
    last: float  # the median of the last fifth, of as many as are there one by one
    top_of_start: float  # the greatest of the first quarter


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """A run: `blocks`, and after them one entry a step in order, NaN where absent.

    Primitives take `since`, the share of the run's beginning that is left out; in blocks, a cut is
    at the nearest border of two.
    """

    pre_norm: Array
    threshold: Array
    clipped: Array
    nonfinite: Array
    loss: Array | None = None
    optimizer: str = ""
    policy: str = ""
    norm_type: float = 2.0
    blocks: Blocks = dataclasses.field(default_factory=Blocks.none)
    first_loss: float | None = None  # where that is in a block
    begins: bool = (
        True  # whether its beginning is the run's: it was not pruned, nor resumed elsewhere
    )
    clipped_before: bool = (
        False  # whether the agent saw that the loop clips by itself before step()
    )
    not_zeroed: str = ""  # what the agent says of a loop without zero_grad()
    changed_at: int = 0  # the steps before another policy was applied, the last time that one was
    signs: Mapping[str, Sign] = dataclasses.field(default_factory=dict)  # what is wrong at its end
    moves: float | None = None  # what a gradient of norm 1 moves, in units of the weights' norm
    # By where they are, so that what one has worked out serves again.
    _stretches: dict[tuple[tuple[int, int], tuple[int, int]], Stretch] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def of(cls, store: Store, run_id: int) -> Self:
        """The history of a run's visible timeline."""
        blocks, columns = store.long(run_id, ("step", *COLUMNS), of_blocks=_OF_BLOCKS)
        first = store.first_loss(run_id) if blocks.steps else None
        told = facts(
            store.run(run_id),
            first_of(blocks, columns["step"]),
            store.last_change(run_id),
            concluded(store, run_id),
        )
        window = window_of(store, run_id)
        norms, threshold, clipped, nonfinite, loss = (columns[name] for name in COLUMNS)
        return cls(
            norms, threshold, clipped, nonfinite, loss, blocks=blocks, first_loss=first, **told,
            signs={} if window is None else {sign.finding: sign for sign in signs(window)},
            moves=None if window is None else relative_to_norm(window),
        )  # fmt: skip

    # -- in whole ------------------------------------------------------------------------------

    def since(self, share: float) -> Stretch:
        """The run without that share of its beginning."""
        whole = self.stretch((0, len(self.blocks.column("steps"))), (0, len(self.pre_norm)))
        return whole.cut(int(whole.steps * share), whole.steps)

    def stretch(self, over: tuple[int, int], exact: tuple[int, int]) -> Stretch:
        """Its blocks [from, to), and the steps [from, to) of those that are exact."""
        return self._stretches.setdefault((over, exact), Stretch(self, over, exact))

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return self.since(0.0).steps

    def quantile(self, q: float, since: float = 0.0) -> float:
        """A quantile of the norms that are finite and above 0; NaN where there are none."""
        return self.since(since).quantile(q)

    def ratio(self, threshold: float, since: float = 0.0) -> float:
        """The share of the finite norms, those of 0 too, that are above a threshold."""
        return self.since(since).ratio(threshold)

    def windows(self, n: int, since: float = 0.0) -> list[Stretch]:
        """`n` stretches of as many steps each, in time order."""
        return self.since(since).windows(n)

    @functools.cached_property
    def losses(self) -> Losses | None:
        """Of the finite losses; None where they measure no progress, or are too few.

        One that takes both signs, as a policy gradient's does, measures none; nor does one whose
        beginning is not on record.
        """
        if not self.begins:
            return None
        exact = _finite(self.loss) if self.loss is not None else np.empty(0)
        least, most = (_finite(self.blocks.column(f"loss_{end}")) for end in ("min", "max"))
        first = self.first_loss if self.blocks.steps else exact[0] if len(exact) else None
        if first is None or len(exact) < _LOSSES or min([*least, exact.min()]) < 0 or first == 0:
            return None
        fifth = (self.blocks.steps + len(exact)) // 5
        early = most[: -(-len(most) // 4)] if len(most) else exact[: len(exact) // 4]
        return Losses(float(first), float(np.median(exact[-fifth:])), float(early.max()))

    def standstill(self) -> str | None:
        """The sentence that says that the loss is about where it began, None where it is not."""
        loss = self.losses
        if loss is None or not STILL <= loss.last / loss.first <= 1 / STILL:
            return None
        return f"the loss is about where it began ({loss.first:.3g} at first, {loss.last:.3g} at the end)"

    # -- piece by piece ------------------------------------------------------------------------

    @functools.cached_property
    def values(self) -> Array:
        """Norms that are finite and above 0, in time order: a bin's of a block, then a step's."""
        return np.concatenate([middles(self.blocks.histograms.bins), self.pre_norm[self._usable]])

    @functools.cached_property
    def weights(self) -> Array:
        """How many norms each of `values` stands for."""
        ones = np.ones(int(self._usable.sum()), np.int64)
        return np.concatenate([self.blocks.histograms.weights, ones])

    @functools.cached_property
    def block(self) -> Array:
        """The position in `per_block` of each of `values`."""
        first = len(self.blocks.column("steps"))
        recent = first + np.flatnonzero(self._usable) // BLOCK
        return np.concatenate([self.blocks.histograms.block, recent])

    @functools.cached_property
    def per_block(self) -> Mapping[str, Array]:
        """Arrays with an entry a block of 1,000 steps in a row, the last steps too.

        steps, clipped, nonfinite: counts; threshold_min, threshold_max; spike, the greatest norm in
        units of the median of the 50 before it; burst, the greatest log(q98 / median) in 100 steps.
        """
        count = len(self.blocks.column("steps"))
        pieces = [
            Stretch(self, (count, count), (at, min(at + BLOCK, len(self.pre_norm))))
            for at in range(0, len(self.pre_norm), BLOCK)
        ]
        recent = {
            "steps": [piece.steps for piece in pieces],
            "clipped": [piece.clipped.sum() for piece in pieces],
            "nonfinite": [piece.nonfinite.sum() for piece in pieces],
            "threshold_min": [piece.thresholds[0] for piece in pieces],
            "threshold_max": [piece.thresholds[1] for piece in pieces],
            "spike": [piece.spike for piece in pieces],
            "burst": [piece.burst for piece in pieces],
        }
        return {
            name: np.concatenate([self.blocks.column(name), np.array(column, float)])
            for name, column in recent.items()
        }

    @functools.cached_property
    def _usable(self) -> Array:
        return np.isfinite(self.pre_norm) & (self.pre_norm > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Stretch:
    """A part of a run: the blocks [from, to), then the steps [from, to) of those that are exact."""

    history: History
    over: tuple[int, int]
    exact: tuple[int, int]

    def cut(self, start: int, stop: int) -> Stretch:
        """Its steps [start, stop), counted from its first."""
        ends = np.concatenate([[0], np.cumsum(self.column("steps"))])
        inside = int(ends[-1])
        at = [int(np.abs(ends - border).argmin()) for border in (start, stop)]
        first, last = self.exact[0], self.exact[1]
        exact = [min(last, first + max(0, border - inside)) for border in (start, stop)]
        return self.history.stretch(
            (self.over[0] + at[0], self.over[0] + at[1]), (exact[0], exact[1])
        )

    def windows(self, n: int) -> list[Stretch]:
        """`n` stretches of it, of as many steps each, in time order."""
        cuts = np.linspace(0, self.steps, n + 1).astype(int).tolist()
        return [self.cut(start, stop) for start, stop in itertools.pairwise(cuts)]

    def column(self, name: str) -> Array:
        """A column of its blocks."""
        return self.history.blocks.column(name)[slice(*self.over)]

    @functools.cached_property
    def steps(self) -> int:
        """How many steps it has."""
        return int(self.column("steps").sum()) + self.exact[1] - self.exact[0]

    @functools.cached_property
    def norms(self) -> Array:
        """Those of the exact steps that are finite and above 0."""
        usable = self.history._usable[slice(*self.exact)]
        return np.asarray(self.history.pre_norm[slice(*self.exact)][usable])

    @property
    def clipped(self) -> Array:
        """Which of the exact steps were clipped."""
        return np.asarray(self.history.clipped[slice(*self.exact)])

    @property
    def nonfinite(self) -> Array:
        """Which of the exact steps had a NaN or inf in the gradient."""
        return np.asarray(self.history.nonfinite[slice(*self.exact)])

    @functools.cached_property
    def distribution(self) -> Distribution:
        """Its norms that are finite and above 0."""
        values, weights = merge(self._histograms)
        return Distribution(
            np.concatenate([values, self.norms]),
            np.concatenate([weights, np.ones(len(self.norms), np.int64)]),
        )

    @property
    def count(self) -> int:
        """How many of them there are."""
        return self.distribution.count

    def quantile(self, q: float) -> float:
        """A quantile of them; NaN where there are none."""
        return self.distribution.quantile(q)

    @functools.cached_property
    def every(self) -> Distribution:
        """All its finite norms, those of 0 too: what a clip ratio is of."""
        exact = self.history.pre_norm[slice(*self.exact)]
        zeros = int(self.column("zeros").sum()) + int((exact == 0).sum())
        if not zeros:
            return self.distribution
        values, weights = merge(self._histograms)
        return Distribution(
            np.concatenate([[0.0], values, self.norms]),
            np.concatenate([[zeros], weights, np.ones(len(self.norms), np.int64)]),
        )

    @functools.cached_property
    def finite(self) -> int:
        """How many of its steps have a finite norm."""
        exact = self.history.pre_norm[slice(*self.exact)]
        return int(self.column("finite").sum()) + int(np.isfinite(exact).sum())

    def ratio(self, threshold: float) -> float:
        """The clip ratio that a constant threshold would have had; 0 without a finite norm."""
        return float(self.every.share(threshold))

    @property
    def clip_ratio(self) -> float | None:
        """Its clipped steps over those with a finite norm; None without such a step."""
        return clip_ratio(int(self.column("clipped").sum() + self.clipped.sum()), self.finite)

    @property
    def nonfinite_ratio(self) -> float:
        """The share of its steps with a NaN or inf in the gradient."""
        total = int(self.column("nonfinite").sum()) + int(self.nonfinite.sum())
        return total / self.steps if self.steps else 0.0

    @functools.cached_property
    def thresholds(self) -> tuple[float, float]:
        """The least and the greatest threshold in force; NaN where there was none."""
        exact = self.history.threshold[slice(*self.exact)]
        both = [self.column("threshold_min"), self.column("threshold_max"), exact]
        there = _finite(np.concatenate(both))
        return (float(there.min()), float(there.max())) if len(there) else (math.nan, math.nan)

    @property
    def last_threshold(self) -> float:
        """The last one in force; NaN where there was none."""
        exact = self.history.threshold[slice(*self.exact)]
        there = _finite(np.concatenate([self.column("threshold"), exact]))
        return float(there[-1]) if len(there) else math.nan

    @functools.cached_property
    def spike(self) -> float:
        """The greatest norm in units of the median of the 50 before it; NaN without norms."""
        return _greatest(self.column("spike"), spikes(self.norms))

    @functools.cached_property
    def burst(self) -> float:
        """The greatest log(q98 / median) within 100 steps; NaN without norms."""
        return _greatest(self.column("burst"), bursts(self.norms))

    def levels(self, q: float) -> Array:
        """A quantile of each block, and of each 100 of the exact norms, in time order."""
        histograms = self._histograms
        old = np.empty(0)
        if len(histograms.bins):
            until = np.cumsum(histograms.weights, dtype=np.int64)
            ends = np.flatnonzero(np.diff(histograms.block, append=-1))
            counts = np.diff(until[ends], prepend=0)
            rank = until[ends] - counts + np.floor(q * (counts - 1)).astype(np.int64)
            old = middles(histograms.bins[np.searchsorted(until, rank, side="right")])
        return np.concatenate([old, windowed(self.norms, [q])[0]])

    @property
    def _histograms(self) -> Histograms:
        every = self.history.blocks.histograms
        # In the array's own type: else all of it is converted.
        start, stop = np.searchsorted(every.block, np.array(self.over, every.block.dtype))
        return Histograms(*(array[start:stop] for array in every))


def facts(
    run: Run, first: int | None, change: Event | None, findings: Sequence[Finding]
) -> dict[str, Any]:
    """What is on record beside the steps, of which `first` is the first: how it clips, since when.

    `change` is the event of the last change that was applied, `findings` what was concluded so far.
    """
    policies: Sequence[Mapping[str, Any]] = run.settings.get("policies", [])
    if change is not None and first is not None:
        policies = [change.data["policy"]]
    seen = {finding.finding: finding for finding in findings if not finding.ended_at}
    not_zeroed = seen.get("gradients_not_zeroed")
    # JSON has no inf, so that is a word there, or null.
    norm_type = policies[0].get("norm_type", 2.0) if policies else 2.0
    return {
        "optimizer": str(run.settings.get("optimizer", "")),
        "policy": ", ".join(policy["policy"] for policy in policies),
        "norm_type": math.inf if norm_type is None else float(norm_type),
        "clipped_before": "clipped_twice" in seen,
        "not_zeroed": not_zeroed.message if not_zeroed else "",
        "begins": first is None or first < _BEGINNING,
        "changed_at": 0 if change is None or first is None else max(0, change.step - first),
    }


def first_of(blocks: Blocks, steps: Array) -> int | None:
    """The first step of these; None of none."""
    every = [*blocks.column("first_step")[:1].tolist(), *steps[:1].tolist()]
    return int(min(every)) if every else None


def _greatest(*parts: Array) -> float:
    there = _finite(np.concatenate(parts))
    return float(there.max()) if len(there) else math.nan


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]
