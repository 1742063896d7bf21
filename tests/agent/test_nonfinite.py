"""A NaN in a gradient: named, skipped without a trace, and training goes on."""

import math

import pytest
import torch
from loops import mlp, one_parameter, set_gradients, state_of, states_equal, train
from torch import nn

import gradwatch
from gradwatch.testing import MemorySink

KINDS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-momentum-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_nan_is_named_and_leaves_no_trace(kind, at):
    """At the very first step too: parameters and state bit-identical, the next step applied."""
    model = mlp()
    optimizer = KINDS[kind](model.parameters())
    agent = gradwatch.Agent(optimizer, model=model, store=(sink := MemorySink()), metrics_port=None)
    for step in range(10):
        set_gradients(step, model)
        before, state = copies(model), state_of(optimizer)
        if step == at:
            model[2].weight.grad[1, 1] = math.nan
        optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, copies(model), strict=True))
        assert same == (step == at)
        if step == at:
            assert states_equal(state, state_of(optimizer))
            assert model[2].weight.grad[1, 1].isnan()  # the gradients are given back
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert agent.flush()
    (event,) = sink.events
    assert (event.kind, event.step, event.severity) == ("nonfinite_gradient", at, "critical")
    assert event.data["parameters"] == {"2.weight": "nan"}
    assert event.data["origin"] == "2.weight"
    assert "2.weight" in event.message
    records = sink.steps
    assert [r.nonfinite for r in records] == [r.skipped for r in records]
    assert [r.step for r in records if r.skipped] == [at]
    assert math.isnan(records[at].pre_norm)
    assert math.isnan(records[at].post_norm)


class _Poison(torch.autograd.Function):
    """The identity, with a NaN (or inf) in its gradient."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[0, 0] = ctx.value
        return grad, None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_origin_is_the_last_nonfinite_parameter(value):
    """A NaN born behind layer 2 of 4 spoils layers 1 and 2 and leaves 3 and 4 finite."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"layer{i}": nn.Linear(4, 4) for i in (1, 2, 3, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(optimizer, model=model, store=(sink := MemorySink()), metrics_port=None)
    x = torch.randn(3, 4)
    for i in (1, 2, 3, 4):
        x = model[f"layer{i}"](x)
        if i == 2:
            x = _Poison.apply(x, value)
    x.square().mean().backward()
    optimizer.step()
    assert agent.flush()
    (event,) = sink.events
    spoilt = {name.split(".")[0] for name in event.data["parameters"]}
    assert spoilt == {"layer1", "layer2"}
    assert event.data["origin"] == "layer2.bias"
    assert event.data["entered"] == "backward"


def test_a_nan_from_the_forward_pass_spoils_all():
    """Where every parameter is non-finite the event says: the forward pass or the loss."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(optimizer, model=model, store=(sink := MemorySink()), metrics_port=None)
    loss = (model(torch.randn(4, 8)) * math.nan).mean()
    loss.backward()
    agent.log(loss=loss)
    optimizer.step()
    assert agent.flush()
    gradient, of_loss = sink.events
    assert gradient.data["origin"] is None
    assert gradient.data["entered"] == "forward"
    assert "forward pass or the loss" in gradient.message
    assert len(gradient.data["parameters"]) == 6
    assert of_loss.kind == "nonfinite_loss"
    assert sink.steps[0].nonfinite_loss


def test_names_come_from_the_optimizer_or_the_position_without_a_model():
    """Named parameters give their names; else group and place are told."""
    for model, params, expected in (
        (m := mlp(), list(m.named_parameters()), "2.bias"),
        (m := mlp(), list(m.parameters()), "group0.param3"),
    ):
        optimizer = torch.optim.SGD(params, lr=0.1)
        agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
        set_gradients(0, model)
        model[2].bias.grad[0] = -math.inf
        optimizer.step()
        assert agent.flush()
        assert sink.events[0].data["parameters"] == {expected: "inf"}


def test_raise_names_the_parameters_and_records_first():
    """`on_nonfinite="raise"` ends the step before it is applied; the event is on record."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    agent = gradwatch.Agent(
        optimizer, model=model, store=(sink := MemorySink()), metrics_port=None,
        on_nonfinite="raise",
    )  # fmt: skip
    set_gradients(0, model)
    model[0].bias.grad[0] = math.nan
    before = copies(model)
    with pytest.raises(gradwatch.NonFiniteGradientError, match=r"0\.bias") as caught:
        optimizer.step()
    assert caught.value.step == 0
    assert caught.value.parameters == {"0.bias": "nan"}
    assert all(torch.equal(a, b) for a, b in zip(before, copies(model), strict=True))
    assert agent.flush()
    assert (sink.steps[0].nonfinite, sink.steps[0].skipped) == (True, True)
    assert sink.events[0].kind == "nonfinite_gradient"
    set_gradients(1, model)
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, copies(model), strict=True))


