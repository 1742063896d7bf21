"""What the layers' norms show: a rate too high for the weights, gradients that vanish, one layer that is all."""

from __future__ import annotations

import math

import numpy as np

from gradwatch_monitor.diagnosis.training import usable
from gradwatch_monitor.diagnosis.window import Array, Rule, Sign, Window

__all__ = [
    "RULES",
    "dominating_layer",
    "learning_rate_too_high",
    "relative_rate",
    "vanishing_gradients",
]

_SAMPLES = 3
_LAYERS = 4  # tensors, below which nothing is said of one among them
_VANISHED = 4.0  # decades between the greatest and the least gradient in units of its weight
_SHARE = 0.95  # of the squared norm
# Whose steps are about as long as the learning rate for every weight, whatever its gradient.
_BY_RATE = {"Adam", "AdamW", "NAdam", "RAdam", "Adamax"}
_LATEST = 5  # samples, by whose median a rate is judged
# Of the weights' size a step. Jobs that train well have 0.01 to 0.1 there once they are under way, those
# whose rate does harm 0.15 and more; and no job that learns nothing has 0.1 for another reason.
_TOO_HIGH, _IN_VAIN = 0.15, 0.1
_LEARNT = 0.9  # of the first loss


def relative_rate(window: Window) -> float | None:
    """How far a step moves a weight, in units of the weights' root mean square; the latest samples'.

    None for optimizers whose steps are as long as their gradients, for parameter groups of different
    rates, where there is no network (an image is optimized), or not three samples of its weights.
    """
    layers, settings = window.layers, window.settings
    alone = settings.get("groups") == 1 or len(set(settings.get("learning_rates", ()))) == 1
    count = settings.get("parameters")
    if layers is None or len(layers.names) < _LAYERS or window.optimizer not in _BY_RATE:
        return None
    if not count or not alone:
        return None
    norms = np.sqrt((layers.weight_norm**2).sum(axis=1))
    sampled = np.isfinite(norms) & (norms > 0)
    known = np.isfinite(window.lr)
    if sampled.sum() < _SAMPLES or not known.any():
        return None
    at, size = layers.step[sampled][-_LATEST:], norms[sampled][-_LATEST:] / math.sqrt(count)
    rate = np.interp(at, window.step[known], window.lr[known])
    return float(np.median(rate / size))


def learning_rate_too_high(window: Window) -> Sign | None:
    """Each step of Adam moves each weight by a good part of its size, at all times."""
    relative = relative_rate(window)
    if not relative:
        return None
    loss, first = usable(window.loss), usable(window.first_losses)
    learns = not len(loss) or not len(first) or np.median(loss[-100:]) < _LEARNT * first[0]
    rate = float(window.lr[np.isfinite(window.lr)][-1])
    return Sign(
        "learning_rate_too_high", "warning" if learns else "critical", relative / (_TOO_HIGH if learns else _IN_VAIN),
        window.span(),
        f"at a learning rate of {rate:g} {window.optimizer} moves each weight by up to "
        f"{100 * relative:.0f} % of the weights' size a step; some 0.1 % is usual",
        "Lower the learning rate by 10 to 100, and start anew: the weights have been carried off. "
        "No clipping mends that, as the step's length does not hang on the gradient's.",
        "Kingma, Ba 2015, Adam, section 2.1 (its step is bounded by the rate); CS231n, Neural networks "
        "3: ratio of weights and updates",
        {"relative": relative, "learning_rate": rate},
    )  # fmt: skip


def vanishing_gradients(window: Window) -> Sign | None:
    """Weight matrices whose gradient is a ten-thousandth of another's, each in units of its weight."""
    layers = window.layers
    if layers is None:
        return None
    weights = {
        i: float(np.median(known))
        for i, name in enumerate(layers.names)
        if "weight" in name
        and "norm" not in name
        and len(known := _positive(layers.weight_norm[:, i]))
    }
    kept = [i for i in weights if len(_positive(layers.grad_norm[:, i])) >= _SAMPLES]
    if len(kept) < 3:
        return None
    level = np.array([np.median(_positive(layers.grad_norm[:, i])) / weights[i] for i in kept])
    decades = float(np.log10(level.max() / level.min()))
    least = layers.names[kept[int(level.argmin())]]
    if decades <= 0:
        return None
    return Sign(
        "vanishing_gradients", "warning", decades / _VANISHED,
        (int(layers.step[0]), int(layers.step[-1])),
        f"the gradient of {least} is {level.min():.2g} of its weight, {10**decades:.0f} times less "
        "than that of the layer with the most",
        "It learns next to nothing: residual connections, normalisation, another activation or "
        "initialisation, gates in a recurrent network. No clipping mends that.",
        "Hochreiter 1991; Pascanu et al. 2013; Glorot, Bengio 2010",
        {"parameter": least, "decades": decades},
    )  # fmt: skip


def dominating_layer(window: Window) -> Sign | None:
    """One parameter is nearly all of the global norm: it alone decides what is clipped."""
    layers = window.layers
    if layers is None or len(layers.names) < _LAYERS:
        return None
    squares = layers.grad_norm**2
    total = np.nansum(squares, axis=1)
    known = total > 0
    if known.sum() < _SAMPLES:
        return None
    shares = np.nan_to_num(squares[known] / total[known, None])
    median = np.median(shares, axis=0)
    top = int(median.argmax())
    share = float(median[top])
    return Sign(
        "dominating_layer", "info", share / _SHARE, (int(layers.step[0]), int(layers.step[-1])),
        f"{layers.names[top]} makes {100 * share:.0f} % of the squared gradient norm",
        "It alone decides when all others are clipped: a policy a parameter group, ClipLayerNorm "
        "or AdaptiveGradientClip treats each by its own.",
        "Brock et al. 2021, arXiv 2102.06171",
        {"parameter": layers.names[top], "share": share},
    )  # fmt: skip


def _positive(norms: Array) -> Array:
    return norms[np.isfinite(norms) & (norms > 0)]


RULES: tuple[Rule, ...] = (learning_rate_too_high, vanishing_gradients, dominating_layer)
