"""Steps that go straight to the optimizer's kernel: the same weights and state, bit for bit.

The reference is torch's own step, on a twin that nobody watches.
"""

import copy
import gc
import subprocess
import sys
import types
import weakref

import pytest
import torch
from loops import (
    mlp,
    one_parameter,
    parameters_equal,
    set_gradients,
    state_of,
    states_equal,
    watched,
)
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch import ClipNorm, kernels
from gradwatch.scaling import CLIP_EPSILON

ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
KINDS = [
    (ADAMW, {}),
    (ADAMW, {"amsgrad": True, "betas": (0.5, 0.7), "eps": 1e-3}),
    (ADAMW, {"lr": torch.tensor(0.03)}),
    (ADAM, {"weight_decay": 0.1, "maximize": True}),
    (ADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (SGD, {}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.5, "dampening": 0.3, "maximize": True}),
]


class Pair:
    """A model with a watched optimizer, and its twin with one that is not."""

    def __init__(self, kind=ADAMW, *, two_groups=False, clip=None, **options):
        self.models = [mlp(), mlp()]
        self.optimizers = []
        for model in self.models:
            groups = list(model.parameters())
            if two_groups:
                groups = [{"params": groups[:2]}, {"params": groups[2:], "lr": 0.01}]
            given = {"lr": 0.03, **copy.deepcopy(options)}
            self.optimizers.append(kind(groups, fused=True, **given))
        self.agent, _ = watched(self.optimizers[0], clip=clip or ClipNorm(1e9))
        self.number = 0

    def step(self, before_twin=lambda _: None):
        set_gradients(self.number, *self.models)
        self.number += 1
        self.optimizers[0].step()
        before_twin(self.optimizers[1])
        self.optimizers[1].step()

    def each(self, change):
        """Do the same to both."""
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            change(model, optimizer)

    def same(self):
        ours, theirs = self.optimizers
        return parameters_equal(*self.models) and states_equal(state_of(ours), state_of(theirs))


@pytest.fixture
def by_torch(monkeypatch):
    """The steps that torch's own Python takes, one entry a group."""
    taken = []
    for module, function in (("adam", "adam"), ("sgd", "sgd")):
        place = sys.modules[f"torch.optim.{module}"]
        original = getattr(place, function)

        def counted(*args, original=original, **kwargs):
            taken.append(original)
            return original(*args, **kwargs)

        monkeypatch.setattr(place, function, counted)
    for kind in kernels._CALLS:
        kernels.KernelStep.of(one_parameter(kind)[1], None, None)  # tries torch's own, once
    taken.clear()
    return taken


@pytest.mark.parametrize("two_groups", [False, True])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_thirty_steps_are_torchs_bit_for_bit(kind, options, two_groups, by_torch):
    """Weights and state; after the first step, without torch's Python."""
    pair = Pair(kind, two_groups=two_groups, **options)
    for _ in range(30):
        by_torch.clear()
        pair.step()
        if pair.number > 1:
            assert len(by_torch) == 1 + two_groups  # the twin's
    assert pair.same()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_clipped_step_is_what_torch_makes_of_the_same_divisor(kind, options):
    """The divisor that the kernel is handed is the only difference to an unclipped one."""
    pair = Pair(kind, clip=ClipNorm(0.05), **options)

    def divide(twin):
        norm = pair.agent.last.pre_norm
        coefficient = 0.05 / (norm + CLIP_EPSILON)
        twin.grad_scale = torch.tensor(1.0 / coefficient) if coefficient < 1.0 else None

    clipped = 0
    for _ in range(20):
        pair.step(before_twin=divide)
        clipped += pair.agent.last.clipped
    assert clipped > 5
    assert pair.same()


@pytest.mark.parametrize("first", ["scheduler", "agent"])
def test_under_a_scheduler(first, by_torch, recwarn):
    """Built before or after: the learning rates it sets, and no warning of a step left out."""
    model = mlp()
    optimizer = ADAMW(model.parameters(), lr=0.1, fused=True)
    if first == "agent":
        watched(optimizer)
    scheduler = CosineAnnealingLR(optimizer, 10)
    if first == "scheduler":
        watched(optimizer)
    twin = mlp()
    other = ADAMW(twin.parameters(), lr=0.1, fused=True)
    others = CosineAnnealingLR(other, 10)
    for step in range(10):
        set_gradients(step, model, twin, size=1e-3)
        by_torch.clear()
        optimizer.step()
        assert len(by_torch) == (step == 0)
        scheduler.step()
        other.step()
        others.step()
    assert parameters_equal(model, twin)
    assert not recwarn.list


def replace_average(_, optimizer):
    for state in optimizer.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])


def replace_one_state(model, optimizer):
    old = optimizer.state[model[0].weight]
    optimizer.state[model[0].weight] = {key: value + 1 for key, value in old.items()}


def reset_one_state(model, optimizer):
    del optimizer.state[model[2].weight]


def move_counters(_, optimizer):
    """To another device and back, as a popular recipe does it: other memory, the same tensors."""
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def load(_, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def freeze(model, _):
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)


