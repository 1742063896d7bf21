"""The clip ratio: clipped steps over the steps that have a finite gradient norm.

Only such a step can be clipped. Steps with NaN or inf in the gradient, steps that a loss scaler
suppressed and steps without any gradient have no finite norm (`pre_norm` is NULL) and are in neither
number. Every reader divides here, so that all of them tell one ratio.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["clip_ratio", "clip_ratios", "without_gradient"]

Array = np.ndarray[Any, Any]


def clip_ratio(clipped: int, finite: int) -> float | None:
    """The ratio of so many clipped steps and steps with a finite norm; None without such a step."""
    return int(clipped) / int(finite) if finite else None


def clip_ratios(clipped: Array, finite: Array) -> Array:
    """The same of many stretches at once: NaN for a stretch without a finite norm."""
    ratios = np.full(len(finite), np.nan)
    np.divide(clipped, finite, out=ratios, where=np.asarray(finite) > 0)
    return ratios


def without_gradient(pre_norm: Array, nonfinite: Array, skipped: Array) -> Array:
    """Which steps had no gradient at all: those without a norm that nothing else explains.

    >>> nan = float("nan")
    >>> no = np.array([False, False])
    >>> without_gradient(np.array([nan, 0.0]), no, no).tolist()
    [True, False]
    """
    return np.asarray(np.isnan(pre_norm) & np.logical_not(nonfinite) & np.logical_not(skipped))
