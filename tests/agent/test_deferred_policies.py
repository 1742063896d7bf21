"""Which policies decide on the device, and how they learn from what comes later."""

import math

import pytest
from devices import OPTIMIZERS
from loops import greatest_difference, mlp, set_gradients, twins, watched
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import ClipNorm, TargetRatio
from gradwatch.records import Scale


def test_a_policy_learns_in_order_as_the_numbers_come(queue):
    """Thresholds on record are those of the policy fed with the norms known at that step."""
    model = mlp()
    policy = TargetRatio(cap=5.0)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    agent, sink = watched(optimizer, model=model, clip=policy)
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
        agent, sink = watched(optimizer, model=model, clip=TargetRatio())
        for step in range(60):
            set_gradients(step, model)
            optimizer.step()
            if saves and step % 7 == 0:
                agent.state_dict()
        assert agent.flush()
        seen.append([r.threshold for r in sink.steps])
    assert len(set(seen[0])) > 10
    assert seen[0] == seen[1] == seen[2]


class _Twice(ClipNorm):
    """Its own idea of what to do."""

    def decide(self, measurement, state):
        return Scale(2 * self.max_norm)


class _Threshold(ClipNorm):
    """Says something else than it does, which is `decide`'s `max_norm`."""

    def threshold(self, state):
        return 100.0


class _Mixed(type("Mixin", (), {"decide": _Twice.decide}), TargetRatio):
    """What it decides comes from a class that is no policy."""

    max_norm = 1.0


class _Shown(ClipNorm):
    """Nothing that matters to a step is its own."""

    def describe(self):
        return {**super().describe(), "team": "a"}


class _Ahead(_Twice):
    """Says itself that it decides ahead."""

    ahead = True

    def threshold(self, state):
        return 2 * self.max_norm


@pytest.mark.parametrize(
    ("policy", "limit", "deferred"),
    [
        (_Twice(1.0), 2.0, False),
        (_Threshold(1.0), 1.0, False),
        (_Mixed(), 2.0, False),
        (type("Grandchild", (_Twice,), {})(1.0), 2.0, False),
        (_Shown(1.0), 1.0, True),
        (_Ahead(1.0), 2.0, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_policy_of_the_users_own_is_asked(queue, policy, limit, deferred):
    """A class that overrides `decide` or `threshold` is not taken for the one it inherits from."""
    ours, theirs = twins()
    wrapped, plain = (OPTIMIZERS["sgd"](m.parameters()) for m in (ours, theirs))
    agent, sink = watched(wrapped, model=ours, clip=policy)
    for step in range(8):
        set_gradients(step, ours, theirs)
        wrapped.step()
        clip_grad_norm_(theirs.parameters(), limit)
        plain.step()
    assert (queue.sent > 0) is deferred
    assert greatest_difference(ours, theirs) < 1e-6
    assert agent.flush()
    assert any(r.clipped for r in sink.steps)
    assert all(r.post_norm <= limit for r in sink.steps)


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
    agent, sink = watched(optimizer, model=model, **arguments)
    for step in range(5):
        set_gradients(step, model)
        optimizer.step()
    assert queue.sent == 0
    assert agent.flush()
    assert len(sink.steps) == 5