def test_ignore_lets_it_through():
    """`on_nonfinite="ignore"` applies the step as torch would, and says that it was not skipped."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(
        optimizer, model=model, store=(sink := MemorySink()), metrics_port=None,
        on_nonfinite="ignore",
    )  # fmt: skip
    set_gradients(0, model)
    model[0].bias.grad[0] = math.nan
    optimizer.step()
    assert model[0].bias[0].isnan()
    assert not model[4].weight.isnan().any()
    assert agent.flush()
    assert (sink.steps[0].nonfinite, sink.steps[0].skipped) == (True, False)
    assert "not skipped" in sink.events[0].message


def test_observe_only_implies_ignore():
    """`ObserveOnly` changes nothing at all, not even a NaN."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(
        optimizer, clip=gradwatch.ObserveOnly(), store=(sink := MemorySink()), metrics_port=None
    )
    set_gradients(0, model)
    model[0].bias.grad[0] = math.nan
    optimizer.step()
    assert model[0].bias[0].isnan()
    assert agent.flush()
    assert sink.steps[0].nonfinite


def test_training_survives_a_storm():
    """Half of the steps NaN: the other half train; each is flagged, and a few tell how many."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    agent = gradwatch.Agent(optimizer, model=model, store=(sink := MemorySink()), metrics_port=None)

    def spoil(step, loss):
        if step % 2:
            model[0].weight.grad[0, 0] = math.nan

    losses = train(model, optimizer, 400, after_backward=spoil)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert agent.flush()
    assert [r.step for r in sink.steps if r.nonfinite] == list(range(1, 400, 2))
    told = [e for e in sink.events if e.kind == "nonfinite_gradient"]
    assert [e.step for e in told] == [1, 3, 7, 15, 31, 63, 127, 255]
    assert told[-1].message.endswith("; the gradient was not finite in 128 of the last 255 steps")


def test_clip_by_hand_skips_at_the_step():
    """`agent.clip()` returns the NaN as torch would, and the step is skipped."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(optimizer, model=model, store=(sink := MemorySink()), metrics_port=None)
    set_gradients(0, model)
    model[0].bias.grad[0] = math.nan
    before = copies(model)
    assert agent.clip().isnan()
    assert model[0].bias.grad is not None
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, copies(model), strict=True))
    assert agent.flush()
    assert [(r.nonfinite, r.skipped) for r in sink.steps] == [(True, True)]


def test_a_dead_gradient_is_noted_and_counted():
    """A norm of exactly 0 is an event at the 1st, 2nd, 4th … such step; no gradient at all is none."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    for step in range(6):
        set_gradients(step, model)
        if step in {1, 2, 5}:
            for p in model.parameters():
                p.grad.zero_()
        if step == 4:
            optimizer.zero_grad()
        optimizer.step()
    assert agent.flush()
    assert [(e.step, e.message) for e in sink.events if e.kind == "dead_gradient"] == [
        (1, "every gradient is exactly 0"),
        (2, "every gradient is exactly 0; it was so in each of the last 2 steps"),
    ]
    assert [r.pre_norm == 0 for r in sink.steps] == [False, True, True, False, False, True]


def test_a_tiny_gradient_is_not_dead():
    """Squares that underflow float32 do not make a norm 0."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[0].bias.grad[0] = 1e-30
    optimizer.step()
    assert agent.flush()
    assert sink.steps[0].pre_norm == pytest.approx(1e-30)
    assert not sink.events


@pytest.mark.parametrize("on_nonfinite", ["skip", "ignore", "raise"])
def test_the_jobs_own_log_tells_of_the_first_and_of_no_end(caplog, on_nonfinite):
    """Who looks at the log alone learns that training stands still; once, not at each step."""
    weight, optimizer = one_parameter()
    agent = gradwatch.Agent(
        optimizer, store=MemorySink(), metrics_port=None, on_nonfinite=on_nonfinite
    )
    for step in range(130):
        weight.grad = torch.full((4,), math.nan if step == 3 or step >= 10 else 1.0)
        try:
            optimizer.step()
        except gradwatch.NonFiniteGradientError:
            assert on_nonfinite == "raise"
    agent.close()
    if on_nonfinite == "raise":
        assert not caplog.messages
        return
    first, no_end = caplog.messages
    assert first.startswith(
        "gradwatch: step 3: NaN in the gradient of group0.param0; it came from the forward"
    )
    assert "50 steps in a row" in no_end
    assert no_end.endswith("steps 10 to 59")
    assert ("nothing is learnt" in no_end) == (on_nonfinite == "skip")
