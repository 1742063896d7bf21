"""Steps without any gradient, as the monitor reads them: counted, left out of ratios, named as a fault."""

import copy
import math

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from loops import mlp
from stores import NOW, Job
from windows import history, window

import gradwatch
from gradwatch.layout import FLAGS
from gradwatch.recorder import STEP_DTYPE
from gradwatch_monitor import Store, diagnose, recommend
from gradwatch_monitor.diagnose import signs
from gradwatch_monitor.evidence import Evidence
from gradwatch_monitor.history import History
from gradwatch_monitor.recommend import recommend_from

ABSENT = "pre_norm IS NULL AND NOT nonfinite AND NOT skipped"
# Flags, norm and loss scale of each kind of step, as the agent records them.
KINDS = {
    "ordinary": (0, 0.8, math.nan),
    "clipped": (FLAGS.CLIPPED, 1.7, math.nan),
    "zero": (0, 0.0, math.nan),
    "absent": (FLAGS.NO_GRADIENT, math.nan, math.nan),
    "nan": (FLAGS.NONFINITE | FLAGS.SKIPPED, math.nan, math.nan),
    "nan, applied": (FLAGS.NONFINITE, math.inf, math.nan),
    "overflow": (FLAGS.SKIPPED | FLAGS.AMP_OVERFLOW, math.nan, 1024.0),
    "overflow, unscaled": (FLAGS.SKIPPED | FLAGS.AMP_OVERFLOW, math.nan, math.nan),
    "spike": (FLAGS.SKIPPED, 90.0, math.nan),
}


def steps_of(start, count, kinds, seed=0):
    """Records of steps of these kinds, drawn evenly."""
    drawn = np.random.default_rng(seed).choice(len(kinds), count)
    steps = np.zeros(count, STEP_DTYPE)
    steps["step"], steps["time"] = np.arange(start, start + count), NOW + np.arange(count)
    steps["loss"] = steps["threshold"] = 1.0
    for name, column in (("flags", 0), ("pre_norm", 1), ("loss_scale", 2)):
        steps[name] = np.array([KINDS[kind][column] for kind in kinds])[drawn]
    return steps


