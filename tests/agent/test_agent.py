"""The handle: wrapping, lifetime, logging, and training on where something fails."""

import gc
import math
import weakref

import pytest
import torch
from loops import one_parameter, set_gradients, sgd, step_once, twins, watched
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import Agent, ClipNorm, ClipValue
from gradwatch.testing import MemorySink


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
    channel = agent._recording.channel
    del optimizer
    gc.collect()
    assert channel.closed.wait(5.0)
    assert len(sink.steps) == 1
    assert sink.statuses == ["finished"]
    assert agent.flush()


def test_closing_waits_for_the_run_of_an_optimizer_that_is_gone(monkeypatch):
    """It ends by itself, in the worker's own time; who calls close() finds it stored."""
    monkeypatch.setenv("GRADWATCH_DRAIN_INTERVAL", "0.5")
    optimizer = sgd()
    sink = MemorySink()
    agent = Agent(optimizer, store=sink, metrics_port=None)
    step_once(optimizer)
    assert agent.flush()
    del optimizer
    gc.collect()
    agent.close()
    assert sink.statuses == ["finished"]


def test_closed_agents_are_not_kept():
    """Nor what they hold."""
    _, optimizer = one_parameter()
    gone = []
    for _ in range(3):
        agent, _ = watched(optimizer, replace=True)
        gone.append(weakref.ref(agent))
    del agent
    gradwatch.Agent.of(optimizer).close()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


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


@pytest.mark.parametrize(
    "loss", [torch.tensor([1.0, 2.0]), torch.tensor(1 + 2j), 1 + 2j, "low", None, [1.0, 2.0]]
)
def test_what_is_no_loss_is_refused(loss):
    """When it is logged, not at the step, whose record would be lost."""
    optimizer = sgd()
    agent = Agent(optimizer, store=(sink := MemorySink()), metrics_port=None)
    with pytest.raises(gradwatch.ConfigurationError, match=r"log\(loss="):
        agent.log(loss=loss)
    step_once(optimizer)
    assert agent.flush()
    assert len(sink.steps) == 1


def test_logged_losses_are_values_not_memory():
    """The loop may write into the tensor before the step."""
    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer)
    loss = torch.tensor(3.0)
    agent.log(loss=loss)
    loss.zero_()
    weight.grad = torch.ones(4)
    optimizer.step()
    assert agent.last.loss == 3.0


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
    assert agent._recording.channel.dropped() == {"error": 3}
    agent.close()
    told = [e for e in sink.events if e.kind == "records_dropped"]
    assert sum(e.data["error"] for e in told) == 3
