"""The rules that judge a run's clipping: evidence → verdict, policy to run with, and reasons."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from gradwatch.policies import ClipNorm, Policy, TargetRatio
from gradwatch_monitor.evidence import AT_LEAST, BURN_IN
from gradwatch_monitor.rerun import rescales

if TYPE_CHECKING:
    from gradwatch_monitor.evidence import Evidence

__all__ = ["Judgement", "Verdict", "judge", "over", "remarks", "unknown"]

Verdict = Literal["keep", "change", "not_needed", "use_policy", "fix_training", "not_enough_data"]

_STEADY = 0.10  # standard deviation of the ratio over the windows, up to which a constant holds
# Of what is in force: those of the tuning jobs move by 11 points at most, or by 17 and more, and of
# the latter a third was out of the band with the next seed.
_EVEN = 0.15
_FAR = 1.5  # times what is in force: constants looser than that were right in half of the cases
_KNOWN = 0.9  # of a run at the constant, that this one must tell about
_SPIKE = 5.0  # times what is usual: a healthy run has none
_MARGIN = 1.1  # by which a ratio may lie out of the band: the next seed moves it further
_NO_CURE = "no threshold mends that"
# A step, of the weights' norm: in the band jobs of the tuning set have 0.05 at most, or 0.18 and diverge.
_STRIDE, _USUAL = 0.15, 0.03
# A policy's cap, in units of the constant, or of what the run's end would need: at 3 it loosened where
# the norms were large, and an LSTM, a factorisation and a classifier of digits ended worse than when
# clipped at 1.0; at 1 it left the band.
_CAP = 1.5
_CAP_UNKNOWN = 3.0  # where the constant is of a run that this one hardly shows

Judgement = tuple[Verdict, Policy[Any] | None, list[str]]


def judge(seen: Evidence, band: tuple[float, float]) -> Judgement:
    """The first rule that has something to say."""
    return (
        _faults(seen)
        or _held_down(seen, band)
        or _explosion(seen, band)
        or _no_need(seen, band)
        or _constant(seen, band)
        or _policy(seen, band)
    )


def unknown(seen: Evidence) -> Judgement | None:
    """No threshold can be read from it: the true norms are not there, or too few."""
    if seen.history.not_zeroed:
        return None if seen.count >= AT_LEAST else _faults(seen)
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
        (f"{seen.count} finite gradient norms above 0 after the first {100 * BURN_IN:.0f} % of the run; "
        f"{AT_LEAST} are needed")
    ]  # fmt: skip


def over(seen: Evidence) -> str:
    """What the share that was clipped is of."""
    since, without = seen.since, ""
    ratio = since.clip_ratio or 0.0
    if round(100 * ratio) != round(100 * ratio * since.finite / max(since.steps, 1)):
        without = ", not counting those without a finite gradient norm"
    if seen.history.changed_at > seen.start.steps:
        return f"in the {since.steps:,} steps since the last change{without}"
    return f"after the first fifth of the run{without}"


def _faults(seen: Evidence) -> Judgement | None:
    """A loop that adds gradients up; NaN or inf in more than one in a hundred; a loss that diverged, or stands still."""
    if seen.history.not_zeroed:
        return "fix_training", _kept(seen), [
            seen.history.not_zeroed,
            "call optimizer.zero_grad() once a step, and ask again of the run after that",
        ]  # fmt: skip
    if seen.nonfinite_ratio > 0.01:
        return "fix_training", _kept(seen), [
            (f"after the first fifth of the run {100 * seen.nonfinite_ratio:.1f} % of the steps have a "
            "NaN or inf in the gradient: find where it enters (the events name the parameter) before "
            "tuning a threshold")
        ]  # fmt: skip
    if divergence := seen.divergence():
        return "fix_training", *_after_divergence(seen, f"the training diverged: {divergence}")
    if (too_fast := seen.too_fast()) and not too_fast[1]:
        return "fix_training", _kept(seen), [
            f"the loss has not fallen: {too_fast[0]}",
            f"lower the learning rate by 10 to 100; {_NO_CURE}",
        ]  # fmt: skip
    return None


def _after_divergence(seen: Evidence, divergence: str) -> tuple[Policy[Any] | None, list[str]]:
    """By SGD, to clip every step is to lower the learning rate; nothing else helps."""
    advice = "lower the learning rate (by ten, to begin with), or look at the initialisation"
    if not seen.steps_follow_the_gradient:
        return _kept(seen), [divergence, f"{advice}; {_NO_CURE}"]
    usual = min(seen.late.quantile(0.5), seen.held or math.inf)  # as it was applied
    if not math.isfinite(usual):  # no norm is above 0 any more
        return _kept(seen), [divergence, advice]
    tight = ClipNorm(float(f"{0.1 * usual:.2g}"), seen.history.norm_type)
    return tight, [
        divergence,
        (f"{advice}. In a further run {tight} does the same by {seen.history.optimizer}: every step "
        "is then a tenth of what it usually was, at most"),
    ]  # fmt: skip


def _held_down(seen: Evidence, band: tuple[float, float]) -> Judgement | None:
    """SGD clipped beyond the band, where that is what makes its learning rate bearable."""
    ratio = seen.late.clip_ratio if seen.late_ratio is None else seen.late_ratio
    stride = seen.stride(seen.tau)
    if ratio is None or ratio <= band[1] or not stride > _STRIDE:
        return None
    at = f" at {seen.held:g}" if seen.held else ""
    return "fix_training", _kept(seen), [
        (f"{100 * ratio:.0f} % of the steps are clipped{at}, and that holds down a learning rate that is "
        f"too high: at {seen.tau:g}, as the band asks, {seen.history.optimizer} would move the weights by "
        f"up to {_times(stride)} their norm a step"),
        (f"keep {f'{seen.held:g}' if seen.held else 'what is in force'}, or lower the learning rate "
        f"{stride / _USUAL:.0f}-fold and ask again of that run"),
    ]  # fmt: skip


def _explosion(seen: Evidence, band: tuple[float, float]) -> Judgement | None:
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
    growth = None if seen.falls() else seen.growth()  # as a likelihood's do that sharpens
    explosion = growth or (seen.burst() if bites else None)
    if not explosion or seen.learns() or seen.stands_still():
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


def _no_need(seen: Evidence, band: tuple[float, float]) -> Judgement | None:
    """Clipped rarely and healthy, or so far converged that the band would do harm."""
    ratio, low = seen.late_ratio, band[0]
    rarely = ratio < low / 2 if ratio is not None else not seen.whole.clip_ratio
    said = "nothing is clipped" if not ratio else f"{100 * ratio:.1f} % is clipped"
    if seen.converged and (rarely or (ratio is not None and ratio < low)):
        return "not_needed", None, [
            (f"{over(seen)} {said}, and the norms fell {_fold(seen)} as "
            "it converged"),
            (f"{seen.tau:g} would put it in the band of {_percent(band)}, and clip every step of "
            "the phase in which it learns: the band would do harm here"),
        ]  # fmt: skip
    spike = seen.greatest_spike()
    if not rarely or spike > _SPIKE:
        return None
    learns = not seen.history.standstill() and "vanishing_gradients" not in seen.history.signs
    without = "nothing is wrong" if learns else "no norm is wrong"
    faults = round(seen.whole.nonfinite_ratio * seen.whole.steps)
    state = (
        f"{faults} step{'s' if faults > 1 else ''} had a NaN or inf, which no threshold is for; the others are healthy"
        if faults
        else "the run is healthy as it is"
        if learns
        else "the norms are healthy"
    )
    usual = "what was usual as it began" if seen.fell() else "what is usual"
    return "not_needed", None, [
        f"{said}, and no norm is above {spike:.1f} times {usual}: {state}",
        (f"{seen.tau:g} would put it in the band of {_percent(band)}; {without} without it"),
    ]  # fmt: skip


def _constant(seen: Evidence, band: tuple[float, float]) -> Judgement | None:
    """What is in force, if it does its work; or a constant near it that clips evenly."""
    return (
        _keep(seen, band, margin=1.0)
        or _uneven(seen, band, margin=1.0)
        or _change(seen, band)
        or (None if seen.constant else _keep(seen, band, _MARGIN))
        or _uneven(seen, band, _MARGIN)
    )


def _keep(seen: Evidence, band: tuple[float, float], margin: float) -> Judgement | None:
    share = _in_force(seen, band, margin)
    if share is None:
        return None
    if not seen.constant:
        by = f"{seen.history.policy} holds" if seen.history.policy else "what is in force clips"
        return "keep", None, [f"{by} {share}"]
    if seen.moves > _EVEN and seen.history.norm_type == 2.0:
        return None
    how = "evenly so over the run" if seen.moves <= _STEADY else "its share moves"
    return "keep", None, [f"{seen.held:g} clips {share}; {how} ({_deviates(seen.moves)})"]


def _uneven(seen: Evidence, band: tuple[float, float], margin: float) -> Judgement | None:
    """A constant in force that clips a share in the band, but all at once: a controller near it."""
    share, held = _in_force(seen, band, margin), seen.held
    if share is None or held is None or seen.moves <= _STEADY or seen.history.norm_type != 2.0:
        return None
    policy = TargetRatio(*band, cap=float(f"{_CAP * held:.3g}"), initial=held)
    return "use_policy", policy, [
        (f"{held:g} clips {share}, but unevenly ({_deviates(seen.moves)}): how long the norms are "
        "large tends to differ from seed to seed, so no constant can be counted on"),
        (f"{policy} follows them where they are small, and where they are large is never above "
        f"{_CAP:g} times what clips them now"),
    ]  # fmt: skip


def _in_force(seen: Evidence, band: tuple[float, float], margin: float) -> str | None:
    """What share the threshold in force clips, in words; None where that is not in the band."""
    ratio, (low, high) = seen.late_ratio, band
    if ratio is None or not low / margin <= ratio <= high * margin:
        return None
    where = "inside" if low <= ratio <= high else "at the edge of"
    return f"{100 * ratio:.0f} % of the steps, {where} the band of {_percent(band)}"


def _change(seen: Evidence, band: tuple[float, float]) -> Judgement | None:
    tau = seen.tau
    moves = seen.moves_at(tau)
    if moves > _STEADY or seen.known < _KNOWN or _is_far(seen, band[1]):
        return None
    return "change", ClipNorm(tau, seen.history.norm_type), [
        *_outside(seen, band),
        (f"{tau:g} would clip {100 * seen.ratio(tau):.0f} % of the next run, evenly over "
        f"it ({_deviates(moves)})"),
    ]  # fmt: skip


def _is_far(seen: Evidence, high: float) -> bool:
    """Whether the constant is so much looser than what was in force that it is another run's."""
    return seen.held is not None and (seen.late_ratio or 0.0) > high and seen.tau > _FAR * seen.held


