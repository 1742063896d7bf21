"""Under a GradScaler the norms are the true ones, and overflows are told apart from NaNs."""

import copy
import math
import pickle

import pytest
import torch
from loops import greatest_difference, mlp, set_gradients, told_of, twins
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch.testing import MemorySink

FUSED = pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=generator)
    return x, 5 * x.sum(1, keepdim=True)


def backward(model, scaler, step, *, overflow_at=()):
    x, target = batch(step)
    loss = torch.nn.functional.mse_loss(model(x), target)
    scaler.scale(loss * (1e38 if step in overflow_at else 1.0)).backward()
    return loss


@FUSED
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_parameters_equal_those_of_unscale_and_clip(fused, unscale):
    """Folded or not, unscaled by the loop or not: as `unscale_` + `clip_grad_norm_` + `step`."""
    ours, theirs = twins()
    wrapped = torch.optim.AdamW(ours.parameters(), lr=0.01, fused=fused)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=fused)
    scalers = [GradScaler("cpu", init_scale=2.0**10, growth_interval=7) for _ in range(2)]
    sink = MemorySink()
    agent = gradwatch.Agent(wrapped, store=sink, metrics_port=None, scaler=scalers[0])
    overflows = (0, 9, 10)
    norms, scales = {}, {}
    for step in range(25):
        wrapped.zero_grad()
        backward(ours, scalers[0], step, overflow_at=overflows)
        if unscale:
            scalers[0].unscale_(wrapped)
        scalers[0].step(wrapped)
        scalers[0].update()

        plain.zero_grad()
        scales[step] = scalers[1].get_scale()
        backward(theirs, scalers[1], step, overflow_at=overflows)
        scalers[1].unscale_(plain)
        norms[step] = float(clip_grad_norm_(theirs.parameters(), 1.0))
        scalers[1].step(plain)
        scalers[1].update()

    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    records = sink.steps
    assert [r.step for r in records] == list(range(25))
    for record in records:
        assert record.loss_scale == scales[record.step]
        overflow = record.step in overflows
        assert record.skipped == overflow
        assert not record.nonfinite
        if overflow:
            assert math.isnan(record.pre_norm)
        else:
            assert record.pre_norm == pytest.approx(norms[record.step], rel=1e-5)
    assert [(e.kind, e.step) for e in sink.events if e.severity != "warning"] == [
        ("amp_overflow", step) for step in told_of(overflows)
    ]
    assert "grad_scale" not in vars(wrapped)


@FUSED
def test_clip_by_hand_unscales_where_the_loop_did_not(fused):
    """`agent.clip()` with the scaler known gives the true norm, with or without `unscale_`."""
    ours, theirs = twins()
    wrapped = torch.optim.AdamW(ours.parameters(), lr=0.01, fused=fused)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=fused)
    scalers = [GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    agent = gradwatch.Agent(wrapped, store=(sink := MemorySink()), metrics_port=None,
                            scaler=scalers[0])  # fmt: skip
    for step in range(10):
        wrapped.zero_grad()
        backward(ours, scalers[0], step, overflow_at=(4,))
        if step % 2:
            scalers[0].unscale_(wrapped)
        norm = agent.clip()
        scalers[0].step(wrapped)
        scalers[0].update()

        plain.zero_grad()
        backward(theirs, scalers[1], step, overflow_at=(4,))
        scalers[1].unscale_(plain)
        expected = clip_grad_norm_(theirs.parameters(), 1.0)
        scalers[1].step(plain)
        scalers[1].update()
        if step != 4:
            assert float(norm) == pytest.approx(float(expected), rel=1e-5)
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert [r.step for r in sink.steps] == list(range(10))
    assert [e.kind for e in sink.events if e.kind != "grad_norm_spike"] == ["amp_overflow"]


@FUSED
def test_an_overflow_does_not_raise(fused):
    """An AMP overflow is routine: `on_nonfinite="raise"` is for NaNs."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    gradwatch.wrap(
        optimizer, store=MemorySink(), metrics_port=None, scaler=scaler, on_nonfinite="raise"
    )
    backward(model, scaler, 0, overflow_at=(0,))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9


def test_the_first_step_of_fused_sgd_with_momentum_may_overflow():
    """The kernel would leave the momentum buffer uninitialised; its state stays empty instead."""
    ours, theirs = twins()
    wrapped = torch.optim.SGD(ours.parameters(), lr=0.01, momentum=0.9, fused=True)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    gradwatch.wrap(wrapped, store=MemorySink(), metrics_port=None, scaler=scaler)
    for step in range(5):
        wrapped.zero_grad()
        backward(ours, scaler, step, overflow_at=(0,))
        scaler.step(wrapped)
        scaler.update()
        if step == 0:
            assert not wrapped.state
        else:
            plain.zero_grad()
            x, target = batch(step)
            torch.nn.functional.mse_loss(theirs(x), target).backward()
            clip_grad_norm_(theirs.parameters(), 1.0)
            plain.step()
    assert greatest_difference(ours, theirs) < 1e-6


@FUSED
@pytest.mark.parametrize("unscale", [False, True])
def test_an_exception_inside_step_does_not_scale_the_next(fused, unscale):
    """What a failed step leaves on the optimizer is not multiplied into the scaler's next one."""
    ours, theirs = twins()
    wrapped = torch.optim.AdamW(ours.parameters(), lr=0.01, fused=fused)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=fused)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    gradwatch.wrap(
        wrapped, clip=gradwatch.ClipNorm(0.1), store=MemorySink(), metrics_port=None, scaler=scaler
    )

    def fail(*_):
        raise RuntimeError("in the user's own hook")

    handle = wrapped.register_step_pre_hook(fail)
    backward(ours, scaler, 0)
    with pytest.raises(RuntimeError, match="user's own hook"):
        scaler.step(wrapped)
    handle.remove()
    scaler.update()
    for step in range(1, 5):
        wrapped.zero_grad()
        backward(ours, scaler, step)
        if unscale:
            scaler.unscale_(wrapped)
        scaler.step(wrapped)
        scaler.update()
        plain.zero_grad()
        x, target = batch(step)
        torch.nn.functional.mse_loss(theirs(x), target).backward()
        clip_grad_norm_(theirs.parameters(), 0.1)
        plain.step()
    assert greatest_difference(ours, theirs) < 1e-6


