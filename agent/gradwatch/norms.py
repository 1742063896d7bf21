"""Gradients → Measurement: every tensor's norm and the total, by functions that only read.

float32 sums of squares lose accuracy as tensors grow (torch's own total norm is off by 1e-3 at
25 million elements in one tensor), so large tensors are summed in chunks and chunks are added up
in float64: closer to the true norm, and faster. 16-bit gradients are summed in float32.
"""

from __future__ import annotations

import math
from math import hypot, sqrt
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from gradwatch.listing import Listing
from gradwatch.records import Measurement
from gradwatch.shards import Shards, local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Meter", "combine", "fault", "max_abs", "tensor_norms"]

# Past numpy's dispatch to other array types, which costs as much again as the product.
_vdot = getattr(np.vdot, "_implementation", np.vdot)
_LARGE = 1 << 16  # elements; from here on torch's dot product, on all threads, is faster
_CHUNK = 1 << 20  # elements; a float32 dot product of this length is right to about 1e-6
_HALF_CHUNK = 1 << 16
_TINY = 1e-15  # squares below this one's lose digits in float32
_HALF = (torch.float16, torch.bfloat16)
_dtype = attrgetter("dtype")


class Meter:
    """Measures the same parameters step after step; remembers which tensor is summed how."""

    def __init__(self, norm_type: float = 2.0) -> None:
        self.norm_type = norm_type
        self._listing = Listing()
        self._dtypes: list[torch.dtype] = []  # of the gradients: a layer may turn half precision
        self._plan = _Plan([], [], [], [], [])
        self._shards: Shards | None = None

    @property
    def repeats(self) -> bool:
        """Whether a parameter was listed more than once in the last list that was measured."""
        return self._listing.first is not None

    def measure(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], scale: float = 1.0
    ) -> Measurement:
        """The true norm of each gradient and of all together: ‖g‖_p / scale; changes nothing.

        A parameter that is listed twice is measured once; the measurement lists it once, too.

        `scale` is the loss scale that the gradients in memory still carry. A norm that is not
        finite though every element is (squares that overflow), or 0 though an element is not
        (squares that underflow), is worked out again in float64; what is still non-finite then
        is a NaN or an inf.
        """
        norm_type = self.norm_type
        listing = self._listing
        changed = listing.changed(params)
        if listing.first is not None:
            params = [params[i] for i in listing.first]
            grads = [grads[i] for i in listing.first]
        dtypes = list(map(_dtype, grads))
        if changed or dtypes != self._dtypes:
            self._dtypes = dtypes
            self._shards = Shards.of(grads)
            self._plan = _plan(list(map(local, grads)), norm_type)
        held = grads if self._shards is None else list(map(local, grads))
        try:
            norms = _norms(held, norm_type, self._plan)
        except (RuntimeError, NotImplementedError, TypeError):
            # A gradient changed its layout (sparse, not contiguous) since the plan was made.
            self._plan = _plan(held, norm_type)
            norms = _norms(held, norm_type, self._plan)
        total = hypot(*norms) if norm_type == 2.0 else combine(norms, norm_type)
        if not _TINY < total < math.inf:
            norms = _settled(norms, held, norm_type)
            total = combine(norms, norm_type)
        if self._shards is not None:
            norms = self._shards.norms(norms, norm_type)
            total = combine(norms, norm_type)
        if scale != 1.0:
            norms = [n / scale for n in norms]
            total /= scale
        return Measurement(total, norm_type, norms, params, grads, scale)


def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> list[float]:
    """‖t‖_p of each tensor, in order; squares may overflow to inf (see `Meter.measure`)."""
    held = list(map(local, tensors))
    norms = _norms(held, norm_type, _plan(held, norm_type))
    shards = Shards.of(tensors)
    return norms if shards is None else shards.norms(norms, norm_type)


def max_abs(grads: Sequence[Tensor]) -> float:
    """The greatest absolute value of any element; 0.0 without gradients."""
    return max(tensor_norms(grads, math.inf), default=0.0)


def fault(tensor: Tensor) -> Literal["nan", "inf", "nan+inf"] | None:
    """Which non-finite values this rank holds of a tensor, None where it holds none."""
    tensor = local(tensor)
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    nan = bool(torch.isnan(values).any())
    inf = bool(torch.isinf(values).any())
    if nan and inf:
        return "nan+inf"
    return "nan" if nan else "inf" if inf else None


class _Plan(NamedTuple):
    """Positions of the tensors by how their norms are taken."""

    dot: list[int]  # BLAS, through numpy: half the cost of a torch call for a small tensor
    large: list[int]
    foreach: list[int]
    half: list[int]
    other: list[int]


