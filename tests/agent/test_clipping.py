"""Clipping agrees with torch's own functions, in every optimizer and whichever way it is done."""

import copy

import pytest
import torch
from loops import greatest_difference, mlp, parameters_equal, set_gradients, train, twins
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradwatch
from gradwatch.testing import MemorySink

OPTIMIZERS = {
    "sgd": lambda p, **k: torch.optim.SGD(p, lr=0.1, momentum=0.9, **k),
    "adam": lambda p, **k: torch.optim.Adam(p, lr=0.01, **k),
    "adamw": lambda p, **k: torch.optim.AdamW(p, lr=0.01, **k),
    "adagrad": lambda p, **k: torch.optim.Adagrad(p, lr=0.1, **k),
    "rmsprop": lambda p, **k: torch.optim.RMSprop(p, lr=0.01, **k),
}
KINDS = [
    pytest.param(name, {"fused": True} if fused else {}, id=f"{name}{'-fused' * fused}")
    for name in OPTIMIZERS
    for fused in (False, True)
    if not (fused and name == "rmsprop")
]


def run_both(kind, options, policy, reference_clip, *, steps=20, size=1.0):
    """Step the wrapped optimizer and torch's own way side by side; both models and the records."""
    ours, theirs = twins()
    sink = MemorySink()
    wrapped = OPTIMIZERS[kind](ours.parameters(), **options)
    plain = OPTIMIZERS[kind](theirs.parameters(), **options)
    agent = gradwatch.Agent(wrapped, clip=policy, store=sink, metrics_port=None)
    for step in range(steps):
        set_gradients(step, ours, theirs, size=size)
        wrapped.step()
        reference_clip(theirs.parameters())
        plain.step()
    assert agent.flush()
    return ours, theirs, sink.steps


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_clip_norm_agrees_with_clip_grad_norm(kind, options):
    """20 steps, some clipped and some not, end within 1e-6 of `clip_grad_norm_` + `step`."""
    ours, theirs, records = run_both(
        kind, options, gradwatch.ClipNorm(1.0), lambda p: clip_grad_norm_(p, 1.0)
    )
    assert greatest_difference(ours, theirs) < 1e-6
    assert 0 < sum(r.clipped for r in records) < 20


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_clip_value_agrees_with_clip_grad_value(kind, options):
    """The same for `clip_grad_value_`."""
    ours, theirs, records = run_both(
        kind, options, gradwatch.ClipValue(0.5), lambda p: clip_grad_value_(p, 0.5)
    )
    assert greatest_difference(ours, theirs) < 1e-6
    assert 0 < sum(r.clipped for r in records) < 20


@pytest.mark.parametrize("norm_type", [1.0, 3.0, float("inf")])
@pytest.mark.parametrize("fused", [False, True])
def test_other_norms(norm_type, fused):
    """p-norms other than 2 clip as torch clips them, and are what is recorded."""
    ours, theirs, records = run_both(
        "adamw",
        {"fused": fused},
        gradwatch.ClipNorm(0.5, norm_type=norm_type),
        lambda p: clip_grad_norm_(p, 0.5, norm_type=norm_type),
    )
    assert greatest_difference(ours, theirs) < 1e-6
    model = mlp()
    for record in records:
        set_gradients(record.step, model)
        expected = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters()], norm_type=norm_type
        )
        assert record.pre_norm == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_without_folding_it_is_bit_identical(kind, options, monkeypatch):
    """`GRADWATCH_FOLD=0` multiplies in place exactly as `clip_grad_norm_` does."""
    monkeypatch.setenv("GRADWATCH_FOLD", "0")
    ours, theirs, _ = run_both(
        kind, options, gradwatch.ClipNorm(1.0), lambda p: clip_grad_norm_(p, 1.0)
    )
    assert parameters_equal(ours, theirs)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_step_that_needs_no_clipping_is_bit_identical(kind, options):
    """A threshold above every norm changes no bit."""
    ours, theirs, records = run_both(kind, options, gradwatch.ClipNorm(1e9), lambda p: None)
    assert parameters_equal(ours, theirs)
    assert not any(r.clipped for r in records)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_observe_only_leaves_parameters_bit_identical(kind, options):
    """A whole training run with `ObserveOnly` has the losses and parameters of an unwrapped one."""
    ours, theirs = twins()
    wrapped = OPTIMIZERS[kind](ours.parameters(), **options)
    plain = OPTIMIZERS[kind](theirs.parameters(), **options)
    sink = MemorySink()
    agent = gradwatch.Agent(wrapped, clip=gradwatch.ObserveOnly(), store=sink, metrics_port=None)
    assert train(ours, wrapped, 50) == train(theirs, plain, 50)
    assert parameters_equal(ours, theirs)
    assert agent.flush()
    assert len(sink.steps) == 50
    assert all(r.pre_norm == r.post_norm > 0 for r in sink.steps)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_post_norm_is_what_the_optimizer_used(kind, options):
    """`post_norm` equals the norm of the gradients `clip_grad_norm_` leaves behind."""
    theirs = mlp()
    _, _, records = run_both(
        kind, options, gradwatch.ClipNorm(1.0), lambda p: clip_grad_norm_(p, 1.0)
    )
    for record in records:
        set_gradients(record.step, theirs)
        pre = clip_grad_norm_(theirs.parameters(), 1.0)
        post = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
        assert record.pre_norm == pytest.approx(float(pre), rel=1e-6)
        assert record.post_norm == pytest.approx(float(post), rel=1e-5)
        assert record.clipped == bool(pre + 1e-6 > 1.0)
        assert record.threshold == 1.0


