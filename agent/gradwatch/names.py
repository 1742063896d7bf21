"""What the parameters are called, and their order in the model."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from gradwatch.listing import every

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Named", "ParameterNames"]


class Named(NamedTuple):
    """What some parameters are called, and their positions in the model's order.

    `places` are those of the parameters among all of the model, infinite where that is not known;
    `complete` is whether none of the model's parameters comes after all of these.
    """

    names: list[str]
    order: list[int]
    places: list[float]
    complete: bool


class _Known(NamedTuple):
    """A parameter that has a name. Its id alone would not do: the next tensor may get it."""

    ref: weakref.ref[Tensor]
    name: str
    place: float
    given: str | None  # by the optimizer, when it was named


class ParameterNames:
    """Names from the model, else from an optimizer made of named parameters, else by position.

    A parameter keeps its name for as long as it exists, wherever its group moves it; no two that
    the optimizer lists have the same one. The order is the model's where it is known: the order in
    which the model registers its parameters.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = weakref.ref(model) if model is not None else None
        self._known: dict[int, _Known] = {}  # what the optimizer listed when it was looked at last
        self._past: dict[int, _Known] = {}  # what it listed before, as far as it still exists
        self._last = math.inf  # the place of the model's last parameter

    def of(self, params: Sequence[Tensor], optimizer: Optimizer | None) -> list[str]:
        """The name of each parameter.

        One that neither the optimizer lists nor was named before is called by its position in
        `params`.
        """
        return self.named(params, optimizer).names

    def named(self, params: Sequence[Tensor], optimizer: Optimizer | None) -> Named:
        """The name of each parameter, and the positions of all in the model's order."""
        found = [_find(self._known, param) for param in params]
        if None in found:
            if optimizer is not None:
                self._learn(optimizer)
            found = [_find(self._known, p) or _find(self._past, p) for p in params]
        names = [f"parameter{i}" if one is None else one.name for i, one in enumerate(found)]
        places = [math.inf if one is None else one.place for one in found]
        order = sorted(range(len(found)), key=places.__getitem__)
        return Named(names, order, places, max(places, default=-1) == self._last < math.inf)

    def _learn(self, optimizer: Optimizer) -> None:
        """Name what the optimizer lists now; what had a name keeps it."""
        self._past = {
            key: known
            for key, known in (self._past | self._known).items()
            if known.ref() is not None
        }
        params = every(optimizer)
        model = self._model() if self._model is not None else None
        in_model = {} if model is None else {id(p): name for name, p in model.named_parameters()}
        names = {id(p): in_model[id(p)] for p in params if id(p) in in_model}
        taken = set(names.values())
        for param in params:
            known = _find(self._past, param)
            if known is not None and id(param) not in names and known.name not in taken:
                names[id(param)] = known.name
                taken.add(known.name)
        given: dict[int, str] = {}
        for g, group in enumerate(optimizer.param_groups):
            given.update(self._given(group))
            for i, param in enumerate(group["params"]):
                if id(param) not in names:
                    name = _free(given.get(id(param)), f"group{g}.param{i}", taken)
                    names[id(param)] = name
                    taken.add(name)
        # Parameters the model does not know keep the optimizer's order, after its own.
        places = {key: place for place, key in enumerate(in_model)}
        self._last = len(in_model) - 1 if in_model else math.inf
        self._known = {
            id(p): _Known(
                weakref.ref(p),
                names[id(p)],
                places.get(id(p), math.inf),
                given.get(id(p)),
            )
            for p in params
        }

    def _given(self, group: dict[str, Any]) -> dict[int, str]:
        """The names an optimizer of named parameters keeps, where they still belong to this list.

        Whoever edits `group["params"]` need not edit `group["param_names"]` with it.
        """
        params, given = group["params"], group.get("param_names") or ()
        if len(given) != len(params):
            return {}
        known = [_find(self._past, param) for param in params]
        moved = any(
            one is not None and one.given not in (None, name)
            for one, name in zip(known, given, strict=True)
        )
        return {} if moved else {id(p): str(n) for p, n in zip(params, given, strict=True)}


def _find(among: dict[int, _Known], param: Tensor) -> _Known | None:
    known = among.get(id(param))
    return known if known is not None and known.ref() is param else None


def _free(given: str | None, position: str, taken: set[str]) -> str:
    """The first of these names that no other parameter has."""
    if given is not None and given not in taken:
        return given
    further = (f"{position}#{count}" for count in itertools.count(2))
    return next(name for name in itertools.chain([position], further) if name not in taken)