def add_group(model, optimizer):
    model.register_parameter("more", nn.Parameter(torch.ones(3)))
    optimizer.add_param_group({"params": [model.more], "lr": 0.5})


def put_another_parameter(model, optimizer):
    """As pruning and densifying do it: the state goes on under a new key."""
    old = model[0].weight
    new = nn.Parameter(old.detach() * 2)
    model[0].weight = new
    params = optimizer.param_groups[0]["params"]
    params[[p is old for p in params].index(True)] = new
    optimizer.state[new] = optimizer.state.pop(old)


def use_doubles(model, optimizer):
    model.double()
    load(model, optimizer)  # casts the state


def halve_a_part(model, optimizer):
    model[0].bfloat16()
    load(model, optimizer)


def regulate(_, optimizer):
    optimizer.param_groups[0].update(lr=0.5, betas=(0.3, 0.4), weight_decay=0.2, maximize=True)


def keep_the_greatest(_, optimizer):
    optimizer.param_groups[0]["amsgrad"] = True
    for state in optimizer.state.values():
        state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])


def note_something(_, optimizer):
    optimizer.state["a note of the user's"] = 3


def unfuse(_, optimizer):
    optimizer.param_groups[0]["fused"] = False


BY_TORCH = {halve_a_part, unfuse}  # torch groups by dtype; another kernel


@pytest.mark.parametrize(
    "change",
    [
        replace_average, replace_one_state, reset_one_state, move_counters, load, freeze, add_group,
        put_another_parameter, use_doubles, halve_a_part, regulate, keep_the_greatest,
        note_something, unfuse,
    ],
)  # fmt: skip
def test_what_is_changed_between_steps_counts(change, by_torch):
    """Whatever a loop does to model and optimizer, the next step works on that; by the kernel."""
    pair = Pair()
    for _ in range(3):
        pair.step()
    pair.each(change)
    for _ in range(3):
        pair.step()
    if change is not freeze:
        assert pair.same()
    else:
        assert parameters_equal(*pair.models)
    by_torch.clear()
    pair.step()
    pair.optimizers[0].zero_grad()
    watched_groups = len(by_torch) - len(pair.optimizers[1].param_groups)
    assert watched_groups == (1 if change in BY_TORCH else 0)


@pytest.mark.parametrize(
    ("kind", "options", "change"),
    [
        (ADAMW, {"amsgrad": True}, {"amsgrad": False}),
        (SGD, {"momentum": 0.9}, {"momentum": 0}),
        (SGD, {}, {"momentum": 0.9}),
        (SGD, {"momentum": 0.9}, {"foreach": True}),
        (ADAM, {}, {"foreach": True}),
    ],
)
def test_options_that_ask_for_another_way(kind, options, change):
    """Or for other state; what is there stays, used or not."""
    pair = Pair(kind, **options)
    for _ in range(3):
        pair.step()
    pair.each(lambda _, optimizer: optimizer.param_groups[0].update(change))
    for _ in range(3):
        pair.step()
    assert pair.same()


def test_what_torch_refuses_is_refused():
    """By its own words, with the weights as they were."""
    pair = Pair()
    pair.step()
    pair.each(lambda _, optimizer: optimizer.param_groups[0].update(differentiable=True))
    set_gradients(1, *pair.models)
    for optimizer in pair.optimizers:
        with pytest.raises(RuntimeError, match="does not support differentiable"):
            optimizer.step()
    assert pair.same()


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


@pytest.mark.parametrize("present", [[0, 1], [2, 3], [], [0, 3]])
def test_parameters_without_a_gradient_are_left_alone(present):
    """Others at each step, as with experts or a frozen part."""
    pair = Pair()
    for step in range(8):
        set_gradients(step, *pair.models)
        for model in pair.models:
            for i, parameter in enumerate(model.parameters()):
                if step % 2 and i not in present:
                    parameter.grad = None
        for optimizer in pair.optimizers:
            optimizer.step()
    assert pair.same()


def test_a_checkpoint_is_what_it_would_be():
    """SGD without momentum keeps no state, and none is made up for it."""
    pair = Pair(SGD)
    for _ in range(3):
        pair.step()
    assert pair.optimizers[0].state_dict() == pair.optimizers[1].state_dict()
    assert not pair.optimizers[0].state


def test_the_callers_grad_mode_stays():
    """Inside `no_grad` and outside."""
    weight, optimizer = one_parameter(ADAMW, fused=True)
    watched(optimizer)
    for mode in (True, False, True):
        weight.grad = torch.ones(4)
        with torch.set_grad_enabled(mode):
            optimizer.step()
            assert torch.is_grad_enabled() is mode
    assert weight.requires_grad
    assert weight.grad_fn is None


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


def test_an_agent_that_is_closed_leaves_other_hooks_their_steps():
    """Its guard may have to stay, under a scheduler's: it steps as torch does."""
    weight, optimizer = one_parameter(ADAMW, fused=True)
    agent, _ = watched(optimizer)
    CosineAnnealingLR(optimizer, 10)
    agent.close()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(2):
        weight.grad = torch.ones(4)
        optimizer.step()
    assert seen == ["before", "after"] * 2


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


