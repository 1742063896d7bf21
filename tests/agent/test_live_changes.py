"""A threshold that is applied while a run goes on: taken at a step boundary, confirmed, on record."""

import json
import sqlite3
import threading

import pytest
import torch
from loops import mlp, parameters_equal, set_gradients, twins

import gradwatch
from gradwatch import ClipNorm, TargetRatio, control
from gradwatch.control import FollowingControl, LeadingControl
from gradwatch.errors import ConfigurationError, NotControllableError
from gradwatch.part import Part
from gradwatch.records import ThresholdChange
from gradwatch.testing import MemorySink
from gradwatch_monitor import Store

DEADLINE = 400  # steps by which a change must have been taken


def query(sql):
    with sqlite3.connect("gradwatch.db") as connection:
        return connection.execute(sql).fetchall()


def watched(model=None, *, clip=None, remote_control=True, **others):
    model = model or mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = clip or ClipNorm(1.0)
    agent = gradwatch.Agent(
        optimizer, model=model, clip=clip, run="job", remote_control=remote_control, **others
    )
    agent.kept = optimizer  # a run ends with its optimizer
    return agent, model


def step(agent, model, number):
    set_gradients(number, model)
    agent.kept.step()


def begin(agent, model):
    step(agent, model, 0)
    assert agent.flush()


def until(agent, model, done, first=1):
    """Steps until something holds; every step is followed by a look of the worker."""
    for number in range(first, first + DEADLINE):
        if done():
            return number
        step(agent, model, number)
        threading.Event().wait(0.01)
    pytest.fail("the change was not taken")


def test_is_taken_confirmed_and_on_record():
    """The row, the event, the records and the parameters all tell of the same step."""
    agent, model = watched()
    reference = mlp()
    plain = torch.optim.SGD(reference.parameters(), lr=0.01)
    begin(agent, model)
    with Store() as store:
        asked = store.apply(1, 0.05, by="ada", reason="too loose")
        assert (asked.applied_at, asked.refused) == (None, None)
        stop = until(agent, model, lambda: agent.threshold == 0.05)
        for number in range(stop, stop + 5):
            step(agent, model, number)
        assert agent.flush()
        (change,) = store.changes(1)
        records = store.steps(1)
        (event,) = store.events(1, kind="threshold_changed")
    assert (change.requested_by, change.reason, change.previous) == ("ada", "too loose", 1.0)
    first = change.applied_step
    assert records["threshold"].tolist() == [1.0] * first + [0.05] * (len(records) - first)
    assert (event.step, event.data["from"], event.data["to"]) == (first, 1.0, 0.05)
    assert "went from 1 to 0.05" in event.message
    assert "ada: too loose" in event.message
    assert change.applied_at == event.time
    for number in range(stop + 5):
        set_gradients(number, reference)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0 if number < first else 0.05)
        plain.step()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    # The store says how the run clips now.
    ((settings,),) = query("SELECT settings FROM runs")
    assert json.loads(settings)["clip"] == "ClipNorm(0.05)"


def test_a_policy_goes_on_with_what_one_of_its_kind_has_learnt():
    """Another cap for TargetRatio: its norms and its offset stay."""
    agent, model = watched(clip=TargetRatio(cap=5.0))
    begin(agent, model)
    for number in range(1, 30):
        step(agent, model, number)
    part = agent._hooks.parts[0]
    with Store() as store:
        store.apply(1, policy=TargetRatio(cap=2.0), by="ada")
    until(agent, model, lambda: part.policy == TargetRatio(cap=2.0), first=30)
    assert len(part.state.norms) >= 30
    assert agent.threshold <= 2.0


def test_changes_are_taken_one_after_another():
    """Two requests at once: both are made, in their order, at steps of their own."""
    agent, model = watched()
    begin(agent, model)
    with Store() as store:
        store.apply(1, 5.0, by="ada")
        store.apply(1, 3.0, by="bob")
        until(agent, model, lambda: agent.threshold == 3.0)
        assert agent.flush()
        second, first = store.changes(1)
    assert (first.threshold, first.previous) == (5.0, 1.0)
    assert (second.threshold, second.previous) == (3.0, 5.0)
    assert first.applied_step < second.applied_step


