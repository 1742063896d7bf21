"""What the layers' norms show: gradients that vanish on their way back, one layer that is all."""

from __future__ import annotations

import numpy as np

from gradwatch_monitor.diagnosis.window import Array, LayerSamples, Rule, Sign, Window

__all__ = ["RULES", "dominating_layer", "vanishing_gradients"]

_SAMPLES = 3
_VANISHED = 4.0  # decades between the greatest and the least gradient in units of its weight
_SHARE = 0.95  # of the squared norm


def vanishing_gradients(window: Window) -> Sign | None:
    """Weight matrices whose gradient is a ten-thousandth of another's, each in units of its weight."""
    layers = window.layers
    if layers is None:
        return None
    if (dead := _dead(layers)) is not None:
        return dead
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


def _dead(layers: LayerSamples) -> Sign | None:
    """Weights whose gradient is exactly 0 at every sample, while others' are not."""
    norms = layers.grad_norm
    there = np.isfinite(norms)
    dead = ((norms == 0) & there).sum(axis=0) >= np.maximum(_SAMPLES, there.sum(axis=0))
    names = [
        name for name, zero in zip(layers.names, dead, strict=True) if zero and "weight" in name
    ]
    if not names or not (norms > 0).any():
        return None
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    sampled = int(there[:, layers.names.index(names[0])].sum())
    return Sign(
        "vanishing_gradients", "warning", 2.0, (int(layers.step[0]), int(layers.step[-1])),
        f"the gradient of {names[0]}{others} is exactly 0 at each of {sampled} samples",
        "It learns nothing: units that are dead or saturated for every input (a lower learning rate, "
        "another initialisation or activation), or a graph cut by detach() or no_grad().",
        "Lu et al. 2019, Dying ReLU and initialization, arXiv 1903.06733",
        {"parameter": names[0], "parameters": len(names)},
    )  # fmt: skip


def dominating_layer(window: Window) -> Sign | None:
    """One parameter is nearly all of the global norm: it alone decides what is clipped."""
    layers = window.layers
    if layers is None or len(layers.names) < 4:
        return None
    largest = np.fmax.reduce(layers.grad_norm, axis=1, initial=0.0)
    known = largest > 0
    if known.sum() < _SAMPLES:
        return None
    # Over the largest: the squares of huge norms are beyond what a float holds.
    squares = (layers.grad_norm[known] / largest[known, None]) ** 2
    shares = np.nan_to_num(squares / np.nansum(squares, axis=1)[:, None])
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


RULES: tuple[Rule, ...] = (vanishing_gradients, dominating_layer)
