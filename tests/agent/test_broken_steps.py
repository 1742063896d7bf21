"""Steps left by an exception: gradients and optimizer are at once what they were before."""

import gc
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from loops import greatest_difference, mlp, one_parameter, set_gradients, sgd, twins, watched
from torch.optim.lr_scheduler import StepLR

import gradwatch
from gradwatch import ClipNorm


def fail(*_):
    raise KeyboardInterrupt


class Stopped(torch.optim.AdamW):
    """An optimizer whose own step is interrupted, once."""

    stopped = False

    def step(self, closure=None):
        if not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt
        return super().step(closure)


WHERE = {
    "pre-hook before": lambda p: (o := torch.optim.AdamW(p), o.register_step_pre_hook(fail)),
    "post-hook before": lambda p: (o := torch.optim.AdamW(p), o.register_step_post_hook(fail)),
    "pre-hook": lambda p: (o := torch.optim.AdamW(p), lambda: o.register_step_pre_hook(fail)),
    "post-hook": lambda p: (o := torch.optim.AdamW(p), lambda: o.register_step_post_hook(fail)),
    "fused": lambda p: (
        o := torch.optim.AdamW(p, fused=True),
        lambda: o.register_step_post_hook(fail),
    ),
    "kernel": lambda p: (Stopped(p), None),
}


# A scheduler's mark; a shadow that counts `zero_grad()` until the first step.
COMES_AND_GOES = {"_opt_called", "zero_grad"}


@pytest.mark.parametrize("nan", [True, False], ids=["skipped", "clipped"])
@pytest.mark.parametrize("scheduler", [None, "before", "after"])
@pytest.mark.parametrize("where", WHERE)
def test_gradients_are_there_whatever_raises(where, scheduler, nan):
    """In the handler itself; the step after is as torch's own.

    A skipped step is left out, so that of those that would raise only a hook before ours is called.
    """
    model = mlp()
    optimizer, handle = WHERE[where](model.parameters())
    if scheduler == "before":
        StepLR(optimizer, 10)
    agent, sink = watched(optimizer)
    if scheduler == "after":
        StepLR(optimizer, 10)
    if callable(handle):
        handle = handle()
    set_gradients(0, model)
    if nan:
        model[0].weight.grad[0, 0] = math.nan
    grads, attributes = [p.grad for p in model.parameters()], set(vars(optimizer))
    left_out = nan and where != "pre-hook before"
    with nullcontext() if left_out else pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert set(vars(optimizer)) - {"stopped", *COMES_AND_GOES} == attributes - COMES_AND_GOES
    if handle is not None:
        handle.remove()
    if left_out:
        optimizer.stopped = True  # or it would be now
    set_gradients(1, model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert agent.flush()
    assert not sink.steps[-1].skipped


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("evaluations", [1, 2])
def test_a_closure_that_raises(fused, evaluations):
    """Before the gradient is looked at, or after (an optimizer may ask again)."""

    class AsksTwice(torch.optim.SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    weight, optimizer = one_parameter(AsksTwice, fused=fused)
    watched(optimizer)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == evaluations:
            raise KeyboardInterrupt
        weight.grad = torch.full_like(weight, 50.0)
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert (weight.grad is None) == (evaluations == 1)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    optimizer.step(lambda: 0.0)


def test_lbfgs_that_is_stopped():
    """It goes on as without us."""
    ours, theirs = twins()
    wrapped, plain = (torch.optim.LBFGS(m.parameters(), max_iter=3) for m in (ours, theirs))
    watched(wrapped, clip=gradwatch.ObserveOnly())
    for model, optimizer in ((ours, wrapped), (theirs, plain)):
        calls = []

        def closure(model=model, optimizer=optimizer, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            loss = model(torch.ones(4, 8)).square().sum()
            loss.backward()
            return loss

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert all(p.grad is not None for p in model.parameters())
        optimizer.state.clear()  # torch's own, half made
        optimizer.step(closure)
    assert greatest_difference(ours, theirs) == 0.0


def test_a_clip_by_hand_outlives_the_step_that_failed():
    """The norm on record is that before `clip()`, not after it."""
    model = mlp()
    optimizer = sgd(model)
    handle = optimizer.register_step_pre_hook(fail)
    agent, sink = watched(optimizer, clip=ClipNorm(0.01))
    set_gradients(0, model)
    norm = agent.clip()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    optimizer.step()
    assert agent.flush()
    assert [r.pre_norm for r in sink.steps] == [pytest.approx(float(norm))]


@pytest.mark.parametrize("scheduler", [None, "before", "after"])
def test_nothing_stays_and_nothing_is_kept_alive(scheduler):
    """`step` is what it was once the agent is closed; the optimizer is freed with its last user."""
    model = mlp()
    optimizer = sgd(model)
    plain = optimizer.step
    if scheduler == "before":
        StepLR(optimizer, 10)
        plain = optimizer.step
    agent, _ = watched(optimizer)
    if scheduler == "after":
        StepLR(optimizer, 10)
    set_gradients(0, model)
    optimizer.step()
    agent.close()
    assert scheduler == "after" or optimizer.step == plain
    optimizer.step()
    watched(optimizer)
    del plain
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_a_step_whose_optimizer_is_gone():
    """Says what is to be kept."""
    _, optimizer = one_parameter()
    watched(optimizer)
    step = optimizer.step
    del optimizer
    with pytest.raises(ReferenceError, match="keep it"):
        step()
