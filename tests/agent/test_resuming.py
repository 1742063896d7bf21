"""Whole checkpoints, of torch.save and of torch.distributed: written, read, and trained on from."""

import sqlite3

import pytest
import torch
from loops import mlp, parameters_equal, set_gradients, sgd, twins, watched
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_flatten

from gradwatch import Agent, ClipNorm, PercentileClip, SkipSpikes, TargetRatio, ZClip

# One process without a process group, which torch.distributed.checkpoint remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def _in_place(monkeypatch):
    """Clip by multiplying, which is torch's own clipping bit by bit."""
    monkeypatch.setenv("GRADWATCH_FOLD", "0")


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def assert_same_state(one, other):
    """Two nested states have the same keys, and values equal bit by bit."""
    (values, keys), (others, other_keys) = tree_flatten(one), tree_flatten(other)
    assert keys == other_keys
    for a, b in zip(values, others, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def step_clipped(model, optimizer, steps):
    """Steps that torch clips; the norms."""
    norms = []
    for step in steps:
        set_gradients(step, model)
        norms.append(float(clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    return norms


def step_watched(model, optimizer, steps):
    """Steps that the agent clips."""
    for step in steps:
        set_gradients(step, model)
        optimizer.step()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "make", [adamw, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)]
)
def test_the_distributed_state_is_that_of_an_unwrapped_optimizer(make, flat):
    """Got, set into an optimizer that has stepped elsewhere, and got again: torch's, bit by bit."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    ours, theirs = twins()
    wrapped, plain = make(ours), make(theirs)
    agent, sink = watched(wrapped, model=ours)
    step_watched(ours, wrapped, range(5))
    step_clipped(theirs, plain, range(5))
    state = get_optimizer_state_dict(ours, wrapped, options=options)
    expected = get_optimizer_state_dict(theirs, plain, options=options)
    assert_same_state(state, expected)

    other = mlp(3)
    loaded = make(other)
    watched(loaded, model=other)
    step_watched(other, loaded, range(7, 9))
    set_optimizer_state_dict(other, loaded, state, options=options)
    assert_same_state(get_optimizer_state_dict(other, loaded, options=options), expected)
    assert agent.flush()
    assert [r.step for r in sink.steps] == list(range(5))


class Saved:
    """A file of `torch.save`, read with `weights_only=True`."""

    def save(self, model, optimizer, agent):
        parts = (model, optimizer, agent)
        torch.save([part.state_dict() for part in parts], "checkpoint.pt")

    def load(self, model, optimizer, wrap):
        of_model, of_optimizer, of_agent = torch.load("checkpoint.pt", weights_only=True)
        model.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
        agent = wrap()
        agent.load_state_dict(of_agent)
        return agent


class Distributed:
    """A folder of `torch.distributed.checkpoint`, the agent's state one of its parts."""

    def part(self, agent):
        return agent.state_dict()

    def save(self, model, optimizer, agent):
        weights, state = get_state_dict(model, optimizer)
        whole = {"model": weights, "optimizer": state, "agent": self.part(agent)}
        checkpoint.save(whole, checkpoint_id="checkpoint")

    def load(self, model, optimizer, wrap):
        weights, state = get_state_dict(model, optimizer)
        agent = wrap()
        whole = {"model": weights, "optimizer": state, "agent": self.part(agent)}
        checkpoint.load(whole, checkpoint_id="checkpoint")
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=whole["optimizer"]
        )
        if whole["agent"] is not agent:
            agent.load_state_dict(whole["agent"])
        return agent


class Stateful(Distributed):
    """The same, with the agent itself in it: torch asks it for its state, and hands it back."""

    def part(self, agent):
        return agent


