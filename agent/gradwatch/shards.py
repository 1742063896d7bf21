"""Gradients that are spread over ranks (DTensors of FSDP2 and tensor parallelism).

Every rank measures what it holds; one small all-reduce a device mesh makes global norms of it.
All ranks call these functions at the same steps, for the same tensors, in the same order.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Shards", "full", "is_spread", "local"]


def is_spread(tensor: Tensor) -> bool:
    """Whether this is a DTensor. Cheap where no job of this process uses them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The part that this rank holds; a plain tensor is its own."""
    if not is_spread(tensor):
        plain: Tensor = tensor
        return plain
    with torch.no_grad():
        if any(placement.is_partial() for placement in tensor.placements):
            whole = sys.modules["torch.distributed.tensor"].Replicate()
            placements = [whole if p.is_partial() else p for p in tensor.placements]
            tensor = tensor.redistribute(tensor.device_mesh, placements)
        held: Tensor = tensor.to_local()
        return held


def full(tensor: Any) -> Tensor:
    """The whole tensor, on every rank; a plain tensor is that already."""
    whole: Tensor = tensor.full_tensor() if is_spread(tensor) else tensor
    return whole


class Shards:
    """Which of a list of tensors are spread over which ranks."""

    def __init__(self, groups: list[tuple[Any, tuple[int, ...], list[int]]]) -> None:
        self._groups = groups  # mesh, its dimensions that are summed over, positions of the tensors

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self | None:
        """How these tensors are spread; None where every rank holds all of each."""
        groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        for i, tensor in enumerate(tensors):
            if not is_spread(tensor):
                continue
            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            dims = tuple(
                d for d, p in enumerate(placements) if not (p.is_replicate() or p.is_partial())
            )
            groups.setdefault((mesh, dims), []).append(i)
        if not groups:
            return None
        return cls([(mesh, dims, index) for (mesh, dims), index in groups.items()])

    def norms(self, held: Sequence[float], norm_type: float) -> list[float]:
        """Each tensor's norm over all ranks, from the norm of what this rank holds of it.

        In float64: ‖g‖_p^p has to lie within 1e±308, which that of any float32 gradient does for
        p up to 7.
        """
        norms = list(held)
        for mesh, dims, index in self._groups:
            values = torch.tensor(
                [norms[i] for i in index], dtype=torch.float64, device=mesh.device_type
            )
            if norm_type == math.inf:
                # A maximum may lose a NaN; a sum does not.
                faults = _reduce(mesh, dims, (values * 0.0), "SUM")
                found = _reduce(mesh, dims, values, "MAX") + faults
            else:
                found = _reduce(mesh, dims, values**norm_type, "SUM") ** (1.0 / norm_type)
            for i, norm in zip(index, found.tolist(), strict=True):
                norms[i] = norm
        return norms

    def ranks_with(self, here: bool) -> list[int]:
        """The ranks on which `here` is true, of those that share a tensor with this one."""
        from torch import distributed  # noqa: PLC0415

        flags = torch.zeros(distributed.get_world_size())
        flags[distributed.get_rank()] = here
        for mesh, dims, _ in self._groups:
            flags = _reduce(mesh, dims, flags.to(mesh.device_type), "MAX")
        return [rank for rank, flag in enumerate(flags.tolist()) if flag]


def _reduce(mesh: Any, dims: tuple[int, ...], values: Tensor, how: str) -> Tensor:
    from torch import distributed  # noqa: PLC0415

    for dim in dims:
        distributed.all_reduce(
            values, getattr(distributed.ReduceOp, how), group=mesh.get_group(dim)
        )
    return values
