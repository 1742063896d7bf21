"""Training-health monitoring for PyTorch: clip, record and export every optimizer step.

import gradwatch

gradwatch.wrap(optimizer, model=model, clip=gradwatch.ClipNorm(1.0), run="bilstm")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradwatch._version import __version__
from gradwatch.agent import Agent, wrap
from gradwatch.errors import (
    AlreadyWrappedError,
    ConfigurationError,
    GradwatchError,
    NonFiniteGradientError,
    NotWrappedError,
    RingError,
    RunNotFoundError,
    StoreError,
    StoreNotFoundError,
    StoreRevisionError,
)
from gradwatch.policies import (
    AdaptiveGradientClip,
    ClipLayerNorm,
    ClipNorm,
    ClipValue,
    ObserveOnly,
    PercentileClip,
    Policy,
    SkipSpikes,
    TargetRatio,
    ZClip,
)

if TYPE_CHECKING:
    from gradwatch.config import Settings

__all__ = [
    "AdaptiveGradientClip",
    "Agent",
    "AlreadyWrappedError",
    "ClipLayerNorm",
    "ClipNorm",
    "ClipValue",
    "ConfigurationError",
    "GradwatchError",
    "NonFiniteGradientError",
    "NotWrappedError",
    "ObserveOnly",
    "PercentileClip",
    "Policy",
    "RingError",
    "RunNotFoundError",
    "Settings",
    "SkipSpikes",
    "StoreError",
    "StoreNotFoundError",
    "StoreRevisionError",
    "TargetRatio",
    "ZClip",
    "__version__",
    "wrap",
]


def __getattr__(name: str) -> Any:
    # pydantic takes longer to load than all the rest here; most jobs never name Settings.
    if name == "Settings":
        from gradwatch.config import Settings  # noqa: PLC0415

        return Settings
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
