"""Norms → Recommendation: the constant that clips the target share, and what to do about it.

No constant is reliable from one run to the next: norms depend on the path the training took, on
the clipping itself, and on the seed. So a constant is offered as provisional, with an interval
learnt from runs repeated with another seed; where the norms drift a policy is named instead, and
where the band would do harm that is said.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from gradwatch.errors import ConfigurationError
from gradwatch.policies import ClipNorm, Policy, TargetRatio
from gradwatch_monitor.evidence import AT_LEAST, BURN_IN, Evidence
from gradwatch_monitor.history import History

if TYPE_CHECKING:
    from gradwatch_monitor.store import Store

__all__ = ["History", "Recommendation", "Verdict", "recommend", "recommend_from"]

Verdict = Literal["keep", "change", "not_needed", "use_policy", "fix_training", "not_enough_data"]

_STEADY = 0.10  # standard deviation of the ratio over the windows, up to which a constant holds
_FAR = 1.5  # times what is in force: constants looser than that were right in half of the cases
_KNOWN = 0.9  # of a run at the constant, that this one must tell about
_SPIKE = 5.0  # times what is usual: a healthy run has none
_MARGIN = 1.1  # by which a ratio may lie out of the band: the next seed moves it further
_CAP = 3.0  # a policy's cap, in units of the constant


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do about a run's clipping threshold, and why.

    `threshold` is the constant that should clip `target` of the steps, whatever the verdict (None
    where too few norms are known to tell one). `interval` holds the clip ratio that a re-run with it should
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
    current_policy: str = ""  # the class of what clips now
    over: str = ""  # the steps that `current_clip_ratio` is of, in words

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
        return f"clipped {100 * self.current_clip_ratio:.0f} % of steps{at} {self.over}; {would}"

    @property
    def remarks(self) -> tuple[str, ...]:
        """The reasons that the sentence does not say already."""
        return tuple(reason for reason in self.reasons if reason != self.sentence)

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
    return recommend_from(History.of(store, run_id), target=target, band=band)


def recommend_from(
    history: History, *, target: float = 0.20, band: tuple[float, float] = (0.10, 0.30)
) -> Recommendation:
    """The same from a history in memory: a pure function."""
    _check(target, band)
    seen = Evidence(history, target)
    if (unknown := _unknown(seen)) is not None:
        verdict, policy, reasons = unknown
        return Recommendation(
            verdict, None, None, None, policy, tuple(reasons), history.steps,
            seen.current_threshold, seen.late_ratio, target, band, current_policy=history.policy,
            over=_over(seen),
        )  # fmt: skip
    verdict, policy, reasons = _judge(seen, band)
    return Recommendation(
        verdict=verdict,
        threshold=seen.tau,
        predicted_clip_ratio=seen.ratio(seen.tau),
        interval=seen.interval(),
        policy=policy,
        reasons=(*reasons, *_remarks(seen, verdict)),
        steps=history.steps,
        current_threshold=seen.current_threshold,
        current_clip_ratio=seen.late_ratio,
        target=target,
        band=band,
        current_is_constant=seen.constant,
        current_policy=history.policy,
        over=_over(seen),
    )


_Judgement = tuple[Verdict, Policy[Any] | None, list[str]]


def _judge(seen: Evidence, band: tuple[float, float]) -> _Judgement:
    """The first rule that has something to say."""
    return (
        _faults(seen)
        or _explosion(seen, band)
        or _no_need(seen, band)
        or _constant(seen, band)
        or _policy(seen, band)
    )


def _unknown(seen: Evidence) -> _Judgement | None:
    """No threshold can be read from it: the true norms are not there, or too few."""
    if (wall := seen.wall()) is not None:
        top, share = wall
        return "not_enough_data", None, [
            (f"the loop clips by itself before step(): {100 * share:.0f} % of the last norms are "
            f"exactly {top:.3g}, so the true norms are not seen, nor what a threshold would clip: "
            "take its own clip_grad_norm_ out, and ask again of the next run")
        ]  # fmt: skip
    if seen.count >= AT_LEAST:
        return None
    faults = _faults(seen)
    if faults is not None and seen.late.steps >= AT_LEAST:
        return faults
    return "not_enough_data", None, [
        (f"{seen.count} finite gradient norms after the first {100 * BURN_IN:.0f} % of the run; "
        f"{AT_LEAST} are needed")
    ]  # fmt: skip


def _over(seen: Evidence) -> str:
    """What the share that was clipped is of."""
    if seen.history.changed_at > seen.start.steps:
        return f"in the {seen.since.steps:,} steps since the last change"
    return "after the first fifth of the run"


def _faults(seen: Evidence) -> _Judgement | None:
    """NaN or inf in more than one gradient in a hundred; a loss that diverged."""
    if seen.nonfinite_ratio > 0.01:
        return "fix_training", _kept(seen), [
            (f"after the first fifth of the run {100 * seen.nonfinite_ratio:.1f} % of the steps have a "
            "NaN or inf in the gradient: find where it enters (the events name the parameter) before "
            "tuning a threshold")
        ]  # fmt: skip
    if divergence := seen.divergence():
        return "fix_training", *_after_divergence(seen, f"the training diverged: {divergence}")
    return None


def _after_divergence(seen: Evidence, divergence: str) -> tuple[Policy[Any] | None, list[str]]:
    """By SGD, to clip every step is to lower the learning rate; nothing else helps."""
    advice = "lower the learning rate (by ten, to begin with), or look at the initialisation"
    if not seen.steps_follow_the_gradient:
        return _kept(seen), [divergence, f"{advice}; no threshold mends that"]
    tight = ClipNorm(float(f"{0.1 * seen.late.quantile(0.5):.2g}"), seen.history.norm_type)
    return tight, [
        divergence,
        (f"{advice}. In a further run {tight} does the same by {seen.history.optimizer}: every step "
        "is then a tenth of what it usually was, at most"),
    ]  # fmt: skip


def _explosion(seen: Evidence, band: tuple[float, float]) -> _Judgement | None:
    """Norms that leap or grow while clipping holds them back."""
    ratio, low = seen.late_ratio, band[0]
    if tamed := seen.tamed():
        return "fix_training", _kept(seen), [
            f"the norms explode: {tamed}, and fell {_fold(seen)} once it had learnt",
            (f"keep {seen.held:g}: a constant that clips a share of the end, as {seen.tau:g} does, "
            "would choke the steps in which it learns; a lower learning rate or another "
            "initialisation would need less of it"),
        ]  # fmt: skip
    bites = ratio is None or ratio >= low
    explosion = seen.growth() or (seen.burst() if bites else None)
    if not explosion or seen.learns():
        return None
    meanwhile = (
        "; keep the tight threshold meanwhile"
        if _kept(seen) and ratio is not None and ratio >= low
        else ""
    )
    return "fix_training", _kept(seen), [
        f"the norms explode: {explosion}",
        ("lower the learning rate, or look at the initialisation and the architecture"
        f"{meanwhile}"),
    ]  # fmt: skip


def _no_need(seen: Evidence, band: tuple[float, float]) -> _Judgement | None:
    """Clipped rarely and healthy, or so far converged that the band would do harm."""
    ratio, low = seen.late_ratio, band[0]
    rarely = ratio < low / 2 if ratio is not None else not seen.whole.clip_ratio
    said = "nothing is clipped" if not ratio else f"{100 * ratio:.1f} % is clipped"
    if seen.converged and (rarely or (ratio is not None and ratio < low)):
        return "not_needed", None, [
            (f"{_over(seen)} {said}, and the norms fell {_fold(seen)} as "
            "it converged"),
            (f"{seen.tau:g} would put it in the band of {_percent(band)}, and clip every step of "
            "the phase in which it learns: the band would do harm here"),
        ]  # fmt: skip
    spike = seen.greatest_spike()
    if not rarely or spike > _SPIKE:
        return None
    faults = round(seen.whole.nonfinite_ratio * seen.whole.steps)
    state = (
        f"{faults} step{'s' if faults > 1 else ''} had a NaN or inf, which no threshold is for; the others are healthy"
        if faults
        else "the run is healthy as it is"
    )
    return "not_needed", None, [
        f"{said}, and no norm is above {spike:.1f} times what is usual: {state}",
        (f"{seen.tau:g} would put it in the band of {_percent(band)}; nothing is wrong without it"),
    ]  # fmt: skip


def _constant(seen: Evidence, band: tuple[float, float]) -> _Judgement | None:
    """What is in force, if it does its work; or a constant near it that clips evenly."""
    low, high = band
    return (
        _keep(seen, band, low, high, "inside")
        or _change(seen, band)
        or _keep(seen, band, low / _MARGIN, high * _MARGIN, "at the edge of")
    )


def _keep(
    seen: Evidence, band: tuple[float, float], low: float, high: float, where: str
) -> _Judgement | None:
    ratio = seen.late_ratio
    if ratio is None or not low <= ratio <= high:
        return None
    if not seen.constant:
        by = f"{seen.history.policy} holds" if seen.history.policy else "what is in force clips"
        return "keep", None, [
            f"{by} {100 * ratio:.0f} % of the steps, {where} the band of {_percent(band)}"
        ]  # fmt: skip
    moves = seen.unsteadiness(lambda stretch: stretch.clip_ratio)
    evenly = (
        f"evenly so over the run ({_deviates(moves)})"
        if moves <= _STEADY
        else f"where the norms are large ({_deviates(moves)}): a policy that "
        "follows them would loosen there"
    )
    return "keep", None, [
        (f"{100 * ratio:.0f} % of the steps were clipped, {where} the band of "
        f"{_percent(band)}, and {evenly}")
    ]  # fmt: skip


def _change(seen: Evidence, band: tuple[float, float]) -> _Judgement | None:
    tau = seen.tau
    moves = seen.unsteadiness(lambda stretch: stretch.ratio(tau))
    if moves > _STEADY or seen.known < _KNOWN or _is_far(seen, band[1]):
        return None
    return "change", ClipNorm(tau, seen.history.norm_type), [
        *_outside(seen, band),
        (f"{tau:g} would have clipped {100 * seen.ratio(tau):.0f} % of the steps, evenly over "
        f"the run ({_deviates(moves)})"),
    ]  # fmt: skip


def _is_far(seen: Evidence, high: float) -> bool:
    """Whether the constant is so much looser than what was in force that it is another run's."""
    return seen.held is not None and (seen.late_ratio or 0.0) > high and seen.tau > _FAR * seen.held