@pytest.mark.parametrize("name", ["_init_group", "_optimizer_step_code"])
@pytest.mark.parametrize("on", [ADAM, "instance"])
def test_what_is_put_into_torchs_step_is_called(name, on, monkeypatch):
    """After the wrap, on the class or on this optimizer."""
    weight, optimizer = one_parameter(ADAM, fused=True)
    watched(optimizer)
    seen = []
    original = getattr(ADAM, name)

    def patched(self, *args):
        seen.append(name)
        return original(self, *args)

    for step in range(4):
        if step == 2:
            patch = patched if on is ADAM else types.MethodType(patched, optimizer)
            monkeypatch.setattr(optimizer if on == "instance" else on, name, patch)
        weight.grad = torch.ones(4)
        optimizer.step()
    assert len(seen) == 2


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


def test_nothing_of_a_step_is_kept():
    """What is dropped from the optimizer is freed, and all of it with the optimizer."""
    pair = Pair()
    pair.step()
    pair.step()
    model, optimizer = pair.models[0], pair.optimizers[0]
    optimizer.zero_grad()
    state = [weakref.ref(v) for of in optimizer.state.values() for v in of.values()]
    optimizer.state.clear()
    gc.collect()
    assert not any(reference() for reference in state)
    pair.each(lambda _, optimizer: optimizer.zero_grad())
    weights = [weakref.ref(p) for p in model.parameters()]
    pair.agent.close()
    del model, optimizer
    pair.models.clear()
    pair.optimizers.clear()
    gc.collect()
    assert not any(reference() is not None for reference in weights)


@pytest.mark.parametrize("where", ["one group", "two groups"])
def test_a_counter_that_parameters_share_counts_as_torchs(where):
    """A state dict made by hand, of which loading keeps the sharing."""

    def share(_, optimizer):
        shared = optimizer.state_dict()
        step = torch.tensor(100.0)
        for of in shared["state"].values():
            of["step"] = step
        optimizer.load_state_dict(shared)

    pair = Pair(two_groups=where == "two groups")
    pair.step()
    pair.each(share)
    for _ in range(2):
        pair.step()
    assert pair.same()


@pytest.mark.parametrize("broken", ["lr", "dtype", "sparse"])
def test_a_step_that_raises_leaves_what_torchs_leaves(broken):
    """The same error, the same weights and counters: the groups before the broken one were stepped."""

    def spoil(model, optimizer):
        if broken == "lr":
            optimizer.param_groups[1]["lr"] = None
        elif broken == "dtype":
            model[2].double()
        for parameter in model[2].parameters():
            parameter.grad = torch.ones_like(parameter)
        if broken == "sparse":
            model[2].weight.grad = model[2].weight.grad.to_sparse()

    pair = Pair(two_groups=True)
    for _ in range(3):
        pair.step()
    pair.each(spoil)
    told = []
    for optimizer in pair.optimizers:
        with pytest.raises((TypeError, RuntimeError)) as caught:
            optimizer.step()
        told.append((caught.type, str(caught.value)[:50]))
    assert told[0] == told[1]
    assert pair.same()


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


def test_betas_that_are_tensors_of_one_element():
    """They are made numbers of, first."""
    pair = Pair()
    betas = torch.tensor([0.8]), torch.tensor([0.9])
    for _ in range(3):
        pair.step()
        pair.each(lambda _, optimizer: optimizer.param_groups[0].update(betas=betas))
    assert pair.same()


def test_hooks_that_took_the_place_of_the_agents():
    """As many as before, of somebody else."""
    weight, optimizer = one_parameter(ADAMW, fused=True)
    watched(optimizer)
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(2):
        weight.grad = torch.ones(4)
        optimizer.step()
    assert seen == ["before", "after"] * 2


def test_the_storage_of_a_counter_is_the_jobs():
    """It may be freed, as offloading does it; and what watches operations sees torch's."""
    weight, optimizer = one_parameter(ADAMW, fused=True)
    watched(optimizer)
    for _ in range(2):
        weight.grad = torch.ones(4)
        optimizer.step()
    optimizer.state[weight]["step"].untyped_storage().resize_(0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_parameter_that_joins_in_later(momentum):
    """Its first gradient comes when others have a momentum already."""
    pair = Pair(ADAM if momentum else SGD)
    for step in range(5):
        set_gradients(step, *pair.models)
        if step < 2:
            for model in pair.models:
                model[0].weight.grad = None
        for optimizer in pair.optimizers:
            optimizer.step()
    assert pair.same()


def test_a_function_of_torchs_that_somebody_replaces_is_called(monkeypatch):
    """The one that its step hands everything to, after the wrap."""
    weight, optimizer = one_parameter(ADAM, fused=True)
    watched(optimizer)
    place = sys.modules["torch.optim.adam"]
    seen, original = [], place.adam

    def patched(*args, **kwargs):
        seen.append(weight)
        return original(*args, **kwargs)

    for step in range(4):
        if step == 2:
            monkeypatch.setattr(place, "adam", patched)
        weight.grad = torch.ones(4)
        optimizer.step()
    assert len(seen) == 2


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