@pytest.mark.parametrize("kind", [Saved, Distributed, Stateful])
@pytest.mark.parametrize("anew", [True, False], ids=["anew", "rolled back"])
def test_a_resumed_job_is_the_same_run_and_trains_as_if_never_interrupted(kind, anew):
    """Against 20 uninterrupted steps clipped by torch: parameters, norms, one run, two attempts."""
    plain = mlp()
    norms = step_clipped(plain, adamw(plain), range(20))
    file, model = kind(), mlp()
    optimizer = adamw(model)
    agent = Agent(optimizer, model=model, run="resumed")
    step_watched(model, optimizer, range(10))
    file.save(model, optimizer, agent)
    step_watched(model, optimizer, range(50, 53))  # which the checkpoint does not have
    if anew:
        agent.close()
        model = mlp(7)
        optimizer = adamw(model)
        agent = file.load(model, optimizer, lambda: Agent(optimizer, model=model, run="resumed"))
    else:
        file.load(model, optimizer, lambda: agent)
    step_watched(model, optimizer, range(10, 20))
    assert parameters_equal(model, plain)
    assert agent.flush()
    agent.close()
    with sqlite3.connect("gradwatch.db") as connection:
        (run,) = connection.execute("SELECT id, uid, name FROM runs").fetchall()
        attempts = connection.execute("SELECT run_id, attempt, start_step FROM attempts").fetchall()
        rows = connection.execute("SELECT step, attempt, pre_norm FROM steps ORDER BY step")
        steps, visible, stored = zip(*rows, strict=True)
    assert run == (1, agent.run_id, "resumed")
    assert sorted(attempts) == [(1, 1, 0), (1, 2, 10)]
    assert steps == tuple(range(20))
    assert visible == (1,) * 10 + (2,) * 10
    assert stored == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        TargetRatio(),
        ZClip(max_norm=100.0),
        PercentileClip(warmup=10, history=30),
        SkipSpikes(TargetRatio(), window=16),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_what_a_policy_has_learnt_comes_through_a_distributed_checkpoint(policy):
    """A fresh agent that loads it goes on as the one that wrote it: same state, same thresholds."""
    agents = []
    for seed in (0, 1):
        model = mlp(seed)
        optimizer = adamw(model)
        agents.append((*watched(optimizer, clip=policy), model, optimizer))
    (first, first_sink, *watched_there), (second, second_sink, *watched_here) = agents
    step_watched(*watched_there, range(40))
    untaught = second.state_dict()["policies"]
    checkpoint.save({"agent": first}, checkpoint_id="checkpoint")
    checkpoint.load({"agent": second}, checkpoint_id="checkpoint")
    assert second.state_dict() == first.state_dict()
    assert second.state_dict()["policies"] != untaught
    step_watched(*watched_there, range(40, 50))
    step_watched(*watched_here, range(40, 50))
    assert first.flush()
    assert second.flush()
    thresholds = [r.threshold for r in second_sink.steps]
    assert thresholds == [r.threshold for r in first_sink.steps[40:]]
    assert len(set(thresholds)) > 1


@pytest.mark.parametrize("applied", [ClipNorm(0.05), TargetRatio()], ids=str)
def test_an_applied_policy_comes_through_a_distributed_checkpoint(applied):
    """As it does through torch.save (test_live_changes.py)."""
    agents = []
    for seed in (0, 1):
        model = mlp(seed)
        optimizer = adamw(model)
        agents.append((*watched(optimizer, clip=ClipNorm(1.0)), model, optimizer))
    (first, _, model, optimizer), (second, *_) = agents
    # What a live change does at a step boundary.
    first._hooks.parts[0].take(applied)
    step_watched(model, optimizer, range(40))
    state = first.state_dict()
    checkpoint.save({"agent": first}, checkpoint_id="checkpoint")
    checkpoint.load({"agent": second}, checkpoint_id="checkpoint")
    assert second.state_dict() == state
    assert second.threshold == first.threshold


@pytest.mark.parametrize("make", [sgd, adamw])
def test_asking_for_the_distributed_state_is_no_step(make):
    """Torch steps with zero gradients to make the state it is asked for: no record, no event."""
    model = mlp()
    optimizer = make(model)
    agent, sink = watched(optimizer, model=model)
    get_state_dict(model, optimizer)
    step_watched(model, optimizer, range(2))
    optimizer.zero_grad()
    agent.log(loss=3.0)
    get_state_dict(model, optimizer)  # plain SGD has no state: it is made each time
    step_watched(model, optimizer, range(2, 3))
    assert agent.flush()
    assert [(r.step, r.lr == 0, r.loss == 3.0) for r in sink.steps] == [
        (0, False, False),
        (1, False, False),
        (2, False, True),
    ]
    assert not sink.events


def test_a_job_that_wraps_before_it_loads_is_the_same_run():
    """The fresh optimizer's state is made by torch before the checkpoint is in: one run all the same."""
    uids = []
    for seed in (0, 7):
        model = mlp(seed)
        optimizer = adamw(model)
        agent = Agent(optimizer, model=model, run="resumed")
        weights, state = get_state_dict(model, optimizer)
        whole = {"model": weights, "optimizer": state, "agent": agent.state_dict()}
        if uids:
            checkpoint.load(whole, checkpoint_id="checkpoint")
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
            agent.load_state_dict(whole["agent"])
            step_watched(model, optimizer, range(10, 20))
        else:
            step_watched(model, optimizer, range(10))
            weights, state = get_state_dict(model, optimizer)
            whole = {"model": weights, "optimizer": state, "agent": agent.state_dict()}
            checkpoint.save(whole, checkpoint_id="checkpoint")
        uids.append(agent.run_id)
        assert agent.flush()
        agent.close()
    with sqlite3.connect("gradwatch.db") as connection:
        runs = connection.execute("SELECT uid FROM runs").fetchall()
        steps = [s for (s,) in connection.execute("SELECT step FROM steps ORDER BY step")]
    assert runs == [(uids[0],)]
    assert uids[0] == uids[1]
    assert steps == list(range(20))
