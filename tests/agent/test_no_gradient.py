"""Steps in which no parameter has a gradient: no norm, nothing learnt, no event, no zeros."""

import json
import math
import sqlite3

import pytest
import ranks
import torch
from loops import mlp, parameters_equal, set_gradients, state_of, states_equal, twins, watched
from torch import nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import ClipNorm, PercentileClip, SkipSpikes, TargetRatio, ZClip
from gradwatch.layout import FLAGS

ABSENT = (0, 4, 5, 11)
POLICIES = [
    ClipNorm(0.5),
    gradwatch.ObserveOnly(),
    gradwatch.ClipValue(0.5),
    gradwatch.ClipLayerNorm(0.5),
    gradwatch.AdaptiveGradientClip(0.01),
    TargetRatio(),
    PercentileClip(50, warmup=3),
    ZClip(warmup=4),
    SkipSpikes(TargetRatio(), window=4, sigma=0.5),
]


def absent(record):
    """As SQL tells such a step: no norm, and nothing that explains it."""
    return math.isnan(record.pre_norm) and not record.nonfinite and not record.skipped


def learnt(agent):
    """What the policies know, as a checkpoint has it."""
    return agent.state_dict()["policies"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fold", ["0", "1"])
def test_such_a_step_has_no_norm_and_leaves_all_as_torch_does(fold, fused, monkeypatch):
    """Loss and learning rate are on record, no norm is; weights and state are those of plain steps."""
    monkeypatch.setenv("GRADWATCH_FOLD", fold)
    ours, theirs = twins()
    wrapped, plain = (
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=fused)
        for m in (ours, theirs)
    )
    agent, sink = watched(wrapped, model=ours, clip=ClipNorm(1e9))
    for step in range(12):
        if step in ABSENT:
            wrapped.zero_grad()
            plain.zero_grad()
        else:
            set_gradients(step, ours, theirs)
        agent.log(loss=1.0 + step)
        wrapped.step()
        plain.step()
    assert parameters_equal(ours, theirs)
    assert states_equal(state_of(wrapped), state_of(plain))
    assert absent(agent.last)
    assert (agent.last.loss, agent.last.lr, agent.last.threshold) == (12.0, 0.1, 1e9)
    assert agent.flush()
    assert [r.step for r in sink.steps if absent(r)] == list(ABSENT)
    assert all(math.isnan(sink.steps[step].post_norm) for step in ABSENT)
    assert [int(f) & FLAGS.NO_GRADIENT for f in sink.rows["flags"]] == [
        FLAGS.NO_GRADIENT * (step in ABSENT) for step in range(12)
    ]
    assert not sink.events


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_no_policy_decides_or_learns_anything_of_it(policy):
    """State and records of the other steps are those of a run that never had such steps."""
    runs = []
    for leave_out in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        agent, sink = watched(optimizer, clip=policy)
        for step in range(40):
            if step % 3 != 1:
                set_gradients(step, model)
            elif leave_out:
                continue
            else:
                optimizer.zero_grad()
            agent.log(
                loss=1.0 + step % 5 + 100.0 * (step == 31)
            )  # a spike, of a step without gradient
            optimizer.step()
        assert agent.flush()
        others = [r for r in sink.steps if not absent(r)]
        told = [(r.pre_norm, r.post_norm, r.threshold, r.clipped, r.skipped) for r in others]
        runs.append((learnt(agent), json.dumps(told)))
        assert len(sink.steps) - len(others) == (0 if leave_out else 13)
    assert runs[0] == runs[1]


def test_nothing_is_sampled_of_it_but_the_weights(tmp_path):
    """A layer's gradient norm of 0 is one that was 0; of an absent one there is none."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(
        optimizer, model=model, store=f"{tmp_path}/a.db", metrics_port=None,
        settings=gradwatch.Settings(layer_norms_every=1),
    )  # fmt: skip
    for step in range(6):
        optimizer.zero_grad()
        if step % 2:
            set_gradients(step, model)
        optimizer.step()
    agent.close()
    with sqlite3.connect(tmp_path / "a.db") as connection:
        sampled = connection.execute(
            "SELECT step, count(grad_norm), count(weight_norm) FROM layer_norms GROUP BY step"
        ).fetchall()
        zeros = "SELECT count(*) FROM layer_norms WHERE grad_norm = 0"
        assert connection.execute(zeros).fetchone() == (0,)
    assert [step for step, grads, _ in sampled if grads] == [1, 3, 5]
    assert (0, 0, 6) in sampled
    assert not [row for row in sampled if row[1:] == (0, 0)]


def test_clip_by_hand_returns_what_torch_does():
    """0, as `clip_grad_norm_`; the step itself has no norm, unless a gradient has come by then."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent, sink = watched(optimizer, model=model)
    norm, theirs = agent.clip(), clip_grad_norm_(model.parameters(), 1.0)
    assert (norm, norm.dtype, norm.shape) == (theirs, theirs.dtype, theirs.shape)
    optimizer.step()
    assert agent.clip() == agent.clip() == 0.0
    set_gradients(1, model)
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()
    set_gradients(2, model)
    assert agent.clip() > 0
    optimizer.zero_grad()
    optimizer.step()
    assert agent.flush()
    assert [absent(r) for r in sink.steps] == [True, False, True]
    assert sink.steps[1].pre_norm == pytest.approx(float(expected))
    assert not sink.events


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_that_calls_no_backward(make):
    """As Lightning's, of a `training_step` that returned None."""
    model = mlp()
    optimizer = make(model.parameters(), lr=0.1)
    agent, sink = watched(optimizer, model=model, on_nonfinite="ignore")
    for step in range(4):

        def closure(step=step):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 8)).pow(2).mean()
            if step % 2:
                loss.backward()
            return loss

        optimizer.step(closure)
    assert agent.flush()
    assert [absent(r) for r in sink.steps] == [True, False, True, False]
    assert not [r for r in sink.steps if math.isnan(r.loss)]
    assert not sink.events


