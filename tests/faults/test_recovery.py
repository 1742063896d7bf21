"""Killed jobs: what they left is stored exactly once, by whoever comes next, and they are marked."""

import contextlib
import errno
import json
import math
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import kills
import pytest
import torch
from jobs import wait_until
from kills import PREAMBLE, about_nobody, killed, query, rings, watched
from typer.testing import CliRunner

from gradwatch import Agent
from gradwatch.config import resolve_store
from gradwatch.recorder import Ring
from gradwatch.recovery import recover
from gradwatch.sinks import NotYetError
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import run_info
from gradwatch_dashboards.cli import app


@pytest.fixture
def factory():
    """Starts a job, lets it run until `moment` says so, kills it."""
    with kills.Factory("gradwatch.db") as made:
        yield made.start_and_kill


def test_sigkill_at_a_hundred_moments_loses_and_doubles_nothing(factory):
    """At full speed, each job while its worker stores the one before: no step is missing."""
    pick = random.Random(0)
    for number in range(100):
        count = pick.choice([1, 2, pick.randrange(3, 300), pick.randrange(300, 3000)])
        factory(number, lambda seen, count=count: seen >= count)
    found = recover("sqlite:///gradwatch.db")
    assert [one.problem for one in found if one.problem] == []
    assert rings() == []
    assert query("PRAGMA integrity_check") == [("ok",)]
    stored = dict(query("SELECT uid, count(*) FROM runs JOIN steps ON run_id = id GROUP BY uid"))
    for number in range(100):
        # The kill may have come between the record and the note that step() had returned.
        assert kills.returned(number) <= stored[f"uid-{number}"] <= kills.returned(number) + 1, (
            number
        )
    assert query(
        "SELECT count(*) FROM runs WHERE status != 'crashed' OR ended_at IS NULL"
    ) == [(0,)]  # fmt: skip
    wrong = (
        "SELECT count(*) FROM step_records WHERE loss != step OR clipped != 1 "
        "OR abs(pre_norm - (step % 97 + 1) * sqrt(10)) > 1e-4 * pre_norm"
    )
    assert query(wrong) == [(0,)]
    gaps = "SELECT count(*) FROM (SELECT count(*) n, max(step) m FROM steps GROUP BY run_id) WHERE n != m + 1"
    assert query(gaps) == [(0,)]


def test_recover_tells_what_it_stored():
    """`gradwatch recover`: the steps, the last one, the file gone, the status and its time."""
    killed("agent = begin(); steps(1); assert agent.flush(60); steps(1233)")
    (ring,) = rings()
    before = query("SELECT count(*) FROM steps")[0][0]  # its worker's first look came early
    result = CliRunner().invoke(app, ["recover"])
    assert result.exit_code == 0, result.output
    left = f"{1234 - before:,}"
    assert result.output == f"job: crashed at step 1,233; {left} steps stored that had not been\n"
    assert not ring.exists()
    last = query("SELECT max(time) FROM step_records")[0][0]
    assert query("SELECT status, ended_at FROM runs") == [("crashed", last)]
    again = CliRunner().invoke(app, ["recover", "--json"])
    assert (again.exit_code, json.loads(again.stdout)) == (0, [])


def test_another_job_on_the_machine_recovers():
    """A worker of another run finds the ring at its first look, beside its own work."""
    killed("begin(); steps(500)")
    agent, _optimizer = watched(10)
    wait_until(lambda: agent.flush() and len(rings()) == 1)
    agent.close()
    assert query(
        "SELECT name, status, count(*) FROM runs JOIN steps ON run_id = id GROUP BY name"
    ) == [("job", "crashed", 500), ("next", "finished", 10)]