@pytest.mark.parametrize(
    ("clip", "change", "reason"),
    [
        (gradwatch.ClipValue(0.5), {"threshold": 2.0}, "ClipValue(0.5), which has no single"),
        (ClipNorm(1.0, norm_type=1.0), {"policy": TargetRatio()}, "in norm 2"),
        (ClipNorm(1.0), {"policy": gradwatch.ClipLayerNorm(1.0)}, "only be chosen where"),
        ([ClipNorm(1.0)], {"threshold": 2.0}, "policy of its own"),
    ],
    ids=["by value", "another norm", "by layer", "by group"],
)
def test_what_cannot_be_had_is_refused_with_the_reason(clip, change, reason):
    """The job goes on as it was, and the row says why."""
    agent, model = watched(clip=clip)
    begin(agent, model)
    with Store() as store:
        store.apply(1, **change, by="ada")
        until(agent, model, lambda: store.changes(1)[0].refused)
        (row,) = store.changes(1)
        assert reason in row.refused
        assert row.applied_at is None
        assert not store.events(1, kind="threshold_changed")


def test_nobody_can_change_a_job_that_does_not_allow_it():
    """Neither through `apply`, nor by writing the table."""
    agent, model = watched(remote_control=None)
    begin(agent, model)
    with Store() as store, pytest.raises(NotControllableError, match="GRADWATCH_REMOTE_CONTROL=1"):
        store.apply(1, 5.0, by="mallory")
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute(
            "INSERT INTO threshold_changes (run_id, requested_at, requested_by, threshold) "
            "VALUES (1, 0, 'mallory', 5.0)"
        )
    for number in range(1, 100):
        step(agent, model, number)
        threading.Event().wait(0.01)
    assert agent.threshold == 1.0
    assert query("SELECT applied_at, refused FROM threshold_changes") == [(None, None)]


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_is_a_number_above_0(threshold):
    """Said at once, with nothing written."""
    agent, model = watched()
    begin(agent, model)
    with Store() as store:
        with pytest.raises(ConfigurationError, match="above 0"):
            store.apply(1, threshold, by="ada")
        assert store.changes(1) == []


def test_a_run_that_has_ended_takes_nothing():
    """Said at once."""
    agent, model = watched()
    begin(agent, model)
    agent.close()
    with Store() as store, pytest.raises(NotControllableError, match="finished"):
        store.apply(1, 5.0, by="ada")


def test_a_sink_that_cannot_be_asked():
    """An option that would do nothing is an error."""
    with pytest.raises(ConfigurationError, match="MemorySink"):
        watched(store=MemorySink())


def test_the_change_outlives_a_checkpoint():
    """A resumed job goes on with the threshold that was applied, not with that of its script."""
    agent, model = watched()
    begin(agent, model)
    with Store() as store:
        store.apply(1, 0.05, by="ada")
    stop = until(agent, model, lambda: agent.threshold == 0.05)
    state = agent.state_dict()
    agent.close()
    one, other = twins(3)
    resumed, _ = watched(one)
    resumed.load_state_dict(state)
    assert resumed.threshold == 0.05
    plain = torch.optim.SGD(other.parameters(), lr=0.01)
    set_gradients(stop, one, other)
    resumed.kept.step()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
    plain.step()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)
    assert not parameters_equal(one, twins(3)[0])


def test_a_change_stands_whatever_becomes_of_its_step():
    """The step at which it was taken fails and is taken again: confirmed all the same."""
    agent, model = watched()
    begin(agent, model)
    failing = [True]

    def fail(*_):
        if failing and agent.threshold == 0.05:
            failing.clear()
            raise RuntimeError("a hook of the user's failed")

    agent.kept.register_step_pre_hook(fail)
    with Store() as store:
        store.apply(1, 0.05, by="ada")
        for number in range(1, DEADLINE):
            try:
                step(agent, model, number)
            except RuntimeError:
                break
            threading.Event().wait(0.01)
        assert not failing
        step(agent, model, DEADLINE)
        assert agent.flush()
        (change,) = store.changes(1)
        assert change.applied_step is not None
        assert len(store.events(1, kind="threshold_changed")) == 1


