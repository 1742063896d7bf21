"""Steps that go straight to the optimizer's kernel: the same weights and state, bit for bit.

The reference is torch's own step, on a twin that nobody watches.
"""

import copy
import gc
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

from gradwatch import ClipNorm
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
    assert not any(reference() is not None for reference in state)
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


def test_betas_that_are_tensors_of_one_element():
    """They are made numbers of, first."""
    pair = Pair()
    betas = torch.tensor([0.8]), torch.tensor([0.9])
    for _ in range(3):
        pair.step()
        pair.each(lambda _, optimizer: optimizer.param_groups[0].update(betas=betas))
    assert pair.same()


def test_the_storage_of_a_counter_is_the_jobs():
    """It may be freed, as offloading does it."""
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
