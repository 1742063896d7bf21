"""Optimizers as jobs have them: interrupted, subclassed, without a learning rate, growing."""

import math

import pytest
import torch
from loops import one_parameter, watched

from gradwatch import ClipNorm


@pytest.mark.parametrize("how", ["close", "replace", "load_state_dict", "go on"])
def test_an_interrupted_step_leaves_nothing_on_the_optimizer(how, monkeypatch):
    """Ctrl-C inside a folded step, then what people do next: the divisor is gone."""
    weight, optimizer = one_parameter(fused=True)
    agent, _ = watched(optimizer)
    weight.grad = torch.full((4,), 50.0)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_sgd_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert getattr(optimizer, "grad_scale", None) is None
    if how == "close":
        agent.close()
    elif how == "replace":
        agent, _ = watched(optimizer, replace=True)
    elif how == "load_state_dict":
        agent.load_state_dict(agent.state_dict())
    for _ in range(2):
        weight.grad = torch.full((4,), 0.05)
        before = weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - weight.detach(), torch.full((4,), 0.005))
        if how != "close":
            assert agent.last.pre_norm == pytest.approx(0.1)
    assert getattr(optimizer, "grad_scale", None) is None


def test_a_subclass_that_calls_super_is_one_step():
    """Hooks that torch runs at both levels look once; of a NaN step the subclass sees nothing."""

    class Decaying(torch.optim.AdamW):
        taken = 0

        def step(self, closure=None):
            self.taken += 1
            return super().step(closure)

    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # torch wraps AdamW.step now as well
    weight, optimizer = one_parameter(Decaying)
    agent, sink = watched(optimizer)
    for value in (50.0, math.nan, 50.0):
        weight.grad = grad = torch.full((4,), value)
        optimizer.step()
        assert weight.grad is grad
    assert optimizer.taken == 2
    weight.grad = None
    optimizer.step((50 * weight.sum()).backward)
    assert agent.flush()
    assert [(s.step, s.clipped, s.skipped) for s in sink.steps] == [
        (0, True, False),
        (1, False, True),
        (2, True, False),
        (3, True, False),
    ]
    assert sink.steps[0].pre_norm == pytest.approx(100.0)
    assert [e.kind for e in sink.events] == ["nonfinite_gradient"]


def test_an_optimizer_without_a_learning_rate_is_recorded():
    """Its lr is absent (an optimizer that finds its own)."""
    weight, optimizer = one_parameter()
    agent, sink = watched(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    for lr in (0.1, torch.tensor(0.2)):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.ones(4)
        optimizer.step()

    class OwnPace(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": None})

        def step(self):
            return None

    other = OwnPace([torch.nn.Parameter(torch.ones(1))])
    paced, paced_sink = watched(other)
    other.step()
    assert agent.flush()
    assert paced.flush()
    assert [s.lr for s in sink.steps] == pytest.approx([0.1, 0.2])
    assert math.isnan(paced_sink.steps[0].lr)
    assert sink.runs[0].settings["learning_rates"] == [0.1]
    assert paced_sink.runs[0].settings["learning_rates"] == []


def test_the_rates_of_groups_are_those_at_the_height_of_a_schedule():
    """Under a warm-up from 0 all begin alike; momentum counts as what it adds up to."""
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    groups = [{"params": weights[:1], "lr": 0.02}, {"params": weights[1:], "lr": 0.001}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, dampening=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 50)
    agent, sink = watched(optimizer)
    for weight in weights:
        weight.grad = torch.ones(4)
    optimizer.step()
    assert agent.flush()
    assert sink.runs[0].settings["learning_rates"] == [0.001, 0.02]
    assert sink.runs[0].settings["gain"] == pytest.approx(5.0)


def test_groups_added_later_get_the_last_policy(caplog):
    """Measured, clipped, and their NaN seen; said once."""
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=0.1)
    agent, sink = watched(optimizer, clip=[ClipNorm(1.0)])
    optimizer.add_param_group({"params": [second]})
    for value in (3.0, 3.0, math.nan):
        first.grad, second.grad = torch.full((2,), 4.0), torch.full((2,), value)
        optimizer.step()
        if not math.isnan(value):
            assert second.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert agent.flush()
    assert [s.pre_norm for s in sink.steps[:2]] == pytest.approx([math.sqrt(50)] * 2)
    assert sink.steps[2].nonfinite
    assert torch.isfinite(second).all()
    assert caplog.text.count("parameter group was added") == 1
