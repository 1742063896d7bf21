"""The handle: identity, lifetime, logging, checkpoints, and errors that say what is right."""

import copy
import gc
import io
import math
import pickle
import warnings

import pytest
import torch
from loops import mlp, set_gradients, train, twins
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import Agent, ClipNorm, ClipValue, ObserveOnly, Settings
from gradwatch.testing import MemorySink


def sgd(model=None, **options):
    model = model or mlp()
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def step_once(optimizer, step=0):
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            p.grad = torch.full_like(p, 0.01 * (step + i + 1))
    optimizer.step()


def test_wrap_returns_the_same_object():
    """The optimizer is instrumented in place."""
    optimizer = sgd()
    assert gradwatch.wrap(optimizer, store=MemorySink(), metrics_port=None) is optimizer
    assert type(optimizer) is torch.optim.SGD


def test_wrapping_twice_is_an_error_unless_replace():
    """A notebook cell run again: an error that says so, or with replace=True a new run."""
    optimizer = sgd()
    first = MemorySink()
    gradwatch.wrap(optimizer, store=first, metrics_port=None)
    step_once(optimizer)
    with pytest.raises(gradwatch.AlreadyWrappedError, match="replace=True"):
        gradwatch.wrap(optimizer, store=MemorySink(), metrics_port=None)
    second = MemorySink()
    gradwatch.wrap(optimizer, store=second, metrics_port=None, replace=True)
    step_once(optimizer)
    assert Agent.of(optimizer).flush()
    assert len(first.steps) == len(second.steps) == 1
    assert first.statuses == ["finished"]
    assert first.runs[0].uid != second.runs[0].uid


def test_of_finds_the_agent():
    """`Agent.of` gives the handle, and an error for an optimizer that has none."""
    optimizer = sgd()
    agent = Agent(optimizer, store=MemorySink(), metrics_port=None)
    assert Agent.of(optimizer) is agent
    agent.close()
    with pytest.raises(gradwatch.NotWrappedError, match="call gradwatch.wrap first"):
        Agent.of(optimizer)


def test_closing_takes_the_hooks_off():
    """After `close()` the optimizer is as it was, and steps unclipped."""
    ours, theirs = twins()
    optimizer, plain = sgd(ours), sgd(theirs)
    with Agent(optimizer, clip=ClipNorm(1e-3), store=(sink := MemorySink()), metrics_port=None):
        pass
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    set_gradients(0, ours, theirs)
    optimizer.step()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(),
                                                   strict=True))  # fmt: skip
    assert not sink.runs  # a run comes into being at its first step


def test_an_exception_in_the_with_block_fails_the_run():
    """`with Agent(...)` ends the run as failed where the block raises."""
    optimizer = sgd()
    sink = MemorySink()
    with pytest.raises(ZeroDivisionError), Agent(optimizer, store=sink, metrics_port=None):
        step_once(optimizer)
        raise ZeroDivisionError
    assert sink.statuses == ["failed"]


def test_an_optimizer_that_is_gone_ends_its_run():
    """The agent holds the optimizer weakly."""
    optimizer = sgd()
    sink = MemorySink()
    agent = Agent(optimizer, store=sink, metrics_port=None)
    step_once(optimizer)
    channel = agent._channel
    del optimizer
    gc.collect()
    assert channel.closed.wait(5.0)
    assert len(sink.steps) == 1
    assert sink.statuses == ["finished"]
    assert agent.flush()


def test_log_attaches_the_loss_to_the_coming_step():
    """A tensor or a number, once; the step after has none."""
    optimizer = sgd()
    agent = Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    for loss in (torch.tensor(0.5, requires_grad=True), 2, torch.tensor([[3.0]]), None, math.inf):
        if loss is not None:
            agent.log(loss=loss)
        step_once(optimizer)
    assert agent.last.nonfinite_loss
    assert agent.flush()
    assert [r.loss for r in sink.steps] == pytest.approx([0.5, 2, 3, math.nan, math.inf],
                                                         nan_ok=True)  # fmt: skip


@pytest.mark.parametrize("loss", [torch.zeros(3), "high", None, [1.0]])
def test_log_refuses_what_is_not_one_number(loss):
    """A batch of losses is the user's mistake, and the error says what is right."""
    agent = Agent(sgd(), store=MemorySink(), metrics_port=None)
    with pytest.raises(gradwatch.ConfigurationError, match="loss"):
        agent.log(loss=loss)


