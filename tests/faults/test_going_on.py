"""Jobs started again under their run id without a state: every step of each, once, in order."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import ranks
import torch
from jobs import query, stored, wait_until

from gradwatch.recovery import recover
from gradwatch_monitor import integrity

ID = {"GRADWATCH_RUN_ID": "job-17"}
# Its worker looks at the ring too seldom to have stored the last steps.
SELDOM = {**ID, "GRADWATCH_DRAIN_INTERVAL": "30"}
FOLDERS = iter(f"job-{number}" for number in range(10**6))


@pytest.fixture
def start(factory, tmp_path):
    """Starts a job with the same store as the others of the test."""
    return lambda store="gradwatch.db", **more: factory.start(
        tmp_path / next(FOLDERS), store if "://" in str(store) else tmp_path / store, **more
    )


def kill(job):
    """`kill -9`, wherever it is; until it is gone with all of its threads."""
    os.kill(job.pid, signal.SIGKILL)
    job.code = job._factory.ask(job.pid)


def shows(rows, jobs):
    """The timeline is the jobs' steps as torch saw them, one after the other.

    A job that was killed may have recorded a step more than it had time to note.
    """
    norms = iter(norm for _, norm in rows)
    for i, job in enumerate(jobs):
        did = [norm for _, _, norm in job.did()]
        assert [next(norms) for _ in did] == pytest.approx(did, rel=1e-4), i
        if i + 1 < len(jobs):
            following = jobs[i + 1].did()[0][2]
            norm = next(norms)
            if norm != pytest.approx(following, rel=1e-4):
                norm = next(norms)
            assert norm == pytest.approx(following, rel=1e-4)
            norms = iter([norm, *norms])
    assert len(list(norms)) <= 1
    assert [step for step, _ in rows] == list(range(len(rows)))


def timeline(path="gradwatch.db"):
    return query(path, "SELECT step, pre_norm FROM steps WHERE run_id = 1 ORDER BY step")


def test_killed_and_started_again_at_once(start):
    """Three times: what each had recorded shows, though its last steps were not stored yet."""
    jobs = []
    for seed, settings in enumerate([SELDOM, SELDOM, ID]):
        jobs.append(job := start(seed=seed, **settings))
        job.go_on(50)
        if seed < 2:
            kill(job)
    jobs[-1].end()
    rows = timeline()
    shows(rows, jobs)
    assert query("gradwatch.db", "SELECT count(*) FROM step_records") == [(len(rows),)]
    assert query("gradwatch.db", "SELECT uid, status FROM runs") == [("job-17", "finished")]
    events = query("gradwatch.db", "SELECT step, message FROM events ORDER BY step")
    first, second, *_ = (len(job.did()) for job in jobs)
    assert [message for _, message in events] == [
        f"attempt {attempt} goes on from step {step}, after the last step on record: no state was "
        "loaded"
        for attempt, (step, _) in enumerate(events, start=2)
    ]
    assert events[0][0] - first in {0, 1}
    assert events[1][0] - events[0][0] - second in {0, 1}
    assert integrity.check("sqlite:///gradwatch.db") == []
    assert [line for line in jobs[1].said() if "goes on from" in line] == [
        f"gradwatch: run python (job-17): {events[0][1]}"
    ]


def test_on_postgresql(start, postgres_server):
    """The same there, where rings lie in a folder of their own."""
    url = postgres_server.new_database()
    jobs = []
    for seed, settings in enumerate([SELDOM, ID]):
        jobs.append(job := start(url, seed=seed, **settings))
        job.go_on(50)
        if not seed:
            kill(job)
    jobs[-1].end()
    shows(postgres_server.query(url, "SELECT step, pre_norm FROM steps ORDER BY step"), jobs)


def test_postgresql_is_down_at_the_first_step(start, postgres_server):
    """Of the second job: what it has recorded meanwhile follows the first one's steps."""
    url = postgres_server.new_database()
    first = start(url, seed=0, **SELDOM)
    first.go_on(50)
    kill(first)
    postgres_server.stop()
    second = start(url, seed=1, **ID)
    second.is_told("is the server up, and the URL right?")
    second.go_on(50)
    postgres_server.start()
    second.is_told("takes records again")
    second.go_on(50)
    second.end()
    rows = postgres_server.query(url, "SELECT step, pre_norm FROM steps ORDER BY step")
    shows(rows, [first, second])


