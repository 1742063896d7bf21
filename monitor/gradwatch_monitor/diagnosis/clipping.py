"""What is wrong with the threshold, and with where the loop clips."""

from __future__ import annotations

import math

import numpy as np

from gradwatch.habits import ClippedTwice
from gradwatch_monitor.diagnosis.training import spikes
from gradwatch_monitor.diagnosis.window import Rule, Sign, Window
from gradwatch_monitor.rerun import AS_LONG_AS_THE_GRADIENT, rescales

__all__ = [
    "RULES",
    "clipping_every_step",
    "clipping_keeps_it_alive",
    "clipping_most_steps",
    "not_unscaled",
    "threshold_never_reached",
    "value_taken_for_a_norm",
]

_RECENT = 500
_AT_LEAST = 200
_BY_ELEMENT = {"ClipValue", "ClipLayerNorm", "AdaptiveGradientClip"}
_FAR_ABOVE = 10.0  # times the threshold


def clipping_every_step(window: Window) -> Sign | None:
    """All but one in twenty steps are clipped by the global norm."""
    return _clipped(window, "clipping_every_step", 0.95)


def clipping_most_steps(window: Window) -> Sign | None:
    """More than half of the steps are."""
    return _clipped(window, "clipping_most_steps", 0.5)


def _clipped(window: Window, finding: str, at_least: float) -> Sign | None:
    recent = window.last(_RECENT).held
    if recent.finite.sum() < _AT_LEAST or not math.isfinite(recent.constant):
        return None
    share = recent.clip_ratio
    if not share:
        return None
    if rescales(recent.optimizer):
        meaning = (
            f"{recent.optimizer} rescales every parameter by itself, so this evens out how long the "
            "gradients are, and seldom changes more; but the threshold guards against nothing that "
            "is unusual"
        )
    elif recent.optimizer in AS_LONG_AS_THE_GRADIENT:
        meaning = "the threshold is a cap on the learning rate"
    else:
        meaning = "the threshold has a part in most steps, and guards against nothing unusual"
    return Sign(
        finding, "warning", share / at_least, recent.span(recent.clipped),
        f"{100 * share:.0f} % of {_steps(recent)} were clipped at {recent.constant:g}: {meaning}",
        "gradwatch recommend names a threshold near the top of the usual norms. If the loss is "
        "unsteady without it, the learning rate is too high or the initialisation bad.",
        "rule of thumb: a threshold belongs near the top of the normal range",
        {"share": share, "threshold": recent.constant},
    )  # fmt: skip


def _steps(recent: Window) -> str:
    """The steps that a clip ratio is of, in words."""
    finite = int(recent.finite.sum())
    if finite == len(recent):
        return f"the last {finite} steps"
    return f"the {finite} steps with a finite norm among the last {len(recent)}"


def threshold_never_reached(window: Window) -> Sign | None:
    """Nothing is clipped while the loss leaps."""
    recent = window.last(_RECENT).held
    loss = recent.loss[np.isfinite(recent.loss)]
    if (
        not math.isfinite(recent.constant)
        or recent.clipped.any()
        or not len(loss)
        or not np.isfinite(recent.pre_norm).any()
        or loss.min() < 0
        or math.isnan(window.first_loss)
    ):
        return None
    at = spikes(loss, window.first_loss)
    if not len(at):
        return None
    top = float(np.nanmax(recent.pre_norm))
    return Sign(
        "threshold_never_reached", "warning", len(at) / 3, recent.span(),
        f"the loss leapt up {len(at)} times in the last {len(recent)} steps and nothing was clipped: "
        f"the greatest norm there, {top:.3g}, is under the threshold of {recent.constant:g}",
        "Lower the threshold to near the top of the usual norms (gradwatch recommend).",
        "Pascanu et al. 2013, section 3.2",
        {"threshold": recent.constant, "greatest_norm": top, "spikes": len(at)},
    )  # fmt: skip