def _policy(seen: Evidence, band: tuple[float, float]) -> _Judgement:
    """A controller, where no constant can be counted on."""
    tau, norm_type = seen.tau, seen.history.norm_type
    why = _why_no_constant(seen)
    if norm_type != 2.0:
        other = f"TargetRatio follows L2 norms; these are of type {norm_type:g}"
        return "use_policy", ClipNorm(tau, norm_type), [*_outside(seen, band), why, other]
    cap = float(f"{_CAP * tau:.3g}")
    initial = float(f"{min(seen.level_of_start(), cap):.3g}")
    policy = TargetRatio(*band, cap=cap, initial=initial)
    follows = f"{policy} follows them, never above its cap"
    return "use_policy", policy, [*_outside(seen, band), why, follows]


def _why_no_constant(seen: Evidence) -> str:
    tau = seen.tau
    moves = seen.unsteadiness(lambda stretch: stretch.ratio(tau))
    would = f"{tau:g} would have clipped {100 * seen.ratio(tau):.0f} % of the steps"
    if seen.known < _KNOWN:
        shows = f"the first {100 * seen.known:.0f} %" if seen.known >= 0.01 else "next to nothing"
        return (
            f"clipped so much, {seen.history.optimizer} gets on slowly: this run shows {shows} of "
            f"what one at {tau:g} goes through, and no constant can be read from that"
        )
    if moves > _STEADY:
        return (
            f"the norms drift: {would}, but not evenly over the run ({_deviates(moves)}), so no "
            "constant stays in the band"
        )
    least, most = seen.interval()
    return (
        f"{would}, but clipped so much less the next run is another one: with another seed "
        f"{100 * least:.0f}–{100 * most:.0f} %, and a constant cannot be counted on"
    )


