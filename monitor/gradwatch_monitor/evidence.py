"""What a recommendation rests on: a run's norms and losses, looked at once.

Two things are learnt from runs repeated with another seed (`benchmarks/workloads`, the tuning set
alone): how far the norms of the next run lie from this one's, and from when on a run explodes.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.habits import ClippedTwice
from gradwatch_monitor.diagnosis.rates import STILL, STIRS
from gradwatch_monitor.rerun import AS_LONG_AS_THE_GRADIENT, rerun_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch_monitor.history import History, Stretch
    from gradwatch_monitor.rerun import Rerun

__all__ = ["AT_LEAST", "BURN_IN", "Evidence"]

BURN_IN = 0.2  # share of the run's beginning that is left out
AT_LEAST = 50  # finite norms after the burn-in, below which nothing is said
_WINDOWS = 8
_PHASES = 20
_BURST = 2.0  # log(q98 / median) within 100 steps, from which on the run explodes
_DRIFT = 1.2  # growth of the windowed log(q80), from which on the run explodes
_CONVERGED = 2.5  # log of the fall of the level, from which on the end says nothing of the start
_LEAP = 4.0  # times the median of the start: norms there are of a start that blew up
_TIGHT = 5.0  # times the threshold, reached by the norms of a start that clipping kept in hand

# The next run's norms are those of this one times exp(u), |u| ≤ reach in four of five cases:
# reach = 0.55 · the log distance between what clips 30 % and what clips 10 %, times 700 / steps below
# 700 steps. On the tuning jobs it holds 87 % of the runs (0.5: 84 %), a margin for jobs unlike these;
# cut off after 600, 400 and 200 steps 87, 89 and 97 %. What a single run shows of itself (drift,
# restlessness) was no better a measure of how far its seeds lie apart.
_OF_WIDTH, _STEPS = 0.55, 700


class Evidence:
    """A history's figures, each worked out once: of what comes after the run's first fifth."""

    def __init__(self, history: History, target: float) -> None:
        self.history, self.target = history, target
        self.whole, self.late = history.since(0.0), history.since(BURN_IN)
        self.start = self.whole.cut(0, self.whole.steps - self.late.steps)
        self.count = self.late.count
        self.nonfinite_ratio = self.late.nonfinite_ratio
        # Only policies of the global norm have a threshold; only they have a ratio in the band.
        self.since = self.whole.cut(
            max(self.start.steps, history.changed_at), self.whole.steps
        )  # what is in force was in force all along here
        least, greatest = self.whole.thresholds if not history.changed_at else self.since.thresholds
        has_threshold = not math.isnan(least)
        self.constant = has_threshold and least == greatest
        self.current_threshold = self.whole.last_threshold if has_threshold else None
        told = has_threshold and self.since.steps >= min(AT_LEAST, self.late.steps)
        self.late_ratio = self.since.clip_ratio if told else None

    @property
    def held(self) -> float | None:
        """The constant that is in force, since the last change."""
        return self.current_threshold if self.constant else None

    @functools.cached_property
    def tau(self) -> float:
        """The geometric middle of two quantiles around 1 - target, to the digits that it takes.

        Of some twenty-five ways tried, none came nearer on runs repeated with another seed.
        """
        if not self.count:
            return math.nan
        low = self.rerun.threshold(min(1.0, self.target + 0.05))
        high = self.rerun.threshold(max(0.0, self.target - 0.05))
        exact = math.sqrt(low) * math.sqrt(high)
        share = self.ratio(exact)
        for digits in range(3, 17):
            rounded = float(f"{exact:.{digits}g}")
            if abs(self.ratio(rounded) - share) <= 0.01:
                return rounded
        return exact

    @functools.cached_property
    def rerun(self) -> Rerun:
        """A further run, after its first fifth."""
        return rerun_of(self.history, BURN_IN)

    def ratio(self, threshold: float) -> float:
        """The share that a further run would clip at a threshold."""
        return self.rerun.share(threshold)

    @property
    def steps_follow_the_gradient(self) -> bool:
        """Whether the optimizer's steps are as long as its gradients."""
        return self.history.optimizer in AS_LONG_AS_THE_GRADIENT

    @functools.cached_property
    def known(self) -> float:
        """How much of a run at `tau` this one tells anything about."""
        return self.rerun.known(self.tau)

    def wall(self) -> tuple[float, float] | None:
        """The norm that the loop's own clipping ends at, and the share of norms that lie there.

        None where the agent saw no such clipping, or the last 500 norms show none.
        """
        recent = self.whole.norms[-500:]
        if not self.history.clipped_before or not ClippedTwice.shows(recent):
            return None
        return float(recent.max()), float(ClippedTwice.at_wall(recent).mean())

    def level_of_start(self) -> float:
        """The 80th percentile of the first norms."""
        return float(self.late.levels(0.8)[0])

    def level_of_end(self) -> float:
        """The 80th percentile of the last eighth of the norms; 0 where there are none."""
        last = self.late.windows(_WINDOWS)[-1]
        return last.quantile(0.8) if last.count else 0.0

    # -- how it moves --------------------------------------------------------------------------

    def moves_at(self, threshold: float) -> float:
        """How the share above a threshold moves over the run."""
        return _moves(self.late, lambda stretch: stretch.ratio(threshold))

    @functools.cached_property
    def moves(self) -> float:
        """How the share that was clipped has moved since the last change of what is in force."""
        return _moves(self.since, lambda stretch: stretch.clip_ratio)

    def interval(self) -> tuple[float, float]:
        """The clip ratio at `tau` of a run with another seed, in four of five cases.

        Of what it does after all that this run shows, nothing is known.
        """
        wide = math.log(self.rerun.threshold(0.1)) - math.log(self.rerun.threshold(0.3))
        early = max(1.0, _STEPS * (1 - BURN_IN) / self.count)
        reach = min(_OF_WIDTH * wide * early, 700.0)
        low, high = (self.ratio(self.tau * math.exp(u)) for u in (reach, -reach))
        return low * self.known, high * self.known + 1 - self.known

    # -- what is wrong with it -----------------------------------------------------------------

    def greatest_spike(self) -> float:
        """The greatest norm, in units of the median of the 50 before it, or of the run or its start.

        A run that has converged leaps to norms that it was healthy with before.
        """
        medians = [x for x in (self.late.quantile(0.5), self.start.quantile(0.5)) if x > 0]
        return min(self.late.spike, self.late.quantile(1.0) / max(medians))

    def fell(self) -> bool:
        """Whether the norms are below those that the run began with."""
        return self.late.quantile(0.5) < self.start.quantile(0.5)

    def burst(self) -> str | None:
        """The sentence that says how norms jump up within a hundred steps, None where none do."""
        burst = self.late.burst
        if not burst >= _BURST:
            return None
        times = math.exp(min(burst, 700.0))
        return f"within 100 steps the largest norms are {times:.0f} times the median"

    def growth(self) -> str | None:
        """The sentence that says how the level of the norms grows, None where it does not.

        Falling norms are what a run that converges has, and others after a threshold was changed.
        """
        levels = np.log(self.since.levels(0.8))
        if not len(levels):
            return None
        rises = levels - np.minimum.accumulate(levels)
        top = int(rises.argmax())
        if rises[top] < _DRIFT:
            return None
        low, high = math.exp(levels[: top + 1].min()), math.exp(levels[top])
        return f"the level of the norms grows from {low:.3g} to {high:.3g} during the run"

    def divergence(self) -> str | None:
        """The sentence that says that loss and weights, or norms, blew up and did not come back."""
        weights = self.history.signs.get("exploding_weights")
        if weights is not None and weights.severity == "critical":
            return weights.message
        loss = None if self.stands_still() else self.history.losses
        if loss is None or loss.last < loss.first or loss.top_of_start < 1.5 * loss.first:
            return None
        if not self.start.quantile(0.98) > _LEAP * self.start.quantile(0.5):
            return None
        return (
            f"norms and loss leapt up at the start, and the loss, {loss.first:.3g} at first, ended "
            f"at {loss.last:.3g}"
        )

    def critical(self) -> list[str]:
        """What `diagnose` says of its end that no threshold should be looked at before."""
        return [s.message for s in self.history.signs.values() if s.severity == "critical"]

    def too_fast(self) -> tuple[str, bool] | None:
        """The sentence that says that the learning rate is too high, and whether it learns all the same."""
        sign = self.history.signs.get("learning_rate_too_high")
        return None if sign is None else (sign.message, sign.severity != "critical")

    def stride(self, threshold: float) -> float:
        """How far a gradient of that norm, if it stays, moves the weights; NaN where it is not known."""
        moves = self.history.moves if self.history.norm_type == 2.0 else None
        return math.nan if moves is None else moves * threshold

    def stands_still(self) -> bool:
        """Whether all steps together, as they were clipped, cannot have moved the weights: nothing leapt."""
        return self.held is not None and self.stride(self.held) * self.whole.steps < STIRS

    def falls(self) -> bool:
        """Whether the loss ended below where it began."""
        loss = self.history.losses
        return loss is not None and loss.last < STILL * loss.first

    def learns(self) -> bool:
        """Whether the loss fell to under a fifth of what it began at: leaps did it no harm."""
        loss = self.history.losses
        return loss is not None and loss.last < 0.2 * loss.first

    @functools.cached_property
    def fall(self) -> float:
        """By what factor the level of the norms fell from its top to the run's end."""
        levels = self._levels
        return float(levels.max() / levels[-1]) if len(levels) else 1.0

    @property
    def converged(self) -> bool:
        """Whether the norms fell so far that their end says nothing of the phase it learnt in."""
        return math.log(self.fall) >= _CONVERGED

    def tamed(self) -> str | None:
        """The sentence that says that clipping kept the start of a converged run in hand."""
        # An adaptive optimizer's steps are as long without: there, nothing was kept in hand.
        if not (self.held and self.converged and self.steps_follow_the_gradient):
            return None
        if self.history.changed_at:
            return None
        levels = self._levels
        last = int(np.flatnonzero(levels >= levels.max() * math.exp(-_CONVERGED))[-1]) + 1
        learnt = self.whole.cut(0, sum(phase.steps for phase in self._phases[:last]))
        share, top = learnt.ratio(self.held), learnt.quantile(1.0)
        if share <= 0.5 or top < _TIGHT * self.held:
            return None
        return (
            f"while it learnt (its first {learnt.steps:,} steps) {100 * share:.0f} % were clipped "
            f"at {self.held:g}, with norms up to {top:.3g}"
        )

    @functools.cached_property
    def _phases(self) -> list[Stretch]:
        count = min(_PHASES, max(1, self.whole.steps // 20))
        return [phase for phase in self.history.windows(count) if phase.count]

    @functools.cached_property
    def _levels(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([phase.quantile(0.5) for phase in self._phases])


def _moves(stretch: Stretch, ratio_of: Callable[[Stretch], float | None]) -> float:
    """The standard deviation of a ratio over eight windows, less what chance alone makes.

    A window of n independent steps of which a share p is clipped has the variance p(1-p)/n.
    """
    ratio = ratio_of(stretch) or 0.0
    by_chance = ratio * (1 - ratio) * _WINDOWS / max(1, stretch.finite)
    # A window without a finite norm has no ratio: it is not one in which nothing is clipped.
    ratios = [ratio_of(window) or 0.0 for window in stretch.windows(_WINDOWS) if window.finite]
    variance = float(np.var(ratios)) if ratios else 0.0
    return math.sqrt(max(0.0, variance - by_chance))
