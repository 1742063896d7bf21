"""However a job ends: no recorded step is missing, none doubled, its exit status is its own."""

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradwatch.recovery import recover

# Steps as fast as it can; every step() that returned is noted in memory that outlives the job.
# Whether gradwatch holds the exit up is told by what runs last of all at exit: the interpreter's own
# end with torch in it takes seconds where the machine is busy.
JOB = """
import atexit, mmap, os, signal, sys, threading, time
atexit.register(lambda: print(time.time(), flush=True))
import torch, gradwatch
signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have it ignored
torch.set_num_threads(1)
with open("returned", "wb") as file:
    file.write(bytes(8))
with open("returned", "r+b") as file:
    returned = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
weight = torch.nn.Parameter(torch.ones(10))
optimizer = torch.optim.SGD([weight], lr=0.0)
agent = gradwatch.Agent(optimizer, run="job", metrics_port=None)
def steps(n):
    for _ in range(n):
        weight.grad = torch.full((10,), 2.0)
        optimizer.step()
        returned[0] += 1
def done():
    print(time.time(), flush=True)
"""
HANDLER = """
def stop(number, frame):
    done()
    {answer}
signal.signal(signal.SIGTERM, stop)
"""
TERM = "steps(2000); os.kill(os.getpid(), signal.SIGTERM); steps(10**9)"


def run(script):
    """The ended job, and the seconds from its last word until nothing is left to do at exit."""
    job = subprocess.run(
        [sys.executable, "-c", JOB + script],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    ended = time.time()
    told = [float(word) for word in job.stdout.split()]
    if not told:
        return job, 0.0
    assert ended - told[0] < 10.0  # the interpreter's own end is in it
    # Where nothing runs at exit any more, the end of the process is what tells.
    return job, (told[1] if len(told) > 1 else ended) - told[0]


def query(sql):
    with sqlite3.connect("file:gradwatch.db?mode=ro", uri=True) as connection:
        return connection.execute(sql).fetchall()


def returned():
    return int.from_bytes(Path("returned").read_bytes(), "little")


def check_all_there():
    """Every step that returned is in the store, once recovery has been; one more may be."""
    found = recover("sqlite:///gradwatch.db")
    assert [one.problem for one in found if one.problem] == []
    ((count, last),) = query("SELECT count(*), max(step) FROM step_records")
    assert count == last + 1
    assert returned() <= count <= returned() + 1


@pytest.mark.parametrize(
    ("script", "code", "status"),
    [
        ("steps(2000); done()", 0, "finished"),
        ("steps(2000); done(); raise RuntimeError", 1, "failed"),
        ("steps(2000); done(); sys.exit(7)", 7, "finished"),
        ("steps(2000); done(); os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "failed"),
        ("steps(2000); done(); os._exit(3)", 3, "crashed"),
        (TERM, -signal.SIGTERM, "crashed"),
        (HANDLER.format(answer="sys.exit(143)") + TERM, 143, "finished"),
        (HANDLER.format(answer="raise TimeoutError") + TERM, 1, "failed"),
        (HANDLER.format(answer="os._exit(9)") + TERM, 9, "crashed"),
        ("steps(2000); os.abort()", -signal.SIGABRT, "crashed"),
        # A thread that is not a daemon goes on stepping after the main thread has ended.
        ("threading.Thread(target=lambda: (steps(2000), done())).start()", 0, "finished"),
    ],
)  # fmt: skip
def test_an_ending_is_the_jobs_own_and_loses_nothing(script, code, status):
    """Exit status, what is told of the run, and the time that the exit takes."""
    job, seconds = run(script)
    assert job.returncode == code, job.stderr
    assert seconds < 3.5  # two at most, the rest for a busy machine
    check_all_there()
    assert query("SELECT status FROM runs") == [(status,)]


def test_exit_with_a_full_ring_to_store():
    """The worker has all to do when the job ends: what it cannot do in time is recovered."""
    job, seconds = run("""
agent = agent.close()
agent = gradwatch.Agent(optimizer, run="busy", replace=True, settings=gradwatch.Settings(
    metrics_port="off", drain_interval=60, run_id="busy"))
steps(1)
agent.flush()
ring = agent._recording.channel.ring
for step in range(1, 131072):
    ring.append(step, 1.7e9, 1.0, 0.5, 1e-3, 2.0, 1.0, 1.0, float("nan"), 1)
done()
""")
    assert job.returncode == 0, job.stderr
    assert seconds < 3.5
    recover("sqlite:///gradwatch.db")
    assert query("SELECT count(*) FROM steps") == [(131072,)]
    assert query("SELECT status FROM runs") == [("finished",)]
    assert not list(Path("gradwatch.db.rings").glob("*.ring"))
