"""The arguments of `wrap`, checked: every error names the argument, its value and what is right."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from gradwatch._version import __version__
from gradwatch.errors import ConfigurationError
from gradwatch.listing import every
from gradwatch.part import Part, sparse_refusal
from gradwatch.policies import Policy, SkipSpikes
from gradwatch.step_log import number

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.config import Settings
    from gradwatch.treatment import OnNonFinite
    from gradwatch.watch import Watch

__all__ = [
    "NOT_GIVEN",
    "NotGiven",
    "counter",
    "describe",
    "loaded",
    "model_and_scaler",
    "on_nonfinite",
    "optimizers",
    "parts",
    "settings_of",
    "sparse",
    "tags",
]


_MOST_COUNTED = 2.0**53  # what a float counts to


class NotGiven:
    """Stands for an argument that was left out, where None means something."""

    def __repr__(self) -> str:
        return "…"


NOT_GIVEN: Final = NotGiven()


def optimizers(given: Any, model: Any) -> list[Any]:
    """The optimizers of a run: the one that was given, or those of a list."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
        return [given]
    if not given:
        msg = "wrap([]): a list of at least one optimizer"
        raise ConfigurationError(msg)
    if len({id(one) for one in given}) < len(given):
        msg = "wrap([…]): an optimizer is in the list twice"
        raise ConfigurationError(msg)
    if len(given) > 1 and model is None:
        msg = (
            f"wrap of {len(given)} optimizers needs model=model: without it, parameters of several "
            "optimizers would have one name"
        )
        raise ConfigurationError(msg)
    return list(given)


def parts(optimizer: Optimizer, clip: Any) -> list[Part]:
    """The optimizer's parts: one policy over all groups, or one for each."""
    if isinstance(clip, Policy):
        return [Part(clip)]
    policies = list(clip) if isinstance(clip, Sequence) else [clip]
    if not policies or not all(isinstance(p, Policy) for p in policies):
        msg = f"clip={clip!r}: a policy, as in ClipNorm(1.0), or a list of them"
        raise ConfigurationError(msg)
    groups = len(optimizer.param_groups)
    if len(policies) != groups:
        msg = (
            f"clip has {len(policies)} policies and the optimizer {groups} parameter groups; "
            "a list has one for each group, a single policy is for all together"
        )
        raise ConfigurationError(msg)
    if len({p.norm_type for p in policies}) > 1:
        msg = "clip: policies in one list need the same norm_type, or no total norm can be given"
        raise ConfigurationError(msg)
    return [Part(policy, group) for group, policy in enumerate(policies)]


def sparse(optimizer: Optimizer, model: Any, parts: list[Part]) -> None:
    """Refuse policies that cannot clip sparse gradients, where it is known that there are some."""
    refused = [part.policy for part in parts if not part.policy.takes_sparse]
    if not refused:
        return
    where = "SparseAdam" if isinstance(optimizer, torch.optim.SparseAdam) else None
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, module in model.named_modules() if model is not None else ():
        if getattr(module, "sparse", False) and any(id(p) in owned for p in module.parameters()):
            where = f"the {type(module).__name__} {name!r}".replace(" ''", "")
    if where is not None:
        raise ConfigurationError(sparse_refusal(refused[0], where))


def on_nonfinite(optimizer: Optimizer, parts: list[Part], given: Any) -> OnNonFinite:
    """What to do with a non-finite step, as far as the policy and the optimizer allow it."""
    if isinstance(optimizer, torch.optim.LBFGS) and any(
        isinstance(part.policy, SkipSpikes) for part in parts
    ):
        msg = "SkipSpikes cannot be kept with LBFGS, which steps several times inside one step()"
        raise ConfigurationError(msg)
    if given not in {"skip", "raise", "ignore"}:
        msg = f'on_nonfinite={given!r}: "skip", "raise" or "ignore"'
        raise ConfigurationError(msg)
    if given != "skip":
        chosen: OnNonFinite = given
        return chosen
    if not any(part.policy.changes_gradients for part in parts):
        return "ignore"
    if isinstance(optimizer, torch.optim.LBFGS):
        msg = (
            'on_nonfinite="skip" cannot be kept with LBFGS, which steps several times inside '
            'one step(); use on_nonfinite="raise" or "ignore"'
        )
        raise ConfigurationError(msg)
    return "skip"


def settings_of(settings: Any, store: object, metrics_port: object, **others: object) -> Settings:
    """The settings with the arguments put before them, those that are not None."""
    from gradwatch.config import Settings  # noqa: PLC0415 - pydantic is loaded only to wrap

    given = {name: value for name, value in others.items() if value is not None}
    if isinstance(store, (str, Path)):
        given["store"] = str(store)
    elif store is not None and not hasattr(store, "write"):
        msg = f"store={store!r}: a database URL, a file's path, or a Sink"
        raise ConfigurationError(msg)
    if metrics_port is not NOT_GIVEN:
        given["metrics_port"] = metrics_port
    if settings is not None and not isinstance(settings, Settings):
        msg = f"settings={settings!r}: a gradwatch.Settings"
        raise ConfigurationError(msg)
    chosen = Settings.load(**given) if settings is None else settings.override(**given)
    if chosen.remote_control and hasattr(store, "write") and not hasattr(store, "requested"):
        msg = (
            f"remote_control=True needs a store to be asked through: {type(store).__name__} is none"
        )
        raise ConfigurationError(msg)
    return chosen


