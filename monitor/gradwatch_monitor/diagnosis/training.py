"""The symptoms of exploding gradients: in the loss, in the weights, in the norms."""

from __future__ import annotations

import math

import numpy as np

from gradwatch_monitor.diagnosis.rates import stands_still
from gradwatch_monitor.diagnosis.window import Array, Rule, Severity, Sign, Window, usable

__all__ = [
    "RULES",
    "exploding_gradients",
    "exploding_weights",
    "loss_spikes",
    "no_convergence",
    "norm_drift",
    "oscillating_loss",
    "spikes",
]

_PASCANU = "Pascanu, Mikolov, Bengio 2013, On the difficulty of training recurrent neural networks"
_LEARNING_RATE = "Lower the learning rate (by 3 to 10), or warm it up"
_SPIKES = 3  # within the last 500 steps
_SWING = 0.5  # how far neighbouring losses go against each other
_BURST = math.log(4.0)  # log(q98 / median) within 100 steps
_DRIFT = math.log(2.0)  # of the level, over the window
_LEAST = 1e-12  # losses below it are 0
_AGAIN = 0.5  # of the first loss: a loss that rises from near 0 by little is no explosion
_NEARLY_ALL = 0.95  # of the steps with a finite norm
_GROWTH = math.log(3.0)  # of the weights, within the window
_GRAVE = math.log(10.0)  # less is seen where a policy learns well: its loss rises with what it wins


