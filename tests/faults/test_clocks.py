"""A wall clock that is set back and forth under a job: nothing is out of order, nobody is dead."""

import itertools
import json
import time

import pytest
from jobs import check_stored, query, stored, wait_until
from typer.testing import CliRunner

from gradwatch_dashboards.cli import app
from gradwatch_monitor import Store, views

HOUR = 3600.0
# Set two hours back after 100 steps, a day ahead after 200, right from 300 on.
JUMPS = """
import time
from gradwatch import clock
real, shift = time.time, [0.0]
time.time = lambda: real() + shift[0]
clock.SystemClock.time = staticmethod(time.time)
def each(step):
    if step <= 300 and step % 100 == 0:
        shift[0] = {100: -7200.0, 200: 86400.0, 300: 0.0}[step]
"""


def shown(verb, *arguments, store):
    result = CliRunner().invoke(app, [verb, *arguments, "--json", "--store", str(store)])
    told = json.loads(result.stdout)
    assert result.exit_code == (1 if verb == "show" and told["findings"] else 0), result.output
    return told


def test_a_clock_that_jumps(factory, tmp_path):
    """Steps are in their order, all of them stored, and the run is live while it is."""
    store = tmp_path / "runs.db"
    job = factory.start(tmp_path / "job", store, code=JUMPS, GRADWATCH_HEARTBEAT_INTERVAL="0.1")
    wait_until(lambda: stored(store) > 350, job.said)
    (run,) = shown("runs", store=store)
    assert (run["status"], run["live"]) == ("running", True)
    there = stored(store)
    wait_until(lambda: stored(store) > there, job.said)  # the worker has not fallen asleep
    job.end()
    assert job.said() == []
    check_stored(store, job)

    times = [at for (at,) in query(store, "SELECT time FROM steps ORDER BY step")]
    leaps = [round((b - a) / HOUR) for a, b in itertools.pairwise(times)]
    assert [leap for leap in leaps if leap] == [-2, 26, -24]
    ((started, beat, ended),) = query(store, "SELECT started_at, heartbeat_at, ended_at FROM runs")
    assert started < ended == pytest.approx(time.time(), abs=60)
    assert beat == pytest.approx(ended, abs=60)
    told = shown("show", "python", store=store)
    assert told["steps"] == job.steps()
    with Store(str(store)) as opened:
        timeline = views.Timeline(1)
        timeline.refresh(opened)
    frame = views.norms_chart(timeline)
    assert frame["step"].is_monotonic_increasing


def test_a_run_that_ends_while_the_clock_is_behind(factory, tmp_path):
    """Its end is on record, at the time the clock said."""
    store = tmp_path / "runs.db"
    code = JUMPS.replace("300: 0.0", "300: -7200.0")
    job = factory.start(tmp_path / "job", store, code=code)
    wait_until(lambda: job.steps() > 350, job.said)
    job.end()
    check_stored(store, job)
    (run,) = shown("runs", store=store)
    assert (run["status"], run["live"]) == ("finished", False)
    shown("show", "python", store=store)
