"""Training-health monitoring for PyTorch: clip, record and export every optimizer step.

import gradwatch

gradwatch.wrap(optimizer, model=model, clip=gradwatch.ClipNorm(1.0), run="bilstm")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradwatch._version import __version__
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
    from gradwatch.agent import Agent, wrap
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


# Loaded when they are asked for: Agent and wrap bring torch, which no command but the demo needs;
# Settings brings pydantic, which takes longer than all the rest here and which most jobs never name.
_LATER = {"Agent": "gradwatch.agent", "Settings": "gradwatch.config", "wrap": "gradwatch.agent"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    found = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return found
