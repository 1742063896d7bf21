"""Steps decided on the device: the same on record and in the weights, with nothing waited for.

The CPU stands in for the device here, with a queue that the tests move on; `test_cuda` has the
device itself.
"""

import copy
import gc
import math
import weakref

import pytest
import torch
from devices import OPTIMIZERS, Reads
from loops import greatest_difference, mlp, parameters_equal, set_gradients, twins, watched
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import ObserveOnly, TargetRatio, process


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_torch_and_on_record(queue, name):
    """Norms, clip flags and parameters are those of `clip_grad_norm_` + `step`."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS[name](m.parameters()) for m in (ours, theirs))
    agent, sink = watched(wrapped, model=ours)
    norms = []
    for step in range(120):
        set_gradients(step, ours, theirs)
        agent.log(loss=torch.tensor(float(step)))
        wrapped.step()
        norms.append(float(clip_grad_norm_(theirs.parameters(), 1.0)))
        plain.step()
    assert queue.sent == 119  # all but the first
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert [r.step for r in sink.steps] == list(range(120))
    for record, norm in zip(sink.steps, norms, strict=True):
        assert record.pre_norm == pytest.approx(norm, rel=1e-5)
        assert record.post_norm == pytest.approx(min(norm, 1.0), rel=1e-5)
        assert record.clipped == (norm > 1.0)
        assert (record.loss, record.lr, record.threshold) == (record.step, 0.01, 1.0)
    # Layer norms are sampled as they are elsewhere, the weights' too.
    (sample,) = [s for s in sink.layers if s.step == 100]
    set_gradients(100, theirs)
    expected = [float(p.grad.norm()) for p in theirs.parameters()]
    assert sample.grad_norms == pytest.approx(expected, rel=1e-6)
    assert all(math.isfinite(norm) and norm > 0 for norm in sample.weight_norms)
    assert not {"grad_scale", "found_inf"} & set(vars(wrapped))


def test_nothing_is_read_from_the_device(queue):
    """No step waits for a value: neither one that is clipped, nor a NaN, nor one with a loss."""
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    agent, _ = watched(optimizer, model=model, clip=TargetRatio())
    for step in range(120):
        set_gradients(step, model)
        if step == 50:
            model[0].weight.grad[0, 0] = math.nan
        agent.log(loss=1.0)
        with Reads() as reads:
            optimizer.step()
        assert step == 0 or not reads.found
    assert agent.flush()
    with Reads() as reads:  # and these would be seen
        model[0].weight.detach()[0, 0].item()
    assert reads.found


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("first", [0, 7])
def test_a_step_with_nan_is_left_out(queue, name, first):
    """Parameters and the optimizer's state are untouched, the parameter is named, later steps go on."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS[name](m.parameters()) for m in (ours, theirs))
    agent, sink = watched(wrapped, model=ours)
    queue.at_once = False
    for step in range(15):
        set_gradients(step, ours, theirs)
        if first <= step < first + 2:
            for param, value in ((ours[2].weight, math.nan), (ours[0].bias, math.inf)):
                there = torch.arange(param.numel()).reshape(param.shape) == 3
                param.grad = torch.where(there, value, param.grad)  # not in place: it has an origin
            before = copy.deepcopy(wrapped.state_dict()["state"])
            wrapped.step()
            after = wrapped.state_dict()["state"]
            for key, values in before.items():
                for entry, value in values.items():
                    assert torch.equal(torch.as_tensor(after[key][entry]), torch.as_tensor(value))
        else:
            wrapped.step()
            clip_grad_norm_(theirs.parameters(), 1.0)
            plain.step()
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    bad = [first, first + 1]
    assert [r.step for r in sink.steps] == list(range(15))
    assert [r.step for r in sink.steps if r.nonfinite and r.skipped] == bad
    events = [e for e in sink.events if e.kind == "nonfinite_gradient"]
    assert [e.step for e in events] == bad
    assert events[1].data["parameters"] == {"0.bias": "inf", "2.weight": "nan"}
    assert events[1].data["origin"] == "2.weight"


def test_two_steps_may_be_on_the_device(queue):
    """A third waits for the first; what is under way is on record after flush, close and exit."""
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    agent, sink = watched(optimizer, model=model)
    queue.at_once = False
    recorded = []
    for step in range(8):
        set_gradients(step, model)
        optimizer.step()
        recorded.append(agent.last.step)
    assert recorded == [0, 0, 0, 1, 2, 3, 4, 5]
    assert queue.waits == 5
    assert agent.state_dict()["step"] == 8
    assert agent.last.step == 7
    set_gradients(8, model)
    optimizer.step()
    assert agent.flush()
    assert len(sink.steps) == 9
    set_gradients(9, model)
    optimizer.step()
    process._process.pipeline.shutdown("finished", 10.0)
    assert [r.step for r in sink.steps] == list(range(10))


def test_what_is_under_way_is_recorded_when_the_optimizer_goes(queue):
    """Its last steps arrive after it is gone."""
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    agent, sink = watched(optimizer, model=model)
    queue.at_once = False
    for step in range(5):
        set_gradients(step, model)
        optimizer.step()
    channel = agent._recording.channel
    del agent, optimizer
    assert channel.closed.wait(20)
    assert len(sink.steps) == 5


