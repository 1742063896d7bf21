"""Steps decided on the device under a GradScaler, which may live on another."""

import pytest
import torch
from devices import OPTIMIZERS, Elsewhere
from loops import greatest_difference, parameters_equal, set_gradients, twins, watched
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from gradwatch import ObserveOnly, deferred


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("known", [False, True], ids=["", "scaler="])
def test_under_a_grad_scaler(queue, unscale, known):
    """As `unscale_` + `clip_grad_norm_` + `scaler.step`; an overflow is no NaN."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS["adamw"](m.parameters()) for m in (ours, theirs))
    scalers = [GradScaler("cpu", init_scale=2.0**10, growth_interval=5) for _ in range(2)]
    agent, sink = watched(wrapped, model=ours, scaler=scalers[0] if known else None)
    norms, scales = [], []
    for step in range(20):
        scales.append(scalers[1].get_scale())
        for model, optimizer, scaler in ((ours, wrapped, scalers[0]), (theirs, plain, scalers[1])):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 8, generator=generator)
            loss = torch.nn.functional.mse_loss(model(x), 5 * x.sum(1, keepdim=True))
            scaler.scale(loss * (1e38 if step in {6, 7} else 1.0)).backward()
            if optimizer is plain or unscale:
                scaler.unscale_(optimizer)
            if optimizer is plain:
                norms.append(float(clip_grad_norm_(theirs.parameters(), 1.0)))
            scaler.step(optimizer)
            scaler.update()
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    for record, norm, scale in zip(sink.steps, norms, scales, strict=True):
        if known or not unscale:
            assert record.loss_scale == scale
        if record.step in {6, 7}:
            assert (record.skipped, record.nonfinite) == (True, False)
        else:
            assert record.pre_norm == pytest.approx(norm, rel=1e-5)
    assert [e.step for e in sink.events if e.kind == "amp_overflow"] == [6, 7]
    assert not [e for e in sink.events if e.kind == "nonfinite_gradient"]
    assert not {"grad_scale", "found_inf"} & set(vars(wrapped))
    assert queue.sent >= 15


def test_an_inf_that_only_the_scaler_knows_of(queue):
    """`found_inf` from elsewhere (another device, another rank) keeps the step from being applied."""
    ours, before = twins()
    wrapped = OPTIMIZERS["sgd"](ours.parameters())
    agent, sink = watched(wrapped, model=ours)
    for step in range(2):
        set_gradients(step, ours)
        if step == 1:
            before.load_state_dict(ours.state_dict())
            wrapped.grad_scale, wrapped.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        wrapped.step()
    assert parameters_equal(ours, before)
    assert (wrapped.grad_scale.item(), wrapped.found_inf.item()) == (2.0, 1.0)
    assert agent.flush()
    assert [r.skipped for r in sink.steps] == [False, True]
    assert sink.steps[1].loss_scale == 2.0


@pytest.mark.parametrize("mode", ["skip", "ignore", "observe"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaler_and_a_loss_on_another_device(queue, monkeypatch, caplog, mode, name):
    """Of a model over several: as `clip_grad_norm_` of the unscaled, and nothing waits for either."""
    monkeypatch.setattr(deferred, "DEVICES", frozenset({"cpu", "meta"}))
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS[name](m.parameters()) for m in (ours, theirs))
    arguments = {"clip": ObserveOnly()} if mode == "observe" else {"on_nonfinite": mode}
    agent, sink = watched(wrapped, model=ours, **arguments)
    for step in range(12):
        set_gradients(step, ours, theirs)
        found_inf = float(step == 7)
        for p in ours.parameters():
            p.grad.mul_(1024.0)
        wrapped.grad_scale, wrapped.found_inf = left = (
            (torch.tensor(1024.0), torch.tensor(found_inf))
            if step == 0  # looked at from here
            else (Elsewhere(1024.0), Elsewhere(found_inf))
        )
        agent._hooks.loss = 0.5 if step == 0 else Elsewhere(0.5)  # as `log` leaves it
        wrapped.step()
        assert (wrapped.grad_scale, wrapped.found_inf) == left
        if mode != "observe":
            clip_grad_norm_(theirs.parameters(), 1.0)
        if not found_inf:
            plain.step()
    assert queue.sent == 11
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert not caplog.records
    assert {(r.loss, r.loss_scale) for r in sink.steps} == {(0.5, 1024.0)}
    assert [r.step for r in sink.steps if r.skipped] == [7]
