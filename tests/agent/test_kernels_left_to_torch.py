"""Steps that do not go to the kernel: whoever wants to see torch's own step sees it."""

import subprocess
import sys
import types

import pytest
import torch
from loops import mlp, one_parameter, parameters_equal, set_gradients, watched
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch import ClipNorm, kernels

ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW


def test_a_step_of_somebody_elses_is_called():
    """Put on the optimizer before the agent came."""
    weight, optimizer = one_parameter(ADAMW, fused=True)
    seen = []

    def step(closure=None):
        seen.append(weight)
        return ADAMW.step(optimizer, closure)

    optimizer.step = step
    watched(optimizer)
    for _ in range(3):
        weight.grad = torch.ones(4)
        optimizer.step()
    assert len(seen) == 3


class Subclass(ADAMW):
    """Nothing of its own."""


@pytest.mark.parametrize("around", ["pre-hook", "post-hook", "hook of all", "class"])
def test_whoever_wants_to_see_torchs_step_sees_it(around, by_torch, monkeypatch):
    """Other hooks, or a step that somebody has put in its place: torch's own, with all of it."""
    weight, optimizer = one_parameter(ADAMW, fused=True)
    watched(optimizer)
    seen = []
    original = ADAMW.step

    def replaced(self, closure=None):
        seen.append(self)
        return original(self, closure)

    handle = None
    for step in range(6):
        if step == 3 and around == "class":
            monkeypatch.setattr(ADAMW, "step", replaced)
        elif step == 3:
            handle = {
                "pre-hook": optimizer.register_step_pre_hook,
                "post-hook": optimizer.register_step_post_hook,
                "hook of all": register_optimizer_step_post_hook,
            }[around](lambda *_: seen.append(optimizer))
        weight.grad = torch.ones(4)
        optimizer.step()
    if handle is not None:
        handle.remove()
    assert len(seen) == 3
    assert len(by_torch) == 1 + 3


def test_a_profiler_sees_the_step_by_its_name():
    """As without the agent."""
    weight, optimizer = one_parameter(ADAMW, fused=True)
    watched(optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            weight.grad = torch.ones(4)
            optimizer.step()
    names = [event.name for event in profile.events()]
    assert names.count("Optimizer.step#AdamW.step") == 3


@pytest.mark.parametrize("reason", ["subclass", "not fused", "no folding"])
def test_steps_that_are_left_to_torch(reason, by_torch, monkeypatch):
    """Not the optimizer's own step; not the kernel; a run that is to be torch's to the letter."""
    if reason == "no folding":
        monkeypatch.setenv("GRADWATCH_FOLD", "0")
    kind = Subclass if reason == "subclass" else ADAMW
    weight, optimizer = one_parameter(kind, fused=reason != "not fused")
    watched(optimizer)
    for _ in range(3):
        weight.grad = torch.ones(4)
        optimizer.step()
    assert len(by_torch) == 3


def test_a_torch_whose_step_does_something_else_is_left_alone(monkeypatch):
    """Found out by trying: its own step does more than to call the kernel."""
    place = sys.modules["torch.optim.adam"]
    original = place.adam

    def adam(params, grads, *args, **kwargs):
        original(params, [g * 2 for g in grads], *args, **kwargs)

    assert kernels._does_the_same.__wrapped__(ADAMW)
    monkeypatch.setattr(place, "adam", adam)
    assert not kernels._does_the_same.__wrapped__(ADAMW)


def test_a_step_of_somebody_elses_below_a_scheduler_is_called():
    """The scheduler's own is put over it: that a step is counted is not all that happens there."""
    weight, optimizer = one_parameter(ADAM, fused=True)

    def bounded(self, closure=None):
        ADAM.step(self, closure)
        with torch.no_grad():
            weight.clamp_(min=0.85)

    optimizer.step = types.MethodType(bounded, optimizer)
    CosineAnnealingLR(optimizer, 10)
    watched(optimizer)
    for _ in range(4):
        weight.grad = torch.ones(4)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4,), 0.85))


def test_a_class_whose_step_was_replaced_before_torch_hooked_it():
    """In a process of its own: torch wraps whatever stands there when the first one is made."""
    script = """
import torch, gradwatch
from gradwatch.testing import MemorySink
seen, original = [], torch.optim.SGD.step
def step(self, closure=None):
    seen.append(self)
    return original(self, closure)
torch.optim.SGD.step = step
weight = torch.nn.Parameter(torch.ones(4))
optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
gradwatch.wrap(optimizer, store=MemorySink(), metrics_port=None)
for _ in range(4):
    weight.grad = torch.ones(4)
    optimizer.step()
print(len(seen), all(one is optimizer for one in seen))
"""
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["4", "True"]


class Operations(TorchDispatchMode):
    """Notes what torch is asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_who_watches_operations_sees_torchs():
    """Under a dispatch mode, as those that count or fake them are."""
    weight, optimizer = one_parameter(ADAM, fused=True)
    watched(optimizer)
    for _ in range(2):
        weight.grad = torch.ones(4)
        optimizer.step()
    weight.grad = torch.ones(4)
    with Operations() as operations:
        optimizer.step()
    assert "aten._foreach_add_.Scalar" in operations.seen


@pytest.mark.parametrize(
    ("on", "name"),
    [
        ("class", "_init_group"),
        ("class", "_optimizer_step_code"),
        ("instance", "_init_group"),
        ("instance", "_optimizer_step_code"),
        ("module", "adam"),
    ],
)
def test_what_is_put_into_torchs_step_is_called(on, name, monkeypatch):
    """After the wrap: on the class, on this optimizer, or the function it hands everything to."""
    weight, optimizer = one_parameter(ADAM, fused=True)
    watched(optimizer)
    place = {"class": ADAM, "instance": optimizer, "module": sys.modules["torch.optim.adam"]}[on]
    seen, original = [], getattr(place, name)

    def patched(*args, **kwargs):
        seen.append(name)
        return original(*args, **kwargs)

    for step in range(4):
        if step == 2:
            monkeypatch.setattr(place, name, patched)
        weight.grad = torch.ones(4)
        optimizer.step()
    assert len(seen) == 2


@pytest.mark.parametrize("how", ["agent closed under a scheduler", "hooks cleared"])
def test_hooks_that_took_the_place_of_the_agents(how):
    """As many as before, of somebody else: the guard may still be there, and steps as torch does."""
    weight, optimizer = one_parameter(ADAMW, fused=True)
    agent, _ = watched(optimizer)
    if how == "hooks cleared":
        optimizer._optimizer_step_pre_hooks.clear()
        optimizer._optimizer_step_post_hooks.clear()
    else:
        CosineAnnealingLR(optimizer, 10)
        agent.close()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(2):
        weight.grad = torch.ones(4)
        optimizer.step()
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("kind", ["none", "values", "ParameterList"])
def test_groups_of_another_kind(kind):
    """Emptied, or with something else than a list of parameters: as torch takes it."""
    models = [mlp(), mlp()]
    for i, model in enumerate(models):
        optimizer = ADAMW(model.parameters(), lr=0.1, fused=True)
        (group,) = optimizer.param_groups
        group["params"] = {
            "none": list,
            "values": lambda model=model: dict(model.named_parameters()).values(),
            "ParameterList": lambda model=model: nn.ParameterList(model.parameters()),
        }[kind]()
        if i == 0:
            watched(optimizer, clip=ClipNorm(1e9))
        for step in range(3):
            set_gradients(step, model)
            optimizer.step()
        optimizer.param_groups.clear()
        optimizer.step()
    assert parameters_equal(*models)
