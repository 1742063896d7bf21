"""Real training jobs in processes of their own, each with its own list of what it did."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest

# torch is loaded once; every order on the input forks a job, which trains until it finds a file
# named "stop" in its folder. After each step() it notes there what torch itself says of the step.
FACTORY = """
import json, os, sys, tempfile, time, torch, gradwatch
from gradwatch import delivery
torch.set_num_threads(1)
delivery._RETRY_SECONDS = 0.5  # the longest pause between two tries of a store
delivery._RING_SECONDS = 600.0  # between two looks for its ring's file, which a test may delete

def begin(store, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return optimizer, gradwatch.Agent(optimizer, model=model, store=store)

# Whatever loads at the first step is loaded once, here.
with tempfile.TemporaryDirectory() as folder:
    optimizer, agent = begin(f"{folder}/first.db", torch.nn.Linear(1, 1))
    optimizer.step()
    agent.close()

def job(folder, store, environ, user, code, seed):
    os.chdir(folder)
    os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    did = open("did", "w")
    if user is not None:
        os.setgroups([]); os.setgid(user); os.setuid(user)
    os.environ.update(environ)
    tempfile.tempdir = None
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    names = {}
    exec(code, names)
    each = names.get("each")
    optimizer, agent = begin(store, model)
    names.update(agent=agent, optimizer=optimizer)
    step = 0
    while not os.path.exists("stop"):
        x = torch.randn(8, 8)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        agent.log(loss=loss.item())
        optimizer.step()
        did.write(json.dumps([step, loss.item(), norm]) + "\\n")
        did.flush()
        step += 1
        if each is not None:
            each(step)
        time.sleep(0.0005)

for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, int):
        print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        job(**order)
        sys.exit(0)  # its atexit handlers run
    print(pid, flush=True)
"""


class Factory:
    """The process that forks jobs."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", FACTORY],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._jobs = []

    def start(self, folder, store, *, user=None, code="", seed=0, **environ):
        """A job with that store, in a folder of its own.

        `code` runs before it begins, and what that defines as `each(step)` after every step; the
        names `agent` and `optimizer` are there then.
        """
        folder.mkdir(parents=True)
        for name in ("did", "stderr"):
            (folder / name).touch()
        environ = {"GRADWATCH_METRICS_PORT": "off", "GRADWATCH_DRAIN_INTERVAL": "0.05", **environ}
        order = {"folder": str(folder), "store": str(store), "environ": environ,
                 "user": user, "code": code, "seed": seed}  # fmt: skip
        job = Job(folder, self.ask(order), self)
        self._jobs.append(job)
        return job

    def ask(self, order):
        """The answer to an order: of a job its pid, of a pid how it ended."""
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def stop(self):
        """End all, by force what does not end."""
        for job in self._jobs:
            if job.code is None:
                os.kill(job.pid, 9)
        self._process.kill()
        self._process.communicate()


class Job:
    """One of its jobs, seen from outside."""

    def __init__(self, folder, pid, factory):
        self.folder, self.pid, self._factory = folder, pid, factory
        self.code = None

    def did(self):
        """(step, loss, norm) of all steps so far, by the loop itself."""
        lines = (self.folder / "did").read_text().split("\n")[:-1]
        return [tuple(json.loads(line)) for line in lines]

    def steps(self):
        """How many steps it has taken."""
        return (self.folder / "did").read_bytes().count(b"\n")

    def go_on(self, steps=100):
        """Wait until it has taken so many steps more."""
        target = self.steps() + steps
        wait_until(lambda: self.steps() >= target, self.said)

    def said(self):
        """What it was warned of."""
        said = (self.folder / "stderr").read_text()
        return [line for line in said.split("\n") if line]

    def is_told(self, words):
        """Wait for a line with these words in it."""
        wait_until(lambda: any(words in line for line in self.said()), self.said)

    def stop(self):
        """Tell it to stop."""
        (self.folder / "stop").touch()

    def end(self):
        """The same, and wait until it has; its exit status is good."""
        self.stop()
        self.code = self._factory.ask(self.pid)
        assert self.code == 0, (self.code, self.said())


def wait_until(done, told=lambda: "", seconds=20.0):
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, told()
        time.sleep(0.01)


def query(path, sql, *arguments):
    """Rows, by the sqlite3 module alone."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, arguments).fetchall()


def stored(path):
    """How many steps a store has; 0 where it cannot be read, as while it is being made."""
    try:
        return query(path, "SELECT count(*) FROM step_records")[0][0]
    except sqlite3.Error:
        return 0


def check_stored(path, job, run_id=1, among=lambda _: True):
    """Every step the loop took is in the store, as torch saw it, once."""
    rows = query(
        path,
        "SELECT step, loss, pre_norm, clipped FROM steps WHERE run_id = ? ORDER BY step",
        run_id,
    )
    expected = [row for row in job.did() if among(row[0])]
    assert [row[0] for row in rows] == [row[0] for row in expected]
    assert [row[1] for row in rows] == [row[1] for row in expected]
    assert [row[2] for row in rows] == pytest.approx([row[2] for row in expected], rel=1e-4)
    unsure = [row[2] for row in rows if row[3] != (row[2] > 1.0)]
    assert unsure == pytest.approx([1.0] * len(unsure), rel=1e-5)
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