def test_a_job_that_is_over_before_the_other_is_stored(start):
    """It ends within a moment of its first step, and takes the time to store both."""
    first = start(seed=1, **SELDOM)
    first.go_on(3000)
    kill(first)
    second = start(
        seed=2, code="def each(step):\n    step == 3 and open('stop', 'w').close()", **ID
    )
    second.go_on(3)
    second.end()
    assert len(second.did()) == 3
    shows(timeline(), [first, second])


def test_the_store_is_down_at_the_first_step(start):
    """Of the second job, whose first look comes when the first one's last steps are not stored."""
    first = start(seed=1, **SELDOM)
    first.go_on(50)
    wait_until(lambda: stored("gradwatch.db"))
    kill(first)
    hidden = Path("hidden")
    hidden.mkdir()
    for path in Path().glob("gradwatch.db*"):
        if path.is_file():
            path.rename(hidden / path.name)
    Path("gradwatch.db").mkdir()
    second = start(seed=2, **ID)
    second.is_told("unable to open database file")
    second.go_on(50)
    Path("gradwatch.db").rmdir()
    for path in hidden.iterdir():
        path.rename(path.name)
    second.is_told("takes records again")
    second.go_on(50)
    second.end()
    shows(timeline(), [first, second])


def test_two_that_were_killed_before_they_could_store_anything(start):
    """Their rings are taken in the order in which they began, whatever their names."""
    Path("gradwatch.db").mkdir()
    jobs = []
    for seed in range(4):
        jobs.append(job := start(seed=seed, **ID))
        job.go_on(30)
        kill(job)
    Path("gradwatch.db").rmdir()
    found = recover("sqlite:///gradwatch.db")
    assert [one.problem for one in found] == [None] * 4
    shows(timeline(), jobs)


def test_a_process_that_lives_keeps_its_run(start):
    """The second one under its id on the same machine is another run, and says so."""
    first, second = start(seed=1, **ID), None
    first.go_on(50)
    second = start(seed=2, **ID)
    second.go_on(50)
    second.is_told(f"process {first.pid} on")
    second.end()
    first.go_on(50)
    first.end()
    runs = query("gradwatch.db", "SELECT id, uid, status FROM runs ORDER BY id")
    assert [(run, status) for run, _, status in runs] == [(1, "finished"), (2, "finished")]
    assert (runs[0][1], runs[1][1].startswith("job-17-")) == ("job-17", True)
    for run, job in ((1, first), (2, second)):
        rows = query("gradwatch.db", "SELECT step, pre_norm FROM steps WHERE run_id = ?", run)
        assert len(rows) == len(job.did())
        shows(rows, [job])
    (told,) = [line for line in second.said() if "in use" in line]
    assert told == (
        f"gradwatch: run id 'job-17' is in use: process {first.pid} on {socket.gethostname()} is "
        f"recording run 'python' under it: this process is a run of its own, {runs[1][1]!r}"
    )


ELSEWHERE = """
import ctypes, socket
assert ctypes.CDLL(None).unshare(0x04000000) == 0
socket.sethostname("elsewhere")
from gradwatch import delivery
delivery._AROUND_SECONDS = 0.2
"""
HERE = "from gradwatch import delivery\ndelivery._AROUND_SECONDS = 0.2"