def value_taken_for_a_norm(window: Window) -> Sign | None:
    """ClipValue at what would be a norm's threshold: no element ever comes near it."""
    limit = window.policy.get("clip_value")
    recent = window.last(_RECENT)
    finite, share = int(recent.finite.sum()), recent.clip_ratio
    if window.policy.get("policy") != "ClipValue" or not limit or finite < _AT_LEAST:
        return None
    above = float((recent.pre_norm > limit).sum()) / finite
    if above <= 0.0 or share is None or share > 0.01:
        return None
    return Sign(
        "value_taken_for_a_norm", "warning", above / 0.1, recent.span(),
        f"{100 * above:.0f} % of the last {finite} norms are above {limit:g}, but "
        f"ClipValue({limit:g}) bounds each element, and changed {100 * share:.0f} % of the steps",
        f"ClipNorm({limit:g}) bounds the norm; a bound by value has to be of the elements' size.",
        "torch.nn.utils.clip_grad_value_ against clip_grad_norm_",
        {"clip_value": limit, "above": above},
    )  # fmt: skip


def clipping_keeps_it_alive(window: Window) -> Sign | None:
    """Norms far above the threshold again and again: without it the run would be gone."""
    recent = window.last(1000).held
    norms = recent.pre_norm
    known = norms[np.isfinite(norms)]
    # The steps of an adaptive optimizer are as long without clipping, which keeps nothing alive.
    adaptive = rescales(recent.optimizer)
    if len(known) < _AT_LEAST or not math.isfinite(recent.constant) or adaptive:
        return None
    if len(np.unique(recent.threshold[np.isfinite(recent.threshold)])) > 1:
        return (
            None  # it follows the norms: as low as they are usual, with every hard batch far above
        )
    far = norms > _FAR_ABOVE * recent.constant
    usual = float(np.median(known))
    if usual > recent.constant * 3:  # the threshold is low, the norms need not be wild
        return None
    share = float(far.sum()) / len(known)
    if share <= 0:
        return None
    return Sign(
        "clipping_keeps_it_alive", "warning", share / 0.01, recent.span(far),
        f"{100 * share:.1f} % of the last {len(known)} norms are more than {_FAR_ABOVE:g} times "
        f"the threshold of {recent.constant:g}, the usual one is {usual:.3g}",
        "Clipping alone keeps this run going: lower the learning rate, or look at the "
        "initialisation and the architecture; keep the threshold meanwhile.",
        "bugs of gradient clipping: clipping as the only thing that keeps a run alive",
        {"share": share, "threshold": recent.constant},
    )  # fmt: skip


def not_unscaled(window: Window) -> Sign | None:
    """The loop clipped the scaled gradients: true norm × loss scale ends at one number."""
    recent = window.last(_AT_LEAST)
    scaled = recent.pre_norm * recent.loss_scale
    known = scaled[np.isfinite(scaled) & (recent.loss_scale > 1.0)]
    if len(known) < 50:
        return None
    top = float(known.max())
    wall = float((known >= top * (1 - 1e-4)).mean())
    if top <= 0 or wall < 0.3:
        return None
    if not _is_of_scaled(recent, wall, top):
        return None
    return Sign(
        "not_unscaled", "critical", wall / 0.5, recent.span(),
        f"{100 * wall:.0f} % of the last {len(known)} norms are exactly {top:.3g} before the loss "
        "scale is taken off: the loop clips gradients that are still scaled",
        "Call scaler.unscale_(optimizer) before clip_grad_norm_, or take the loop's own clip out "
        "and let gradwatch clip, which knows the scale.",
        "PyTorch, Automatic mixed precision examples: gradient clipping",
        {"limit": top, "share": wall},
    )  # fmt: skip


def _is_of_scaled(recent: Window, wall: float, top: float) -> bool:
    """Whether norms end at one number when scaled rather than when not.

    At one scale they do both, or neither: then by which of the numbers somebody may have set.
    """
    true = recent.pre_norm[np.isfinite(recent.pre_norm) & (recent.loss_scale > 1.0)]
    scales = recent.loss_scale[np.isfinite(recent.pre_norm) & (recent.loss_scale > 1.0)]
    if scales.max() == scales.min():
        return top / float(scales[0]) < ClippedTwice.LEAST_SET
    return wall > float((true >= float(true.max()) * (1 - 1e-4)).mean())


RULES: tuple[Rule, ...] = (
    clipping_every_step,
    clipping_most_steps,
    threshold_never_reached,
    value_taken_for_a_norm,
    clipping_keeps_it_alive,
    not_unscaled,
)
