"""Who a run is, told from its script and its launcher."""

import os
import sqlite3
import subprocess
import sys

import torch

import gradwatch
from gradwatch import identity


def test_two_scripts_of_one_allocation_are_two_runs(tmp_path):
    """Both alive under one Slurm job id: neither hides the other's steps."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, torch, gradwatch\n"
        "w = torch.nn.Parameter(torch.ones(2)); o = torch.optim.SGD([w], lr=.1)\n"
        "a = gradwatch.Agent(o, run=sys.argv[1], store='runs.db', metrics_port=None)\n"
        "for i in range(40):\n"
        "    w.grad = torch.ones(2); o.step()\n"
        "assert a.flush(20)\n"
        "print('stored', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    jobs = []
    for name in ("resnet", "lstm"):
        job = subprocess.Popen(
            [sys.executable, str(script), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLURM_JOB_ID": "77"},
        )
        jobs.append(job)
        assert job.stdout.readline() == "stored\n"
    for job in jobs:
        job.communicate("\n", timeout=60)
        assert job.returncode == 0
    with sqlite3.connect("runs.db") as connection:
        found = connection.execute(
            "SELECT r.name, count(*) FROM runs r JOIN steps s ON s.run_id = r.id GROUP BY r.id"
        ).fetchall()
    assert found == [("resnet", 40), ("lstm", 40)]


def test_a_script_whose_name_is_no_text(tmp_path):
    """Its run is stored, under a name that is."""
    script = tmp_path / b"tr\xe9n.py".decode("utf-8", "surrogateescape")
    script.write_text(
        "import torch, gradwatch\n"
        "w = torch.nn.Parameter(torch.ones(2)); o = torch.optim.SGD([w], lr=.1)\n"
        "gradwatch.wrap(o, store='runs.db', metrics_port=None)\n"
        "w.grad = torch.ones(2); o.step()\n"
    )
    subprocess.run([sys.executable, script], check=True, timeout=120)
    with sqlite3.connect("runs.db") as connection:
        assert connection.execute("SELECT name, status FROM runs").fetchall() == [
            ("tr?n", "finished")
        ]


def test_names_fit_the_stores_columns():
    """A script's and a launcher's may be of any length; PostgreSQL takes 255 characters."""
    assert identity.default_name(["x" * 250 + ".py"]) == "x" * 240
    assert len(identity.launcher({"TORCHELASTIC_RUN_ID": "x" * 300}).id) == 240


def small(**settings):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    agent = gradwatch.Agent(optimizer, settings=gradwatch.Settings(**settings))

    def step():
        weight.grad = torch.ones(2)
        optimizer.step()

    step()
    return agent, step


def test_an_id_that_is_given_twice_in_one_process(caplog):
    """While the first run goes on, the second is told its own id; afterwards it is that run again."""
    settings = {"run_id": "x", "store": "runs.db", "metrics_port": None}
    one, _ = small(**settings)
    two, _ = small(**settings)
    assert (one.run_id, two.run_id) == ("x", "x-2")
    (told,) = [r.getMessage() for r in caplog.records if "run id" in r.getMessage()]
    assert told == (
        "gradwatch: run id 'x' is that of another optimizer of this process: the run of this one "
        "has the id 'x-2'"
    )
    for agent in (one, two):
        agent.close()
    three, step = small(**settings)
    step()
    assert three.run_id == "x"
    three.close()
    with sqlite3.connect("runs.db") as connection:
        found = connection.execute(
            "SELECT r.uid, s.attempt, s.step FROM runs r JOIN steps s ON s.run_id = r.id ORDER BY 1, 3"
        ).fetchall()
    assert found == [("x", 1, 0), ("x", 2, 1), ("x", 2, 2), ("x-2", 1, 0)]
