"""A loop that trains while no `step()` of the watched optimizer is seen: it is told so.

That is so where another optimizer takes the steps, or where the loop changes the weights by itself:
nothing is recorded and nothing is clipped, and only silence would show it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import unserializable_hook

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["Unseen"]


class Unseen:
    """Counts what goes by before the first step of one optimizer, and says so after 50 of it.

    It counts backward passes between which the gradients were cleared or the weights changed, so
    that a loop which accumulates gradients over many batches is not told anything, and calls of
    `zero_grad()`. Three parameters are looked at, by a hook each. With the first step all of it is
    taken off again, so a step costs nothing.
    """

    FROM = 50

    def __init__(self, optimizer: Optimizer, report: Callable[[str, str], None]) -> None:
        self._name = type(optimizer).__name__
        self._report = report
        self._optimizer = weakref.ref(optimizer)
        self._told = False
        self._rounds: dict[int, _Rounds] = {}
        self._zeroed = 0
        self._handles: list[Any] = []
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for place in {0, len(params) // 2, len(params) - 1} if params else ():
            self._watch(params[place])
        self._zero_grad = self._shadow(optimizer)

    @property
    def waits(self) -> bool:
        """Whether no step was seen, and nothing has been said of that."""
        return not self._told

    def seen(self) -> None:
        """A step was seen, or the agent is closed: look no further."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        optimizer = self._optimizer()
        if optimizer is not None and vars(optimizer).get("zero_grad") is self._zero_grad:
            del optimizer.zero_grad
        self._rounds.clear()
        self._told = True

    def end(self) -> None:
        """The run ends, or the process does; says what there is to say, and looks no further."""
        count = self._count()
        changed = any(rounds.weights_changed() for rounds in self._rounds.values())
        if not self._told and (count or changed):
            self._tell(count)
        self.seen()

    def _watch(self, param: Tensor) -> None:
        rounds = self._rounds[id(param)] = _Rounds(param)
        if not (param.requires_grad and param.is_leaf):
            return

        @unserializable_hook  # type: ignore[untyped-decorator]
        def after_backward(param: Tensor) -> None:
            rounds.backward(param)
            self._look()

        with contextlib.suppress(RuntimeError):
            register: Any = param.register_post_accumulate_grad_hook
            self._handles.append(register(after_backward))

    def _shadow(self, optimizer: Optimizer) -> Any:
        """Count `zero_grad()`; where somebody has shadowed it already, it is left alone."""
        if "zero_grad" in vars(optimizer) or not hasattr(type(optimizer), "zero_grad"):
            return None
        reference, unseen = self._optimizer, weakref.ref(self)

        @functools.wraps(type(optimizer).zero_grad)
        def zero_grad(*args: Any, **kwargs: Any) -> Any:
            if (this := unseen()) is not None:
                this._zeroed += 1
                this._look()
            optimizer = reference()
            return (
                None if optimizer is None else type(optimizer).zero_grad(optimizer, *args, **kwargs)
            )

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        return zero_grad

    def _count(self) -> int:
        return max((self._zeroed, *(rounds.count for rounds in self._rounds.values())))

    def _look(self) -> None:
        if not self._told and self._count() >= self.FROM:
            self._tell(self._count())

    def _tell(self, count: int) -> None:
        self._told = True
        passes = "backward pass" if count == 1 else "backward passes"
        what = f"{count} {passes} went by" if count else "the weights changed"
        optimizer = self._optimizer()
        others = [] if optimizer is None else _others(optimizer)
        known = f" ({', '.join(others)} holds the same parameters)" if others else ""
        self._report(
            f"unseen {id(self)}",
            f"{what}, and step() of the wrapped {self._name} was not called: nothing is recorded and "
            f"nothing is clipped. Wrap the optimizer whose step() the loop calls{known}. A loop that "
            "changes the weights without an optimizer cannot be watched. If a GradScaler calls step(), "
            "say scaler=scaler: it does not call it where the gradients overflow",
        )


class _Rounds:
    """What happened to one parameter since the optimizer was wrapped."""

    def __init__(self, param: Tensor) -> None:
        self.count = 0  # backward passes on cleared gradients or changed weights; never reset
        self._param = weakref.ref(param)
        self._began = self._weights = _version(param)
        self._grad: weakref.ref[Tensor] | None = None
        self._version = -1

    def backward(self, param: Tensor) -> None:
        grad, weights = param.grad, _version(param)
        before = self._grad() if self._grad is not None else None
        if grad is None:
            return
        version = _version(grad)
        # Accumulating writes once into the gradient that is there.
        if grad is not before or version != self._version + 1 or weights != self._weights:
            self.count += 1
        self._grad, self._version, self._weights = weakref.ref(grad), version, weights

    def weights_changed(self) -> bool:
        param = self._param()
        return param is not None and _version(param) != self._began


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode: nobody counts
        return 0


def _others(optimizer: Optimizer) -> list[str]:
    """The other optimizers of this process with a parameter of this one, by their class."""
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = set()
    for candidate in gc.get_objects():
        # By its type: to ask an object for its class may run its own code.
        if issubclass(type(candidate), torch.optim.Optimizer) and candidate is not optimizer:
            params = (id(p) for group in candidate.param_groups for p in group["params"])
            if any(param in ours for param in params):
                found.add(type(candidate).__name__)
    return sorted(found)