def _kept(seen: Evidence) -> ClipNorm | None:
    return ClipNorm(seen.held, seen.history.norm_type) if seen.held else None


def _outside(seen: Evidence, band: tuple[float, float]) -> list[str]:
    ratio, low = seen.late_ratio, band[0]
    if ratio is None:
        return []
    at = f" at {seen.current_threshold:g}" if seen.constant else ""
    where = "below" if ratio < low else "above"
    return [
        f"{_over(seen)} {100 * ratio:.0f} % were clipped{at}, {where} the band of {_percent(band)}"
    ]


def _remarks(seen: Evidence, verdict: Verdict) -> list[str]:
    """What holds whatever the verdict."""
    remarks = []
    ratio, optimizer = seen.late_ratio, seen.history.optimizer
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
    plain, share = seen.late.ratio(seen.tau), seen.ratio(seen.tau)
    if abs(plain - share) > 0.02 and seen.known >= _KNOWN:
        slower = "slower" if share > plain else "faster"
        remarks.append(
            f"{100 * plain:.0f} % of this run's norms are above {seen.tau:g}, but a run that is "
            f"clipped there by {optimizer} is {slower} past the large ones: {100 * share:.0f} %"
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


def _fold(seen: Evidence) -> str:
    return f"{seen.fall:.0f}-fold" if seen.fall < 10_000 else "more than 10,000-fold"


def _deviates(moves: float) -> str:
    return f"from one eighth to the next by a standard deviation of {100 * moves:.0f} points"


def _check(target: float, band: tuple[float, float]) -> None:
    low, high = band
    if not 0 < low < high < 1:
        msg = f"band={band!r}: two shares 0 < low < high < 1, as in (0.10, 0.30)"
        raise ConfigurationError(msg)
    if not low <= target <= high:
        msg = f"target={target!r}: a share inside the band {band!r}"
        raise ConfigurationError(msg)


def _percent(band: tuple[float, float]) -> str:
    return f"{100 * band[0]:.0f}–{100 * band[1]:.0f} %"