def test_one_group_without_gradients_is_not_a_step_without():
    """A policy a group: the norm is that of the others; absent only where no group has any."""
    model = mlp()
    first, *others = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": others}], lr=0.1)
    agent, sink = watched(optimizer, clip=[TargetRatio(), PercentileClip(50, warmup=2)])
    norms, states = [], []
    for step in range(9):
        set_gradients(step, model)
        for group, without in (
            (optimizer.param_groups[0], (2, 4)),
            (optimizer.param_groups[1], (3, 4)),
        ):
            for p in group["params"]:
                p.grad = None if step in without else p.grad
        present = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(present)))
        optimizer.step()
        states.append(json.loads(learnt(agent)))
    assert agent.flush()
    assert [r.step for r in sink.steps if absent(r)] == [4]
    measured = [r.pre_norm for r in sink.steps if not absent(r)]
    assert measured == pytest.approx(norms[:4] + norms[5:], rel=1e-5)
    assert states[4] == states[3]
    assert states[2][0] == states[1][0] != states[3][0]
    assert states[3][1] == states[2][1] != states[1][1]
    assert not sink.events


@pytest.mark.parametrize("others", ["absent", "frozen"])
def test_a_gradient_that_is_zero_is_there(others):
    """Beside parameters without any, too: a norm of 0 and a `dead_gradient`, as before."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent, sink = watched(optimizer, model=model)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    if others == "frozen":
        model[2].requires_grad_(False)
    optimizer.step()
    assert agent.flush()
    assert (sink.steps[0].pre_norm, sink.steps[0].post_norm) == (0.0, 0.0)
    assert [(e.kind, e.message) for e in sink.events] == [
        ("dead_gradient", "every gradient is exactly 0")
    ]


def test_a_frozen_model_has_no_gradients():
    """Backward through nothing that is trained, then a step."""
    model, head = mlp(), nn.Linear(1, 1)
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    agent, sink = watched(optimizer, model=model)
    for _ in range(3):
        head(model(torch.ones(2, 8))).sum().backward()
        optimizer.step()
    assert agent.flush()
    assert all(map(absent, sink.steps))
    assert not sink.events


def test_steps_left_to_a_device(queue):
    """Neither a wait that finds 0, nor a record that overtakes those that are on the way."""
    ours, theirs = twins()
    wrapped, plain = (
        torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, fused=True) for m in (ours, theirs)
    )
    agent, sink = watched(wrapped, model=ours, clip=ClipNorm(1.0))
    queue.at_once = False
    for step in range(30):
        if step % 6 == 5 or step == 0:
            wrapped.zero_grad()
            plain.zero_grad()
        else:
            set_gradients(step, ours, theirs)
        wrapped.step()
        clip_grad_norm_(theirs.parameters(), 1.0)
        plain.step()
    assert agent.flush()
    assert [r.step for r in sink.steps] == list(range(30))
    assert [r.step for r in sink.steps if absent(r)] == [0, 5, 11, 17, 23, 29]
    assert queue.sent > 10
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert "dead_gradient" not in {e.kind for e in sink.events}


@pytest.mark.parametrize("known", [False, True])
def test_under_a_loss_scaler(known):
    """A fused optimizer is stepped by GradScaler without gradients too; that is no overflow."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = GradScaler("cpu", init_scale=1024.0)
    agent, sink = watched(optimizer, model=model, scaler=scaler if known else None)
    for step in range(6):
        optimizer.zero_grad()
        loss = scaler.scale(model(torch.ones(4, 8)).pow(2).mean())
        if step % 2 == 0:
            (loss * (1e38 if step == 4 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    assert agent.flush()
    assert [absent(r) for r in sink.steps] == [False, True, False, True, False, True]
    assert [r.skipped for r in sink.steps] == [False, False, False, False, True, False]
    assert [e.kind for e in sink.events] == ["amp_overflow"]


def test_on_several_ranks(tmp_path):
    """FSDP2 that skips a backward pass everywhere hangs nowhere; each rank tells of what it has."""
    assert ranks.run(ranks.without_gradients, 2, tmp_path) == [[False, False], [False, False]]
    with sqlite3.connect(tmp_path / "gradwatch.db") as connection:
        rows = connection.execute(
            "SELECT runs.name, step FROM steps JOIN runs ON runs.id = run_id "
            "WHERE pre_norm IS NULL AND NOT nonfinite AND NOT skipped ORDER BY runs.id, step"
        ).fetchall()
        assert rows == [("fsdp", 1), ("fsdp", 3), ("plain", 1), ("plain", 3), ("plain", 4)]
        assert connection.execute("SELECT count(*) FROM events").fetchone() == (0,)
