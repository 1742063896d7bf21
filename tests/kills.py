"""Jobs that step as fast as they can until they are killed."""

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import torch

import gradwatch
from gradwatch.testing import run_info

# What a job's script begins with: an optimizer, and how to step and to die.
PREAMBLE = """
import os, signal, sys, threading, torch, gradwatch
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.ones(10))
optimizer = torch.optim.SGD([weight], lr=0.0)
def begin(**arguments):
    settings = gradwatch.Settings(metrics_port="off", drain_interval=float(os.environ.get("DRAIN", 30)),
                                  **arguments)
    return gradwatch.Agent(optimizer, settings=settings, run="job")
def steps(n):
    for i in range(n):
        weight.grad = torch.full((10,), float(i + 1))
        optimizer.step()
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""

# A factory of jobs: torch is loaded once, and every line on its input forks a job that steps
# until it is killed. After each step() that returned, the job notes it in a file of its own.
FACTORY = """
import mmap, os, sys, torch, gradwatch
from gradwatch.testing import MemorySink
torch.set_num_threads(1)
# Whatever loads at the first step is loaded once, here.
loaded = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.0)
with gradwatch.Agent(loaded, store=MemorySink(), metrics_port=None):
    loaded.step()
def job(number):
    path = f"returned-{number}"
    with open(path, "wb") as file:
        file.write(bytes(16))
    with open(path, "r+b") as file:
        returned = memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")
    weight = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    agent = gradwatch.Agent(optimizer, store=sys.argv[1], run=f"job-{number}",
                            settings=gradwatch.Settings(run_id=f"uid-{number}"))
    step = 0
    while True:
        weight.grad = torch.full((10,), float(step % 97 + 1))
        agent.log(loss=float(step))
        optimizer.step()
        step += 1
        returned[0] = step
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        job(int(line))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


class Factory:
    """Makes such jobs, one after the other, in the working directory; a context manager."""

    def __init__(self, store):
        self._program = subprocess.Popen(
            [sys.executable, "-c", FACTORY, store],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GRADWATCH_METRICS_PORT": "off"},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._program.kill()
        self._program.communicate()

    def start_and_kill(self, number, moment):
        """Let job `number` run until `moment(returned steps)` is true, then kill -9 it."""
        self._program.stdin.write(f"{number}\n")
        self._program.stdin.flush()
        pid = int(self._program.stdout.readline())
        deadline = time.monotonic() + 60
        try:
            while not moment(returned(number)):
                assert time.monotonic() < deadline
                time.sleep(0.001)
        finally:
            os.kill(pid, signal.SIGKILL)
        assert self._program.stdout.readline() == "gone\n"


def returned(number):
    """How many steps job `number` saw return."""
    path = Path(f"returned-{number}")
    noted = path.read_bytes() if path.exists() else b""
    return int.from_bytes(noted[:8], "little")


def query(sql, path="gradwatch.db"):
    """Rows of a store, by a connection that only reads."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return connection.execute(sql).fetchall()


def rings():
    """What killed jobs have left beside the store."""
    return sorted(Path("gradwatch.db.rings").glob("*.ring"))


def killed(script, **environ):
    """A job that ends by SIGKILL; with a worker that comes too late to store its last steps."""
    result = subprocess.run(
        [sys.executable, "-c", f"{PREAMBLE}\n{script}\ndie()"],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        check=False,
        timeout=120,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    return result


def watched(steps, **settings):
    """A job of this process: (agent, optimizer)."""
    weight = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    agent = gradwatch.Agent(optimizer, run="next", settings=gradwatch.Settings(**settings))
    for i in range(steps):
        weight.grad = torch.full((10,), float(i + 1))
        optimizer.step()
    return agent, optimizer


def about_nobody(store):
    """What the ring of a process that is gone says of itself."""
    run = run_info(pid=2**22 + 1)  # above the highest that Linux gives
    return {**dataclasses.asdict(run), "store": store, "parameters": []}
