"""An optimizer as it was before a step: weights, state, groups and plain attributes.

A step is left out by not calling the optimizer's `step()`. Where the gradient is only known once
the optimizer has moved weights or state (SAM, a closure that is evaluated at other weights), they
are put back from a copy instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gradwatch.fronts import within

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Snapshot", "size_of"]

_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_CONTAINERS = (list, tuple, deque)
_NO_STATE = frozenset({"param_groups", "state", "defaults"})  # or kept apart


class Snapshot:
    """A copy of all that a step of this optimizer, and of those that it holds, may change."""

    def __init__(self, optimizer: Any) -> None:
        optimizers = list(within(optimizer))
        groups = {id(group): group for o in optimizers for group in o.param_groups}
        states = {id(state): state for o in optimizers if (state := _state(o)) is not None}
        weights = {id(p): p for group in groups.values() for p in group["params"]}
        with torch.no_grad():
            self._weights = [_Kept(p, p.detach().clone()) for p in weights.values()]
            self._groups = [
                (group, {key: _copied(value) for key, value in group.items() if key != "params"})
                for group in groups.values()
            ]
            self._states = [(state, _copied_items(state)) for state in states.values()]
            self._attributes = [
                (o, {name: _copied(value) for name, value in _attributes(o).items()})
                for o in optimizers
            ]

    def restore(self) -> None:
        """Put everything back, into the same tensors where they are still there."""
        with torch.no_grad():
            for kept in self._weights:
                kept.put_back()
            for group, before in self._groups:
                for key in [key for key in group if key != "params" and key not in before]:
                    del group[key]
                group.update({key: _original(value) for key, value in before.items()})
            for state, before in self._states:
                state.clear()
                state.update({key: _original(value) for key, value in before.items()})
            for optimizer, before in self._attributes:
                for name in [name for name in _attributes(optimizer) if name not in before]:
                    delattr(optimizer, name)
                for name, value in before.items():
                    setattr(optimizer, name, _original(value))

    def differs(self) -> bool:
        """Whether weights, state or groups are not as they were."""
        return (
            any(not kept.is_unchanged() for kept in self._weights)
            or any(
                not _same({k: v for k, v in group.items() if k != "params"}, before)
                for group, before in self._groups
            )
            or any(not _same(state, before) for state, before in self._states)
        )


def size_of(optimizer: Any) -> int:
    """The bytes that a `Snapshot` of this optimizer takes, about."""
    total = 0
    for one in within(optimizer):
        params = [p for group in one.param_groups for p in group["params"]]
        state = [t for of in (_state(one) or {}).values() if isinstance(of, Mapping)
                 for t in of.values()]  # fmt: skip
        total += sum(t.numel() * t.element_size() for t in (*params, *state) if _is_tensor(t))
    return total


class _Kept(NamedTuple):
    """A tensor and what it held."""

    tensor: Tensor
    values: Tensor

    def put_back(self) -> Tensor:
        """The tensor, holding what it held; the copy where its shape or type has changed."""
        now = self.tensor.detach()
        if now.shape != self.values.shape or now.dtype != self.values.dtype:
            if isinstance(self.tensor, torch.nn.Parameter):
                self.tensor.data = self.values
                return self.tensor
            return self.values
        now.copy_(self.values)
        return self.tensor

    def is_unchanged(self) -> bool:
        """Whether it holds the same, bit for bit; a NaN that was there is no change."""
        now, before = self.tensor.detach(), self.values
        if now.shape != before.shape or now.dtype != before.dtype:
            return False
        return bool(torch.equal(now, before)) or _equal_with_nan(now, before)


def _equal_with_nan(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _state(optimizer: Any) -> Any:
    state = getattr(optimizer, "state", None)
    return state if isinstance(state, dict) else None


def _attributes(optimizer: Any) -> dict[str, Any]:
    """What an optimizer keeps as plain attributes: counters, scalars, lists of them."""
    held = getattr(optimizer, "__dict__", {})
    return {
        name: value
        for name, value in held.items()
        if name not in _NO_STATE and not name.startswith(("_optimizer_", "_gradwatch"))
        and name not in {"grad_scale", "found_inf", "_opt_called"} and _is_data(value)
    }  # fmt: skip


def _is_data(value: Any) -> bool:
    if isinstance(value, (*_PLAIN, torch.Tensor)):
        return not isinstance(value, torch.nn.Parameter)
    if isinstance(value, dict):
        return all(map(_is_data, value.values()))
    return isinstance(value, _CONTAINERS) and all(map(_is_data, value))


def _copied_items(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: _copied(value) for key, value in values.items()}


class _Container(NamedTuple):
    """A dict, list, tuple or deque and copies of its items: it is filled again itself."""

    container: Any
    items: Any


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Kept(value, value.detach().clone())
    if isinstance(value, dict):
        return _Container(value, _copied_items(value))
    if isinstance(value, _CONTAINERS):
        return _Container(value, [_copied(item) for item in value])
    return value


def _original(copied: Any) -> Any:
    if isinstance(copied, _Kept):
        return copied.put_back()
    if not isinstance(copied, _Container):
        return copied
    container, items = copied
    if isinstance(container, dict):
        restored = {key: _original(item) for key, item in items.items()}
        container.clear()
        container.update(restored)
    elif isinstance(container, tuple):
        for item in items:
            _original(item)
    else:
        again = [_original(item) for item in items]
        container.clear()
        container.extend(again)
    return container


def _same(now: Any, copied: Any) -> bool:
    if isinstance(copied, _Kept):
        return now is copied.tensor and copied.is_unchanged()
    if isinstance(copied, _Container):
        if now is not copied.container or len(now) != len(copied.items):
            return False
        if isinstance(now, dict):
            return _same(now, copied.items)
        return all(_same(a, b) for a, b in zip(now, copied.items, strict=True))
    if isinstance(copied, dict):
        return now.keys() == copied.keys() and all(_same(now[k], copied[k]) for k in copied)
    return now is copied or bool(now == copied)
