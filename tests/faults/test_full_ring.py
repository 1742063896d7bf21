"""A store that is away for so long that the ring comes round: the newest survive, the rest is told."""

import logging
import sqlite3
import time
import urllib.request

import torch
from typer.testing import CliRunner

import gradwatch
from gradwatch import Agent
from gradwatch_dashboards.cli import app
from gradwatch_monitor import Store, views

CAPACITY = 64


def query(sql):
    with sqlite3.connect("file:gradwatch.db?mode=ro", uri=True) as connection:
        return connection.execute(sql).fetchall()


def metric(agent, name):
    with urllib.request.urlopen(agent.metrics_url) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_the_newest_are_kept_and_the_loss_is_told_everywhere(caplog):
    """Event, counter, table and chart agree on which steps are missing: no others are."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    agent = Agent(
        optimizer, run="long", settings=gradwatch.Settings(ring_steps=CAPACITY, metrics_port=0)
    )

    def steps(count):
        for _ in range(count):
            weight.grad = torch.full((3,), 2.0)
            optimizer.step()

    steps(10)
    assert agent.flush()
    other = sqlite3.connect("gradwatch.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    steps(500)
    assert not agent.flush(5.0)  # long enough to be told
    assert metric(agent, "gradwatch_recorder_backlog_records{") == CAPACITY
    # Told while it happens, not once the store is back.
    lost = 500 - CAPACITY
    assert metric(agent, 'gradwatch_dropped_records_total{rank="0",reason="ring_full"') == lost
    other.execute("COMMIT")
    other.close()
    assert agent.flush(20)
    steps(5)
    assert agent.flush()

    kept = [*range(10), *range(510 - CAPACITY, 515)]
    assert [step for (step,) in query("SELECT step FROM steps ORDER BY step")] == kept
    ((step, data),) = query("SELECT step, data FROM events WHERE kind = 'records_dropped'")
    assert (step, data) == (510 - CAPACITY, f'{{"ring_full": {lost}}}')
    assert metric(agent, 'gradwatch_dropped_records_total{rank="0",reason="ring_full"') == lost
    assert metric(agent, "gradwatch_recorder_backlog_records{") == 0
    with Store("gradwatch.db") as store:
        timeline = views.Timeline(1)
        timeline.refresh(store)
    frame = views.norms_chart(timeline)
    assert frame.loc[frame["pre_norm"].isna(), "step"].tolist() == [10]
    shown = CliRunner().invoke(app, ["show", "long"]).output
    assert f"{lost} steps overwritten in a full flight recorder" in shown
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert sum("cannot write the store" in message for message in warned) == 1
    agent.close()


def test_steps_go_on_at_speed_while_the_ring_comes_round():
    """Overwriting costs what writing does: no step waits for the store."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    agent = Agent(optimizer, settings=gradwatch.Settings(ring_steps=CAPACITY, metrics_port="off"))
    weight.grad = torch.ones(3)
    optimizer.step()
    assert agent.flush()
    other = sqlite3.connect("gradwatch.db", isolation_level=None)
    taken = {}
    for locked in (False, True):
        if locked:
            other.execute("BEGIN IMMEDIATE")
        taken[locked] = []
        for _ in range(3000):
            before = time.perf_counter()
            optimizer.step()
            taken[locked].append(time.perf_counter() - before)
    other.execute("COMMIT")
    other.close()
    slow = {locked: sum(seconds > 0.05 for seconds in taken[locked]) for locked in taken}
    assert slow[True] <= slow[False] + 3
    agent.close()
