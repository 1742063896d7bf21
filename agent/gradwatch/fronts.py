"""Which optimizer's steps are watched, where one optimizer stands before another.

Three kinds of such outer optimizers are told apart:

- A *front* (accelerate, Lightning) only passes the call on, and not at every micro-batch: the
  optimizer inside is watched.
- A *two-pass* optimizer (SAM and its variants) moves the weights, has the gradient computed again
  there, moves the weights back and lets its `base_optimizer` step: the base optimizer is watched,
  because its gradient is the one that is applied, and the outer one is undone where its step is
  left out.
- Any other (Lookahead, TRAC, OrthoGrad, ScheduleFreeWrapper) is an algorithm around the inner one:
  it is watched itself, so that a step that is left out is left out of both, and the gradient that
  is measured is the one that the loop's backward pass left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch.optim import Optimizer

from gradwatch.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Watched", "is_optimizer", "steps_another", "watched_of", "within"]

_FRONTS = frozenset({"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"})
_REFUSED = {
    "deepspeed": "DeepSpeed clips inside its engine, before this optimizer's step() is called; set "
    "gradient_clipping in its configuration and do not wrap its optimizer",
    "opacus": "Opacus clips each sample's gradient inside step(), so the gradient that wrap would "
    "record and clip is not the one that is applied; do not wrap a DPOptimizer",
}


class Watched(NamedTuple):
    """The optimizer whose `step()` is watched, and the two-pass optimizer around it, if any."""

    optimizer: Optimizer
    two_pass: Any = None


def watched_of(optimizer: Any) -> Watched:
    """The optimizer whose steps are to be watched: the one given, or one inside it.

    Raises `ConfigurationError` for what is no optimizer, and for one whose steps cannot be watched.
    """
    if not is_optimizer(optimizer):
        msg = f"wrap takes a torch.optim.Optimizer, not {type(optimizer).__name__}"
        raise ConfigurationError(msg)
    optimizer = _behind(optimizer)
    name = type(optimizer).__name__
    for package in _packages(optimizer) & _REFUSED.keys():
        msg = f"wrap({name}): {_REFUSED[package]}"
        raise ConfigurationError(msg)
    if callable(getattr(optimizer, "fused_backward", None)):  # LOMO
        msg = (
            f"wrap({name}): it applies each gradient within fused_backward() and takes no step(), so "
            "there is no gradient to record, clip or skip; do not wrap it"
        )
        raise ConfigurationError(msg)
    base = getattr(optimizer, "base_optimizer", None)
    if isinstance(base, Optimizer) and _parameters(base) == _parameters(optimizer):
        return Watched(base, optimizer)
    if type(optimizer).step is Optimizer.step or _is_torchs_front(optimizer):
        msg = (
            f"{name} is a torch.optim.Optimizer by its class alone (it never called "
            "Optimizer.__init__): wrap the optimizer that it calls"
        )
        raise ConfigurationError(msg)
    return Watched(optimizer)


def is_optimizer(candidate: Any) -> bool:
    """Whether this has what an optimizer is used by: `step()` and `param_groups`."""
    if isinstance(candidate, Optimizer):
        return True
    groups = getattr(candidate, "param_groups", None)
    return (
        callable(getattr(candidate, "step", None))
        and isinstance(groups, list)
        and all(isinstance(group, dict) and "params" in group for group in groups)
    )


def steps_another(outer: Any, inner: Optimizer) -> bool:
    """Whether `outer` is an algorithm around `inner`, and not a front that passes its calls on."""
    return (
        is_optimizer(outer)
        and not _packages(outer) & _FRONTS
        and not _is_torchs_front(outer)
        and any(held is inner for held in within(outer))
    )


def within(optimizer: Any) -> Iterator[Any]:
    """This optimizer and those that it holds, each once, the outermost first."""
    seen: list[Any] = []
    waiting = [optimizer]
    while waiting:
        candidate = waiting.pop(0)
        if not any(candidate is other for other in seen):
            seen.append(candidate)
            held = getattr(candidate, "__dict__", {})
            waiting.extend(value for value in held.values() if is_optimizer(value))
    return iter(seen)


def _behind(optimizer: Any) -> Any:
    """The optimizer that a front passes its calls on to."""
    while _packages(optimizer) & _FRONTS:
        inner: Any = getattr(optimizer, "optimizer", None)
        if (
            inner is optimizer
            or not is_optimizer(inner)
            or inner.param_groups is not optimizer.param_groups
        ):
            break
        optimizer = inner
    return optimizer


def _packages(optimizer: Any) -> set[str]:
    """The packages that its class and the classes above it are from."""
    return {kind.__module__.partition(".")[0] for kind in type(optimizer).__mro__}


def _parameters(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _is_torchs_front(optimizer: Any) -> bool:
    """Whether it is one of torch's own that only calls another (PostLocalSGDOptimizer)."""
    own = type(optimizer).__module__.partition(".")[0] == "torch"
    return own and not hasattr(optimizer, "_optimizer_step_pre_hooks")
