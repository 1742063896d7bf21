"""Lists of parameters as they are from step to step: what is listed twice, and what has changed.

A parameter that is freed leaves its `id()` to the next one that is made, so lists are compared by
the parameters themselves, which are held weakly.
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["Listing", "every"]


class Listing:
    """Remembers the last list of parameters it was shown, and which entries are repetitions."""

    def __init__(self) -> None:
        self.refs: list[weakref.ref[Tensor]] = []
        # Positions of the first mention of each parameter; None where none is listed twice.
        self.first: list[int] | None = None

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters of the last list, in the same order."""
        refs = self.refs
        return len(refs) == len(params) and all(map(is_, params, [ref() for ref in refs]))

    def changed(self, params: Sequence[Tensor]) -> bool:
        """Whether this list differs from the last one; it is the last one from now on."""
        if self.holds(params):
            return False
        self.refs = list(map(weakref.ref, params))
        places: dict[int, int] = {}
        for i, param in enumerate(params):
            places.setdefault(id(param), i)
        self.first = list(places.values()) if len(places) < len(params) else None
        return True


def every(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all groups in their order, each once."""
    found = {id(param): param for group in optimizer.param_groups for param in group["params"]}
    return list(found.values())
