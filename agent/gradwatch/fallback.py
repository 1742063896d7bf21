"""Clipping with torch's own functions: where ours failed before they changed anything."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradwatch.policies import ClipValue
from gradwatch.scaling import real_parts
from gradwatch.shards import full

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from gradwatch.part import Part
    from gradwatch.scaling import Carrier

__all__ = ["clip_plainly"]


def clip_plainly(
    optimizer: Optimizer,
    parts: list[Part],
    carrier: Carrier,
    report: Callable[[str, str], None],
    *,
    skip: bool,
) -> None:
    """Clip by the thresholds in force; `skip`: hide non-finite gradients. Reports what it could not.

    The policies by tensor and by unit have no counterpart in torch.
    """
    try:
        undone = _clip(optimizer, parts, carrier, skip=skip)
    except Exception as error:  # noqa: BLE001 - the border with the training loop
        report("clip", f"a step went unclipped ({type(error).__name__}: {error})")
    else:
        if undone:
            report("clip", f"a step went unclipped by {', '.join(undone)}")


def _clip(optimizer: Optimizer, parts: list[Part], carrier: Carrier, *, skip: bool) -> list[str]:
    scale = carrier.loss_scale(optimizer).in_memory
    undone = []
    seen: set[int] = set()  # parameters that are clipped already: one may be listed twice
    for part in parts:
        params = []
        for param in part.gradients(optimizer)[0]:
            if id(param) not in seen:
                seen.add(id(param))
                params.append(param)
        grads = [param.grad for param in params if param.grad is not None]
        if isinstance(part.policy, ClipValue):
            limit = part.policy.clip_value * scale
            for values in (one for grad in grads for one in real_parts(grad.detach())):
                values.clamp_(-limit, limit)
        elif not math.isnan(part.threshold):
            total = full(torch.nn.utils.get_total_norm(grads, part.policy.norm_type))
            if torch.isfinite(total):
                limit = part.threshold * scale
                torch.nn.utils.clip_grads_with_norm_(params, limit, total)
            elif skip:
                carrier.skip(params, grads)
        elif part.policy.changes_gradients:
            undone.append(str(part.policy))
    return undone
