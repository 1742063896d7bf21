"""On a CUDA device itself: no step that is recorded waits for it."""

import copy
import math

import pytest
import torch
from loops import mlp, set_gradients
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch.testing import MemorySink

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device on this machine"
)

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
}


@pytest.fixture
def no_waiting():
    """Any wait for the device inside the block is an error."""

    class Block:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield Block()
    torch.cuda.set_sync_debug_mode("default")


def twins():
    model = mlp().cuda()
    return model, copy.deepcopy(model)


def gradients(step, *models):
    """The same as on the CPU, brought over."""
    source = mlp()
    set_gradients(step, source)
    for model in models:
        for mine, given in zip(model.parameters(), source.parameters(), strict=True):
            mine.grad = given.grad.cuda()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_torch_without_waiting(no_waiting, name):
    """Norms, parameters, skipped NaN steps; every step but the first under sync_debug_mode."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS[name](m.parameters()) for m in (ours, theirs))
    sink = MemorySink()
    agent = gradwatch.Agent(wrapped, model=ours, store=sink, metrics_port=None)
    norms = []
    for step in range(150):
        gradients(step, ours, theirs)
        loss = torch.full((), float(step), device="cuda")
        if step == 40:
            ours[2].weight.grad[0, 0] = math.nan
        if step == 0:
            agent.log(loss=loss)
            wrapped.step()
        else:
            with no_waiting:
                agent.log(loss=loss)
                wrapped.step()
        if step == 40:
            norms.append(math.nan)
        else:
            norms.append(float(clip_grad_norm_(theirs.parameters(), 1.0)))
            plain.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    assert agent.flush()
    assert [r.step for r in sink.steps] == list(range(150))
    for record, norm in zip(sink.steps, norms, strict=True):
        assert record.loss == record.step
        if record.step == 40:
            assert record.skipped
            assert record.nonfinite
        else:
            assert record.pre_norm == pytest.approx(norm, rel=1e-5)
    (event,) = [e for e in sink.events if e.kind == "nonfinite_gradient"]
    assert event.data["parameters"] == {"2.weight": "nan"}


def test_values_arrive_through_pinned_memory():
    """What the device writes to is page-locked."""
    ours, _ = twins()
    optimizer = OPTIMIZERS["adamw"](ours.parameters())
    agent = gradwatch.Agent(optimizer, store=MemorySink(), metrics_port=None)
    for step in range(5):
        gradients(step, ours)
        optimizer.step()
    agent.flush()
    slots = agent._hooks._deferred._free
    assert slots
    assert all(slot.host.is_pinned() for slot in slots)


def test_float16_under_a_grad_scaler(no_waiting):
    """Autocast, GradScaler and a fused optimizer: as `unscale_` + `clip_grad_norm_` + `step`."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS["adamw"](m.parameters()) for m in (ours, theirs))
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**12) for _ in range(2)]
    sink = MemorySink()
    agent = gradwatch.Agent(wrapped, store=sink, metrics_port=None, scaler=scalers[0])
    norms = []
    for step in range(30):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).cuda()
        for model, optimizer, scaler in ((ours, wrapped, scalers[0]), (theirs, plain, scalers[1])):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = (model(x) - 5 * x.sum(1, keepdim=True)).float().square().mean()
            scaler.scale(loss * (1e38 if step == 9 else 1.0)).backward()
            if optimizer is plain:
                scaler.unscale_(plain)
                norms.append(float(clip_grad_norm_(theirs.parameters(), 1.0)))
                scaler.step(plain)
            elif step == 0:
                scaler.step(wrapped)
            else:
                with no_waiting:
                    scaler.step(wrapped)
            scaler.update()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    assert agent.flush()
    assert [r.step for r in sink.steps if r.skipped] == [9]
    assert [e.step for e in sink.events if e.kind == "amp_overflow"] == [9]
    for record, norm in zip(sink.steps, norms, strict=True):
        if record.step != 9:
            assert record.pre_norm == pytest.approx(norm, rel=1e-3)
