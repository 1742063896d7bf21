"""What a policy is: Measurement → Decision, as pure functions of an explicit state."""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from gradwatch.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.records import Decision, Measurement

__all__ = ["Policy", "bounded", "positive", "quantile", "whole"]

S = TypeVar("S")
_GREATEST = 1e150  # that a state takes in: sums of its squares stay finite


class Policy(ABC, Generic[S]):
    """A frozen description of how to clip. What it has learnt so far lives in a state `S`.

    The agent calls `decide` before a step whose gradient is finite, and `update` after it. What is
    not finite never reaches a state; nor does a norm of 0, which says nothing of the others' size.

    On CUDA a step waits for the gradient's norm, which `decide` is to see, unless the policy says
    that it decides `ahead`. A class of your own that overrides `decide` or `threshold` has to say
    so itself: what the class above said does not hold for it.
    """

    norm_type: float = 2.0
    changes_gradients: ClassVar[bool] = True
    takes_sparse: ClassVar[bool] = True  # one factor for all works on any layout
    ahead: ClassVar[bool] = False  # whether `decide` is `Scale(threshold)` whatever the gradient
    wants_loss: ClassVar[bool] = False  # whether `Measurement.loss` is to be filled in

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What a class says of `ahead` holds for its own `decide` and `threshold`, not an heir's."""
        super().__init_subclass__(**kwargs)
        first = next(c for c in cls.__mro__ if vars(c).keys() & {"ahead", "decide", "threshold"})
        if "ahead" not in vars(first):
            cls.ahead = False

    @property
    def learns(self) -> bool:
        """Whether a step changes the state at all."""
        kind = type(self)
        return kind.learn is not Policy.learn or kind.update is not Policy.update

    @abstractmethod
    def init(self) -> S:
        """The state before the first step."""

    @abstractmethod
    def decide(self, measurement: Measurement, state: S) -> Decision:
        """What to do with this gradient."""

    def update(self, state: S, norm: float, loss: float | None = None) -> S:
        """The state after a step with this pre-clip norm and loss (None: not known)."""
        if not (math.isfinite(norm) and norm > 0.0):
            return state
        if loss is not None:
            loss = min(max(loss, -_GREATEST), _GREATEST) if math.isfinite(loss) else None
        return self.learn(state, min(norm, _GREATEST), loss)

    def learn(self, state: S, norm: float, loss: float | None) -> S:  # noqa: ARG002
        """`update` for a norm that is above 0, both finite. Here: nothing is learnt."""
        return state

    def threshold(self, state: S) -> float | None:  # noqa: ARG002
        """The one norm above which a step is clipped, None where there is no single one."""
        return None

    def dump(self, state: S) -> dict[str, Any]:  # noqa: ARG002
        """The state as plain numbers and lists, for a checkpoint."""
        return {}

    def load(self, dumped: Mapping[str, Any]) -> S:  # noqa: ARG002
        """The state that `dump` wrote."""
        return self.init()

    def __str__(self) -> str:
        """As one would write it: arguments at their default are left out."""
        shown = []
        for field in _fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                shown.append(str(value) if isinstance(value, Policy) else f"{value!r}")
            elif value != field.default:
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def describe(self) -> dict[str, Any]:
        """The policy's name and arguments, as `runs.settings` keeps them."""
        described: dict[str, Any] = {}
        for field in _fields(self):
            name, value = field.name, getattr(self, field.name)
            # An argument that is a policy must not stand in the place of this one's name.
            if isinstance(value, Policy):
                described["inner"] = value.describe()
            else:  # JSON has no inf; the arguments take the word
                described[name] = "inf" if value == math.inf else value
        return {"policy": type(self).__name__, **described}


def _fields(policy: Policy[Any]) -> tuple[dataclasses.Field[Any], ...]:
    """A policy's arguments; a policy of the user's own need not be a dataclass."""
    return dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()


def positive(policy: Policy[Any], name: str, *, finite: bool = True) -> None:
    """Check that an argument is a number above 0, and store it as a float.

    Raises `ConfigurationError` naming policy, argument and value.
    """
    value = getattr(policy, name)
    try:
        # JSON's word for inf apart, text is no number.
        wrong = isinstance(value, bool) or (isinstance(value, str) and value != "inf")
        number = math.nan if wrong else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number > 0 or (finite and math.isinf(number)):
        kind = "a finite number above 0" if finite else "a number above 0, or inf"
        never = "; to never clip use ObserveOnly(), or a number that no norm reaches"
        hint = never if math.isinf(number) else ""
        msg = f"{type(policy).__name__}({name}={value!r}): {name} must be {kind}{hint}"
        raise ConfigurationError(msg)
    object.__setattr__(policy, name, number)


def whole(policy: Policy[Any], name: str, *, least: int = 1) -> None:
    """Check that an argument is a whole number from `least` on.

    Raises `ConfigurationError` naming policy, argument and value.
    """
    value = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        msg = f"{type(policy).__name__}({name}={value!r}): {name} must be a whole number, {least} or more"
        raise ConfigurationError(msg)


def bounded(threshold: float) -> float:
    """A threshold that arithmetic may have driven to 0 or inf, kept finite and above 0."""
    return min(max(threshold, sys.float_info.min), sys.float_info.max)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The linearly interpolated quantile of sorted values, as numpy's default."""
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
