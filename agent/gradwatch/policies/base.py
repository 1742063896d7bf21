"""What a policy is: Measurement → Decision, as pure functions of an explicit state."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from gradwatch.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.records import Decision, Measurement

__all__ = ["Policy", "positive"]

S = TypeVar("S")


class Policy(ABC, Generic[S]):
    """A frozen description of how to clip. What it has learnt so far lives in a state `S`.

    The agent calls `decide` before a step whose gradient is finite, and `update` once the norm of
    such a step is known; a non-finite norm never reaches either, so it cannot poison a state.
    """

    norm_type: float = 2.0
    changes_gradients: ClassVar[bool] = True

    @abstractmethod
    def init(self) -> S:
        """The state before the first step."""

    @abstractmethod
    def decide(self, measurement: Measurement, state: S) -> Decision:
        """What to do with this gradient."""

    def update(self, state: S, norm: float) -> S:  # noqa: ARG002 - the rule where nothing is learnt
        """The state after a step whose pre-clip norm was `norm` (finite)."""
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
        fields = getattr(self, "__dataclass_fields__", {})
        shown = []
        for name, field in fields.items():
            value = getattr(self, name)
            if field.default is dataclasses.MISSING:
                shown.append(f"{value!r}")
            elif value != field.default:
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def describe(self) -> dict[str, Any]:
        """The policy's name and arguments, as `runs.settings` keeps them."""
        fields: dict[str, Any] = getattr(self, "__dataclass_fields__", {})
        arguments = {name: getattr(self, name) for name in fields}
        return {"policy": type(self).__name__, **arguments}


def positive(policy: Policy[Any], name: str, *, finite: bool = True) -> None:
    """Check that an argument is a number above 0, and store it as a float.

    Raises `ConfigurationError` naming policy, argument and value.
    """
    value = getattr(policy, name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number > 0 or (finite and math.isinf(number)):
        kind = "a finite number above 0" if finite else "a number above 0, or inf"
        hint = "; to never clip use ObserveOnly()" if math.isinf(number) else ""
        msg = f"{type(policy).__name__}({name}={value!r}): {name} must be {kind}{hint}"
        raise ConfigurationError(msg)
    object.__setattr__(policy, name, number)
