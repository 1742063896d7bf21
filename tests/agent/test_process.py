"""Whole processes: exit, fork, workers, kill, and a job that never notices."""

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradwatch.recorder import Ring

PREAMBLE = """
import atexit, os, signal, sys, torch, gradwatch
def at_last():
    pass
atexit.register(lambda: at_last())  # what was registered first runs last, after gradwatch
signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have it ignored
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.ones(10))
optimizer = torch.optim.SGD([weight], lr=0.1)
agent = gradwatch.Agent(optimizer, store="gradwatch.db", run="job")
def steps(n):
    for i in range(n):
        weight.grad = torch.full((10,), float(i + 1))
        optimizer.step()
"""


def run(script, *, timeout=120):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PREAMBLE + script],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def query(sql):
    with sqlite3.connect("file:gradwatch.db?mode=ro", uri=True) as connection:
        return connection.execute(sql).fetchall()


STATUS = "SELECT status, count(*) FROM runs JOIN steps ON run_id = id GROUP BY id"


def test_a_script_that_ends_stores_everything():
    """Without a word from the user: all steps, status finished, no file left but the store."""
    result = run("steps(5000)")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert query(STATUS) == [("finished", 5000)]
    assert not list(Path("gradwatch.db.rings").iterdir())


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        ("raise ValueError('mine')", "failed", 1),
        ("sys.exit(3)", "finished", 3),
        ("os.kill(os.getpid(), signal.SIGINT)", "failed", -signal.SIGINT),
    ],
)
def test_the_exit_status_is_the_jobs_own(ending, status, code):
    """An exception, `sys.exit` and Ctrl-C end as they would, with everything stored."""
    result = run(f"steps(500)\n{ending}")
    assert result.returncode == code
    assert query(STATUS) == [(status, 500)]


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"])
def test_a_killed_process_leaves_its_records_in_the_ring(ending):
    """What the worker had not stored is in the file; store and ring together lack nothing."""
    run(f"steps(3000)\n{ending}")
    (path,) = Path("gradwatch.db.rings").iterdir()
    ring = Ring.open(path)
    assert ring.metadata["name"] == "job"
    assert ring.read_steps(0).records["step"].tolist() == list(range(3000))
    if query("SELECT 1 FROM sqlite_master"):  # the worker has made the store in that time
        stored = [row[0] for row in query("SELECT step FROM step_records ORDER BY step")]
        ((cursor,),) = query("SELECT step_cursor FROM rings") or [(0,)]
        assert stored == list(range(cursor))
    ring.close()


def test_a_forked_child_clips_and_records_nothing():
    """The worker runs, the process forks: no deadlock, no double count, the child inert."""
    result = run("""
steps(100)
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        weight.grad = torch.full((10,), 100.0)
        before = weight.detach().clone()
        optimizer.step()
        moved = float((before - weight.detach()).norm())
        assert abs(moved - 0.1) < 1e-5, moved      # clipped to 1, times lr
        assert agent.flush() and agent.metrics_url is None
        agent.close()
        sys.exit(0)                                # its atexit handlers run
    assert os.waitpid(pid, 0)[1] == 0
    steps(100)
""")
    assert (result.returncode, result.stderr) == (0, "")
    assert query(STATUS) == [("finished", 400)]
    assert query("PRAGMA integrity_check") == [("ok",)]


def test_a_child_that_wraps_its_own_optimizer_has_its_own_run():
    """A forked trainer is a run of its own, with a worker of its own."""
    result = run("""
steps(50)
pid = os.fork()
if pid == 0:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    gradwatch.wrap(optimizer, store="gradwatch.db", run="child")
    for i in range(70):
        weight.grad = torch.ones(3)
        optimizer.step()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
steps(50)
""")
    assert (result.returncode, result.stderr) == (0, "")
    rows = query("SELECT name, count(*) FROM runs JOIN steps ON run_id = id GROUP BY 1")
    assert rows == [("child", 70), ("job", 100)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_are_inert(method):
    """Workers forked or spawned while the agent runs: nothing hangs, nothing is counted twice."""
    script = Path("job.py")
    script.write_text(
        f"""
import torch, gradwatch
from torch.utils.data import DataLoader, TensorDataset
def main():
    torch.set_num_threads(1)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gradwatch.wrap(optimizer, model=model, store="gradwatch.db", run="job")
    loader = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=8, num_workers=2,
                        multiprocessing_context={method!r})
    for epoch in range(2):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
if __name__ == "__main__":
    main()
"""
    )
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert query(STATUS) == [("finished", 16)]


def test_exit_is_not_held_up_by_a_store_that_hangs():
    """The database is locked by another writer: exit within two seconds of the work's end."""
    result = run("""
import sqlite3, time
steps(10)
assert agent.flush()
other = sqlite3.connect("gradwatch.db", isolation_level=None)
other.execute("BEGIN IMMEDIATE")
steps(10)
def at_last():
    print(time.time(), flush=True)
at_last()
""")
    gone = time.time()
    assert result.returncode == 0
    began, ended = map(float, result.stdout.split())
    assert ended - began < 3.5  # two at most, the rest for a busy machine
    assert gone - began < 10.0  # with the interpreter's own end
    assert "ended before all of it was stored" in result.stderr
    (path,) = Path("gradwatch.db.rings").iterdir()
    assert str(path) in result.stderr
    assert query("SELECT count(*) FROM steps") == [(10,)]
    assert len(Ring.open(path).read_steps(10).records) == 10