def test_a_job_that_lives_is_left_alone():
    """Neither its own process nor another takes the ring of a live run."""
    agent, _optimizer = watched(10, drain_interval=30)
    (ring,) = rings()
    assert recover("sqlite:///gradwatch.db") == []
    other = subprocess.run(
        [sys.executable, "-m", "gradwatch_dashboards.cli", "recover"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ring.exists()
    assert other.returncode == 0, other.stderr
    # Having looked has not let go of the lock.
    assert subprocess.run(
        [sys.executable, "-c",
         ("import sys; from pathlib import Path; from gradwatch.salvage import claim;"
         "sys.exit(claim(Path(sys.argv[1])) is not None)"), str(ring)],
        check=False,
    ).returncode == 0  # fmt: skip
    agent.close()


RECOVER = "import gradwatch.recovery as r; print(len(r.recover('gradwatch.db')))"


def test_a_job_whose_parent_never_asks_how_it_ended_is_recovered():
    """It has a process id still, and nothing runs under it: PID 1 of many a container never asks."""
    job = subprocess.Popen([sys.executable, "-c", f"{PREAMBLE}\nbegin(); steps(50); die()"])
    try:
        state = Path(f"/proc/{job.pid}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z")
        found = []  # its other threads end a moment later than its first
        wait_until(lambda: found.extend(recover("gradwatch.db")) or found)
        assert [(one.status, one.last_step) for one in found] == [("crashed", 49)]
    finally:
        job.wait()


def test_a_job_that_copies_its_own_folder_is_left_alone():
    """It lets go of its lock thereby: a process loses those of a file that it closes."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    agent = Agent(optimizer, run="live")
    optimizer.step()
    assert agent.flush()
    shutil.copytree("gradwatch.db.rings", "copied")
    shutil.rmtree("copied")
    done = subprocess.run(
        [sys.executable, "-c", RECOVER], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"
    assert len(rings()) == 1
    assert query("SELECT status FROM runs") == [("running",)]
    agent.close()


def test_a_rank_that_did_not_know_its_run_hides_nothing():
    """Killed before rank 0 had told it: it is no attempt of its own, though the job has one id."""
    shared = {"uid": "job-7", "uid_source": "launcher", "world_size": 2, "recovered": True}
    sink = DatabaseSink("sqlite:///gradwatch.db")
    sink.open(run_info(**shared, ring="zero"))
    with pytest.raises(NotYetError, match="rank 1"):
        sink.open(run_info(**shared, ring="one", rank=1))
    assert query("SELECT count(*) FROM attempts") == [(1,)]
    sink.dispose()


def test_two_recover_at_the_same_time():
    """Eight rings, three processes: every step once."""
    killed("""
begin().close()
kept = []
for number in range(8):
    optimizer = torch.optim.SGD([weight], lr=0.0)
    kept.append(begin())
    steps(2000)
    kept.append(optimizer)
""")
    assert len(rings()) == 8
    code = "from gradwatch.recovery import recover; recover('sqlite:///gradwatch.db')"
    helpers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [helper.wait(120) for helper in helpers] == [0] * 3
    assert recover("sqlite:///gradwatch.db") == []  # what was locked is open to be tried again
    assert query("SELECT count(*), count(DISTINCT run_id) FROM step_records") == [(16000, 8)]
    assert query("SELECT DISTINCT status FROM runs") == [("crashed",)]


@pytest.mark.parametrize("wait", ["agent._recording.channel.store.run is None", "False"])
def test_a_job_killed_in_its_first_step_is_marked(wait):
    """Where the memory for the optimizer's state runs out; whether or not the store knew the run."""
    killed(f"""
agent = begin()
def hook(*_):
    while {wait}: pass
    die()
optimizer.register_step_pre_hook(hook)
steps(1)
""")
    assert len(rings()) == 1
    result = CliRunner().invoke(app, ["recover"])
    assert (result.exit_code, result.output) == (
        0,
        "job: crashed before its first step; 0 steps stored that had not been\n",
    )
    assert query("SELECT status, ended_at = started_at FROM runs") == [("crashed", 1)]
    assert rings() == []


@pytest.mark.parametrize("steps", [0, 500])
def test_a_ring_that_cannot_be_removed_ends_nothing(tmp_path, monkeypatch, steps):
    """What it held is stored, and the next ring is looked at; which one is there still is told."""
    for name in ("a", "b"):
        about = {**about_nobody(resolve_store("gradwatch.db")), "ring": name, "uid": name}
        ring = Ring.create(tmp_path / f"{name}.ring", about, steps=512, events=64)
        for step in range(steps):
            ring.append(step, time.time(), *[1.0] * 7, 0)
        ring.close()

    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    found = recover(resolve_store("gradwatch.db"), [tmp_path])
    assert [one.path.name for one in found] == ["a.ring", "b.ring"]
    assert all("cannot be removed" in one.problem for one in found)
    assert query("SELECT count(*) FROM steps") == [(2 * steps,)]
    assert query("SELECT status FROM runs") == [("crashed",)] * 2


def left_by(uid, **about):
    """Leaves the ring of a process that is gone, with 100 steps, beside the store."""
    Path("gradwatch.db.rings").mkdir(exist_ok=True)
    about = {**about_nobody(resolve_store("gradwatch.db")), "ring": uid, "uid": uid, **about}
    path = Path("gradwatch.db.rings") / f"{uid}.ring"
    ring = Ring.create(path, about, steps=128, events=64)
    for step in range(100):
        ring.append(step, math.nan if step == 50 else time.time(), *[1.0] * 7, 0)
    ring.close()
    return path


def test_a_time_that_is_none_spoils_nothing():
    """As on PostgreSQL: the step is stored, at 0."""
    left_by("damaged")
    (one,) = recover("sqlite:///gradwatch.db")
    assert (one.steps, one.problem) == (100, None)
    assert query("SELECT step FROM step_records WHERE time = 0") == [(50,)]


def test_another_writer_is_waited_for():
    """As long as a job would, before it says anything; whatever became of the ring before."""
    left_by("a-mad", started_at=math.nan)
    left_by("job-1")
    other = sqlite3.connect("gradwatch.db", isolation_level=None, check_same_thread=False)
    timer = threading.Timer(2.2, other.execute, ["ROLLBACK"])

    def lock(done, _):
        if done == 1:  # the first has been dealt with
            other.execute("BEGIN IMMEDIATE")
            timer.start()

    mad, one = recover("sqlite:///gradwatch.db", progress=lock)
    timer.join()
    other.close()
    assert "set aside" in mad.problem
    assert one.problem is None


def test_what_can_never_be_stored_is_set_aside():
    """It is told once, where it lies; the next look is for others."""
    path = left_by("mad", started_at=math.nan)
    (one,) = recover("sqlite:///gradwatch.db")
    assert "NOT NULL constraint failed" in one.problem
    assert f"set aside as {path.absolute()}.aside" in one.problem
    assert [left.name for left in path.parent.iterdir()] == ["mad.ring.aside"]
    assert recover("sqlite:///gradwatch.db") == []


def test_a_job_says_its_own_faults_beside_what_can_never_be_stored(caplog):
    """Each once: that of the ring that it found, and that of its own store."""
    left_by("mad", started_at=math.nan)
    agent, optimizer = watched(10)
    wait_until(lambda: "set aside" in caplog.text)
    with contextlib.closing(sqlite3.connect("gradwatch.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        optimizer.step()
        wait_until(lambda: "database is locked" in caplog.text)
        other.execute("ROLLBACK")
    wait_until(lambda: "takes records again" in caplog.text)
    agent.close()
    assert caplog.text.count("set aside") == 1


def test_a_rank_whose_run_never_comes_is_left_at_once(monkeypatch):
    """It is asked for once a look, not at every look of the worker."""
    left_by("rank", rank=1, world_size=2, leader=None)
    opened = []
    real = DatabaseSink.open
    monkeypatch.setattr(
        DatabaseSink, "open", lambda self, run: opened.append(run.uid) or real(self, run)
    )
    agent, _optimizer = watched(10, drain_interval=0.01)
    wait_until(lambda: "rank" in opened)
    time.sleep(1.0)  # a hundred looks
    agent.close()
    assert opened.count("rank") == 1
    assert len(rings()) == 1


def test_what_was_stored_already_is_not_stored_again():
    """The worker had stored a part when the process was killed."""
    killed("agent = begin(); steps(700); assert agent.flush(); steps(300)", DRAIN="0.05")
    before = query("SELECT count(*) FROM steps")[0][0]
    assert before >= 700
    (one,) = recover("sqlite:///gradwatch.db")
    assert (one.steps, one.last_step) == (1000 - before, 299 + 700)
    assert query("SELECT count(*) FROM steps") == [(1000,)]


def test_a_store_that_is_down_leaves_the_file():
    """Told with the reason; stored when it is back."""
    killed("begin(); steps(100)")
    Path("gradwatch.db").unlink(missing_ok=True)
    Path("gradwatch.db").mkdir()
    result = CliRunner().invoke(app, ["recover"])
    assert result.exit_code == 1
    assert "unable to open database file" in result.output
    assert len(rings()) == 1
    Path("gradwatch.db").rmdir()
    assert CliRunner().invoke(app, ["recover"]).exit_code == 0
    assert query("SELECT count(*) FROM steps") == [(100,)]


# -- what it says of the end -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "status"),
    [("", "finished"), ("raise ValueError", "failed"), ("os._exit(3)", "crashed")],
)
def test_how_a_run_ended_is_known_though_the_store_was_down(ending, status):
    """The ring keeps it, and the store hears of it with the rest."""
    subprocess.run(
        [sys.executable, "-c",
         f"{PREAMBLE}\nos.mkdir('gradwatch.db'); begin(); steps(50)\n{ending}"],
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    Path("gradwatch.db").rmdir()
    (one,) = recover("sqlite:///gradwatch.db")
    assert (one.status, one.steps) == (status, 50)
    assert query("SELECT status FROM runs") == [(status,)]


# -- killed and resumed ----------------------------------------------------------------------------