def _plan(tensors: Sequence[Tensor], norm_type: float) -> _Plan:
    plan = _Plan([], [], [], [], [])
    for i, tensor in enumerate(tensors):
        euclidean = norm_type == 2.0 and tensor.is_cpu and not tensor.is_complex()
        if tensor.layout is not torch.strided or tensor.numel() == 0:
            kind = plan.other
        elif euclidean and tensor.numel() > _LARGE:
            kind = plan.large
        elif tensor.dtype in _HALF:
            kind = plan.half
        elif euclidean and type(tensor) is torch.Tensor and not tensor.requires_grad:
            kind = plan.dot
        else:
            kind = plan.foreach
        kind.append(i)
    return plan


def _norms(tensors: Sequence[Tensor], norm_type: float, plan: _Plan) -> list[float]:
    if len(plan.dot) == len(tensors):
        return [sqrt(_vdot(x, x)) for x in [t.numpy() for t in tensors]]
    norms = [0.0] * len(tensors)
    for i in plan.dot:
        x = tensors[i].numpy()
        norms[i] = sqrt(_vdot(x, x))
    for i in plan.large:
        norms[i] = _large_norm(tensors[i])
    for i in plan.other:
        norms[i] = _wide_norm(tensors[i], norm_type)
    for index, dtype in ((plan.foreach, None), (plan.half, torch.float32)):
        if index:
            found = torch._foreach_norm([tensors[i] for i in index], norm_type, dtype=dtype)
            for i, norm in zip(index, _read(found), strict=True):
                norms[i] = norm
    return norms


def _read(norms: Sequence[Tensor]) -> list[float]:
    if norms[0].is_cpu:
        return [norm.item() for norm in norms]
    values: list[float] = torch.stack(list(norms)).tolist()  # one wait for the device
    return values


def _large_norm(tensor: Tensor) -> float:
    flat = tensor.reshape(-1)
    if tensor.dtype in _HALF:
        parts = torch._foreach_norm(torch.split(flat, _HALF_CHUNK), 2.0, dtype=torch.float32)
        return hypot(*(part.item() for part in parts))
    if flat.numel() <= _CHUNK:
        return sqrt(torch.dot(flat, flat).item())
    return math.sqrt(math.fsum(torch.dot(c, c).item() for c in torch.split(flat, _CHUNK)))


def _settled(norms: Sequence[float], tensors: Sequence[Tensor], norm_type: float) -> list[float]:
    """Norms beyond float32's range, worked out again in float64.

    A NaN is one already: squares do not make one. Whether an inf or a 0 is one, the greatest element
    of each tensor tells, in one call for all: a gradient that stays so costs little more than others.
    """
    unsure = [i for i, n in enumerate(norms) if not (_TINY < n < math.inf or math.isnan(n))]
    plain = [i for i in unsure if _is_plain(tensors[i])]
    peaks: dict[int, float] = {}
    if plain:
        found = torch._foreach_norm([tensors[i] for i in plain], math.inf)
        peaks = dict(zip(plain, _read(found), strict=True))
    settled = list(norms)
    for i in unsure:
        peak = peaks.get(i, 1.0)
        certain = peak == 0.0 or not math.isfinite(peak)
        settled[i] = peak if certain else _wide_norm(tensors[i], norm_type)
    return settled


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.numel() > 0 and not tensor.is_complex()


def _wide_norm(tensor: Tensor, norm_type: float) -> float:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    if values.numel() == 0:
        return 0.0
    # The absolute value of a complex64 may overflow, though both of its parts are finite.
    values = values.to(torch.complex128) if values.is_complex() else values.double()
    # Squares relative to the greatest element stay in range, those of float64 too.
    peak = float(values.abs().max())
    if peak == 0.0 or not math.isfinite(peak):
        return peak
    return peak * float(torch.linalg.vector_norm(values / peak, norm_type))


def combine(norms: Sequence[float], norm_type: float) -> float:
    """The norm of all tensors together, from the norm of each; 0.0 of none."""
    if not norms:
        return 0.0
    if norm_type == 2.0:
        return hypot(*norms)
    # max() and sums of powers do not reliably carry NaN: say it outright.
    if any(map(math.isnan, norms)):
        return math.nan
    peak = max(norms)
    if norm_type == math.inf or peak == 0.0 or math.isinf(peak):
        return peak
    return float(peak * sum((n / peak) ** norm_type for n in norms) ** (1.0 / norm_type))
