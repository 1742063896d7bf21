"""The frozen records that cross a border: measuring → deciding → carrying out → sinks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping  # noqa: TC003 - whoever reads a `RunInfo` as JSON needs it
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

__all__ = [
    "Batch",
    "Clamp",
    "Decision",
    "Event",
    "Finding",
    "Keep",
    "LayerNorms",
    "Measurement",
    "RunInfo",
    "RunStatus",
    "Scale",
    "ScaleEach",
    "Severity",
    "Skip",
    "StepRecord",
    "ThresholdChange",
]

Severity = Literal["info", "warning", "critical"]
RunStatus = Literal["running", "finished", "failed", "crashed"]


class Measurement(NamedTuple):
    """What one step's gradient was, before anything was done to it.

    `norm` is the true norm: of all tensors together, and with any loss scale divided out.
    `tensor_norms[i]` belongs to `grads[i]` and `params[i]`. The tensors in memory are
    `scale` times the true gradients (1.0 without a loss scale). `loss` is the step's, None where it
    is not known or the policy does not ask for it.
    """

    norm: float
    norm_type: float
    tensor_norms: Sequence[float]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    scale: float
    loss: float | None = None

    @property
    def finite(self) -> bool:
        """Whether every element of every gradient is finite."""
        return math.isfinite(self.norm)


class Keep(NamedTuple):
    """Leave the gradient as it is."""


class Scale(NamedTuple):
    """Multiply every gradient by min(1, max_norm / (norm + 1e-6)): one factor for all."""

    max_norm: float


class ScaleEach(NamedTuple):
    """Multiply gradient i by `factors[i]`: a number, or a tensor that broadcasts to it."""

    factors: Sequence[float | Tensor]


class Clamp(NamedTuple):
    """Clamp every element of the true gradient to [-limit, limit]."""

    limit: float


class Skip(NamedTuple):
    """Do not apply this step: parameters and optimizer state stay untouched.

    `reason` is a sentence for the record, `data` its evidence.
    """

    reason: str
    data: Mapping[str, Any] = MappingProxyType({})


Decision = Keep | Scale | ScaleEach | Clamp | Skip


class StepRecord(NamedTuple):
    """One optimizer step as it is stored: the same fields in the ring, the table and the frame.

    Norms are the true ones, in the policy's norm type. What is absent is NaN here and NULL in
    SQL; `time` is in Unix seconds. A step in which no parameter had a gradient has no `pre_norm` and
    is neither `nonfinite` nor `skipped`; a gradient that is 0 has a `pre_norm` of 0.
    """

    step: int
    time: float
    loss: float
    lr: float
    pre_norm: float
    post_norm: float
    threshold: float
    loss_scale: float
    clipped: bool
    nonfinite: bool
    nonfinite_loss: bool
    skipped: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at a step. `data` holds the evidence and is JSON-able."""

    kind: str
    step: int
    time: float
    severity: Severity
    message: str
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rank: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A conclusion about a run: what is wrong, the steps it rests on, and what to do."""

    finding: str
    severity: Severity
    first_step: int
    last_step: int
    message: str
    advice: str
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class ThresholdChange:
    """A request to clip otherwise from now on: by a constant `threshold`, or by a `policy`.

    `policy` is as `Policy.describe` gives it. `id` counts the requests of a store.
    """

    id: int
    threshold: float | None
    policy: Mapping[str, Any] | None
    requested_by: str
    reason: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class RunInfo:
    """Who a run is. Known before its first step; `uid` and `name` may be settled by the store.

    `uid_source` says whether `uid` came from a checkpoint ("state"), from the user ("setting"),
    from the launcher ("launcher") or is new ("fresh"). `leader` is the ring of rank 0 on the other
    ranks, whose runs it is. `recovered`: its process is gone, another one stores its ring.

    `start_step` is the number that the ring's first step has there. Of a run that goes on under its
    id without a state the store knows better (see `sinks.resume`): what `Sink.open` returns has the
    step at which the attempt begins, and the sink is handed all step numbers counted from there.
    `counter` is how many steps the optimizer said that it had applied before; None where it does
    not say. `after`: the ring whose steps `start_step` goes on from, where the state was saved
    before the store had said at which step that ring begins.
    """

    uid: str
    uid_source: Literal["state", "setting", "launcher", "fresh"]
    name: str
    job: str
    ring: str
    host: str
    pid: int
    rank: int
    world_size: int
    started_at: float
    start_step: int
    metrics_url: str | None
    tags: Mapping[str, Any]
    settings: Mapping[str, Any]
    leader: str | None = None
    recovered: bool = False
    counter: int | None = None
    after: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """What a sink is handed: the ring's content between two cursor positions, decoded.

    `steps` is a structured array of `recorder.STEP_DTYPE`. `dropped` counts records between
    the cursors that were overwritten or torn before anyone read them.
    """

    steps: np.ndarray[Any, np.dtype[np.void]]
    events: Sequence[Event]
    layers: Sequence[LayerNorms]
    findings: Sequence[Finding]
    first: tuple[int, int]
    last: tuple[int, int]
    dropped: Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerNorms:
    """Every parameter's gradient norm and weight norm at one step (NaN where not known)."""

    step: int
    parameters: Sequence[str]
    grad_norms: Sequence[float]
    weight_norms: Sequence[float]
