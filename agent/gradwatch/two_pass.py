"""Two-pass optimizers (SAM and its variants): what they did around a step that was left out is undone.

Such an optimizer moves the weights to where the loss is greater, has the gradient computed there,
moves the weights back and calls `base_optimizer.step()`. The base optimizer is what is watched. A
NaN in the first gradient makes the weights NaN, and what the outer optimizer keeps between its two
passes too, so all of it is copied before the first pass and put back where the base optimizer's step
was left out.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from gradwatch.errors import NonFiniteGradientError
from gradwatch.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.hooks import StepHooks

__all__ = ["TwoPass"]

_BEGINS = ("step", "first_step")
_ENDS = ("step", "second_step")


class TwoPass:
    """Shadows `step`, `first_step` and `second_step` of one such optimizer."""

    def __init__(self, outer: Any, hooks: StepHooks, report: Callable[[str, str], None]) -> None:
        self._outer = weakref.ref(outer)
        self._hooks = hooks
        self._report = report
        self._before: Snapshot | None = None
        self._left_out = 0  # steps that had been left out when this one began
        self._inside = False  # `step()` is under way
        self._shadows: dict[str, Any] = {}

    @classmethod
    def around(cls, outer: Any, hooks: StepHooks, report: Callable[[str, str], None]) -> TwoPass:
        """Watch over this two-pass optimizer, whose base optimizer has these hooks."""
        watch = cls(outer, hooks, report)
        for name in {*_BEGINS, *_ENDS}:
            if callable(getattr(outer, name, None)):
                shadow = watch._shadow(name, vars(outer).get(name))
                watch._shadows[name] = shadow
                setattr(outer, name, shadow)
        return watch

    def off(self) -> None:
        """Take the shadows off, but for those that somebody has shadowed since."""
        outer = self._outer()
        for name, shadow in self._shadows.items():
            if outer is not None and vars(outer).get(name) is shadow:
                if shadow.shadowed is None:
                    delattr(outer, name)
                else:
                    setattr(outer, name, shadow.shadowed)

    def _shadow(self, name: str, shadowed: Callable[..., Any] | None) -> Any:
        reference = self._outer

        @functools.wraps(shadowed or getattr(type(reference()), name))
        def called(*args: Any, **kwargs: Any) -> Any:
            outer = reference()
            if outer is None:
                msg = f"{name}(): the optimizer is gone; keep it, not its method alone"
                raise ReferenceError(msg)
            method = shadowed or functools.partial(getattr(type(outer), name), outer)
            return self._call(outer, name, method, args, kwargs)

        called.shadowed = shadowed  # type: ignore[attr-defined]
        return called

    def _call(
        self, outer: Any, name: str, method: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self._inside:  # first_step and second_step, as step() calls them
            return method(*args, **kwargs)
        if name in _BEGINS:
            self._begin(outer)
        self._inside = name == "step"
        try:
            return method(*args, **kwargs)
        except NonFiniteGradientError:
            self._undo()
            raise
        finally:
            self._inside = False
            if name in _ENDS:
                self._end()

    def _begin(self, outer: Any) -> None:
        self._left_out = self._hooks.left_out
        try:
            self._before = Snapshot(outer) if self._hooks.on_nonfinite != "ignore" else None
        except (RuntimeError, MemoryError) as error:
            self._before = None
            self._report(
                "snapshot",
                f"there is no memory for a copy of the weights of {type(outer).__name__} ({error}): "
                "a step with NaN or inf in its gradient cannot be undone; use "
                'on_nonfinite="raise" or "ignore"',
            )

    def _end(self) -> None:
        if self._hooks.left_out > self._left_out:
            self._undo()
        self._before = None

    def _undo(self) -> None:
        if self._before is not None:
            self._before.restore()
            self._before = None
