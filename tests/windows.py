"""What the rules look at, made from arrays."""

import math

import numpy as np

from gradwatch_monitor.diagnosis import Window
from gradwatch_monitor.diagnosis.window import LayerSamples
from gradwatch_monitor.history import History


def history(norms, threshold=1.0, **facts):
    norms = np.asarray(norms, dtype=float)
    thresholds = np.full(len(norms), math.nan if threshold is None else threshold)
    clipped = norms > thresholds
    return History(norms, thresholds, clipped, ~np.isfinite(norms), **facts)


def window(loss, norms=None, **facts):
    """A window made of losses alone."""
    count = len(loss)
    no = np.zeros(count, dtype=bool)
    nan = np.full(count, math.nan)
    values = {
        "step": np.arange(float(count)), "loss": loss, "pre_norm": np.ones(count),
        "post_norm": np.ones(count), "threshold": nan, "loss_scale": nan, "lr": nan,
        "clipped": no,         "nonfinite": no, "nonfinite_loss": no, "skipped": no, "first_losses": loss[:200],
        "first_norms": np.ones(min(count, 200)), **facts,
    }  # fmt: skip
    if norms is not None:
        values |= {"pre_norm": norms, "first_norms": norms[:200]}
    return Window(**values)


def falling(count=600):
    """A loss that falls, with a little noise."""
    return np.geomspace(2.0, 0.1, count) * np.exp(
        0.02 * np.random.default_rng(0).normal(size=count)
    )


def layer_samples(weights, grads, names=None):
    """A sample every 50 steps: a row of norms for each."""
    weights, grads = np.array(weights, float), np.array(grads, float)
    names = names or [f"{i}.weight" for i in range(weights.shape[1])]
    return LayerSamples(np.arange(len(weights)) * 50.0, names, grads, weights)
