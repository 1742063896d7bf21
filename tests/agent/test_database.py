"""The store: what is in it equals what was trained, whoever writes it and whatever goes wrong."""

import contextlib
import dataclasses
import json
import logging
import math
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loops import mlp, set_gradients

import gradwatch
from gradwatch import Agent, schema
from gradwatch.sinks import sqlite
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import MemorySink


def query(sql, *arguments, path="gradwatch.db"):
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        try:
            return connection.execute(sql, arguments).fetchall()
        finally:
            connection.commit()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def run_steps(steps=5, *, agent=None, model=None, optimizer=None, **arguments):
    model = model or mlp()
    optimizer = optimizer or adamw(model)
    agent = agent or Agent(optimizer, model=model, **arguments)
    for step in range(steps):
        set_gradients(step, model)
        optimizer.step()
    assert agent.flush()
    return agent, model, optimizer


def test_sql_equals_what_was_trained():
    """Every column of `steps`, against the norms torch gives for the same gradients."""
    model = mlp()
    optimizer = adamw(model)
    agent = Agent(optimizer, model=model, run="first", tags={"lr": 0.01, "weird": object})
    expected = []
    for step in range(30):
        set_gradients(step, model)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        agent.log(loss=step / 10)
        if step == 7:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        nan = step == 7
        expected.append(
            (step, step / 10, 0.01, None if nan else norm, None if nan else min(norm, 1.0),
             1.0, None, int(not nan and norm > 1.0), int(nan), 0, int(nan))
        )  # fmt: skip
    assert agent.flush()
    rows = query(
        "SELECT step, loss, lr, pre_norm, post_norm, threshold, loss_scale, clipped, nonfinite,"
        " nonfinite_loss, skipped FROM steps WHERE run_id = 1 ORDER BY step"
    )
    assert len(rows) == 30
    for row, wanted in zip(rows, expected, strict=True):
        assert [v is None for v in row] == [v is None for v in wanted]
        numbers = [(v, w) for v, w in zip(row, wanted, strict=True) if v is not None]
        assert [v for v, _ in numbers] == pytest.approx([w for _, w in numbers], rel=1e-5)
    ((name, status, tags, settings),) = query("SELECT name, status, tags, settings FROM runs")
    assert (name, status) == ("first", "running")
    assert json.loads(tags) == {"lr": 0.01, "weird": "<class 'object'>"}
    assert json.loads(settings)["optimizer"] == "AdamW"
    agent.close()
    assert query("SELECT status, ended_at IS NOT NULL FROM runs") == [("finished", 1)]


def test_events_and_layer_norms_are_stored():
    """The NaN's event, and the norms of every layer at it and where they are sampled."""
    model = mlp()
    optimizer = adamw(model)
    agent = Agent(optimizer, model=model, settings=gradwatch.Settings(layer_norms_every=3))
    for step in range(6):
        set_gradients(step, model)
        if step == 4:
            model[2].weight.grad[0, 0] = math.inf
        optimizer.step()
    assert agent.flush()
    ((kind, step, severity, data),) = query("SELECT kind, step, severity, data FROM events")
    assert (kind, step, severity) == ("nonfinite_gradient", 4, "critical")
    assert json.loads(data)["parameters"] == {"2.weight": "inf"}
    sampled = query("SELECT step, count(*), count(grad_norm) FROM layer_norms GROUP BY step")
    assert sampled == [(0, 6, 6), (3, 6, 6), (4, 6, 5)]
    names = {row[0] for row in query("SELECT DISTINCT parameter FROM layer_norms")}
    assert names == {name for name, _ in model.named_parameters()}


def test_a_deep_model_is_sampled_early_too():
    """Twenty tensors: every 200 steps, and what is wrong from the start shows before the third."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(10)))
    run_steps(401, model=model)[0].close()
    sampled = query(
        "SELECT step, count(grad_norm), count(weight_norm) FROM layer_norms "
        "WHERE step NOT IN (SELECT step FROM events) GROUP BY step"  # spikes are sampled as well
    )
    assert sampled == [(step, 20, 20) for step in (0, 100, 200, 400)]


def test_a_name_in_use_by_a_live_run_gets_a_number():
    """Two optimizers of one script are two runs of one job; a name that is free is taken again."""
    first, *_ = run_steps(run="gan")
    second, *_ = run_steps(run="gan")
    assert query("SELECT name FROM runs ORDER BY id") == [("gan",), ("gan-2",)]
    assert len(query("SELECT DISTINCT job FROM runs")) == 1
    first.close()
    second.close()
    run_steps(run="gan")
    assert query("SELECT name FROM runs ORDER BY id")[-1] == ("gan",)


def test_without_a_name_the_script_gives_it(monkeypatch):
    """`python train.py` is the run `train`."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "--lr", "3"])
    run_steps()
    assert query("SELECT name FROM runs") == [("train",)]


