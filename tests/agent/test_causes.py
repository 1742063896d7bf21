"""What is told as the cause of a NaN, and what is not known of it; faults that stay."""

import logging
import math

import pytest
import torch
from loops import mlp, told_of, watched
from torch import nn

import gradwatch
from gradwatch import ClipNorm


def of_kind(sink, kind):
    return [event for event in sink.events if event.kind == kind]


def backward(model, factor=1.0):
    model.zero_grad()
    ((model(torch.ones(4, 8)) - 3.0).square().mean() * factor).backward()


def test_the_origin_is_not_known_of_gradients_that_the_loop_changed():
    """The loop divides all gradients by a norm of 0: neither forward pass nor loss made the NaN."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent, sink = watched(optimizer, model=model)
    backward(model, factor=0.0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    for param in model.parameters():
        param.grad.div_(norm)
    optimizer.step()
    backward(model)
    optimizer.step()
    backward(model, factor=math.nan)  # and this one the loss has made
    optimizer.step()
    assert agent.flush()
    changed, made = of_kind(sink, "nonfinite_gradient")
    assert (changed.data["entered"], changed.data["origin"]) == ("unknown", None)
    assert "not known" in changed.message
    assert "forward" not in changed.message
    assert made.data["entered"] == "forward"
    agent.close()


@pytest.mark.parametrize("known", [True, False], ids=["model given", "no model"])
def test_a_nan_may_come_from_a_layer_that_the_optimizer_does_not_have(known):
    """An optimizer of the first layers alone: what comes after them may be the loss or a layer."""
    model = mlp()
    optimizer = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    agent, sink = watched(optimizer, model=model if known else None)
    backward(model, factor=math.nan)
    optimizer.step()
    agent.close()
    (event,) = of_kind(sink, "nonfinite_gradient")
    assert (event.data["entered"], event.data["origin"]) == ("outside", None)
    assert "; it came from the forward pass, the loss or a later layer that is not" in event.message


@pytest.mark.parametrize("on_nonfinite", ["skip", "ignore"])
def test_weights_that_the_optimizer_made_nan_are_told(on_nonfinite):
    """Adam with eps=0 divides 0 by 0 where a gradient is 0: the event names the parameter."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1), nn.Linear(1, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=0.0)
    agent, sink = watched(optimizer, model=model, on_nonfinite=on_nonfinite)
    for step in range(3):
        backward(model)
        if step == 1:
            for param in model.parameters():
                optimizer.state[param]["exp_avg"].zero_()
                optimizer.state[param]["exp_avg_sq"].zero_()
            model[1].weight.grad = torch.zeros_like(model[1].weight)
        optimizer.step()
        finite = {n: bool(p.isfinite().all()) for n, p in model.named_parameters()}
        assert finite["1.weight"] == (step < 1)
    assert agent.flush()
    assert [record.nonfinite for record in sink.steps] == [False, False, True]
    (weights,) = of_kind(sink, "nonfinite_weights")
    assert (weights.step, weights.data["parameter"]) == (2, "1.weight")
    assert list(weights.data["parameters"]) == ["1.weight"]
    (gradient,) = of_kind(sink, "nonfinite_gradient")
    assert gradient.data["entered"] == "weights"
    assert "forward pass or the loss" not in gradient.message
    agent.close()


@pytest.mark.parametrize("own_scaler", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_under_clipping_by_hand_is_no_nan_in_the_log(fused, own_scaler, caplog):
    """unscale_, agent.clip(), scaler.step(): the scaler skips the step, and nothing is warned of."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    given = {"scaler": scaler} if own_scaler else {}
    agent, sink = watched(optimizer, model=model, clip=ClipNorm(1.0), **given)
    for step in range(6):
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 8)) - 3.0).square().mean()
        scaler.scale(loss).backward()
        if step in {1, 2, 4}:
            for param in model.parameters():
                param.grad[...] = math.inf
        scaler.unscale_(optimizer)
        agent.clip()
        with caplog.at_level(logging.WARNING):
            scaler.step(optimizer)
        scaler.update()
    assert agent.flush()
    assert "in the gradient" not in caplog.text
    assert not of_kind(sink, "nonfinite_gradient")
    assert all(math.isfinite(r.pre_norm) for r in sink.steps if not r.skipped)
    agent.close()


def test_a_nan_that_clipping_by_hand_sees_is_in_the_log(caplog):
    """Without a scaler it is said as the step is taken."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent, _ = watched(optimizer, model=model)
    backward(model, factor=math.nan)
    agent.clip()
    assert "NaN" not in caplog.text
    optimizer.step()
    assert "NaN in the gradient of all 6 parameters" in caplog.text
    agent.close()


def test_a_nan_that_stays_is_told_ever_more_seldom_and_counted():
    """The 1st, 2nd, 4th, 8th … such step has an event, each step its flag; anew after 100 without."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent, sink = watched(optimizer, model=model)
    good = {0, 50, *range(120, 220), 223, *range(230, 330), 331}
    for step in range(333):
        backward(model, factor=1.0 if step in good else math.nan)
        agent.log(loss=1.0 if step in good else math.nan)
        optimizer.step()
    assert agent.flush()
    bad = [step for step in range(333) if step not in good]
    expected = [
        step
        for series in (range(120), range(120, 230), range(230, 333))
        for step in told_of(set(series) & set(bad))
    ]
    for kind, flag, message in (
        ("nonfinite_gradient", "nonfinite", "the gradient was not finite in"),
        ("nonfinite_loss", "nonfinite_loss", "it was not finite in"),
    ):
        events = of_kind(sink, kind)
        assert [event.step for event in events] == expected
        for event in events:
            begin = max(start for start in (1, 220, 330) if start <= event.step)
            count = sum(begin <= step <= event.step for step in bad)
            within = event.step + 1 - begin
            assert (event.data["count"], event.data["within"]) == (count, within)
            of = "each of" if count == within else f"{count} of"
            said = f"; {message} {of} the last {within} steps"
            assert event.message.endswith(said) == (count > 1)
        assert [r.step for r in sink.steps if getattr(r, flag)] == bad
    agent.close()


def test_every_error_that_is_asked_for_has_its_parameters():
    """With on_nonfinite="raise" each step of a streak raises, by name."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent, _ = watched(optimizer, model=model, on_nonfinite="raise")
    for _ in range(5):
        backward(model, factor=math.nan)
        with pytest.raises(gradwatch.NonFiniteGradientError) as caught:
            optimizer.step()
        assert len(caught.value.parameters) == 6
    agent.close()