def test_post_norm_of_value_clipping_is_measured():
    """By-value clipping changes the norm in a way that only measuring tells."""
    theirs = mlp()
    _, _, records = run_both(
        "sgd", {}, gradwatch.ClipValue(0.2), lambda p: clip_grad_value_(p, 0.2)
    )
    for record in records:
        set_gradients(record.step, theirs)
        clip_grad_value_(theirs.parameters(), 0.2)
        post = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
        assert record.post_norm == pytest.approx(float(post), rel=1e-5)
        assert record.threshold != record.threshold  # NaN: no single threshold of the norm


@pytest.mark.parametrize("fused", [False, True])
def test_several_groups_share_one_norm(fused):
    """One policy over two parameter groups clips by the norm of both together, folded too."""
    ours, theirs = twins()

    def optimizer(model):
        first, *rest = model.children()
        groups = [
            {"params": list(first.parameters()), "lr": 0.02},
            {"params": [p for m in rest for p in m.parameters()]},
        ]
        return torch.optim.AdamW(groups, lr=0.01, fused=fused)

    wrapped, plain = optimizer(ours), optimizer(theirs)
    agent = gradwatch.Agent(wrapped, store=(sink := MemorySink()), metrics_port=None)
    for step in range(20):
        set_gradients(step, ours, theirs)
        wrapped.step()
        clip_grad_norm_(theirs.parameters(), 1.0)
        plain.step()
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert sink.steps[0].lr == 0.02


@pytest.mark.parametrize("fused", [False, True])
def test_a_policy_for_each_group(fused):
    """A list clips each group by its own policy; the recorded norm is of all together."""
    ours, theirs = twins()

    def optimizer(model):
        first, *rest = model.children()
        return torch.optim.AdamW(
            [
                {"params": list(first.parameters())},
                {"params": [p for m in rest for p in m.parameters()]},
            ],
            lr=0.01,
            fused=fused,
        )

    wrapped, plain = optimizer(ours), optimizer(theirs)
    policies = [gradwatch.ClipNorm(0.3), gradwatch.ClipValue(0.1)]
    agent = gradwatch.Agent(wrapped, clip=policies, store=(sink := MemorySink()), metrics_port=None)
    totals = []
    for step in range(20):
        set_gradients(step, ours, theirs)
        totals.append(float(torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])))
        wrapped.step()
        clip_grad_norm_(plain.param_groups[0]["params"], 0.3)
        clip_grad_value_(plain.param_groups[1]["params"], 0.1)
        plain.step()
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert [r.pre_norm for r in sink.steps] == pytest.approx(totals, rel=1e-6)


def test_gradients_are_as_before_after_a_folded_step():
    """What the hook sets on the optimizer is gone after the step."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gradwatch.wrap(optimizer, clip=gradwatch.ClipNorm(0.01), store=MemorySink(), metrics_port=None)
    set_gradients(0, model)
    before = set(vars(optimizer)) - {"zero_grad"}  # which is counted until the first step
    optimizer.step()
    assert set(vars(optimizer)) == before


def test_an_exception_inside_step_leaves_no_grad_scale_behind():
    """A step that raises after the hook does not scale the next one."""
    ours, theirs = twins()
    wrapped = torch.optim.AdamW(ours.parameters(), lr=0.01, fused=True)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=True)
    gradwatch.wrap(wrapped, clip=gradwatch.ClipNorm(0.01), store=MemorySink(), metrics_port=None)

    def fail(*_):
        raise RuntimeError("in the user's own hook")

    set_gradients(0, ours)
    handle = wrapped.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="user's own hook"):
        wrapped.step()
    handle.remove()
    for step in range(1, 4):
        set_gradients(step, ours, theirs)
        wrapped.step()
        clip_grad_norm_(theirs.parameters(), 0.01)
        plain.step()
    assert greatest_difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_a_huge_finite_gradient_is_clipped(fused):
    """Squares that overflow float32 make torch's norm inf; ours is right, and it is no NaN."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    before = copy.deepcopy(model)
    set_gradients(0, model)
    next(model.parameters()).grad[0, 0] = 1e30
    optimizer.step()
    assert agent.flush()
    (record,) = sink.steps
    assert record.pre_norm == pytest.approx(1e30)
    assert (record.clipped, record.nonfinite, record.skipped) == (True, False, False)
    moved = before[0].weight[0, 0] - model[0].weight[0, 0]
    assert moved.item() == pytest.approx(1.0, rel=1e-5)
