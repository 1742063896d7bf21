"""How far a step moves the weights, beside what they are: a learning rate that is too high for them."""

from __future__ import annotations

import math

import numpy as np

from gradwatch_monitor.diagnosis.training import usable
from gradwatch_monitor.diagnosis.window import Rule, Sign, Window
from gradwatch_monitor.rerun import AS_LONG_AS_THE_GRADIENT

__all__ = ["RULES", "learning_rate_too_high", "relative_to_norm"]

_AS_LONG_AS_THE_RATE = {"Adam", "AdamW", "NAdam", "RAdam", "Adamax"}  # for every weight
_SAMPLES, _LATEST = 3, 5  # of the weights: so many at least, the median of so many
_LAYERS = 4  # tensors; with fewer it is no network, but an image that is optimized
# Of the weights' size a step. Jobs that train well have 0.01 to 0.1 there once they are under way, those
# whose rate does harm 0.15 and more; and no job that learns nothing has 0.1 for another reason.
_TOO_HIGH, _IN_VAIN = 0.15, 0.1
_LEARNT = 0.9  # of the first loss


def learning_rate_too_high(window: Window) -> Sign | None:
    """Each step of Adam moves each weight by a good part of its size, at all times."""
    count = window.settings.get("parameters")
    if not count or window.optimizer not in _AS_LONG_AS_THE_RATE:
        return None
    if window.layers is None or len(window.layers.names) < _LAYERS:
        return None
    beside_norm = _rate_beside_norm(window)
    if not beside_norm:
        return None
    relative = beside_norm * math.sqrt(count)
    loss, first = usable(window.loss), usable(window.first_losses)
    learns = not len(loss) or not len(first) or np.median(loss[-100:]) < _LEARNT * first[0]
    rate = float(window.lr[np.isfinite(window.lr)][-1])
    return Sign(
        "learning_rate_too_high", "warning" if learns else "critical",
        relative / (_TOO_HIGH if learns else _IN_VAIN), window.span(),
        f"at a learning rate of {rate:g} {window.optimizer} moves each weight by up to "
        f"{100 * relative:.0f} % of the weights' size a step; some 0.1 % is usual",
        "Lower the learning rate by 10 to 100, and start anew: the weights have been carried off. "
        "No clipping mends that: how long these steps are does not depend on the gradient's norm.",
        "Kingma, Ba 2015, Adam, section 2.1 (its step is bounded by the rate); CS231n, Neural networks "
        "3: ratio of weights and updates",
        {"relative": relative, "learning_rate": rate},
    )  # fmt: skip


def relative_to_norm(window: Window) -> float | None:
    """How far a gradient of norm 1 moves the weights, in units of their norm, momentum counted in.

    None for optimizers whose steps are not as long as their gradients, and where it is not known.
    """
    if window.optimizer not in AS_LONG_AS_THE_GRADIENT:
        return None
    beside_norm = _rate_beside_norm(window)
    return beside_norm and beside_norm / (1.0 - float(window.settings.get("momentum", 0.0)))


def _rate_beside_norm(window: Window) -> float | None:
    """The learning rate over the norm of all weights, at their latest samples.

    None for parameter groups of different rates, and where the weights were not sampled often enough.
    """
    layers, settings = window.layers, window.settings
    if layers is None:
        return None
    if settings.get("groups") != 1 and len(set(settings.get("learning_rates", ()))) != 1:
        return None
    norms = np.sqrt((layers.weight_norm**2).sum(axis=1))
    sampled = np.isfinite(norms) & (norms > 0)
    known = np.isfinite(window.lr)
    if sampled.sum() < _SAMPLES or not known.any():
        return None
    rate = np.interp(layers.step[sampled], window.step[known], window.lr[known])
    return float(np.median((rate / norms[sampled])[-_LATEST:]))


RULES: tuple[Rule, ...] = (learning_rate_too_high,)
