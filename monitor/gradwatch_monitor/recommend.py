"""Norms → Recommendation: the constant that clips the target share, and what to do about it.

No constant is reliable from one run to the next: norms depend on the path the training took, on
the clipping itself, and on the seed. So a constant is offered as provisional, with an interval
learnt from runs repeated with another seed, and where the norms drift a policy is named instead.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gradwatch.errors import ConfigurationError
from gradwatch.policies import ClipNorm, Policy, TargetRatio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch_monitor.store import Store

__all__ = ["History", "Recommendation", "Verdict", "recommend", "recommend_from"]

Verdict = Literal["keep", "change", "not_needed", "use_policy", "fix_training", "not_enough_data"]

AT_LEAST = 50  # finite norms after the burn-in, below which nothing is said
BURN_IN = 0.2  # share of the run's beginning that is left out
_WINDOWS = 8
_STEADY = 0.08  # standard deviation of the ratio over the windows, up to which a constant holds
_SPIKE = 5.0  # times the median of the 50 norms before: a healthy run has none
_BURST = 2.0  # log(q98 / median) within 100 steps, from which on the run explodes
_DRIFT = 1.2  # range of the windowed log(q80), from which on the run explodes
_RERUN = 0.30  # a re-run's norms lie within a factor exp(±0.30) in about four of five times
_CAP = 3.0  # a policy's cap, in units of the threshold that keeps the run alive


@dataclasses.dataclass(frozen=True)
class History:
    """What `recommend_from` looks at, one entry a step in order; NaN where absent."""

    pre_norm: np.ndarray[Any, np.dtype[np.float64]]
    threshold: np.ndarray[Any, np.dtype[np.float64]]
    clipped: np.ndarray[Any, np.dtype[np.bool_]]
    nonfinite: np.ndarray[Any, np.dtype[np.bool_]]
    optimizer: str = ""
    policy: str = ""
    norm_type: float = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do about a run's clipping threshold, and why.

    `threshold` is the constant that should clip `target` of the steps, whatever the verdict (None
    with `not_enough_data` alone). `interval` holds the clip ratio that a re-run with it should
    have, in 80 % of cases. `policy` is what to run with: None where nothing is to be changed.
    """

    verdict: Verdict
    threshold: float | None
    predicted_clip_ratio: float | None
    interval: tuple[float, float] | None
    policy: Policy[Any] | None
    reasons: tuple[str, ...]
    steps: int
    current_threshold: float | None  # the last one in force
    current_clip_ratio: float | None
    target: float
    band: tuple[float, float]
    current_is_constant: bool = True  # whether it was in force all along

    @property
    def sentence(self) -> str:
        """The recommendation in one sentence with its numbers."""
        if self.threshold is None or self.interval is None or self.predicted_clip_ratio is None:
            return self.reasons[0]
        low, high = (round(100 * bound) for bound in self.interval)
        would = (
            f"{self.threshold:g} would have clipped "
            f"{100 * self.predicted_clip_ratio:.0f} % ({low}–{high} %)"
        )
        if self.current_clip_ratio is None:
            return would
        at = f" at {self.current_threshold:g}" if self.current_is_constant else ""
        return f"clipped {100 * self.current_clip_ratio:.0f} % of steps{at}; {would}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        policy = self.policy.describe() if self.policy is not None else None
        return {**values, "policy": policy, "sentence": self.sentence}


def recommend(
    store: Store,
    run_id: int,
    target: float = 0.20,
    band: tuple[float, float] = (0.10, 0.30),
) -> Recommendation:
    """The recommendation for a run, from its visible timeline.

    Args:
        store: where the run is.
        run_id: its integer id (`store.run("name").id`).
        target: the share of steps the constant should clip, inside the band.
        band: the shares between which a threshold is left as it is.

    Raises:
        ConfigurationError: `target` and `band` are no such shares.
    """
    _check(target, band)
    columns = store.columns(run_id, ("pre_norm", "threshold", "clipped", "nonfinite"))
    settings: Mapping[str, Any] = store.run(run_id).settings
    history = History(
        **columns,
        optimizer=str(settings.get("optimizer", "")),
        policy=", ".join(p["policy"] for p in settings.get("policies", [])),
        norm_type=_norm_type(settings.get("policies", [])),
    )
    return recommend_from(history, target=target, band=band)


