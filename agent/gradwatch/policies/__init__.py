"""The clipping policies, one a file."""

from gradwatch.policies.adaptive_gradient_clip import AdaptiveGradientClip
from gradwatch.policies.base import Policy
from gradwatch.policies.clip_layer_norm import ClipLayerNorm
from gradwatch.policies.clip_norm import ClipNorm
from gradwatch.policies.clip_value import ClipValue
from gradwatch.policies.observe_only import ObserveOnly
from gradwatch.policies.percentile_clip import PercentileClip
from gradwatch.policies.registry import build, parse
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
    "parse",
]