def visible(attempts):
    """The timeline by the design's sentence: attempt j below the start of every later one."""
    rows = []
    for j, (start, length) in enumerate(attempts):
        bound = min((s for s, _ in attempts[j + 1 :]), default=math.inf)
        rows += [(step, j + 1) for step in range(start, start + length) if step < bound]
    return sorted(rows)


@pytest.mark.parametrize("seed", range(6))
def test_the_view_shows_the_timeline_of_the_last_attempts(seed):
    """Killed and resumed from older checkpoints, a resume that got less far than the one before."""
    pick = random.Random(seed)
    attempts = [(0, pick.randint(5, 20))]
    while len(attempts) < 5:
        start, length = pick.choice(attempts)
        attempts.append((pick.randint(0, start + length), pick.randint(1, 10)))
    uid = None
    for start, length in attempts:
        model = mlp()
        optimizer = adamw(model)
        agent = Agent(optimizer, run="resumed")
        if uid is not None:
            agent.load_state_dict({**agent.state_dict(), "run_id": uid, "step": start})
        uid = agent.run_id
        run_steps(length, agent=agent, model=model, optimizer=optimizer)
        agent.close()
    assert query("SELECT step, attempt FROM steps WHERE run_id = 1 ORDER BY step") == visible(
        attempts
    )
    assert query("SELECT count(*) FROM step_records") == [(sum(n for _, n in attempts),)]
    assert query("SELECT count(*) FROM runs") == [(1,)]
    assert query("SELECT kind, count(*) FROM events GROUP BY 1") == [("run_resumed", 4)]


def test_a_job_started_again_under_its_id_resumes_its_run(monkeypatch):
    """`GRADWATCH_RUN_ID` names the run; the second optimizer of the process is another."""
    monkeypatch.setenv("GRADWATCH_RUN_ID", "job-17")
    run_steps(run="a")[0].close()
    run_steps(run="b")[0].close()
    assert query("SELECT uid, name FROM runs") == [("job-17", "a"), ("job-17-2", "b")]