def spikes(loss: Array, start: float) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Where a loss leaps out of the 50 before it: 6 robust deviations, twofold, to half of the start.

    A converged run's flicker is none.
    """
    if len(loss) <= 50:
        return np.empty(0, dtype=np.intp)
    before = np.lib.stride_tricks.sliding_window_view(loss[:-1], 50)
    middle = np.median(before, axis=1)
    spread = 1.4826 * np.median(np.abs(before - middle[:, None]), axis=1)
    at = loss[50:]
    return 50 + np.flatnonzero((at > middle + 6 * spread) & (at > 2 * middle) & (at > 0.5 * start))


def loss_spikes(window: Window) -> Sign | None:
    """The loss leaps up again and again."""
    recent = window.last(500)
    if not len(usable(recent.loss)) or math.isnan(window.first_loss):
        return None
    finite = np.isfinite(recent.loss)
    steps, loss = recent.step[finite], recent.loss[finite]
    at = spikes(loss, window.first_loss)
    if not len(at):
        return None
    before = np.array([np.median(loss[i - 50 : i]) for i in at])
    worst = float((loss[at] / np.maximum(before, _LEAST)).max())
    return Sign(
        "loss_spikes", "warning", len(at) / _SPIKES, (int(steps[at[0]]), int(steps[at[-1]])),
        f"the loss leapt up {len(at)} times in the last {len(recent)} steps, {worst:.3g}-fold at "
        "worst",
        f"{_LEARNING_RATE}; clip nearer to the usual norm, or leave such steps out "
        "(SkipSpikes); look at the batches of those steps.",
        _PASCANU, {"spikes": len(at), "worst": worst},
    )  # fmt: skip


def oscillating_loss(window: Window) -> Sign | None:
    """The loss goes up and down by turns, and by much."""
    loss = usable(window.last(200).loss)
    if len(loss) < 100:
        return None
    moves = np.diff(loss)
    power = float(np.dot(moves, moves))
    if power == 0.0:
        return None
    # Independent noise gives -0.5 here, a loss that swings to and fro -1.
    turn = float(np.dot(moves[1:], moves[:-1])) / power
    swing = float(np.median(np.abs(moves)) / max(_LEAST, float(np.median(loss))))
    strength = min((-turn - _SWING) / 0.35, swing / 0.2)
    if strength <= 0:
        return None
    return Sign(
        "oscillating_loss", "warning", strength, window.last(200).span(),
        f"the loss swings to and fro: by {100 * swing:.0f} % from step to step, against the step "
        f"before ({turn:.2f}; noise has -0.5)",
        f"The steps overshoot: {_LEARNING_RATE.lower()}, or use less momentum.",
        _PASCANU, {"autocorrelation": turn, "swing": swing},
    )  # fmt: skip


def no_convergence(window: Window) -> Sign | None:
    """The loss blew up at the start and ended no lower than it began."""
    loss, first = usable(window.loss), usable(window.first_losses)
    norms = window.first_norms[: int(window.step[-1] + 1) // 5]  # as `recommend` looks at it
    norms = norms[np.isfinite(norms)]
    if len(loss) < 100 or len(first) < 20 or len(norms) < 20:
        return None
    begun, now = float(first[0]), float(np.median(loss[-len(loss) // 5 :]))
    leapt = float(np.quantile(norms, 0.98)) > 4.0 * float(np.median(norms))
    if now < begun or float(max(first.max(), loss.max())) < 1.3 * begun or not leapt:
        return None
    if stands_still(window):  # loss and norms leap from batch to batch
        return None
    return Sign(
        "no_convergence", "critical", now / begun, window.span(),
        f"the loss, {begun:.3g} at first, blew up and is now at {now:.3g}",
        f"{_LEARNING_RATE}, and start anew: where the weights are now, gradients say nothing.",
        _PASCANU, {"first": begun, "now": now},
    )  # fmt: skip


def exploding_gradients(window: Window) -> Sign | None:
    """The norms leap by factors within a hundred steps while the loss does not fall."""
    norms = window.pre_norm[np.isfinite(window.pre_norm) & (window.pre_norm > 0)]
    first = usable(window.first_losses)
    loss = usable(window.loss)
    if len(norms) < 200:
        return None
    if len(loss) >= 100 and len(first):
        now = float(np.median(loss[-100:]))
        lowest = min(float(np.median(part)) for part in np.array_split(loss, len(loss) // 50))
        learns = now < 0.2 * first[0] or (now < 0.8 * first[0] and now < 1.2 * lowest)
    else:  # norms that fell with the run are those of one that converges
        begun = window.first_norms[np.isfinite(window.first_norms)]
        learns = len(begun) > 0 and float(np.median(norms[-100:])) < 0.5 * float(np.median(begun))
    parts = np.array_split(norms, len(norms) // 100)
    bursts = np.array([np.log(np.quantile(p, 0.98) / np.median(p)) for p in parts])
    strength = float(np.median(np.sort(bursts)[-3:])) / _BURST
    if learns or strength <= 0.5:
        return None
    severity: Severity = "critical"
    unknown = ""
    if not len(loss):
        severity = "warning"
        unknown = " (whether the loss falls is not on record: agent.log(loss=loss))"
    elif stands_still(window):
        severity = "warning"
        unknown = " (the steps are clipped to so little that the loss cannot fall)"
    return Sign(
        "exploding_gradients", severity, strength, window.span(),
        f"within 100 steps the largest norms are {math.exp(float(bursts.max())):.3g} times the "
        f"median, again and again{unknown}",
        f"{_LEARNING_RATE}; look at the initialisation (recurrent weights above 1). Keep the "
        "tight threshold meanwhile.",
        _PASCANU, {"burst": math.exp(float(bursts.max()))},
    )  # fmt: skip


def exploding_weights(window: Window) -> Sign | None:
    """The weights grow by factors while the loss grows too."""
    layers, loss = window.layers, usable(window.loss)
    if layers is None or len(loss) < 100:
        return None
    known = np.isfinite(layers.weight_norm).all(axis=1)
    with np.errstate(over="ignore"):
        totals = np.hypot.reduce(layers.weight_norm[known], axis=1)  # huge ones, too
    if len(totals) < 3 or totals.min() <= 0 or not math.isfinite(totals[-1]):
        return None
    growth = math.log(totals[-1] / totals.min())
    now = float(np.median(loss[-50:]))
    lowest = min(float(np.median(part)) for part in np.array_split(loss, len(loss) // 50))
    # Where the run's beginning is not on record, its lowest loss stands for it.
    first = lowest if math.isnan(window.first_loss) else window.first_loss
    if now < 1.5 * min(first, lowest) or now < _AGAIN * first or growth <= 0:
        return None
    steps = layers.step[known]
    lowest_at = int(steps[int(totals.argmin())])
    anew = f"start from a checkpoint of about step {lowest_at:,}" if lowest_at else "start anew"
    severity: Severity = "critical" if growth >= _GRAVE else "warning"
    return Sign(
        "exploding_weights", severity, growth / _GROWTH, (int(steps[0]), int(steps[-1])),
        f"the weights' norm grew from {totals.min():.3g} to {totals[-1]:.3g} while the loss rose",
        f"{_LEARNING_RATE}, add weight decay, and {anew}.",
        _PASCANU, {"from": float(totals.min()), "to": float(totals[-1])},
    )  # fmt: skip


def norm_drift(window: Window) -> Sign | None:
    """The level of the norms rises over the window."""
    norms = window.pre_norm[np.isfinite(window.pre_norm) & (window.pre_norm > 0)]
    if len(norms) < 500:
        return None
    levels = np.log([np.median(part) for part in np.array_split(norms, 5)])
    back = float(np.minimum(np.diff(levels), 0.0).sum())
    rise = float(levels[-1] - levels[0]) + 2 * back  # what goes up and down is no drift
    if rise <= 0:
        return None
    low, high = math.exp(float(levels[0])), math.exp(float(levels[-1]))
    already = (window.clip_ratio or 0.0) > _NEARLY_ALL
    meaning = (
        "Nearly every step is clipped already, so the steps taken are no longer for it. "
        if already
        else "A constant threshold clips more and more of the steps: TargetRatio(cap=…) follows. "
    )
    return Sign(
        "norm_drift", "info", rise / _DRIFT, window.span(),
        f"the usual norm rose from {low:.3g} to {high:.3g}",
        f"{meaning}Norms that go on rising while the loss does too come before an explosion.",
        "Pascanu et al. 2013; Andrew et al. 2021, arXiv 1905.03871", {"from": low, "to": high},
    )  # fmt: skip


RULES: tuple[Rule, ...] = (
    loss_spikes,
    oscillating_loss,
    no_convergence,
    exploding_gradients,
    exploding_weights,
    norm_drift,
)