def may_be_elsewhere():
    """Whether a process may have a host name of its own: asked in a child, which then has one."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ctypes.CDLL(None).unshare(0x04000000) == 0 else 1)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.skipif(not may_be_elsewhere(), reason="needs the right to unshare the host name")
def test_a_process_on_another_machine_that_lives_still(start):
    """It cannot be seen from here: the run goes on, and what that hides of the other is told."""
    first = start(seed=1, code=ELSEWHERE, **ID)
    first.go_on(50)
    wait_until(lambda: stored("gradwatch.db"))
    second = start(seed=2, code=HERE, **ID)
    second.go_on(50)
    first.is_told("two processes record under one run id")
    first.go_on(50)
    first.end()
    second.end()
    assert query("gradwatch.db", "SELECT count(*) FROM runs") == [(1,)]
    attempts = dict(query("gradwatch.db", "SELECT attempt, start_step FROM attempts"))
    records = query(
        "gradwatch.db", "SELECT count(*) FROM step_records WHERE attempt = 1 AND step >= ?",
        attempts[2],
    )  # fmt: skip
    told = query(
        "gradwatch.db", "SELECT attempt, step, data FROM events WHERE kind = 'steps_hidden'"
    )
    assert {(attempt, step) for attempt, step, _ in told} == {(2, attempts[2])}
    assert [(sum(json.loads(data)["hidden_steps"] for *_, data in told),)] == records
    everything = query("gradwatch.db", "SELECT count(*) FROM step_records")
    assert everything == [(len(first.did()) + len(second.did()),)]


def test_steps_that_come_late_from_another_machine_are_told(start):
    """Their ring lay where the job that went on could not see it."""
    Path("other").mkdir()
    elsewhere = {"GRADWATCH_RING_DIR": str(Path("other").absolute())}
    first = start(seed=1, **SELDOM, **elsewhere)
    wait_until(lambda: stored("gradwatch.db"))  # its worker's first look
    first.go_on(50)
    kill(first)
    second = start(seed=2, **ID)
    second.go_on(30)
    second.end()
    (began,) = query("gradwatch.db", "SELECT start_step FROM attempts WHERE attempt = 2")[0]
    recover("sqlite:///gradwatch.db", [Path("other").absolute()])
    hidden = query(
        "gradwatch.db", "SELECT count(*) FROM step_records WHERE attempt = 1 AND step >= ?", began
    )
    ((count,),) = hidden
    assert count >= 50
    told = query(
        "gradwatch.db", "SELECT attempt, step, message FROM events WHERE kind = 'steps_hidden'"
    )
    message = (
        f"{count} steps of attempt 1 reached the store after attempt 2 had begun; the timeline "
        f"shows attempt 2 from step {began} on, and step_records has both"
    )
    assert told == [(2, began, message)]


CONTAINER = f"""{kills.PREAMBLE}
agent = begin(run_id="pod"); steps(int(sys.argv[1]))
os._exit(0) if sys.argv[2] == "dies" else None
"""


def test_a_container_that_is_started_again(tmp_path):
    """Each job in it has the process id of the one before, and is another process all the same."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", CONTAINER]
    done = subprocess.run([*command, "5", "dies"], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr:
        pytest.skip(f"needs the right to unshare process ids: {done.stderr}")
    assert len(kills.rings()) == 1, done.stderr
    subprocess.run([*command, "4", "ends"], check=True, capture_output=True)
    assert kills.rings() == []
    assert query("gradwatch.db", "SELECT step, attempt FROM steps ORDER BY step") == [
        *((step, 1) for step in range(5)),
        *((step, 2) for step in range(5, 9)),
    ]


def test_all_ranks_go_on(tmp_path, monkeypatch):
    """Those of a job that was killed before it could reach the store, and of the one after it."""
    monkeypatch.setenv("GRADWATCH_RUN_ID", "job-17")
    Path("gradwatch.db").mkdir()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        ranks.run(ranks.killed, 2, tmp_path)
    wait_until(lambda: len(kills.rings()) == 2)
    Path("gradwatch.db").rmdir()
    first, second = ranks.run(ranks.data_parallel, 2, tmp_path)
    assert first["run"] == second["run"] == "job-17"
    rows = timeline()
    assert [step for step, _ in rows] == list(range(14))
    assert [norm for _, norm in rows[5:13]] == pytest.approx(first["expected"], rel=1e-4)
    events = query("gradwatch.db", "SELECT kind, rank, step FROM events WHERE kind LIKE 'nonf%'")
    assert ("nonfinite_loss", 1, 3) in events
    assert {step for kind, _, step in events if kind == "nonfinite_gradient"} == {13}
