"""Lists of parameters that are not the plain one: tied, freed and made anew, of another type."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from loops import mlp, watched
from pytorch_optimizer import OrthoGrad
from torch import nn

import gradwatch
from gradwatch import ClipLayerNorm, ClipNorm, ClipValue

POLICIES = {
    "norm": (ClipNorm(0.5), lambda params: torch.nn.utils.clip_grad_norm_(params, 0.5)),
    "value": (ClipValue(0.01), lambda params: torch.nn.utils.clip_grad_value_(params, 0.01)),
    "layer": (
        ClipLayerNorm(0.1),
        lambda params: [torch.nn.utils.clip_grad_norm_([p], 0.1) for p in params],
    ),
}
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "sgd-fused": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}


def tied(kind, model, where):
    """An optimizer that lists the model's first weight once more."""
    params = list(model.parameters())
    if where == "in a group":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of it
            return kind([*params, params[0]])
    optimizer = kind([{"params": params[:3]}, {"params": params[3:]}])
    optimizer.param_groups[1]["params"].append(params[0])  # torch refuses it at once, not later
    return optimizer


@pytest.mark.parametrize("where", ["in a group", "in two groups"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_parameter_that_is_listed_twice_is_measured_and_clipped_once(kind, policy, where):
    """Norms, gradients and weights are those of torch's clipping, over each parameter once."""
    ours = mlp(sizes=(8, 16, 1))
    theirs = copy.deepcopy(ours)
    optimizer, plain = (tied(OPTIMIZERS[kind], model, where) for model in (ours, theirs))
    clip, reference = POLICIES[policy]
    agent, sink = watched(
        optimizer, clip=clip, settings=gradwatch.Settings(layer_norms_every=1), model=ours
    )
    norms = []
    for step in range(4):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            model.zero_grad()
            (model(x) - 20.0).square().mean().backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])))
        reference(list(theirs.parameters()))
        plain.step()
        optimizer.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert agent.flush()
    assert [record.pre_norm for record in sink.steps] == pytest.approx(norms, rel=1e-6)
    assert all(
        list(sample.parameters) == [n for n, _ in ours.named_parameters()] for sample in sink.layers
    )
    agent.close()


def test_a_policy_a_group_clips_what_two_groups_list_once():
    """The first of the groups has it."""
    model = mlp(sizes=(8, 16, 1))
    optimizer = tied(OPTIMIZERS["sgd"], model, "in two groups")
    agent, sink = watched(optimizer, clip=[ClipNorm(1e9), ClipNorm(0.1)])
    model(torch.ones(4, 8)).square().sum().backward()
    params = list(model.parameters())
    before = params[0].grad.clone()
    true = float(torch.nn.utils.get_total_norm([p.grad for p in params]))
    optimizer.step()
    assert torch.equal(params[0].grad, before)
    assert agent.flush()
    assert sink.steps[0].pre_norm == pytest.approx(true, rel=1e-6)
    agent.close()


def test_clipping_by_hand_takes_a_tied_parameter_once():
    """agent.clip() returns torch's norm, and leaves the gradient at the threshold."""
    model = mlp(sizes=(8, 16, 1))
    optimizer = tied(OPTIMIZERS["sgd"], model, "in a group")
    agent, _ = watched(optimizer, clip=ClipNorm(0.5))
    (model(torch.ones(4, 8)) - 20.0).square().sum().backward()
    true = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert float(agent.clip()) == pytest.approx(true, rel=1e-6)
    left = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert left == pytest.approx(0.5, rel=1e-5)
    agent.close()


def test_a_new_parameter_never_gets_the_name_of_a_freed_one():
    """Densification: parameters are freed and made anew until one has the memory of another."""
    names = {"means": 3, "scales": 2, "colors": 4}
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(n))], "name": name} for name, n in names.items()],
        lr=0.0,
    )
    agent, sink = watched(optimizer)
    expected = []
    for step in range(30):
        groups = optimizer.param_groups
        group = groups[step % 3]
        group["params"][0] = None
        group["params"][0] = nn.Parameter(torch.ones(5))
        for one in groups:
            one["params"][0].grad = torch.ones_like(one["params"][0])
        bad = (step * 2) % 3
        groups[bad]["params"][0].grad[0] = math.nan
        expected.append(f"group{bad}.param0")
        optimizer.step()
        for one in groups:
            one["params"][0].grad = torch.ones_like(one["params"][0])
        for _ in range(100):  # good steps: of bad ones that follow soon, ever fewer have an event
            optimizer.step()
    assert agent.flush()
    told = [
        next(iter(event.data["parameters"]))
        for event in sink.events
        if event.kind == "nonfinite_gradient"
    ]
    # A position may bear a count, where the parameter that had it before is still there.
    assert [name.split("#")[0] for name in told] == expected
    agent.close()


