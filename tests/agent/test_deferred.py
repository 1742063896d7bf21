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
from loops import greatest_difference, mlp, parameters_equal, set_gradients, twins
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch import ClipNorm, ObserveOnly, TargetRatio, deferred, process
from gradwatch.testing import MemorySink

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
}


class Queue:
    """A device's queue: what was sent arrives when the test says so, or when it is waited for."""

    def __init__(self):
        self.sent = self.arrived = self.waits = 0
        self.at_once = True

    def arrival(self, _device):
        queue = self

        class Arrival:
            def record(self, _stream):
                queue.sent += 1
                self.number = queue.sent
                if queue.at_once:
                    queue.arrived = queue.sent

            def query(self):
                return queue.arrived >= self.number

            def synchronize(self):
                if not self.query():
                    queue.waits += 1
                    queue.arrived = self.number

        return Arrival()


@pytest.fixture
def queue(monkeypatch):
    """The CPU as a device that steps are deferred to."""
    queue = Queue()
    monkeypatch.setattr(deferred, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(deferred, "arrival", queue.arrival)
    return queue


class Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value, each of which waits for a CUDA device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def watch(optimizer, model=None, **arguments):
    sink = MemorySink()
    agent = gradwatch.Agent(optimizer, model=model, store=sink, metrics_port=None, **arguments)
    return agent, sink


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_torch_and_on_record(queue, name):
    """Norms, clip flags and parameters are those of `clip_grad_norm_` + `step`."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS[name](m.parameters()) for m in (ours, theirs))
    agent, sink = watch(wrapped, ours)
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
    agent, _ = watch(optimizer, model, clip=TargetRatio())
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
    agent, sink = watch(wrapped, ours)
    queue.at_once = False
    for step in range(15):
        set_gradients(step, ours, theirs)
        if first <= step < first + 2:
            ours[2].weight.grad[1, 1] = math.nan
            ours[0].bias.grad[0] = math.inf
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


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("known", [False, True], ids=["", "scaler="])
def test_under_a_grad_scaler(queue, unscale, known):
    """As `unscale_` + `clip_grad_norm_` + `scaler.step`; an overflow is no NaN."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS["adamw"](m.parameters()) for m in (ours, theirs))
    scalers = [GradScaler("cpu", init_scale=2.0**10, growth_interval=5) for _ in range(2)]
    agent, sink = watch(wrapped, ours, scaler=scalers[0] if known else None)
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
    agent, sink = watch(wrapped, ours)
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


def test_two_steps_may_be_on_the_device(queue):
    """A third waits for the first; what is under way is on record after flush, close and exit."""
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    agent, sink = watch(optimizer, model)
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
    agent, sink = watch(optimizer, model)
    queue.at_once = False
    for step in range(5):
        set_gradients(step, model)
        optimizer.step()
    channel = agent._recording.channel
    del agent, optimizer
    assert channel.closed.wait(20)
    assert len(sink.steps) == 5


def test_a_policy_learns_in_order_as_the_numbers_come(queue):
    """Thresholds on record are those of the policy fed with the norms known at that step."""
    model = mlp()
    policy = TargetRatio(cap=5.0)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    agent, sink = watch(optimizer, model, clip=policy)
    queue.at_once = False
    for step in range(150):
        set_gradients(step, model)
        if step == 60:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
    assert agent.flush()
    records = sink.steps
    state = policy.init()
    for number, record in enumerate(records):
        known = number - 3  # of step n the first n - 2 are on record; the very first is at once
        if known > 0:
            state = policy.update(state, records[known].pre_norm)
        if number == 1:
            state = policy.update(state, records[0].pre_norm)
        assert record.threshold == policy.threshold(state)
    assert sum(r.clipped for r in records) > 10


def test_learning_does_not_depend_on_when_the_numbers_come(queue):
    """A quick device, a slow one, and a checkpoint in between: the same thresholds."""
    seen = []
    for at_once, saves in ((True, False), (False, False), (False, True)):
        queue.at_once = at_once
        model = mlp()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        agent, sink = watch(optimizer, model, clip=TargetRatio())
        for step in range(60):
            set_gradients(step, model)
            optimizer.step()
            if saves and step % 7 == 0:
                agent.state_dict()
        assert agent.flush()
        seen.append([r.threshold for r in sink.steps])
    assert len(set(seen[0])) > 10
    assert seen[0] == seen[1] == seen[2]


def test_a_group_that_is_added(queue):
    """Its norms are in the samples from then on."""
    model, more = mlp(), mlp(1)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    agent, sink = watch(optimizer, model)
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
    agent, _ = watch(optimizer, model)
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
    agent, sink = watch(wrapped, ours, clip=ObserveOnly())
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
    agent, sink = watch(wrapped, ours, on_nonfinite="ignore")
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
    agent, sink = watch(wrapped, ours)
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


@pytest.mark.parametrize(
    "arguments",
    [
        {"on_nonfinite": "raise"},
        {"clip": gradwatch.PercentileClip()},
        {"clip": gradwatch.AdaptiveGradientClip()},
        {"clip": [ClipNorm(1.0)]},
    ],
    ids=["raise", "percentile", "by unit", "by group"],
)
def test_what_needs_the_gradient_first_is_not_deferred(queue, arguments):
    """It is looked at from here, as everywhere else."""
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    agent, sink = watch(optimizer, model, **arguments)
    for step in range(5):
        set_gradients(step, model)
        optimizer.step()
    assert queue.sent == 0
    assert agent.flush()
    assert len(sink.steps) == 5


def test_gradients_that_come_and_go(queue):
    """Another set of parameters is looked at from here once; records keep their order."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS["sgd"](m.parameters()) for m in (ours, theirs))
    agent, sink = watch(wrapped, ours)
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
    assert sink.steps[17].pre_norm == 0.0
    assert [e.step for e in sink.events if e.kind == "dead_gradient"] == [17]


def test_an_exception_inside_a_step_leaves_nothing_behind(queue):
    """The next step is clipped by its own divisor, and the one that failed is not on record."""
    ours, theirs = twins()
    wrapped = OPTIMIZERS["sgd"](ours.parameters())
    plain = OPTIMIZERS["sgd"](theirs.parameters())
    agent, sink = watch(wrapped, ours)
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