def tags(tags: object) -> dict[str, Any]:
    """The user's own facts, with text for keys."""
    if tags is None:
        return {}
    if not isinstance(tags, Mapping):
        msg = f"tags={tags!r}: a dict of your own facts, as in tags={{'batch_size': 64}}"
        raise ConfigurationError(msg)
    from gradwatch.sinks.rows import strict_json  # noqa: PLC0415 - SQLAlchemy loads with it

    try:
        plain: dict[str, Any] = json.loads(strict_json({str(k): v for k, v in tags.items()}))
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"tags: not to be had as JSON ({error}); take text, numbers, lists and dicts of them"
        raise ConfigurationError(msg) from None
    return plain


def model_and_scaler(model: Any, scaler: Any) -> None:
    """Refuse what is no model and no gradient scaler."""
    if model is not None and not isinstance(model, torch.nn.Module):
        msg = f"model={type(model).__name__}: the torch.nn.Module whose parameters are optimized"
        raise ConfigurationError(msg)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        msg = f"scaler={type(scaler).__name__}: a torch.amp.GradScaler"
        raise ConfigurationError(msg)


def loaded(state: Mapping[str, Any], parts: list[Part]) -> list[tuple[Policy[Any], Any]]:
    """Policies and states from an agent's state_dict, checked against the policies there are."""
    try:
        policies = json.loads(state["policies"])
        names = [entry["policy"] for entry in policies]
        good = (
            state["version"] == 1
            and isinstance(state["run_id"], str)
            and isinstance(state["step"], int)
            and state["step"] >= 0
            and isinstance(state.get("counts_from", ""), str)
        )
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        msg = "load_state_dict takes what Agent.state_dict() returned"
        raise ConfigurationError(msg)
    ours = [type(part.wrapped_with).__name__ for part in parts]
    if names != ours:
        msg = f"the state is of {', '.join(names)}; this agent has {', '.join(ours)}"
        raise ConfigurationError(msg)
    try:
        return [part.loaded(entry) for part, entry in zip(parts, policies, strict=True)]
    except (TypeError, KeyError, ValueError) as error:
        msg = f"the state of a policy is not as state_dict wrote it ({error!r})"
        raise ConfigurationError(msg) from None


def describe(watches: Sequence[Watch], settings: Settings) -> dict[str, Any]:
    """What `runs.settings` says of this run: enough to read its numbers by, no secrets."""
    optimizers = [o for watch in watches if (o := watch.optimizer) is not None]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    params = [param for optimizer in optimizers for param in every(optimizer)]
    policies = [part.policy for watch in watches for part in watch.hooks.parts]
    gains = [_gain(group) for group in groups]
    return {
        "optimizer": ", ".join(sorted({type(o).__name__ for o in optimizers})),
        "optimizers": len(optimizers),
        "folds": all(watch.hooks.folds for watch in watches),
        "clip": ", ".join(dict.fromkeys(map(str, policies)))
        if len(watches) > 1
        else ", ".join(map(str, policies)),
        "policies": [policy.describe() for policy in policies],
        "on_nonfinite": watches[0].hooks.on_nonfinite,
        "fold": settings.fold,
        "groups": len(groups),
        "learning_rates": sorted(set(filter(math.isfinite, map(_rate, groups)))),
        "gain": None if math.inf in gains else max(gains),
        "tensors": len(params),
        "parameters": sum(p.numel() for p in params),
        "device": str(params[0].device) if params else None,
        "versions": {
            "gradwatch": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def counter(optimizer: Optimizer | None) -> int | None:
    """How many steps the optimizer says that it has applied, in its own state; None: it does not say.

    Up to 1 it says nothing: some have a 0 there from the start, and torch.distributed.checkpoint
    takes a step of its own to have a state made.
    """
    if optimizer is None:
        return None
    try:
        counted = [state["step"] for state in optimizer.state.values() if "step" in state]
        plain = [float(step) for step in counted if not isinstance(step, torch.Tensor)]
        tensors = [
            getattr(step, "to_local", lambda step=step: step)().detach().reshape(())
            for step in counted
            if isinstance(step, torch.Tensor)
        ]
        for device in {tensor.device for tensor in tensors}:  # each is waited for once
            there = torch.stack([t.to(torch.float64) for t in tensors if t.device == device])
            plain.append(float(there.max()))
        greatest = max(plain, default=0.0)
    except Exception:  # noqa: BLE001 - a state may hold anything under that name
        return None
    return int(greatest) if 1.0 < greatest < _MOST_COUNTED else None


def _rate(group: Mapping[str, Any]) -> float:
    """A group's learning rate, that of its schedule at the height of it; NaN where there is none."""
    rates = [number(group.get(name)) for name in ("lr", "initial_lr", "max_lr")]
    return max(filter(math.isfinite, rates), default=math.nan)


def _gain(group: Mapping[str, Any]) -> float:
    """What a gradient that stays the same adds up to in a step by momentum; inf without end."""
    momentum, dampening = (number(group.get(name, 0.0)) for name in ("momentum", "dampening"))
    if momentum == 0.0:
        return 1.0
    return (1.0 - dampening) / (1.0 - momentum) if 0.0 < momentum < 1.0 else math.inf
