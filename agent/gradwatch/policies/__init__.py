"""The clipping policies, one a file."""

from gradwatch.policies.base import Policy
from gradwatch.policies.clip_norm import ClipNorm
from gradwatch.policies.clip_value import ClipValue
from gradwatch.policies.observe_only import ObserveOnly
from gradwatch.policies.target_ratio import TargetRatio

__all__ = ["ClipNorm", "ClipValue", "ObserveOnly", "Policy", "TargetRatio"]
