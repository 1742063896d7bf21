"""One clip ratio: every reader tells what plain SQL says, whatever else happened in the run."""

import contextlib
import html
import itertools
import json
import math
import re
import sqlite3
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from loops import mlp, set_gradients, watched
from prometheus_client.parser import text_string_to_metric_families
from streamlit.testing.v1 import AppTest
from torch.amp import GradScaler

import gradwatch
import gradwatch_dashboards
from gradwatch import ClipNorm, SkipSpikes
from gradwatch_monitor import Store, views

PAGE = Path(gradwatch_dashboards.__file__).parent / "web" / "run.py"
STEPS = 800
ABSENT = "pre_norm IS NULL AND NOT nonfinite AND NOT skipped"


def train(kind_of, clipped=0.68):
    """A job of `STEPS` steps, each of a kind; of the ordinary ones that share is above the threshold."""
    model, pick = mlp(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    agent = gradwatch.Agent(
        optimizer, model=model, clip=SkipSpikes(ClipNorm(1.0), window=32), run="job",
        store="gradwatch.db",
    )  # fmt: skip
    for step in range(STEPS):
        kind = kind_of(step)
        optimizer.zero_grad()
        if kind == "overflow":
            scaler.scale(model(torch.ones(4, 8)).sum() * math.inf).backward()
            scaler.step(optimizer)
            scaler.update()
            continue
        if kind != "absent":
            set_gradients(step, model)
            total = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            norm = pick.uniform(1.1, 2.0) if pick.random() < clipped else pick.uniform(0.3, 0.9)
            norm = {"zero": 0.0, "spike": 500.0}.get(kind, norm)
            for p in model.parameters():
                p.grad.mul_(norm / total)
        if kind == "nan":
            model[2].weight.grad[0, 0] = math.nan
        agent.log(loss=2.0)
        optimizer.step()
    assert agent.flush()
    with urllib.request.urlopen(agent.metrics_url, timeout=10) as answer:
        exported = answer.read().decode()
    agent.close()
    samples = [s for f in text_string_to_metric_families(exported) for s in f.samples]
    return {sample.name: sample.value for sample in samples}


def mixed(step):
    """Of everything there is, all over the run."""
    if step > 40 and step % 97 == 0:
        return "spike"
    return {1: "absent", 4: "nan", 7: "zero", 9: "overflow"}.get(step % 11, "ordinary")


JOBS = {
    "everything": mixed,
    "every second is NaN": lambda step: "nan" if step % 2 else "ordinary",
    "every second is absent": lambda step: "absent" if step % 2 else "ordinary",
    "all ordinary": lambda step: "ordinary",
}


def asked(sql, *arguments):
    with sqlite3.connect("gradwatch.db") as connection:
        (row,) = connection.execute(sql, arguments).fetchall()
    return row


def ratio(where="1"):
    """As decided: clipped steps over those with a norm."""
    (value,) = asked(f"SELECT 1.0 * sum(clipped) / count(pre_norm) FROM steps WHERE {where}")
    return value


@pytest.fixture(params=JOBS)
def exported(request):
    """A store with such a job; what its exporter told."""
    return train(JOBS[request.param])


def test_every_reader_tells_the_ratio_that_sql_does(exported, run, monkeypatch):
    """show, runs, recommend, diagnose, the report, the page, its charts, the exporter."""
    steps, finite, clipped, absent = asked(
        f"SELECT count(*), count(pre_norm), sum(clipped), sum({ABSENT}) FROM steps"
    )
    percent = f"{100 * ratio():.1f} %"
    assert steps == STEPS
    assert 0.53 < ratio() < 0.75

    shown = json.loads(run("show", "job", "--json")[1])
    assert shown["clip_ratio"] == ratio()
    told = (shown["stored_steps"], shown["finite"], shown["clipped"], shown["no_gradient"])
    assert told == (steps, finite, clipped, absent)
    assert json.loads(run("runs", "--json")[1])[0]["steps"] == steps
    text = run("show", "job")[1]
    assert f"{clipped:,} ({percent})" in text
    assert (f"of {finite:,} steps with a finite" in text) == (finite < steps)
    assert (f"{absent:,} steps had no gradient" in text) == (absent > 0)

    late = f"step >= {STEPS // 5}"
    made = json.loads(run("recommend", "job", "--json")[1])
    assert made["current_clip_ratio"] == ratio(late)
    above = (
        f"SELECT 1.0 * sum(pre_norm > ?) / count(pre_norm), count(pre_norm) FROM steps WHERE {late}"
    )
    predicted, _ = asked(above, made["threshold"])
    assert made["predicted_clip_ratio"] == pytest.approx(predicted)

    (found,) = [
        finding for finding in json.loads(run("diagnose", "job", "--json")[1])
        if finding["finding"] == "clipping_most_steps"
    ]  # fmt: skip
    recent = ratio(f"step >= {STEPS - 500}")
    assert found["data"]["share"] == recent
    assert found["message"].startswith(f"{100 * recent:.0f} % of the ")

    assert run("report", "job")[0] == 0
    page = re.sub(r"<[^>]+>|\s+", " ", html.unescape(Path("report.html").read_text()))
    assert f" clipped {percent} " in re.sub(r"\s+", " ", page)
    assert (f"{absent:,} steps had no gradient" in page) == (absent > 0)

    with Store("gradwatch.db") as store:
        timeline = views.Timeline(1)
        timeline.refresh(store)
    rolling = views.clip_ratio(timeline, 100, points=10_000)
    assert rolling["clip_ratio"].iloc[-1] == ratio(f"step >= {STEPS - 100}")
    assert rolling["clip_ratio"].iloc[0] == ratio("step < 100")
    assert views.what_if(timeline, 1.0) == asked(above, 1.0)
    curve = views.what_if_curve(timeline, include=(1.0,)).set_index("threshold")["clip_ratio"]
    assert curve[1.0] == asked(above, 1.0)[0]

    monkeypatch.setenv("GRADWATCH_STORE", "gradwatch.db")
    app = AppTest.from_file(str(PAGE), default_timeout=120).run()
    assert not app.exception
    tiles = {metric.label: metric.value for metric in app.metric}
    assert tiles["Clipped"] == percent
    said = " ".join(caption.value.replace("\\", "") for caption in app.caption)
    assert (f"{absent:,} steps had no gradient" in said) == (absent > 0)

    assert exported["gradwatch_steps_total"] == steps
    assert exported["gradwatch_clipped_steps_total"] == clipped
    assert exported["gradwatch_grad_norm_pre_clip_count"] == finite


@pytest.mark.parametrize("kind", ["nan", "absent"])
def test_without_a_finite_norm_there_is_no_ratio(kind, run, monkeypatch):
    """Unknown, and said to be: a dash, null in JSON, no line in the chart; never 0 %."""
    train(lambda step: kind)
    shown = json.loads(run("show", "job", "--json")[1])
    assert (shown["clip_ratio"], shown["clipped"], shown["finite"]) == (None, 0, 0)
    assert re.search(r"\n clipped +– +\n", run("show", "job")[1])
    assert json.loads(run("recommend", "job", "--json")[1])["current_clip_ratio"] is None
    assert run("report", "job")[0] == 0
    assert "<small>clipped</small><b>–</b>" in Path("report.html").read_text()
    assert "No step has a finite gradient norm." in Path("report.html").read_text()
    monkeypatch.setenv("GRADWATCH_STORE", "gradwatch.db")
    app = AppTest.from_file(str(PAGE), default_timeout=120).run()
    assert not app.exception
    assert {metric.label: metric.value for metric in app.metric}["Clipped"] == "–"
    assert "No step has a finite gradient norm." in [caption.value for caption in app.caption]


def several_optimizers(on_nonfinite):
    """A layer each: the first one's gradient is clipped, the other's is NaN in three of four steps."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1e-4) for layer in net]
    agent, sink = watched(optimizers, model=net, clip=ClipNorm(1.0), on_nonfinite=on_nonfinite)
    for step in range(40):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        if step % 4:
            net[1].bias.grad[0] = math.nan
        for optimizer in optimizers:
            optimizer.step()
    return agent, sink


def several_evaluations(on_nonfinite):
    """LBFGS: the first evaluation is clipped, the second one is NaN in three of four steps."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.LBFGS([param], lr=1e-3, max_iter=4)
    agent, sink = watched(optimizer, clip=ClipNorm(1.0), on_nonfinite=on_nonfinite)
    for step in range(40):
        param.data.fill_(1.0)
        optimizer.state.clear()
        evaluations = itertools.count()

        def closure(step=step, evaluations=evaluations):
            optimizer.zero_grad()
            loss = param.square().sum() * (math.nan if next(evaluations) == 1 and step % 4 else 30)
            loss.backward()
            return loss

        with contextlib.suppress(gradwatch.NonFiniteGradientError):
            optimizer.step(closure)
    return agent, sink


@pytest.mark.parametrize(
    ("job", "on_nonfinite"),
    [
        (several_optimizers, "skip"),
        (several_optimizers, "ignore"),
        (several_evaluations, "raise"),
        (several_evaluations, "ignore"),
    ],
)
def test_no_step_is_clipped_whose_norm_is_unknown(job, on_nonfinite):
    """Where one part of a step was clipped and another has NaN, the ratio counts the step nowhere."""
    agent, sink = job(on_nonfinite)
    assert agent.flush()
    agent.close()
    told = [(math.isfinite(s.pre_norm), s.nonfinite, s.clipped) for s in sink.steps]
    assert told == [(True, False, True), *[(False, True, False)] * 3] * 10
