"""What a store's JSON has to look like for readers to go by it; what does not is left out.

A document is valid JSON at best. Readers ask the parts that they know of it for a number, a policy
or a name, so each such part is checked once, where the row is read. Parts that nobody here knows
stay as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradwatch.cells import real, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["event_data", "is_policy", "run_settings"]


def run_settings(value: Mapping[str, Any], bad: Callable[[], None]) -> dict[str, Any]:
    """The settings of a run; `bad` is called where a part is left out."""
    return _checked(value, _SETTINGS, bad)


def event_data(value: Mapping[str, Any], bad: Callable[[], None]) -> dict[str, Any]:
    """The data of an event; `bad` is called where a part is left out."""
    return _checked(value, _EVENT, bad)


def is_policy(value: Any) -> bool:
    """Whether it may be what `Policy.describe` gives."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("policy"), str)
        and _is_norm_type(value.get("norm_type"))
        and ("inner" not in value or is_policy(value["inner"]))
    )


def _checked(
    value: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]], bad: Callable[[], None]
) -> dict[str, Any]:
    good = {name: part for name, part in value.items() if checks.get(name, _anything)(part)}
    if len(good) < len(value):
        bad()
    return good


def _anything(_: Any) -> bool:
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_number_or_none(value: Any) -> bool:
    return value is None or real(value) is not None


def _is_count(value: Any) -> bool:
    return whole(value) is not None and value >= 0


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(real(one) is not None for one in value)


def _is_texts(value: Any) -> bool:
    """A mapping of texts to texts."""
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _is_names(value: Any) -> bool:
    """Names: a list of them, or a mapping of names to what is to be said of each."""
    names = value if isinstance(value, (list, dict)) else [None]
    return all(isinstance(name, str) for name in names)


def _is_norm_type(value: Any) -> bool:
    if value is None or value in ("inf", "Infinity"):  # JSON has no inf
        return True
    number = math.inf if value == math.inf else real(value)
    return number is not None and number > 0


def _is_policies(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_policy, value))


def _is_policy_or_none(value: Any) -> bool:
    return value is None or is_policy(value)


_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "optimizer": _is_text,
    "clip": _is_text,
    "on_nonfinite": _is_text,
    "device": _is_text_or_none,
    "policies": _is_policies,
    "learning_rates": _is_numbers,
    "gain": _is_number_or_none,
    "tensors": _is_count,
    "parameters": _is_count,
    "versions": _is_texts,
}
_EVENT: dict[str, Callable[[Any], bool]] = {
    "parameters": _is_names,
    "origin": _is_text_or_none,
    "change": _is_count,
    "requested_by": _is_text,
    "reason": _is_text_or_none,
    "from": _is_number_or_none,
    "to": _is_number_or_none,
    "before": _is_policy_or_none,
    "policy": is_policy,
    "clip": _is_text,
    "ring_full": _is_count,
    "torn": _is_count,
    "error": _is_count,
    "events": _is_count,
    "thinned": _is_count,
    "every": _is_count,
    "first_step": _is_count,
    "last_step": _is_count,
}