def test_another_policy_inside_skip_spikes():
    """The policy inside is replaced, and steps go on being recorded."""
    agent, model = watched(clip=gradwatch.SkipSpikes(ClipNorm(1.0)))
    begin(agent, model)
    part = agent._hooks.parts[0]
    with Store() as store:
        store.apply(1, policy=TargetRatio(cap=2.0), by="ada")
        stop = until(agent, model, lambda: part.policy.policy == TargetRatio(cap=2.0))
        for number in range(stop, stop + 5):
            step(agent, model, number)
        assert agent.flush()
        assert store.changes(1)[0].applied_step is not None
        assert store.steps(1)["step"].tolist() == list(range(stop + 5))


def test_a_policy_in_the_greatest_element(tmp_path):
    """norm_type=inf survives JSON: what is recommended there can be applied."""
    policy = ClipNorm(1.0, norm_type=float("inf"))
    agent, model = watched(clip=policy)
    begin(agent, model)
    with Store() as store:
        store.apply(1, policy=ClipNorm(0.2, norm_type=float("inf")), by="ada")
        until(agent, model, lambda: agent.threshold == 0.2)


def test_a_lower_cap_is_in_force_at_once():
    """At the very step that takes it."""
    state = TargetRatio(cap=50.0, initial=50.0).init()
    capped = TargetRatio(cap=0.5)
    assert capped.load(TargetRatio(cap=50.0).dump(state)).threshold == 0.5


class Board:
    """The key-value store of ranks that are threads."""

    def __init__(self):
        self.values, self.news = {}, threading.Condition()

    def put(self, key, value):
        with self.news:
            self.values[key] = value
            self.news.notify_all()
        return True

    def look(self, key):
        return self.values.get(key)

    def wait(self, key, seconds):
        with self.news:
            self.news.wait_for(lambda: key in self.values, min(seconds, 20))
            return self.values.get(key)


@pytest.mark.parametrize("ahead", [-3, 0, 3])
def test_ranks_that_are_ahead_or_behind_take_a_change_at_one_step(ahead):
    """Rank 0 waits for the step that the others are at, and they for its word."""
    parts, board = [Part(ClipNorm(1.0))], Board()
    leader, follower = LeadingControl(parts, board, 2), FollowingControl(parts, board, 1)
    taken = {}

    def run(name, control, steps):
        for number in steps:
            control.listen()
            if control.due(number) is not None:
                taken[name] = number

    leader.offer(ThresholdChange(1, 0.5, None, "ada"))
    assert leader.due(10) is None  # nobody is ready yet
    other = threading.Thread(target=run, args=("rank 1", follower, range(10 + ahead, 40)))
    other.start()
    while "change/0/ready/1" not in board.values:
        threading.Event().wait(0.001)
    run("rank 0", leader, range(11, 40))
    other.join(30)
    assert taken["rank 0"] == taken["rank 1"]


def test_a_change_that_was_dropped_holds_nobody_up(monkeypatch):
    """A rank that hears of it late goes on at once, and takes the next one."""
    monkeypatch.setattr(control, "ANSWER_SECONDS", -1.0)
    parts, board = [Part(ClipNorm(1.0))], Board()
    leader, follower = LeadingControl(parts, board, 2), FollowingControl(parts, board, 1)
    leader.offer(ThresholdChange(1, 0.5, None, "ada"))
    assert leader.due(0) is None
    assert leader.refused
    follower.listen()
    assert follower.due(1) is None
    monkeypatch.setattr(control, "ANSWER_SECONDS", 20.0)
    leader.offer(ThresholdChange(2, 0.25, None, "ada"))
    assert leader.due(2) is None
    follower.listen()
    follower._ready = follower._peers.put("change/1/ready/1", "3")
    assert leader.due(3).threshold == 0.25
    assert follower.due(3).threshold == 0.25
