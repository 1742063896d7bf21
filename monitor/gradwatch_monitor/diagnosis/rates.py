"""How far a step moves the weights, beside what they are: a learning rate that is too high for them."""

from __future__ import annotations

import math

import numpy as np

from gradwatch_monitor.diagnosis.window import Array, Rule, Sign, Window, usable
from gradwatch_monitor.rerun import AS_LONG_AS_THE_GRADIENT

__all__ = ["RULES", "STILL", "STIRS", "learning_rate_too_high", "relative_to_norm", "stands_still"]

_AS_LONG_AS_THE_RATE = {"Adam", "AdamW", "NAdam", "RAdam", "Adamax"}  # for every weight
_SAMPLES, _LATEST = 3, 5  # of the weights: so many at least, the median of so many
_LAYERS = 4  # tensors; with fewer it is no network, but an image that is optimized
# Of the weights' size a step. Jobs that train well have 0.01 to 0.1 there once they are under way, those
# whose rate does harm 0.15 and more; where the loss has not fallen either, 0.1 is enough to say it.
_TOO_HIGH, _IN_VAIN = 0.15, 0.1
STILL = 0.95  # of the first loss
STIRS = 0.05  # of the weights' norm: moved by less, no loss is blown up, nor mended


def learning_rate_too_high(window: Window) -> Sign | None:
    """Each step of Adam moves each weight by a good part of its size, at all times."""
    count, sampled = window.settings.get("parameters"), _weights(window)
    if not count or sampled is None or window.optimizer not in _AS_LONG_AS_THE_RATE:
        return None
    at, norms = sampled
    known = np.isfinite(window.lr)
    if len(at) < _SAMPLES or not known.any() or _stays_zero(window):
        return None
    rates = np.interp(at, window.step[known], window.lr[known])[-_LATEST:]
    relative = float(np.median(rates / norms[-_LATEST:])) * math.sqrt(count)
    if not relative:
        return None
    rate, loss = float(np.median(rates)), usable(window.loss)
    learns = not len(loss) or not np.median(loss[-100:]) >= STILL * window.first_loss
    return Sign(
        "learning_rate_too_high", "warning" if learns else "critical",
        relative / (_TOO_HIGH if learns else _IN_VAIN), window.span(),
        f"at a learning rate of {rate:.3g} {window.optimizer} moves each weight by up to "
        f"{100 * relative:.0f} % of the weights' size a step; some 0.1 % is usual",
        "Lower the learning rate by 10 to 100, and start anew: the weights have been carried off. "
        "No clipping mends that: how long these steps are does not depend on the gradient's norm.",
        "Kingma, Ba 2015, Adam, section 2.1 (its step is bounded by the rate); CS231n, Neural networks "
        "3: ratio of weights and updates",
        {"relative": relative, "learning_rate": rate},
    )  # fmt: skip


def relative_to_norm(window: Window, samples: int = _SAMPLES) -> float | None:
    """How far a gradient of norm 1 that stays moves the weights a step, in units of their norm.

    At the highest learning rate of the run, momentum counted in. None for optimizers whose steps are not
    as long as their gradients, below so many `samples` of the weights, and where it is not known.
    """
    gain, sampled = window.settings.get("gain"), _weights(window)
    if not gain or sampled is None or window.optimizer not in AS_LONG_AS_THE_GRADIENT:
        return None
    _, norms = sampled
    if len(norms) < samples:
        return None
    rates = [*window.settings.get("learning_rates", ()), *window.lr[np.isfinite(window.lr)]]
    return max(rates, default=0.0) * float(gain) / float(np.median(norms[-_LATEST:]))


def stands_still(window: Window) -> bool:
    """Whether all its steps together, clipped as they were, cannot have moved the weights."""
    moves = relative_to_norm(window, samples=1)
    thresholds = window.threshold[np.isfinite(window.threshold)]
    if moves is None or len(thresholds) < len(window):
        return False
    return bool(moves * thresholds.max() * (window.step[-1] + 1) < STIRS)


def _weights(window: Window) -> tuple[Array, Array] | None:
    """The norm of all weights, and at which steps it was sampled.

    None where one learning rate does not stand for all, and for no network: an image that is optimized.
    """
    layers, settings = window.layers, window.settings
    one_rate = len(settings.get("learning_rates", ())) == 1
    if layers is None or not one_rate or len(layers.names) != settings.get("tensors"):
        return None
    if len(layers.names) < _LAYERS:
        return None
    norms = np.sqrt((layers.weight_norm**2).sum(axis=1))
    sampled = np.isfinite(norms) & (norms > 0)
    return layers.step[sampled], norms[sampled]


def _stays_zero(window: Window) -> bool:
    """Whether a tensor is all 0 and has no gradient: no rate moves it, and the weights' size tells nothing."""
    layers = window.layers
    return layers is not None and bool(((layers.weight_norm == 0) & (layers.grad_norm == 0)).any())


RULES: tuple[Rule, ...] = (learning_rate_too_high,)