def _policy(seen: Evidence, band: tuple[float, float]) -> Judgement:
    """A controller, where no constant can be counted on."""
    tau, norm_type = seen.tau, seen.history.norm_type
    why = _why_no_constant(seen)
    if norm_type != 2.0:
        other = f"TargetRatio follows L2 norms; these are of type {norm_type:g}"
        return "use_policy", ClipNorm(tau, norm_type), [*_outside(seen, band), why, other]
    above = _CAP * max(tau, seen.level_of_end()) if seen.known >= _KNOWN else _CAP_UNKNOWN * tau
    cap = float(f"{above:.3g}")
    initial = float(f"{min(seen.level_of_start(), cap):.3g}")
    policy = TargetRatio(*band, cap=cap, initial=initial)
    follows = f"{policy} follows them, never above its cap"
    return "use_policy", policy, [*_outside(seen, band), why, follows]


def _why_no_constant(seen: Evidence) -> str:
    tau = seen.tau
    moves = seen.moves_at(tau)
    would = f"{tau:g} would clip {100 * seen.ratio(tau):.0f} % of the next run"
    if seen.known < _KNOWN:
        shows = f"the first {100 * seen.known:.0f} %" if seen.known >= 0.01 else "next to nothing"
        return (
            f"clipped so much, {seen.history.optimizer} gets on slowly: this run shows {shows} of "
            f"what one at {tau:g} goes through, and no constant can be read from that"
        )
    if moves > _STEADY:
        return (
            f"the norms drift: {would}, but not evenly over it ({_deviates(moves)}), so no "
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
    where = "below" if ratio < low else "inside" if ratio <= band[1] else "above"
    told = [
        f"{over(seen)} {100 * ratio:.0f} % were clipped{at}, {where} the band of {_percent(band)}"
    ]
    if ratio < low / 2 and (spike := seen.greatest_spike()) > _SPIKE:
        told.append(
            f"so few would do, but for a norm {spike:.3g} times what is usual: a threshold guards "
            "against the next one"
        )
    return told


def _another_measure(policy: str) -> str:
    clips = f"{policy} clips by another measure"
    if "," in policy:  # one a group, or one an optimizer
        clips = "this run clips parts of the gradient, each by a policy of its own"
    return f"the band and this threshold are about the global norm; {clips}"


def remarks(seen: Evidence, verdict: Verdict) -> list[str]:
    """What holds whatever the verdict."""
    found = []
    ratio = None if seen.history.not_zeroed else seen.late_ratio
    optimizer = seen.history.optimizer
    if ratio is not None and ratio > 0.5:
        if seen.steps_follow_the_gradient:
            found.append(
                f"with {optimizer}, clipping {100 * ratio:.0f} % of the steps makes the threshold a cap on "
                "the learning rate"
            )
        elif rescales(optimizer):
            found.append(
                f"{optimizer} rescales every parameter's gradient by itself, so clipping most steps "
                "by a constant evens out how long the gradients are, and seldom changes more (two "
                "of twenty-five jobs ended better so: compare the losses); a threshold near the top of "
                "the normal range guards it against spikes"
            )
    plain, share = seen.late.ratio(seen.tau), seen.ratio(seen.tau)
    if abs(plain - share) > 0.02 and seen.known >= _KNOWN:
        slower = "slower" if share > plain else "faster"
        found.append(
            f"{100 * plain:.0f} % of this run's norms are above {seen.tau:g}, but a run that is "
            f"clipped there by {optimizer} is {slower} past the large ones: {100 * share:.0f} %"
        )
    if (too_fast := seen.too_fast()) and too_fast[1]:
        found.append(f"{too_fast[0]}: lower it first; {_NO_CURE}")
    if verdict != "fix_training":
        found.extend(f"to be mended first: {message}" for message in seen.critical())
    # Where SGD is clipped nearly always, that is what it stands still for.
    capped = seen.steps_follow_the_gradient and (ratio or 0.0) > 0.5
    still = None if verdict == "fix_training" or too_fast or capped else seen.history.standstill()
    if still:
        found.append(
            f"{still}: where it should fall, look at the learning rate before the threshold"
        )
    if seen.current_threshold is None and seen.history.policy not in {"", "ObserveOnly"}:
        found.append(_another_measure(seen.history.policy))
    if verdict in {"change", "not_needed"}:
        found.append(
            "a constant is provisional: clipping changes the run it was read from, so check the "
            "share again on the next run"
        )
    return found


def _fold(seen: Evidence) -> str:
    return f"{seen.fall:.0f}-fold" if seen.fall < 10_000 else "more than 10,000-fold"


def _deviates(moves: float) -> str:
    return f"from one eighth to the next by a standard deviation of {100 * moves:.0f} points"


def _times(stride: float) -> str:
    return f"{100 * stride:.0f} % of" if stride < 1.0 else f"{stride:.1f} times"


def _percent(band: tuple[float, float]) -> str:
    return f"{100 * band[0]:.0f}–{100 * band[1]:.0f} %"
