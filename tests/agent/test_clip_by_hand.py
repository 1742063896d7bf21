"""`agent.clip()`, for loops that want the norm in hand."""

import pytest
import torch
from loops import greatest_difference, mlp, one_parameter, set_gradients, twins, watched
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch.testing import MemorySink


def test_clip_by_hand_is_a_drop_in():
    """`agent.clip()` returns the norm and clips there; the hook does not clip again."""
    ours, theirs = twins()
    wrapped = torch.optim.AdamW(ours.parameters(), lr=0.01, fused=True)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=True)
    agent = gradwatch.Agent(wrapped, store=(sink := MemorySink()), metrics_port=None)
    for step in range(20):
        set_gradients(step, ours, theirs)
        norm = agent.clip()
        expected = clip_grad_norm_(theirs.parameters(), 1.0)
        assert norm.shape == expected.shape
        assert norm.dtype == expected.dtype
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)
        wrapped.step()
        plain.step()
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert len(sink.steps) == 20
    assert not sink.findings


def test_a_clip_by_hand_without_its_step_is_forgotten():
    """A loop that clips and then does not step (a skipped batch) records the next step alone."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    set_gradients(0, model)
    agent.clip()
    optimizer.zero_grad()
    set_gradients(1, model)
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    optimizer.step()
    assert agent.flush()
    assert [r.pre_norm for r in sink.steps] == pytest.approx([expected], rel=1e-6)


def test_clip_twice_in_a_step_and_after_close():
    """The norm is the one before clipping both times; a closed agent goes on clipping."""
    weight, optimizer = one_parameter()
    agent, sink = watched(optimizer)
    weight.grad = torch.full((4,), 50.0)
    assert [float(agent.clip()), float(agent.clip())] == [100.0, 100.0]
    optimizer.step()
    agent.close()
    assert [s.pre_norm for s in sink.steps] == [100.0]
    for _ in range(2):
        weight.grad = torch.full((4,), 50.0)
        assert float(agent.clip()) == 100.0
        assert weight.grad.norm().item() == pytest.approx(1.0)
        optimizer.step()


def test_clip_before_the_scaler_has_scaled_anything():
    """Nothing to unscale yet."""
    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer, scaler=torch.amp.GradScaler("cpu"))
    weight.grad = torch.full((4,), 50.0)
    assert float(agent.clip()) == 100.0
