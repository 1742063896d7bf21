"""Loops with schedulers and averaged weights: all as without the agent."""

import math

import pytest
import torch
from loops import mlp, parameters_equal, twins, watched
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler, swa_utils

from gradwatch import ClipNorm

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 15)],
        milestones=[5],
    ),
}
OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, fused=True),
}
# Multiplied in place, the clip is torch's bit by bit; in the kernel, all but rounding.
WAYS = [("sgd", "0"), ("adamw", "1")]


def assert_same(ours, theirs, fold):
    """Parameters and buffers are bit-identical; where the clip is folded, up to rounding."""
    limits = {"rtol": 1e-5, "atol": 1e-6} if fold == "1" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **limits)


def scheduled(model, optimizer, schedulers, *, clip=None, steps=20):
    """Train; the learning rate of every step, and the norms where `clip` is torch's own."""
    generator = torch.Generator().manual_seed(1)
    rates, norms = [], []
    for _ in range(steps):
        x = torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        if clip is not None:
            norms.append(float(clip_grad_norm_(model.parameters(), clip)))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*[loss.detach()] * plateau)
    return rates, norms


@pytest.mark.parametrize(("optimizer", "fold"), WAYS)
@pytest.mark.parametrize("built", ["before", "after", "before and after"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_stay_unaffected(kind, built, optimizer, fold, monkeypatch):
    """No warning, and the rates, parameters and norms of a loop that clips by itself."""
    monkeypatch.setenv("GRADWATCH_FOLD", fold)
    ours, theirs = twins()
    wrapped, plain = OPTIMIZERS[optimizer](ours), OPTIMIZERS[optimizer](theirs)
    one, other = [], []
    if "before" in built:
        one.append(SCHEDULERS[kind](wrapped))
        other.append(SCHEDULERS[kind](plain))
    agent, sink = watched(wrapped, clip=ClipNorm(4.0))
    if "after" in built:
        one.append(SCHEDULERS[kind](wrapped))
        other.append(SCHEDULERS[kind](plain))
    rates, _ = scheduled(ours, wrapped, one)
    expected, norms = scheduled(theirs, plain, other, clip=4.0)
    assert rates == expected
    assert len(set(rates)) > 2
    assert [s.get_last_lr() for s in one] == [s.get_last_lr() for s in other]
    assert_same(ours, theirs, fold)
    assert agent.flush()
    assert [r.lr for r in sink.steps] == expected
    assert [r.pre_norm for r in sink.steps] == pytest.approx(norms, rel=1e-5)
    assert 0 < sum(r.clipped for r in sink.steps) < 20


def test_a_skipped_first_step_is_a_step_to_the_scheduler():
    """A NaN gradient at once: skipped and recorded, and no warning that `step()` was not called."""
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model)
    scheduler = SCHEDULERS["StepLR"](optimizer)
    agent, sink = watched(optimizer)
    model(torch.full((1, 8), math.nan)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert agent.flush()
    assert [(r.step, r.skipped) for r in sink.steps] == [(0, True)]
    assert parameters_equal(model, mlp())


def averaged(model, optimizer, kind, *, clip=None, epochs=6):
    """Train a model with batch norm, averaging its weights; the average and the rates."""
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(16, 8, generator=generator) for _ in range(4)]
    ema = swa_utils.get_ema_multi_avg_fn(0.8)
    average = swa_utils.AveragedModel(model, multi_avg_fn=ema if kind == "EMA" else None)
    annealed = swa_utils.SWALR(optimizer, swa_lr=0.005, anneal_epochs=2)
    rates = []
    for epoch in range(epochs):
        for x in batches:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), 3 * x.sum(1, keepdim=True)).backward()
            if clip is not None:
                clip_grad_norm_(model.parameters(), clip)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if kind == "EMA":
                average.update_parameters(model)
        if epoch >= 2 and kind == "SWA":
            average.update_parameters(model)
            annealed.step()
    swa_utils.update_bn(batches, average)
    return average, rates


@pytest.mark.parametrize(("optimizer", "fold"), WAYS)
@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_averaged_weights_stay_unaffected(kind, optimizer, fold, monkeypatch):
    """The average, its batch norm after `update_bn` and the rates, as of a loop that clips."""
    monkeypatch.setenv("GRADWATCH_FOLD", fold)
    ours, theirs = (
        torch.nn.Sequential(torch.nn.BatchNorm1d(8), *mlp().children()) for _ in range(2)
    )
    wrapped, plain = OPTIMIZERS[optimizer](ours), OPTIMIZERS[optimizer](theirs)
    agent, sink = watched(wrapped, model=ours, clip=ClipNorm(10.0))
    average, rates = averaged(ours, wrapped, kind)
    expected, expected_rates = averaged(theirs, plain, kind, clip=10.0)
    assert_same(ours, theirs, fold)
    assert_same(average, expected, fold)
    assert not parameters_equal(average.module, ours)
    assert rates == expected_rates
    assert agent.flush()
    assert [r.lr for r in sink.steps] == rates
    assert 0 < sum(r.clipped for r in sink.steps) < len(rates)
