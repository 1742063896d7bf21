"""What the parameters are called, and their order in the model."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["ParameterNames"]


class ParameterNames:
    """Names from the model, else from an optimizer made of named parameters, else by position.

    The order is the model's where it is known: parameters earlier in it lie nearer the input.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = weakref.ref(model) if model is not None else None
        self._names: dict[int, str] = {}
        self._places: dict[int, int] = {}

    def of(self, params: Sequence[Tensor], optimizer: Optimizer | None) -> list[str]:
        """The name of each parameter; without an optimizer, of those that were named before."""
        self._learn(params, optimizer)
        return [self._names[id(p)] for p in params]

    def in_model_order(self, params: Sequence[Tensor], optimizer: Optimizer | None) -> list[int]:
        """The positions of `params`, sorted by their place in the model."""
        self._learn(params, optimizer)
        return sorted(range(len(params)), key=lambda i: self._places[id(params[i])])

    def _learn(self, params: Sequence[Tensor], optimizer: Optimizer | None) -> None:
        if optimizer is None or all(id(p) in self._names for p in params):
            return
        self._names.clear()
        for g, group in enumerate(optimizer.param_groups):
            given = group.get("param_names") or ()
            for i, param in enumerate(group["params"]):
                self._names[id(param)] = given[i] if i < len(given) else f"group{g}.param{i}"
        places = list(self._names)
        model = self._model() if self._model is not None else None
        if model is not None:
            in_model = {id(p): name for name, p in model.named_parameters()}
            self._names.update((key, name) for key, name in in_model.items() if key in self._names)
            # Parameters the model does not know keep the optimizer's order, after its own.
            places = [k for k in in_model if k in self._names] + [
                k for k in places if k not in in_model
            ]
        self._places = {key: place for place, key in enumerate(places)}
