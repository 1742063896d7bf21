"""Policies by name: from a description, and from text as one would write it."""

from __future__ import annotations

import ast
import dataclasses
import math
from typing import TYPE_CHECKING, Any

from gradwatch.errors import ConfigurationError
from gradwatch.policies.adaptive_gradient_clip import AdaptiveGradientClip
from gradwatch.policies.clip_layer_norm import ClipLayerNorm
from gradwatch.policies.clip_norm import ClipNorm
from gradwatch.policies.clip_value import ClipValue
from gradwatch.policies.observe_only import ObserveOnly
from gradwatch.policies.percentile_clip import PercentileClip
from gradwatch.policies.skip_spikes import SkipSpikes
from gradwatch.policies.target_ratio import TargetRatio
from gradwatch.policies.zclip import ZClip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.policies.base import Policy

__all__ = ["build", "parse"]

_POLICIES: dict[str, type[Policy[Any]]] = {
    policy.__name__: policy
    for policy in (
        AdaptiveGradientClip,
        ClipLayerNorm,
        ClipNorm,
        ClipValue,
        ObserveOnly,
        PercentileClip,
        SkipSpikes,
        TargetRatio,
        ZClip,
    )
}
_LONGEST = 500  # characters of a policy


def build(description: Mapping[str, Any]) -> Policy[Any]:
    """The policy that `Policy.describe` described.

    Raises `ConfigurationError` where the name or an argument is wrong.
    """
    arguments = dict(description)
    name = arguments.pop("policy", None)
    if "inner" in arguments:
        arguments["policy"] = build(arguments.pop("inner"))
    return _make(name, arguments)


def parse(text: str, *, initial: float | None = None) -> Policy[Any]:
    """The policy of that text, the inverse of `str(policy)`. Nothing in it is evaluated.

    `initial` is the first threshold of a policy that has one and whose text names none. Raises `ConfigurationError` where it is none.

    >>> parse("TargetRatio(cap=3)") == TargetRatio(cap=3)
    True
    """
    try:
        if len(text) > _LONGEST:
            raise ValueError(text)  # noqa: TRY301 - one way to say what is none
        return _policy(ast.parse(text.strip().removeprefix("clip="), mode="eval").body, initial)
    except ConfigurationError:
        raise
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        msg = f"{text[:_LONGEST]!r} is no policy; write one as TargetRatio(cap=3) or ClipNorm(0.8)"
        raise ConfigurationError(msg) from None


def _policy(node: ast.expr, initial: float | None) -> Policy[Any]:
    if not isinstance(node, ast.Call):
        raise ValueError(node)  # noqa: TRY004 - the text is wrong, not a type
    name = ast.unparse(node.func).removeprefix("gradwatch.")
    known = _POLICIES.get(name)
    names = [field.name for field in dataclasses.fields(known)] if known else []  # type: ignore[arg-type]
    if known and len(node.args) > len(names):
        msg = f"{name} takes {len(names)} arguments: {', '.join(names)}"
        raise ConfigurationError(msg)
    arguments = {key: _value(one, initial) for key, one in zip(names, node.args, strict=False)}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError(keyword)
        arguments[keyword.arg] = _value(keyword.value, initial)
    if initial is not None and "initial" in names:
        arguments.setdefault("initial", initial)
    return _make(name, arguments)


def _value(node: ast.expr, initial: float | None) -> Any:
    """A number, a word or a policy."""
    if isinstance(node, ast.Call):
        return _policy(node, initial)
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    return ast.literal_eval(node)


def _make(name: object, arguments: dict[str, Any]) -> Policy[Any]:
    if not isinstance(name, str) or name not in _POLICIES:
        msg = f"no policy is called {name!r}; there are {', '.join(_POLICIES)}"
        raise ConfigurationError(msg)
    known = [field.name for field in dataclasses.fields(_POLICIES[name])]  # type: ignore[arg-type]
    if unknown := [argument for argument in arguments if argument not in known]:
        takes = f"takes {', '.join(known)}" if known else "takes no arguments"
        msg = f"{name} has no {', '.join(map(repr, unknown))}; it {takes}"
        raise ConfigurationError(msg)
    try:
        return _POLICIES[name](**arguments)
    except TypeError as error:
        msg = f"{name}: {error}"
        raise ConfigurationError(msg) from None
