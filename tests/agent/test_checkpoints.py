"""Checkpoints and copies: the agent's own state, and the optimizer's beside it."""

import copy
import io
import json
import pickle

import pytest
import torch
from loops import mlp, one_parameter, sgd, step_once, train, twins, watched

import gradwatch
from gradwatch import Agent, ObserveOnly, TargetRatio
from gradwatch.testing import MemorySink


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


def test_a_policy_state_that_is_none_is_refused():
    """As all of a state that `state_dict` did not write."""
    _, optimizer = one_parameter()
    agent, _ = watched(optimizer, clip=TargetRatio())
    state = agent.state_dict()
    (learnt,) = json.loads(state["policies"])
    state["policies"] = json.dumps([{**learnt, "state": {"threshold": "x"}}])
    with pytest.raises(gradwatch.ConfigurationError, match="policy"):
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


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_checkpoint_may_unfuse_the_optimizer(kind):
    """`load_state_dict` brings `fused=None` back: clipping goes on in place."""
    _, plain = one_parameter(kind)
    weight, optimizer = one_parameter(kind, fused=True)
    agent, _ = watched(optimizer)
    optimizer.load_state_dict(plain.state_dict())
    weight.grad = torch.full((4,), 50.0)
    optimizer.step()
    assert agent.last.clipped
    assert weight.grad.norm().item() == pytest.approx(1.0)
