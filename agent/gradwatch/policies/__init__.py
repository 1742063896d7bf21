"""The clipping policies, one a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradwatch.errors import ConfigurationError
from gradwatch.policies.adaptive_gradient_clip import AdaptiveGradientClip
from gradwatch.policies.base import Policy
from gradwatch.policies.clip_layer_norm import ClipLayerNorm
from gradwatch.policies.clip_norm import ClipNorm
from gradwatch.policies.clip_value import ClipValue
from gradwatch.policies.observe_only import ObserveOnly
from gradwatch.policies.percentile_clip import PercentileClip
from gradwatch.policies.skip_spikes import SkipSpikes
from gradwatch.policies.target_ratio import TargetRatio
from gradwatch.policies.zclip import ZClip

__all__ = [
    "AdaptiveGradientClip",
    "ClipLayerNorm",
    "ClipNorm",
    "ClipValue",
    "ObserveOnly",
    "PercentileClip",
    "Policy",
    "SkipSpikes",
    "TargetRatio",
    "ZClip",
    "build",
]

if TYPE_CHECKING:
    from collections.abc import Mapping

_POLICIES: dict[str, type[Policy[Any]]] = {
    policy.__name__: policy
    for policy in (
        AdaptiveGradientClip,
        ClipLayerNorm,
        ClipNorm,
        ClipValue,
        ObserveOnly,
        PercentileClip,
        SkipSpikes,
        TargetRatio,
        ZClip,
    )
}


def build(description: Mapping[str, Any]) -> Policy[Any]:
    """The policy that `Policy.describe` described.

    Raises `ConfigurationError` where the name or an argument is wrong.
    """
    arguments = dict(description)
    name = arguments.pop("policy", None)
    if name not in _POLICIES:
        msg = f"no policy is called {name!r}; there are {', '.join(_POLICIES)}"
        raise ConfigurationError(msg)
    if "inner" in arguments:
        arguments["policy"] = build(arguments.pop("inner"))
    try:
        return _POLICIES[name](**arguments)
    except TypeError as error:
        msg = f"{name}: {error}"
        raise ConfigurationError(msg) from None