def test_threshold_and_last():
    """What a progress bar shows."""
    optimizer = sgd()
    agent = Agent(optimizer, clip=ClipNorm(0.01), store=MemorySink(), metrics_port=None)
    assert agent.threshold == 0.01
    assert agent.last is None
    agent.log(loss=1.5)
    step_once(optimizer)
    last = agent.last
    assert (last.step, last.loss, last.lr, last.clipped) == (0, 1.5, 0.1, True)
    assert last.post_norm == pytest.approx(0.01, rel=1e-4)
    assert math.isnan(Agent(sgd(), clip=ClipValue(1), store=MemorySink(),
                            metrics_port=None).threshold)  # fmt: skip


def test_state_dict_goes_on_as_the_same_run():
    """Saved and loaded with `weights_only=True`: the run's uid, step and policy state."""
    optimizer = sgd()
    policy = gradwatch.TargetRatio()
    agent = Agent(optimizer, clip=policy, store=MemorySink(), metrics_port=None)
    for step in range(30):
        step_once(optimizer, step)
    buffer = io.BytesIO()
    torch.save(agent.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)

    resumed = sgd()
    sink = MemorySink()
    other = Agent(resumed, clip=policy, store=sink, metrics_port=None)
    other.load_state_dict(state)
    assert (other.run_id, other.threshold) == (agent.run_id, agent.threshold)
    step_once(resumed)
    assert other.flush()
    assert sink.steps[0].step == 30
    assert (sink.runs[0].uid, sink.runs[0].start_step) == (agent.run_id, 30)


def test_a_state_loaded_between_steps_begins_a_new_attempt():
    """Going back to a checkpoint within the process: nothing of the first attempt is lost."""
    optimizer = sgd()
    agent = Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    for step in range(5):
        if step == 2:
            state = agent.state_dict()
        step_once(optimizer, step)
    agent.load_state_dict(state)
    step_once(optimizer)
    assert agent.flush()
    assert [r.step for r in sink.steps] == [0, 1, 2, 3, 4, 2]
    assert [run.start_step for run in sink.runs] == [0, 2]
    assert sink.runs[0].uid == sink.runs[1].uid
    assert sink.statuses == [None]


@pytest.mark.parametrize("state", [{}, {"version": 2}, None, [], {"version": 1, "run_id": 3}])
def test_a_state_that_is_none_is_refused(state):
    """What `state_dict` did not write is an error that says so."""
    agent = Agent(sgd(), store=MemorySink(), metrics_port=None)
    with pytest.raises(gradwatch.ConfigurationError, match="state_dict"):
        agent.load_state_dict(state)


def test_a_state_of_another_policy_is_refused():
    """A policy's state does not fit another policy."""
    state = Agent(sgd(), store=MemorySink(), metrics_port=None).state_dict()
    agent = Agent(sgd(), clip=gradwatch.TargetRatio(), store=MemorySink(), metrics_port=None)
    with pytest.raises(gradwatch.ConfigurationError, match="ClipNorm.*TargetRatio"):
        agent.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_a_wrapped_optimizer_are_unwrapped(copied):
    """Deepcopy and pickle give a working optimizer without an agent."""
    optimizer = torch.optim.AdamW(mlp().parameters(), fused=True)
    agent = Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    step_once(optimizer)
    other = copied(optimizer)
    with pytest.raises(gradwatch.NotWrappedError):
        Agent.of(other)
    step_once(other)
    assert agent.flush()
    assert len(sink.steps) == 1


