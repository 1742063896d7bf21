"""Steps with a closure: the gradient is made, and clipped, inside `step()`."""

import math

import pytest
import torch
from loops import mlp, one_parameter, sgd, twins, watched
from torch.nn.utils import clip_grad_norm_

from gradwatch import Agent, NonFiniteGradientError
from gradwatch.testing import MemorySink


def closure_for(model, optimizer, step, *, clip=None):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=generator)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), 5 * x.sum(1, keepdim=True))
        loss.backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        return loss

    return closure


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
        ("AdamW", {"lr": 0.01, "fused": True}),
        ("LBFGS", {"lr": 0.1, "max_iter": 4}),
    ],
)
def test_closures_clip_after_their_backward(kind, options, monkeypatch):
    """Equal to clipping inside the closure; one record an outer step, with the closure's loss."""
    if kind == "LBFGS":
        # Its curvature estimate blows a rounding error up: compare bit by bit instead.
        monkeypatch.setenv("GRADWATCH_FOLD", "0")
    ours, theirs = twins()
    wrapped = getattr(torch.optim, kind)(ours.parameters(), **options)
    plain = getattr(torch.optim, kind)(theirs.parameters(), **options)
    agent = Agent(wrapped, store=(sink := MemorySink()), metrics_port=None, on_nonfinite="raise")
    losses = []
    for step in range(6):
        returned = wrapped.step(closure_for(ours, wrapped, step))
        expected = plain.step(closure_for(theirs, plain, step, clip=1.0))
        losses.append(float(expected.detach()))
        assert float(returned.detach()) == pytest.approx(losses[-1], rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert agent.flush()
    assert [r.step for r in sink.steps] == list(range(6))
    assert [r.loss for r in sink.steps] == pytest.approx(losses, rel=1e-5)


def test_an_error_in_the_closure_is_the_users():
    """It comes out as it went in, and the next step works."""
    model = mlp()
    optimizer = sgd(model)
    agent = Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)

    def closure():
        raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        optimizer.step(closure)
    optimizer.step(closure_for(model, optimizer, 0))
    assert agent.flush()
    assert len(sink.steps) == 1


@pytest.mark.parametrize("result", [{"loss": 1}, (1, 2), torch.ones(3), "text", None])
def test_a_closure_may_return_anything(result):
    """What is not one number is no loss; records go on."""
    weight, optimizer = one_parameter()
    agent, sink = watched(optimizer)

    def closure():
        weight.grad = torch.ones(4)
        return result

    for _ in range(3):
        assert optimizer.step(closure) is result
    assert agent.flush()
    assert [(s.step, math.isnan(s.loss)) for s in sink.steps] == [(i, True) for i in range(3)]


def test_an_argument_of_step_that_is_no_closure_is_left_alone():
    """As some optimizers have it."""

    class Scaled(torch.optim.SGD):
        def step(self, scale=1.0):
            self.scale = scale

    weight, optimizer = one_parameter(Scaled)
    watched(optimizer)
    weight.grad = torch.ones(4)
    optimizer.step(0.5)
    assert optimizer.scale == 0.5


@pytest.mark.parametrize("on_nonfinite", ["ignore", "raise"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_nan_in_an_inner_evaluation_is_of_that_step(on_nonfinite, at):
    """LBFGS evaluates several times a step: the NaN is on record there, and raised at once."""
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    agent, sink = watched(optimizer, on_nonfinite=on_nonfinite)
    evaluations = 0
    poisoned = False

    def closure():
        nonlocal evaluations
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 8)) - 3.0).square().mean()
        loss.backward()
        if poisoned and evaluations == at:
            model[0].weight.grad[0, 0] = math.nan
        evaluations += 1
        return loss

    optimizer.step(closure)
    evaluations, poisoned = 0, True
    if on_nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError) as caught:
            optimizer.step(closure)
        assert caught.value.step == 1
    else:
        optimizer.step(closure)
    assert agent.flush()
    assert [record.nonfinite for record in sink.steps] == [False, True]
    assert math.isnan(sink.steps[1].pre_norm)
    (event,) = [e for e in sink.events if e.kind == "nonfinite_gradient"]
    assert event.step == 1
    agent.close()