def told(url):
    """Counts and ratio as SQL has them, and the summary."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        counts = connection.execute(
            sa.text(
                "SELECT count(pre_norm), sum(CASE WHEN clipped THEN 1 ELSE 0 END), "
                f"sum(CASE WHEN {ABSENT} THEN 1 ELSE 0 END) FROM steps"
            )
        ).one()
    engine.dispose()
    with Store(url) as store:
        return tuple(map(int, counts)), store.summary(1), History.of(store, 1)


@pytest.mark.parametrize(
    "kinds",
    [
        ["ordinary", "clipped", "absent"],
        ["ordinary", "clipped", "overflow", "absent"],
        ["ordinary", "clipped", "overflow, unscaled"],
        ["nan", "nan, applied", "overflow"],
        [*KINDS],
    ],
    ids=", ".join,
)
def test_a_long_run_counts_them_as_sql_does(kinds, new_store):
    """By blocks, whatever else is in them, with a resume that cuts one."""
    url = new_store()
    job = Job(url, "ring-1", 0)
    for part in np.split(steps_of(0, 24_300, kinds), range(5000, 24_300, 5000)):
        job.write(part)
    job.end()
    job = Job(url, "ring-2", 3_400)
    for part in np.split(steps_of(3_400, 25_000, kinds, seed=1), [900, 20_000]):
        job.write(part)
    job.end()
    (finite, clipped, absent), summary, run = told(url)
    assert run.blocks.steps > 5000
    assert (summary.finite, summary.clipped, summary.no_gradient) == (finite, clipped, absent)
    expected = clipped / finite if finite else None
    assert summary.clip_ratio == run.since(0.0).clip_ratio == expected


def test_what_is_left_of_a_pruned_block_counts_no_more_than_is_sure(new_store):
    """Of steps that were skipped for a reason that its row does not have, none is taken for one."""
    url = new_store()
    job = Job(url, "ring", 0)
    steps = steps_of(0, 30_000, ["ordinary", "clipped"])
    for first, kind in ((0, "overflow, unscaled"), (1000, "absent"), (2000, "spike")):
        flags, norm, _ = KINDS[kind]
        steps["flags"][first : first + 100], steps["pre_norm"][first : first + 100] = flags, norm
    job.write(steps)
    job.end()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM step_records WHERE step < 5000"))
    engine.dispose()
    with Store(url) as store:
        summary = store.summary(1)
    assert (summary.steps, summary.no_gradient) == (30_000, 100)


def norms(*parts):
    """Norms of a window: so many steps each, with a gradient or without."""
    return np.concatenate([np.full(count, norm) for count, norm in parts])


NONE = math.nan
WINDOWS = [
    (norms((10, NONE)), True),
    (norms((9, NONE)), False),
    (norms((2000, NONE)), True),
    (norms((800, 1.0), (1200, NONE)), True),
    (np.tile([NONE, NONE, 1.0], 100), True),
    (np.tile([NONE, NONE, 1.0], 30), False),
    (np.tile([NONE, 1.0], 1000), False),
    (norms((1300, 1.0), (500, NONE)), True),
    (norms((1300, 1.0), (300, NONE)), False),
    (norms((1300, 1.0), (500, NONE), (1, 1.0)), False),
    (np.tile([1.0] * 4 + [NONE], 400), False),
    (norms((2000, 0.0)), False),
]


@pytest.mark.parametrize(("pre_norm", "expected"), WINDOWS)
def test_it_is_a_fault_only_where_next_to_nothing_is_trained(pre_norm, expected):
    """Every step, the greater part of a long run, or each of the last 500."""
    now = window(np.linspace(2.0, 1.0, len(pre_norm)), pre_norm)
    found = {sign.finding: sign for sign in signs(now)}
    assert ("no_gradient" in found) == expected
    assert "dead_gradient" not in found or (pre_norm == 0).any()
    if expected:
        sign, absent = found["no_gradient"], np.flatnonzero(np.isnan(pre_norm))
        assert (sign.severity, sign.steps) == ("warning", (absent[0], absent[-1]))
        assert f"{len(absent):,} of the last {len(pre_norm):,} steps" in sign.message
        assert "backward()" in sign.advice


@pytest.mark.parametrize("reason", ["nonfinite", "skipped"])
def test_a_step_without_a_norm_for_another_reason_had_a_gradient(reason):
    """NaN, and an overflow of the loss scaler."""
    flags = {reason: np.ones(600, dtype=bool)}
    now = window(np.linspace(2.0, 1.0, 600), np.full(600, math.nan), **flags)
    assert "no_gradient" not in {sign.finding for sign in signs(now)}


def train(run, *, after=lambda step, optimizer, model: None, model=None, trained=None, steps=250):
    """A loop on a model, of which the optimizer has the parameters of `trained`; `after` backward."""
    model = model or mlp()
    parameters = (trained or model).parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    with gradwatch.Agent(optimizer, run=run, store="gradwatch.db", metrics_port=None) as agent:
        for step in range(steps):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 8, generator=generator)
            loss = (model(x) - 0.1 * x.sum(1, keepdim=True)).pow(2).mean()
            if loss.requires_grad:
                loss.backward()
            after(step, optimizer, model)
            agent.log(loss=loss)
            optimizer.step()


def zeroed(step, optimizer, model):
    optimizer.zero_grad()


def now_and_then(step, optimizer, model):
    if step % 4 == 0:
        optimizer.zero_grad()


def frozen():
    model = mlp()
    return model.requires_grad_(False)


def of_another(model):
    return {"model": model, "trained": copy.deepcopy(model)}


LOOPS = {
    "frozen": lambda: {"model": frozen()},
    "a copy's parameters": lambda: of_another(mlp()),
    "zero_grad too late": lambda: {"after": zeroed},
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_trains_nothing_is_told_so(loop, run):
    """By the verb, with exit status 1, and by `show`; it is not called a gradient of 0."""
    train("job", **LOOPS[loop]())
    status, text, _ = run("diagnose", "job")
    assert status == 1
    assert text.startswith("warning: no_gradient (steps 0 to 249)")
    assert "in 250 of the last 250 steps no parameter had a gradient" in text
    status, text, _ = run("show", "job")
    assert status == 1
    assert "250 steps had no gradient" in text
    for told in (text, run("recommend", "job")[1]):
        assert "exactly 0" not in told
        assert "0 %" not in told.replace("20 %", "")


def test_a_loop_that_leaves_backward_out_now_and_then_is_healthy(run):
    """Exit status 0; the number of such steps is told, the last norm is one that was there."""
    train("job", after=now_and_then)
    status, text, _ = run("diagnose", "job")
    assert status == 0
    assert text.startswith("Nothing is wrong with job in its last steps.\n")
    status, text, _ = run("show", "job")
    assert status == 0
    assert "63 steps had no gradient" in text
    with Store("gradwatch.db") as store:
        assert diagnose(store, 1) == []
        assert store.summary(1).last_pre_norm > 0
        made, frame = recommend(store, 1), store.steps(1)
    late = frame[50:]
    assert made.current_clip_ratio == late.clipped.sum() / late.pre_norm.notna().sum()


def test_the_sentence_says_of_which_steps_the_ratio_is():
    """Where it would be another one of all steps, and not where that does not show."""
    norms = np.tile([0.5, 2.0, np.nan, np.nan], 300)
    told = recommend_from(history(norms, threshold=1.0)).sentence
    assert "50 % of steps at 1 after the first fifth of the run, not counting those without" in told
    norms = np.tile([0.5, 2.0], 600)
    norms[700] = np.nan
    assert "not counting" not in recommend_from(history(norms, threshold=1.0)).sentence


def test_where_the_steps_without_a_norm_lie_does_not_make_the_ratio_move():
    """An eighth of the run without any norm is not an eighth in which nothing is clipped."""
    generator = np.random.default_rng(0)
    present = np.exp(0.5 * generator.normal(size=3000))
    whole = Evidence(history(present, threshold=1.0), 0.2)
    gap = np.concatenate([present[:1500], np.full(600, np.nan), present[1500:]])
    broken = history(gap, threshold=1.0)
    broken.nonfinite[:] = False
    holed = Evidence(broken, 0.2)
    assert holed.moves == pytest.approx(whole.moves, abs=0.02)
    assert holed.moves_at(1.5) == pytest.approx(whole.moves_at(1.5), abs=0.03)
    assert holed.late_ratio == pytest.approx(whole.late_ratio, abs=0.02)
