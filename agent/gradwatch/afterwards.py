"""Gradients that change after the step they were for: a loop that clips too late, or zeroes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.hooks import unserializable_hook

from gradwatch.recorder import FLAGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

__all__ = ["Afterwards"]


class Afterwards:
    """Sees a loop that clips between `step()` and the next backward pass, where it does nothing.

    The least of a step's gradients is kept until the next step. Whether it was changed in between
    its version tells, for the price of a comparison; whether by a clipping, or by a further backward
    pass that added to it (of another model's loss), is looked at with a copy: in 20 steps in which it
    changed, and 500 in which it did not, at most. Of gradients that are the same tensors at the next
    step it is seen whether the new ones were added to them.
    """

    LOOKS, IN_VAIN = 20, 500
    LEAST, LARGEST = 4, 65_536  # elements: fewer are proportional by chance, more take memory

    def __init__(self) -> None:
        self._which = -1  # the gradient that is kept
        self._of = 0  # among so many
        self._grad: Tensor | None = None
        self._version = 0
        self._copy: Tensor | None = None
        self._suspects = False
        self._looks = self._in_vain = 0
        self._sum = _Sum()

    def keep(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """The step with these gradients is over."""
        if self._looks >= self.LOOKS or self._in_vain >= self.IN_VAIN:
            return
        if len(grads) != self._of:
            self._choose(grads)
        if self._which < 0:
            return
        grad = grads[self._which]
        try:
            self._version = grad._version
        except RuntimeError:  # made in inference mode: nobody counts
            return
        self._grad = grad
        summed = self._sum.suspected
        if (self._suspects or summed) and self._is_small(grad):
            copy = grad.detach().clone()
            if self._suspects:
                self._copy = copy
            if summed:
                self._sum.prepare(params[self._which], copy)

    def since(self, grads: Sequence[Tensor]) -> int:
        """What became of the gradient that was kept, as a record's flag; these are the next step's."""
        old, copy = self._grad, self._copy
        self._grad = self._copy = None
        if old is None or old._version == self._version or len(grads) != self._of:
            if self._sum.steps:
                self._sum.interrupted()
            return 0
        now = grads[self._which]
        if self._sum.shows(now, at_once=now is old and old._version == self._version + 1):
            return FLAGS.ADDED_TO
        if now.data_ptr() == old.data_ptr():  # the same memory, written anew
            return 0
        self._suspects = True
        if copy is None:
            return 0
        if torch.equal(
            old, copy
        ):  # only its version moved on: multiplied by 1, to measure the norm
            self._in_vain += 1
            return 0
        self._looks += 1
        return FLAGS.CLIPPED_LATE if _is_clipped(old.detach(), copy) else 0

    def forget(self) -> None:
        """Leave nothing on the parameters."""
        self._grad = self._copy = None
        self._sum.interrupted()

    def _choose(self, grads: Sequence[Tensor]) -> None:
        self._of = len(grads)
        usable = [(grad.numel(), i) for i, grad in enumerate(grads) if self._is_small(grad)]
        self._which = min(usable)[1] if usable else -1

    def _is_small(self, grad: Tensor) -> bool:
        return grad.layout is torch.strided and self.LEAST <= grad.numel() <= self.LARGEST


class _Sum:
    """Sees gradients that nobody zeroes: each is the one before with the new one added.

    Autograd adds in place, once a backward pass; `zero_grad` makes new tensors, or writes once more.
    `grad.data.zero_()` is not counted as a writing, so after some such steps in a row the new gradient
    itself is looked at, by a hook on the parameter: the sum must be the same to the last bit, and
    not the new one alone. The hook is there for one backward pass, and only takes a copy.
    """

    AFTER, LOOKS, IN_VAIN = 3, 3, 100

    def __init__(self) -> None:
        self.steps = 0  # in a row, before which the gradient was written to once
        self._looks = self._in_vain = 0
        self._before: Tensor | None = None
        self._new: Tensor | None = None
        self._hook: RemovableHandle | None = None

    @property
    def suspected(self) -> bool:
        """Whether the next backward pass is to be looked at."""
        return (
            self.steps >= self.AFTER and self._looks < self.LOOKS and self._in_vain < self.IN_VAIN
        )

    def prepare(self, param: Tensor, grad: Tensor) -> None:
        """Before the backward pass that adds to this gradient, if one does."""
        if param.requires_grad:
            self._before, self._new = grad, None
            self._hook = param.register_hook(self._take)  # type: ignore[no-untyped-call]

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _take(self, new: Tensor) -> None:
        self._new = new.detach().clone()

    def shows(self, grad: Tensor, *, at_once: bool) -> bool:
        """Whether this gradient, which was the step before's and written `at_once`, is such a sum."""
        before, new = self._before, self._new
        self._remove()
        self.steps = self.steps + 1 if at_once else 0
        if before is None:
            return False
        grad = grad.detach()
        added = (
            at_once
            and new is not None
            and torch.equal(grad, before + new)
            and not torch.equal(grad, new)
        )
        self._looks += added
        self._in_vain += not added
        return added

    def interrupted(self) -> None:
        """The gradient was not written to, or is another one."""
        self._in_vain += self._before is not None
        self._remove()
        self.steps = 0

    def _remove(self) -> None:
        self._before = self._new = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _is_clipped(now: Tensor, before: Tensor) -> bool:
    """Whether every element was multiplied by one factor of less than 1, or bounded."""
    at = before.abs().argmax()
    was, top = float(before.flatten()[at]), float(now.abs().max())
    if was == 0.0 or not 0.0 < top <= abs(was) * (1 + 1e-3):
        return False
    factor = float(now.flatten()[at]) / was
    scaled = torch.allclose(now, before * factor, rtol=1e-2, atol=1e-3 * top)
    return (factor > 0 and scaled) or torch.equal(now, before.clamp(-top, top))