def test_schedulers_built_before_and_after_stay_unaffected():
    """No warning, and the learning rate on record is the one in force."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = sgd()
        before = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        agent = Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
        after = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
        expected = []
        for step in range(5):
            expected.append(optimizer.param_groups[0]["lr"])
            step_once(optimizer, step)
            before.step()
            after.step()
    assert agent.flush()
    assert [r.lr for r in sink.steps] == pytest.approx(expected)


def test_optimizer_state_dict_is_what_it_was():
    """The agent puts nothing into the optimizer's checkpoint."""
    ours, theirs = twins()
    wrapped = torch.optim.AdamW(ours.parameters(), fused=True)
    plain = torch.optim.AdamW(theirs.parameters(), fused=True)
    gradwatch.wrap(wrapped, clip=ObserveOnly(), store=MemorySink(), metrics_port=None)
    train(ours, wrapped, 3)
    train(theirs, plain, 3)
    buffer = io.BytesIO()
    torch.save(wrapped.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert str(loaded) == str(plain.state_dict())


# -- closures ------------------------------------------------------------------------------------


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


# -- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "much", None, True])
@pytest.mark.parametrize("policy", [ClipNorm, ClipValue])
def test_a_threshold_is_a_finite_number_above_zero(policy, value):
    """Negative would reverse the gradients, zero stop the training, NaN poison it."""
    name = "max_norm" if policy is ClipNorm else "clip_value"
    with pytest.raises(gradwatch.ConfigurationError, match=name) as caught:
        policy(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"clip": 1.0}, "ClipNorm"),
        ({"clip": []}, "ClipNorm"),
        ({"clip": [ClipNorm(1.0), ClipNorm(1.0)]}, "2 policies.*1 parameter group"),
        ({"on_nonfinite": "stop"}, '"skip", "raise" or "ignore"'),
        ({"metrics_port": 70000}, "70000.*0 to 65535"),
        ({"metrics_port": "abc"}, "abc.*0 to 65535"),
        ({"store": "mysql://root:secret@db/x"}, "SQLite or PostgreSQL"),
        ({"store": 3}, "URL"),
        ({"run": ""}, "run"),
        ({"tags": ["a"]}, "dict"),
        ({"settings": {"run": "x"}}, "gradwatch.Settings"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    """The error names the argument, its value and what would be right; nothing is hooked."""
    optimizer = sgd()
    with pytest.raises(gradwatch.ConfigurationError, match=words) as caught:
        gradwatch.wrap(optimizer, **{"store": MemorySink(), "metrics_port": None} | arguments)
    assert "secret" not in str(caught.value)
    assert not optimizer._optimizer_step_pre_hooks


def test_only_optimizers_are_wrapped():
    """A model handed over by mistake is told apart."""
    with pytest.raises(gradwatch.ConfigurationError, match="torch.optim.Optimizer, not Sequential"):
        gradwatch.wrap(mlp())


def test_lbfgs_cannot_skip():
    """Refused at `wrap`, with what to use."""
    with pytest.raises(gradwatch.ConfigurationError, match='"raise" or "ignore"'):
        gradwatch.wrap(torch.optim.LBFGS(mlp().parameters()))


def test_mixed_norm_types_are_refused():
    """A total of an L2 and an L1 norm means nothing."""
    model = mlp()
    groups = [{"params": list(m.parameters())} for m in (model[0], model[2])]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(gradwatch.ConfigurationError, match="norm_type"):
        gradwatch.wrap(optimizer, clip=[ClipNorm(1.0), ClipNorm(1.0, norm_type=1)])


def test_disabled_still_clips(monkeypatch):
    """`GRADWATCH_DISABLED=1` stops recording, never clipping."""
    monkeypatch.setenv("GRADWATCH_DISABLED", "1")
    ours, theirs = twins()
    wrapped, plain = sgd(ours), sgd(theirs)
    agent = Agent(wrapped, clip=ClipNorm(0.01))
    set_gradients(0, ours, theirs)
    wrapped.step()
    clip_grad_norm_(theirs.parameters(), 0.01)
    plain.step()
    torch.testing.assert_close(ours[0].weight, theirs[0].weight)
    assert agent.metrics_url is None
    assert agent.flush()
    agent.close()


def test_settings_come_after_arguments_and_before_the_environment(monkeypatch):
    """Argument, Settings, environment, default: in this order."""
    monkeypatch.setenv("GRADWATCH_RUN", "from-environment")
    monkeypatch.setenv("GRADWATCH_RING_STEPS", "128")
    for arguments, expected in (
        ({"run": "argument", "settings": Settings(run="settings")}, "argument"),
        ({"settings": Settings(run="settings")}, "settings"),
        ({}, "from-environment"),
    ):
        optimizer = sgd()
        agent = Agent(optimizer, store=(sink := MemorySink()), metrics_port=None, **arguments)
        step_once(optimizer)
        assert agent.flush()
        assert sink.runs[0].name == expected
        assert agent._channel.ring.step_capacity == 128


def test_a_failure_inside_becomes_one_warning_and_training_goes_on_clipped(monkeypatch, caplog):
    """A bug in the measuring: clipped as torch clips, one warning, the loss of records counted."""
    ours, theirs = twins()
    wrapped, plain = sgd(ours), sgd(theirs)
    agent = Agent(wrapped, clip=ClipNorm(0.01), store=(sink := MemorySink()))
    set_gradients(0, ours, theirs)
    for step in range(6):
        set_gradients(step, ours, theirs)
        if step == 1:
            monkeypatch.setattr("gradwatch.part.Part.measure", lambda *_: 1 / 0)
        if step == 4:
            monkeypatch.undo()
            monkeypatch.setenv("GRADWATCH_METRICS_PORT", "0")
        wrapped.step()
        clip_grad_norm_(theirs.parameters(), 0.01)
        plain.step()
    torch.testing.assert_close(ours[0].weight, theirs[0].weight)
    assert agent.flush()
    assert [r.step for r in sink.steps] == [0, 4, 5]
    warned = [r for r in caplog.records if "could not be recorded" in r.message]
    assert len(warned) == 1
    assert agent._channel.dropped() == {"error": 3}