def test_layer_norms_stay_with_their_parameters_when_the_list_changes():
    """A parameter that goes takes its name along; the others keep theirs."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = torch.optim.SGD(params, lr=0.0)
    agent, sink = watched(optimizer, settings=gradwatch.Settings(layer_norms_every=1))
    for step in range(4):
        if step == 2:
            del optimizer.param_groups[0]["params"][1]
            del params[1]
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, 1.0 if i == 0 else 3.0)
        optimizer.step()
    assert agent.flush()
    samples = [dict(zip(s.parameters, s.grad_norms, strict=True)) for s in sink.layers]
    assert samples[1] == {"group0.param0": 2.0, "group0.param1": 6.0, "group0.param2": 6.0}
    assert samples[3] == {"group0.param0": 2.0, "group0.param2": 6.0}
    agent.close()


def test_layer_norms_are_those_of_all_groups_under_a_policy_a_group():
    """Gradient norms and weight norms of each parameter, against torch's."""
    params = [nn.Parameter(torch.full((4,), float(i + 1))) for i in range(3)]
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.0)
    clip = [gradwatch.ClipNorm(1e6)] * 2
    agent, sink = watched(optimizer, clip=clip, settings=gradwatch.Settings(layer_norms_every=1))
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, 0.5 * (i + 1))
    optimizer.step()
    assert agent.flush()
    (sample,) = sink.layers
    assert list(sample.parameters) == ["group0.param0", "group1.param0", "group1.param1"]
    assert sample.grad_norms == pytest.approx([float(p.grad.norm()) for p in params])
    assert sample.weight_norms == pytest.approx([float(p.detach().norm()) for p in params])
    agent.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_that_changes_its_type_is_measured_exactly_from_then_on(dtype):
    """The second layer only; the reference is numpy's in float64."""
    model = mlp(sizes=(64, 64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent, sink = watched(optimizer, clip=ClipNorm(1e9))
    true = []
    for step in range(4):
        if step == 2:
            model[2].to(dtype)
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        grads = [p.grad.double().numpy().ravel() for p in model.parameters()]
        true.append(float(np.linalg.norm(np.concatenate(grads))))
        optimizer.step()
    assert agent.flush()
    assert [record.pre_norm for record in sink.steps] == pytest.approx(true, rel=1e-6)
    agent.close()


COMPLEX = {**POLICIES, "observe": (gradwatch.ObserveOnly(), lambda _: None)}


@pytest.mark.parametrize("policy", COMPLEX)
def test_complex_parameters_are_clipped_as_torch_does_it(policy):
    """By value, torch refuses them: the reference is its clamp of each part by itself."""
    generator = torch.Generator().manual_seed(0)
    first = [
        nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.complex64)),
        nn.Parameter(torch.randn(5, generator=generator)),
    ]
    ours, theirs = first, copy.deepcopy(first)
    optimizer, plain = (torch.optim.SGD(params, lr=0.1) for params in (ours, theirs))
    clip, reference = COMPLEX[policy]
    agent, sink = watched(optimizer, clip=clip)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(ours, theirs, strict=True):
            grad = torch.randn(one.shape, generator=generator, dtype=one.dtype)
            one.grad, other.grad = grad.clone(), grad.clone()
        if policy == "value":
            torch.nn.utils.clip_grad_value_([_as_real(p) for p in theirs], 0.01)
        else:
            reference(theirs)
        plain.step()
        optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert agent.flush()
    records = sink.steps
    assert len(records) == 3
    assert all(r.clipped == (policy != "observe") for r in records)
    assert records[-1].post_norm == pytest.approx(_norm(ours), rel=1e-5)
    agent.close()


def _as_real(param):
    """A stand-in whose gradient is a view of the parameter's, its parts as real numbers."""
    if not param.is_complex():
        return param
    real = nn.Parameter(torch.view_as_real(param.detach()))
    real.grad = torch.view_as_real(param.grad)
    return real


def _norm(params):
    parts = [p.grad.numpy().ravel().astype(np.complex128) for p in params]
    return float(np.linalg.norm(np.concatenate(parts)))


def test_the_gradient_of_the_backward_pass_is_measured_under_an_optimizer_that_changes_it():
    """OrthoGrad projects each gradient before its inner step: the record has the one before."""
    model = mlp()
    optimizer = OrthoGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    agent, sink = watched(optimizer, clip=ClipNorm(1e9))
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        (model(x) - 3.0).square().mean().backward()
        grads = [p.grad.double().numpy().ravel() for p in model.parameters()]
        norms.append(float(np.linalg.norm(np.concatenate(grads))))
        optimizer.step()
    assert agent.flush()
    assert [record.pre_norm for record in sink.steps] == pytest.approx(norms, rel=1e-6)
    agent.close()