def recommend_from(
    history: History, *, target: float = 0.20, band: tuple[float, float] = (0.10, 0.30)
) -> Recommendation:
    """The same from a history in memory: a pure function."""
    _check(target, band)
    seen = _Seen(history, target)
    if seen.count < AT_LEAST:
        return Recommendation(
            "not_enough_data", None, None, None, None,
            (
                (f"{seen.count} finite gradient norms after the first "
                f"{100 * BURN_IN:.0f} % of the run; {AT_LEAST} are needed"),
            ),
            len(history.pre_norm), seen.current_threshold, seen.current_ratio, target, band,
        )  # fmt: skip
    verdict, policy, reasons = _judge(seen, band)
    return Recommendation(
        verdict=verdict,
        threshold=seen.tau,
        predicted_clip_ratio=seen.ratio(seen.tau),
        interval=seen.interval(),
        policy=policy,
        reasons=(*reasons, *_remarks(seen, verdict)),
        steps=len(history.pre_norm),
        current_threshold=seen.current_threshold,
        current_clip_ratio=seen.current_ratio,
        target=target,
        band=band,
        current_is_constant=seen.constant,
    )


class _Seen:
    """What the verdict rests on, worked out once."""

    def __init__(self, history: History, target: float) -> None:
        self.history = history
        every = history.pre_norm
        usable = np.isfinite(every) & (every > 0)
        self.every = every[usable]  # of the whole run: what the numbers told are about
        start = int(len(every) * BURN_IN)
        self.norms = every[start:][usable[start:]]  # after the burn-in: what the verdict is about
        self.count = len(self.norms)
        self.clipped = history.clipped[start:][usable[start:]]
        self.nonfinite_ratio = _mean(history.nonfinite[start:])
        # Only policies of the global norm have a threshold; only they have a ratio in the band.
        thresholds = history.threshold[np.isfinite(history.threshold)]
        has_threshold = bool(len(thresholds))
        self.constant = has_threshold and bool(thresholds.min() == thresholds.max())
        self.current_threshold = float(thresholds[-1]) if has_threshold else None
        self.current_ratio = _mean(history.clipped) if has_threshold else None
        self.late_ratio = _mean(history.clipped[start:]) if has_threshold else None
        self.tau = _middle(self.every, target)

    def ratio(self, threshold: float) -> float:
        """The share of the run's norms above a threshold."""
        return _mean(self.every > threshold)

    def window_ratios(self, clipped: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.array([_mean(part) for part in np.array_split(clipped, _WINDOWS)])

    def unsteadiness(self, threshold: float) -> float:
        """How much the ratio at a threshold moves over eight windows."""
        return self.movement(self.norms > threshold)

    def movement(self, clipped: np.ndarray[Any, Any]) -> float:
        """The standard deviation of the ratio over eight windows, less what chance alone makes.

        A window of n independent steps of which a share p is clipped has the variance p(1-p)/n.
        """
        ratio = _mean(clipped)
        by_chance = ratio * (1 - ratio) * _WINDOWS / max(1, len(clipped))
        return math.sqrt(max(0.0, float(self.window_ratios(clipped).var()) - by_chance))

    def interval(self) -> tuple[float, float]:
        """The ratio of a re-run in four of five cases; wider where the history is short."""
        reach = _RERUN * math.sqrt(max(1.0, 400 / self.count))
        spread = 1.28 * self.unsteadiness(self.tau) / math.sqrt(_WINDOWS)
        middle = self.ratio(self.tau)
        low = min(self.ratio(self.tau * math.exp(reach)), middle - spread)
        high = max(self.ratio(self.tau * math.exp(-reach)), middle + spread)
        return max(0.0, low), min(1.0, high)

    def greatest_spike(self) -> float:
        """The greatest norm in units of the median of the 50 before it."""
        if self.count <= 50:
            return float(self.norms.max() / np.median(self.norms))
        before = np.lib.stride_tricks.sliding_window_view(self.norms[:-1], 50)
        return float((self.norms[50:] / np.median(before, axis=1)).max())

    def burst(self) -> str | None:
        """The sentence that says how norms jump up within a hundred steps, None where none do."""
        windows = np.array_split(self.norms, max(1, self.count // 100))
        burst = max(float(np.log(np.quantile(w, 0.98) / np.median(w))) for w in windows)
        if burst < _BURST:
            return None
        return f"within 100 steps the largest norms are {math.exp(burst):.0f} times the median"

    def growth(self) -> str | None:
        """The sentence that says how the level of the norms grows, None where it does not.

        Falling norms are what a run that converges has.
        """
        windows = np.array_split(self.norms, max(1, self.count // 100))
        levels = np.log([float(np.quantile(w, 0.8)) for w in windows])
        rises = levels - np.minimum.accumulate(levels)
        top = int(rises.argmax())
        if rises[top] < _DRIFT:
            return None
        low, high = math.exp(levels[: top + 1].min()), math.exp(levels[top])
        return f"the level of the norms grows from {low:.3g} to {high:.3g} during the run"


def _judge(seen: _Seen, band: tuple[float, float]) -> tuple[Verdict, Policy[Any] | None, list[str]]:
    """The verdict's rules, in their order."""
    ratio, tau = seen.late_ratio, seen.tau
    norm_type = seen.history.norm_type
    held = seen.current_threshold if seen.constant else None
    keep = ClipNorm(held, norm_type) if held else None
    low, high = band
    if seen.nonfinite_ratio > 0.01:
        return "fix_training", keep, [
            (f"{100 * seen.nonfinite_ratio:.1f} % of the steps have a NaN or inf in the gradient: "
            "find where it enters (the events name the parameter) before tuning a threshold")
        ]  # fmt: skip
    spike, burst, growth = seen.greatest_spike(), seen.burst(), seen.growth()
    rarely = ratio < low / 2 if ratio is not None else not seen.history.clipped.any()
    if rarely and spike <= _SPIKE and not growth:
        said = "nothing is clipped" if not ratio else f"{100 * ratio:.1f} % is clipped"
        faults = int(seen.history.nonfinite.sum())
        state = (
            f"{faults} steps had a NaN or inf, which no threshold is for; the others are healthy"
            if faults
            else "the run is healthy as it is"
        )
        return "not_needed", None, [
            (f"{said}, and no norm is above {spike:.1f} times the median of the 50 before it: "
            f"{state}"),
            f"{tau:g} would put it in the band of {_percent(band)}; nothing is wrong without it",
        ]  # fmt: skip
    explosion = growth or (burst if ratio is None or ratio >= low else None)
    if explosion:
        meanwhile = (
            "; keep the tight threshold meanwhile" if keep and ratio is not None and ratio >= low
            else ""
        )  # fmt: skip
        return "fix_training", keep, [
            f"the norms explode: {explosion}",
            ("lower the learning rate, or look at the initialisation and the architecture"
            f"{meanwhile}"),
        ]  # fmt: skip
    unsteadiness = seen.unsteadiness(tau)
    if ratio is not None and low <= ratio <= high:
        realised = seen.movement(seen.clipped)
        if realised <= _STEADY:
            return "keep", None, [
                (f"{100 * ratio:.0f} % of the steps were clipped, inside the band of "
                f"{_percent(band)}, and evenly so over the run "
                f"(it moves by {100 * realised:.0f} points, chance aside)")
            ]  # fmt: skip
    if unsteadiness <= _STEADY and low <= _mean(seen.norms > tau) <= high:
        return "change", ClipNorm(tau, norm_type), [
            *_outside(seen, band),
            (f"{tau:g} would have clipped {100 * seen.ratio(tau):.0f} % of the steps, evenly over "
            f"the run (it moves by {100 * unsteadiness:.0f} points, chance aside)"),
        ]  # fmt: skip
    first = float(np.quantile(seen.norms[:50], 0.8))
    drift = (
        f"the norms drift: {tau:g} would have clipped {100 * seen.ratio(tau):.0f} % of the run's "
        f"steps and {100 * _mean(seen.norms > tau):.0f} % after its first fifth, where the share "
        f"moves by {100 * unsteadiness:.0f} points, so no constant stays in the band"
    )
    if norm_type != 2.0:
        other = f"TargetRatio follows L2 norms; these are of type {norm_type:g}"
        return "use_policy", ClipNorm(tau, norm_type), [*_outside(seen, band), drift, other]
    cap = float(f"{_CAP * tau:.3g}")
    policy = TargetRatio(low, high, cap=cap, initial=float(f"{min(first, cap):.3g}"))
    follows = f"{policy} follows them, never above its cap"
    return "use_policy", policy, [*_outside(seen, band), drift, follows]


def _outside(seen: _Seen, band: tuple[float, float]) -> list[str]:
    ratio, low = seen.late_ratio, band[0]
    if ratio is None:
        return []
    at = f" at {seen.current_threshold:g}" if seen.constant else ""
    where = "below" if ratio < low else "above" if ratio > band[1] else "unevenly in"
    return [
        (
            f"after the first fifth of the run {100 * ratio:.0f} % of the steps were clipped{at}, "
            f"{where} the band of {_percent(band)}"
        )
    ]


def _remarks(seen: _Seen, verdict: Verdict) -> list[str]:
    """What holds whatever the verdict."""
    remarks = []
    ratio, optimizer = seen.current_ratio, seen.history.optimizer
    if ratio is not None and ratio > 0.5:
        if optimizer == "SGD":
            remarks.append(
                f"with SGD, clipping {100 * ratio:.0f} % of the steps makes the threshold a cap on "
                "the learning rate"
            )
        elif "Adam" in optimizer:
            remarks.append(
                f"{optimizer} rescales every parameter's gradient by itself, so clipping most "
                "steps by a constant changes little; a threshold near the top of the normal range "
                "guards it against spikes"
            )
    if seen.current_threshold is None and seen.history.policy not in {"", "ObserveOnly"}:
        remarks.append(
            f"the band and this threshold are about the global norm; {seen.history.policy} clips "
            "by another measure"
        )
    if verdict in {"change", "not_needed"}:
        remarks.append(
            "a constant is provisional: clipping changes the run it was read from, so check the "
            "share again on the next run"
        )
    return remarks


def _check(target: float, band: tuple[float, float]) -> None:
    low, high = band
    if not 0 < low < high < 1:
        msg = f"band={band!r}: two shares 0 < low < high < 1, as in (0.10, 0.30)"
        raise ConfigurationError(msg)
    if not low <= target <= high:
        msg = f"target={target!r}: a share inside the band {band!r}"
        raise ConfigurationError(msg)


def _middle(norms: np.ndarray[Any, Any], target: float) -> float:
    """The geometric middle of two quantiles around 1 - target, to three digits or what it takes.

    Of some twenty-five ways tried, none came nearer on runs repeated with another seed.
    """
    if not len(norms):
        return math.nan
    low, high = np.quantile(norms, [max(0.0, 0.95 - target), min(1.0, 1.05 - target)])
    exact = math.sqrt(low) * math.sqrt(high)
    share = _mean(norms > exact)
    for digits in range(3, 17):
        rounded = float(f"{exact:.{digits}g}")
        if abs(_mean(norms > rounded) - share) <= 0.01:
            return rounded
    return float(exact)


def _norm_type(policies: Sequence[Mapping[str, Any]]) -> float:
    """The type of the norms on record; JSON has no inf, so that is a word there, or null."""
    norm_type = policies[0].get("norm_type", 2.0) if policies else 2.0
    return math.inf if norm_type is None else float(norm_type)


def _mean(values: np.ndarray[Any, Any]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _percent(band: tuple[float, float]) -> str:
    return f"{100 * band[0]:.0f}–{100 * band[1]:.0f} %"
