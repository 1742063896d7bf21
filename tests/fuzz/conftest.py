"""A store with every kind of row, and the time that there is to fuzz it."""

import os
import shutil
import time
from pathlib import Path

import fuzzing
import numpy as np
import pytest
from live import live
from stores import Job, records, write_run

from gradwatch import ClipNorm, process
from gradwatch.errors import GradwatchError
from gradwatch.identity import host
from gradwatch_dashboards import cli
from gradwatch_monitor import Store
from gradwatch_monitor.watching import Watch


@pytest.fixture
def budget(request):
    """As the command line says: `--fuzz-seconds`, `--fuzz-seed`."""
    option = request.config.getoption
    return fuzzing.Budget(option("--fuzz-seconds"), option("--fuzz-seed"))


@pytest.fixture(autouse=True)
def _faults_are_seen(monkeypatch):
    """What the command line would tell as a fault of its own fails the test, with its traceback."""
    tell = cli._tell

    def seen(error):
        if not isinstance(error, (GradwatchError, OSError)):
            raise AssertionError(repr(error)) from error  # noqa: TRY004
        tell(error)

    monkeypatch.setattr(cli, "_tell", seen)


@pytest.fixture(scope="session")
def whole_store(tmp_path_factory):
    """The file of a store with runs that ended, one that lives, and a long one that was resumed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GRADWATCH_METRICS_PORT", "off")
        patch.setenv("GRADWATCH_DRAIN_INTERVAL", "0.05")
        _write()
        process._process.pipeline.shutdown("finished", 10.0)
        process._process.pipeline = None
    path = folder / "gradwatch.db"
    with fuzzing.connected(path) as connection:
        connection.execute(
            "UPDATE runs SET status = 'running', ended_at = NULL, heartbeat_at = ?, host = ?, pid = ?, "
            "metrics_url = 'http://127.0.0.1:1/metrics' WHERE name IN ('changed', 'good')",
            (time.time() + 1e6, host(), os.getpid()),
        )  # fmt: skip
    return path


def _write():
    write_run(run="good", steps=300, nan_at=(120,), tags={"lr": 3e-4, "data": {"set": ["a", None]}})
    with live("changed", clip=ClipNorm(0.1)) as job, Store() as store:
        job.until(100)
        changed = store.run("changed").id
        store.apply(changed, 0.8, by="somebody", reason="recommended (change): 20 % x")
        while not store.events(changed, kind="threshold_changed"):
            job.until(job.step + 10)
        job.until(job.step + 100)
        Watch().look(store)
    for start, count, ring in ((0, 22_000, "first"), (21_000, 2000, "second")):
        resumed = Job("sqlite:///gradwatch.db", ring, start, name="long")
        for part in np.split(records(start, count, seed=start), range(5000, count, 5000)):
            resumed.write(part)
        resumed.end()


@pytest.fixture
def copy(whole_store, tmp_path):
    """Puts a copy of that store into a folder of its own, which is then the working one."""

    def fresh(mutations=()):
        folder = tmp_path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)
        path = shutil.copy(whole_store, Path("gradwatch.db"))
        for mutation in mutations:
            mutation.apply(path)
        return path

    return fresh