def test_a_group_that_is_added(queue):
    """Its norms are in the samples from then on."""
    model, more = mlp(), mlp(1)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    agent, sink = watched(optimizer, model=model)
    for step in range(205):
        if step == 50:
            optimizer.add_param_group({"params": list(more.parameters())})
        set_gradients(step, *([model] if step < 50 else [model, more]))
        optimizer.step()
    assert agent.flush()
    assert [len(s.grad_norms) for s in sink.layers if s.step < 50]
    assert {len(s.grad_norms) for s in sink.layers if s.step < 50} == {6}
    # With so many tensors every 120th step is sampled.
    assert {s.step for s in sink.layers} >= {0, 120}
    assert {len(s.grad_norms) for s in sink.layers if s.step >= 50} == {12}


def test_a_state_that_was_thrown_away_is_made_before_a_step_is_left_out(queue):
    """Momentum is not begun by a step that the kernel skips."""
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    agent, _ = watched(optimizer, model=model)
    for step in range(6):
        set_gradients(step, model)
        if step == 4:
            optimizer.state.clear()
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
    assert agent.flush()
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    expected = [p.grad for p in model.parameters()]
    for buffer, grad in zip(buffers, expected, strict=True):
        assert buffer.isfinite().all()
        assert buffer.norm() <= grad.norm() + 1e-6


@pytest.mark.parametrize("at_once", [True, False])
def test_parameters_are_free_to_go(queue, at_once):
    """Neither a closed agent, nor the worker, nor the exporter keeps a model alive."""
    queue.at_once = at_once
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    agent = gradwatch.Agent(optimizer, model=model, store="gradwatch.db")
    for step in range(5):
        set_gradients(step, model)
        optimizer.step()
    agent.close()
    weight = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert weight() is None


def test_observing_changes_nothing(queue):
    """Parameters are bit-identical to those of an unwatched run, NaNs included."""
    ours, theirs = twins()
    wrapped, plain = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (ours, theirs))
    agent, sink = watched(wrapped, model=ours, clip=ObserveOnly())
    for step in range(30):
        set_gradients(step, ours, theirs)
        wrapped.step()
        plain.step()
    assert queue.sent == 29
    assert parameters_equal(ours, theirs)
    set_gradients(30, ours)
    ours[0].weight.grad.fill_(math.nan)
    wrapped.step()
    assert agent.flush()
    assert (sink.steps[-1].nonfinite, sink.steps[-1].skipped) == (True, False)
    assert ours[0].weight.isnan().all()


def test_nan_let_through(queue):
    """`on_nonfinite="ignore"` applies the step unclipped, as without gradwatch."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS["sgd"](m.parameters()) for m in (ours, theirs))
    agent, sink = watched(wrapped, model=ours, on_nonfinite="ignore")
    for step in range(4):
        set_gradients(step, ours, theirs)
        for model in (ours, theirs):
            if step == 2:
                model[0].weight.grad[0, 0] = math.inf
        wrapped.step()
        if step != 2:
            clip_grad_norm_(theirs.parameters(), 1.0)
        plain.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, equal_nan=True)
    assert agent.flush()
    assert [r.step for r in sink.steps if r.nonfinite] == [2]
    assert not any(r.skipped for r in sink.steps)


def test_huge_finite_gradients_are_clipped(queue):
    """Squares that overflow float32 are not inf; the clipped step equals the reference."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS["sgd"](m.parameters()) for m in (ours, theirs))
    agent, sink = watched(wrapped, model=ours)
    for step in range(3):
        set_gradients(step, ours, theirs)
        if step == 2:
            for p in ours.parameters():
                p.grad.mul_(1e30)
        wrapped.step()
        total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in theirs.parameters()))
        if step == 2:
            for p in theirs.parameters():
                p.grad.mul_(1.0 / total)
        else:
            clip_grad_norm_(theirs.parameters(), 1.0)
        plain.step()
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert sink.steps[2].pre_norm == pytest.approx(1e30 * total, rel=1e-6)
    assert (sink.steps[2].clipped, sink.steps[2].nonfinite) == (True, False)


def test_gradients_that_come_and_go(queue):
    """Another set of parameters is looked at from here once; records keep their order."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS["sgd"](m.parameters()) for m in (ours, theirs))
    agent, sink = watched(wrapped, model=ours)
    queue.at_once = False
    for step in range(30):
        set_gradients(step, ours, theirs)
        for model in (ours, theirs):
            if step % 10 >= 5:
                model[2].weight.grad = None
            if step == 17:
                for p in model.parameters():
                    p.grad = None
        wrapped.step()
        clip_grad_norm_(theirs.parameters(), 1.0)
        plain.step()
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert [r.step for r in sink.steps] == list(range(30))
    assert [r.step for r in sink.steps if math.isnan(r.pre_norm)] == [17]
    assert [e for e in sink.events if e.kind == "dead_gradient"] == []


def test_an_exception_inside_a_step_leaves_nothing_behind(queue):
    """The next step is clipped by its own divisor, and the one that failed is not on record."""
    ours, theirs = twins()
    wrapped = OPTIMIZERS["sgd"](ours.parameters())
    plain = OPTIMIZERS["sgd"](theirs.parameters())
    agent, sink = watched(wrapped, model=ours)
    for step in range(6):
        set_gradients(step, ours, theirs)
        if step == 3:
            wrapped.register_step_pre_hook(_fail_once())
            with pytest.raises(RuntimeError, match="the kernel failed"):
                wrapped.step()
        wrapped.step()
        clip_grad_norm_(theirs.parameters(), 1.0)
        plain.step()
        assert not {"grad_scale", "found_inf"} & set(vars(wrapped))
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert [r.step for r in sink.steps] == list(range(6))


def _fail_once():
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the kernel failed")

    return hook