def test_a_second_script_of_a_slurm_job_is_another_run(monkeypatch):
    """Only a run that did not finish is resumed by the launcher's id."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    sink = DatabaseSink("sqlite:///gradwatch.db")
    agent, *_ = run_steps(store=(memory := MemorySink()))
    agent.close()
    (run,) = memory.runs
    assert (run.uid, run.uid_source, run.job) == ("slurm-4711", "launcher", "slurm-4711")

    def start(ring, status):
        opened = sink.open(dataclasses.replace(run, ring=ring))
        sink.close(opened, status)
        return opened.uid

    assert start("a", "crashed") == "slurm-4711"
    assert start("b", "finished") == "slurm-4711"  # resumed after the crash
    assert start("c", "finished").startswith("slurm-4711-")
    assert query("SELECT count(*), max(attempt) FROM attempts") == [(3, 2)]


def test_what_somebody_else_stored_is_not_stored_twice():
    """The cursor in the database is the truth: after it moved, the worker goes on from there."""
    agent, model, optimizer = run_steps(5)
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("UPDATE rings SET step_cursor = 8")  # as if a recoverer had stored 3
    for step in range(5, 12):
        set_gradients(step, model)
        optimizer.step()
    assert agent.flush()
    steps = [row[0] for row in query("SELECT step FROM step_records ORDER BY step")]
    assert steps == [0, 1, 2, 3, 4, 8, 9, 10, 11]


def test_the_wal_is_folded_back_at_the_end():
    """A finished store is one file that can be copied."""
    agent, *_ = run_steps(50)
    agent.close()
    with sqlite3.connect("file:gradwatch.db?immutable=1", uri=True) as connection:
        assert connection.execute("SELECT count(*) FROM steps").fetchone() == (50,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_checkpoint_is_made_when_the_wal_has_grown_and_no_sooner(tmp_path):
    """After the first as well: batches between two of them leave the file itself alone."""
    agent, *_ = run_steps(1, settings=gradwatch.Settings(drain_interval=60))
    ring, path = agent._recording.channel.ring, tmp_path / "gradwatch.db"
    written = 0
    for batch in range(60):
        before = path.stat().st_mtime_ns
        for step in range(batch * 4000 + 1, batch * 4000 + 4001):
            ring.append(step, 1.7e9, 1.0, 0.5, 1e-3, 2.0, 1.0, 1.0, math.nan, 1)
        assert agent.flush(20)
        written += path.stat().st_mtime_ns != before
    grown = path.stat().st_size >> 22
    assert 2 <= written <= 2 * grown < 20
    agent.close()
    assert query("SELECT count(*), max(step) FROM steps") == [(240_001, 240_000)]


def test_a_store_that_is_replaced_right_after_a_batch_is_noticed(tmp_path, monkeypatch, caplog):
    """However busy the machine: nothing more goes into the file that has lost its name."""
    agent, model, optimizer = run_steps(5)
    path, checkpoint = tmp_path / "gradwatch.db", sqlite.checkpoint

    def replace(*_, **__):
        monkeypatch.setattr(sqlite, "checkpoint", checkpoint)
        (tmp_path / "text").write_text("a text\n" * 1000)
        (tmp_path / "text").rename(path)
        return False

    monkeypatch.setattr(sqlite, "checkpoint", replace)
    for step in range(5):
        set_gradients(step, model)
        optimizer.step()
        agent.flush(0.5)
    assert not agent.flush(0.5)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "file is not a database (move the file away" in message
    path.rename(tmp_path / "moved")
    assert agent.flush(20)
    assert query("SELECT count(*) FROM steps", path=path) == [(10,)]


WRITES_AND_ENDS = """
import sqlite3, sys
connection = sqlite3.connect("runs.db", isolation_level=None)
connection.execute("INSERT INTO t VALUES (2)")
connection.close()
"""


def test_a_connection_that_is_let_go_takes_no_locks_from_others():
    """Of this process: one that reads goes on reading, whatever others do to the file."""
    path = Path("runs.db").absolute()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as first:
        first.execute("PRAGMA journal_mode=WAL")
        first.execute("CREATE TABLE t (x)")
        first.execute("INSERT INTO t VALUES (1)")
    reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("INSERT INTO t VALUES (1)")
    assert reader.execute("SELECT count(*) FROM t").fetchall() == [(2,)]
    sqlite.let_go(writer.close, path)
    subprocess.run([sys.executable, "-c", WRITES_AND_ENDS], check=True)
    assert Path("runs.db-wal").stat().st_size > 0  # it was not the last to close
    assert reader.execute("SELECT count(*) FROM t").fetchall() == [(3,)]
    reader.close()


WRITER = """
import sys, torch, gradwatch
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.ones(10))
optimizer = torch.optim.SGD([weight], lr=0.1)
agent = gradwatch.Agent(optimizer, store="gradwatch.db", run="same")
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    weight.grad = torch.full((10,), float(i + 1))
    optimizer.step()
assert agent.flush(30)
print("stored", flush=True)
sys.stdin.readline()
"""


def test_four_processes_write_one_new_store():
    """Started at once on a store that is not there: every step once, each run its own name."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    for word in ("ready\n", "stored\n"):
        for process in processes:
            assert process.stdout.readline() == word
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    rows = query("SELECT name, status, count(*) FROM runs JOIN steps ON run_id = id GROUP BY 1")
    assert rows == [(n, "finished", 300) for n in ("same", "same-2", "same-3", "same-4")]
    assert query("PRAGMA integrity_check") == [("ok",)]
    assert query("SELECT version_num FROM gradwatch_revision")[0][0] == schema.REVISION


@pytest.mark.parametrize(("version", "told"), [((3, 51, 2), 1), ((3, 51, 3), 0)])
def test_an_sqlite_with_the_wal_bug_is_said_once(monkeypatch, caplog, version, told):
    """Once a process, and not as a warning: by itself no job of ours wakes the bug."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    sqlite._tell_weakness.cache_clear()
    caplog.set_level(logging.INFO, "gradwatch")
    for run in "ab":
        run_steps(2, run=run, store=f"{run}.db")
    assert ["WAL-reset bug" in message for message in caplog.messages] == [True] * told
    assert all("let no other program write the store" in message for message in caplog.messages)
