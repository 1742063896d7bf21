"""Gradients as jobs have them: missing, frozen, of other types, very large, of very many tensors."""

import math

import pytest
import torch
from loops import parameters_equal, set_gradients, twins, watched
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import ClipNorm, Settings


def test_a_model_that_changes_its_dtype_is_measured_right():
    """`model.bfloat16()` between two steps, against float64."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    agent, _ = watched(optimizer, clip=gradwatch.ObserveOnly())
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        optimizer.zero_grad()
        model(torch.randn(8, 64, dtype=dtype)).pow(2).mean().backward()
        norm = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
        optimizer.step()
        assert agent.last.pre_norm == pytest.approx(norm, rel=1e-5)


def test_a_finite_float64_gradient_is_clipped_however_large():
    """Squares that overflow float64, too."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    agent, _ = watched(optimizer)
    weight.grad = torch.tensor([3e200, 4e200], dtype=torch.float64)
    optimizer.step()
    assert agent.last.pre_norm == pytest.approx(5e200)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8], dtype=torch.float64))


@pytest.mark.parametrize("clip", [ClipNorm(1.0, math.inf), gradwatch.ClipValue(0.5)], ids=str)
def test_a_parameter_without_elements_is_no_trouble(clip):
    """As empty embeddings and uneven shards have it."""
    weight, empty = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(0))
    optimizer = torch.optim.SGD([weight, empty], lr=0.1)
    agent, _ = watched(optimizer, clip=clip)
    weight.grad, empty.grad = torch.full((2,), 7.0), torch.ones(0)
    optimizer.step()
    assert agent.last.clipped


def test_many_parameters_and_a_small_event_ring(monkeypatch, caplog):
    """Events that do not fit are lost alone: every step is on record once."""
    monkeypatch.setenv("GRADWATCH_RING_EVENTS", "64")
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2000)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    agent, sink = watched(optimizer)
    for step in range(3):
        for p in parameters:
            p.grad = torch.full((1,), math.nan if step == 1 else 1.0)
        optimizer.step()
    assert agent.flush()
    assert [s.step for s in sink.steps] == [0, 1, 2]
    assert "an event is not on record" in caplog.text


def test_a_nan_in_every_parameter_of_a_huge_model_is_on_record():
    """The event keeps both ends of the list and says how many it left out."""
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(9000)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    agent, sink = watched(optimizer)
    for i, p in enumerate(parameters):
        p.grad = torch.full((1,), math.nan if i else 1.0)
    optimizer.step()
    assert agent.flush(20)
    (event,) = sink.events
    assert event.data["origin"] == "group0.param8999"
    assert event.data["parameters_left_out"] == 8999 - len(event.data["parameters"])
    assert list(event.data["parameters"])[-1] == "group0.param8999"
    assert sum(len(sample.parameters) for sample in sink.layers) == 9000


def assert_norms(records, norms):
    """The recorded norms are those of `clip_grad_norm_(…, 1.0)`, some of them clipped."""
    assert [r.pre_norm for r in records] == pytest.approx(norms, rel=1e-5)
    assert [r.post_norm for r in records] == pytest.approx([min(n, 1.0) for n in norms], rel=1e-5)
    assert 0 < sum(r.clipped for r in records) < len(records)


def step_both(wrapped, plain, *, norms):
    """A step of each; the second is clipped by torch, whose norm is kept."""
    wrapped.step()
    norms.append(float(clip_grad_norm_([p for g in plain.param_groups for p in g["params"]], 1.0)))
    plain.step()


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_layers_that_thaw(fused, monkeypatch):
    """A layer without gradients is no part of the norm; from the step on that trains it, it is."""
    monkeypatch.setenv("GRADWATCH_FOLD", "0")
    ours, theirs = twins()
    wrapped, plain = (
        torch.optim.AdamW(m.parameters(), lr=0.01, fused=fused) for m in (ours, theirs)
    )
    agent, sink = watched(wrapped, model=ours, settings=Settings(layer_norms_every=1))
    first = ours[0].weight.detach().clone()
    norms, layers = [], []
    for step in range(20):
        set_gradients(step, ours, theirs)
        for model in (ours, theirs):
            model[0].requires_grad_(step >= 10)
            if step < 10:
                model[0].weight.grad = model[0].bias.grad = None
        grads = [p.grad for p in theirs.parameters()]
        layers.append([math.nan if g is None else float(g.norm()) for g in grads])
        step_both(wrapped, plain, norms=norms)
        assert torch.equal(ours[0].weight, first) == (step < 10)
    assert parameters_equal(ours, theirs)
    assert agent.flush()
    assert_norms(sink.steps, norms)
    assert not sink.events
    assert [sample.step for sample in sink.layers] == list(range(20))
    for sample, expected in zip(sink.layers, layers, strict=True):
        assert sample.grad_norms == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_branch_that_is_not_used_has_no_gradient(fused, monkeypatch):
    """Two heads in turn: each step's norm and update are of the parameters that took part."""
    monkeypatch.setenv("GRADWATCH_FOLD", "0")

    def build():
        torch.manual_seed(0)
        parts = {
            "body": torch.nn.Linear(8, 8),
            "a": torch.nn.Linear(8, 1),
            "b": torch.nn.Linear(8, 1),
        }
        return torch.nn.ModuleDict(parts)

    ours, theirs = build(), build()
    wrapped, plain = (
        torch.optim.AdamW(m.parameters(), lr=0.01, fused=fused) for m in (ours, theirs)
    )
    agent, sink = watched(wrapped, model=ours)
    generator = torch.Generator().manual_seed(0)
    norms = []
    for step in range(20):
        x = torch.randn(4, 8, generator=generator)
        unused = "ab"[step % 2]
        for model, optimizer in ((ours, wrapped), (theirs, plain)):
            optimizer.zero_grad()
            head = model["ba"[step % 2]]
            error = head(model["body"](x)) - x.sum(1, keepdim=True)
            (0.15 * error.pow(2).mean()).backward()
            assert model[unused].weight.grad is None
        step_both(wrapped, plain, norms=norms)
    assert parameters_equal(ours, theirs)
    assert agent.flush()
    assert_norms(sink.steps, norms)
    assert not sink.events


def test_a_step_whose_gradient_is_zero(monkeypatch):
    """Norm 0 as torch has it, one `dead_gradient` event, and the same steps before and after."""
    monkeypatch.setenv("GRADWATCH_FOLD", "0")
    ours, theirs = twins()
    wrapped, plain = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, theirs))
    agent, sink = watched(wrapped, model=ours)
    norms = []
    for step in range(10):
        set_gradients(step, ours, theirs)
        if step == 5:
            wrapped.zero_grad(set_to_none=False)
            plain.zero_grad(set_to_none=False)
        step_both(wrapped, plain, norms=norms)
    assert parameters_equal(ours, theirs)
    assert agent.flush()
    assert norms[5] == 0
    assert_norms(sink.steps, norms)
    assert [(e.kind, e.step) for e in sink.events] == [("dead_gradient", 5)]