def test_a_watched_scaler_copies_and_pickles():
    """Checkpoints that hold the scaler object itself still work; the copy is unwatched."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = GradScaler("cpu")
    agent = gradwatch.Agent(optimizer, store=MemorySink(), metrics_port=None, scaler=scaler)
    for other in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        assert other.get_scale() == scaler.get_scale()
        assert other.step.__func__ is GradScaler.step
        assert other.step.__self__ is other
    agent.close()
    assert "step" not in vars(scaler)


def test_a_scaler_shared_by_two_optimizers():
    """A GAN's one scaler: each overflow is recorded for the optimizer it suppressed."""
    models = [mlp(seed) for seed in (0, 1)]
    optimizers = [torch.optim.AdamW(m.parameters()) for m in models]
    scaler = GradScaler("cpu", init_scale=2.0**10)
    sinks = [MemorySink(), MemorySink()]
    agents = [
        gradwatch.Agent(o, store=s, metrics_port=None, scaler=scaler)
        for o, s in zip(optimizers, sinks, strict=True)
    ]
    for step in range(4):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            backward(model, scaler, step, overflow_at=(1,) if i == 0 else (2,))
            scaler.step(optimizer)
        scaler.update()
    for agent, sink, overflow in zip(agents, sinks, (1, 2), strict=True):
        assert agent.flush()
        assert [r.skipped for r in sink.steps] == [step == overflow for step in range(4)]
        agent.close()
    assert "step" not in vars(scaler)


def test_a_scaler_that_is_off_records_no_loss_scale():
    """`GradScaler(enabled=False)` is as if there were none."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = GradScaler("cpu", enabled=False)
    agent = gradwatch.Agent(optimizer, store=(sink := MemorySink()), metrics_port=None,
                            scaler=scaler)  # fmt: skip
    backward(model, scaler, 0)
    scaler.step(optimizer)
    assert agent.flush()
    assert math.isnan(sink.steps[0].loss_scale)
    assert not sink.steps[0].skipped


def _scaled_step(clip, *, by_hand=False, scale=1024.0):
    """One SGD step at lr 1 whose gradients still carry the loss scale; the applied update."""
    model = mlp()
    groups = [{"params": [p]} for p in model.parameters()] if isinstance(clip, list) else None
    optimizer = torch.optim.SGD(groups or model.parameters(), lr=1.0, fused=True)
    agent = gradwatch.Agent(optimizer, clip=clip, store=MemorySink(), metrics_port=None)
    set_gradients(3, model, size=5.0)
    plain = [p.grad.clone() for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    for p in model.parameters():
        p.grad.mul_(scale)
    if by_hand:
        agent.clip()
    scaler.step(optimizer)
    applied = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    return agent.last, plain, applied


def test_clip_value_under_a_scaler_clamps_the_true_gradient():
    """The limit is multiplied by the loss scale that the gradients still carry."""
    _, plain, applied = _scaled_step(gradwatch.ClipValue(0.05))
    for a, g in zip(applied, plain, strict=True):
        torch.testing.assert_close(a, g.clamp(-0.05, 0.05), atol=2e-6, rtol=1e-5)


def test_a_policy_a_group_under_a_scaler_bit_by_bit(monkeypatch):
    """In place and exact (GRADWATCH_FOLD=0): each group by its own true norm."""
    monkeypatch.setenv("GRADWATCH_FOLD", "0")
    _, plain, applied = _scaled_step([gradwatch.ClipNorm(0.2)] * len(list(mlp().parameters())))
    for a, g in zip(applied, plain, strict=True):
        expected = g * min(1.0, 0.2 / (float(g.norm()) + 1e-6))
        torch.testing.assert_close(a, expected, atol=2e-6, rtol=1e-5)


def test_clip_by_hand_before_unscale_records_the_true_norm():
    """What clip() saw was the loss scale times too great; the record says what it was."""
    record, plain, _ = _scaled_step(gradwatch.ClipNorm(1e9), by_hand=True)
    true = float(torch.nn.utils.get_total_norm(plain))
    assert record.pre_norm == pytest.approx(true, rel=1e-5)
    assert record.loss_scale == 1024.0
