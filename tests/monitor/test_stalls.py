"""A loop that hangs is told as stalled, wherever a run is shown; one that pauses as usual is not."""

import contextlib
import dataclasses
import json
import sqlite3
import time
import urllib.request

import numpy as np
import pytest
from live import live
from prometheus_client.parser import text_string_to_metric_families
from stores import NOW, Job, batch, write_run

from gradwatch_dashboards import report
from gradwatch_monitor import Store, diagnose, views
from gradwatch_monitor.stalls import stall_of, status
from gradwatch_monitor.watching import Watch


def move_back(seconds):
    """Its steps were taken so much earlier; its heartbeat is of now."""
    with contextlib.closing(sqlite3.connect("gradwatch.db", timeout=20)) as connection, connection:
        connection.execute("UPDATE step_records SET time = time - ?", [seconds])


@pytest.fixture
def hanging():
    """A real job whose loop took steps of milliseconds, and has taken none for 95 seconds."""
    with live(run="hangs") as job:
        job.until(200)
        job.pause()
        assert job.agent.flush()
        move_back(95)
        yield job


def test_every_verb_tells_of_a_loop_that_hangs(run, hanging):
    """The status, the finding with its seconds and its last step, and exit status 1."""
    last = hanging.step - 1
    assert [row["status"] for row in json.loads(run("runs", "--json")[1])] == ["stalled"]
    assert "stalled" in run("runs")[1]
    code, text, _ = run("show", "hangs", "--json")
    shown = json.loads(text)
    assert (code, shown["status"], shown["live"]) == (1, "stalled", True)
    assert shown["last_time"] == pytest.approx(time.time() - 95, abs=15)
    code, text, _ = run("diagnose", "hangs", "--json")
    (finding,) = [one for one in json.loads(text) if one["finding"] == "stalled"]
    assert code == 1
    assert (finding["severity"], finding["last_step"]) == ("critical", last)
    assert finding["data"]["seconds"] == pytest.approx(95, abs=15)
    assert f"the last was step {last:,}" in finding["message"]
    text = run("diagnose", "hangs")[1]
    assert "Nothing is wrong" not in text
    assert f"Its last step, {last:,}, was taken at " in text
    assert " seconds ago" in run("show", "hangs")[1]


def test_the_report_and_the_table_of_runs_say_so(hanging):
    """As the verbs do."""
    with Store() as store:
        (row,) = views.runs_table(store).to_dict("records")
        assert row["status"] == "stalled"
        ((taken,),) = sqlite3.connect("gradwatch.db").execute("SELECT max(time) FROM steps")
        assert row["last step"].timestamp() == pytest.approx(taken, abs=1e-3)
        page = report.page(store, store.run("hangs"))
    assert '<span class="status">stalled</span>' in page
    assert "no step has been taken for" in page
    assert hanging.agent.run_id in page


def test_the_exporter_tells_the_time_of_the_last_step_and_the_limit(hanging):
    """What the alert compares: both are numbers of the run itself."""
    with urllib.request.urlopen(hanging.agent.metrics_url, timeout=10) as answer:
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(answer.read().decode())
            for sample in family.samples
        }
    assert found["gradwatch_stalled_after_seconds"] == 30.0
    assert found["gradwatch_last_step_timestamp_seconds"] == pytest.approx(time.time(), abs=20)


def test_the_monitor_finds_it_without_a_new_step_and_ends_it_with_one(hanging):
    """On record and exported as critical; over as soon as the loop goes on."""
    with Store() as store:
        watch = Watch()
        move_back(-95)
        watch.look(store)
        assert exported(watch) == {}
        move_back(95)
        watch.look(store)
        assert exported(watch) == {"active": 1.0, "critical": 1.0}
        assert open_findings(store) == ["stalled"]
        watch.look(store)
        assert exported(watch) == {"active": 1.0, "critical": 1.0}
        hanging.go_on()
        hanging.until(hanging.step + 5)
        watch.look(store)
        assert exported(watch) == {"active": 0.0, "critical": 0.0}
        assert open_findings(store) == []


def exported(watch):
    return {
        sample.name.removeprefix("gradwatch_finding_"): sample.value
        for family in text_string_to_metric_families(watch.exposition().decode())
        for sample in family.samples
        if sample.labels.get("finding") == "stalled"
    }


def open_findings(store):
    return [f.finding for f in store.findings(1) if f.ended_at is None and f.finding == "stalled"]


def test_a_run_that_has_ended_is_silent_or_took_one_step_is_not_stalled():
    """Whatever time has passed since."""
    ended = write_run(run="ended", steps=50)
    one = write_run(run="one", steps=1, close=False)
    silent = write_run(run="silent", steps=50, close=False)
    move_back(4000)
    with Store() as store:
        assert status(store, store.run("ended")) == "finished"
        assert status(store, store.run("one")) == "running"
        row = store.run("silent")
        assert status(store, row) == "stalled"
        assert status(store, dataclasses.replace(row, heartbeat_at=time.time() - 61)) == "silent"
        assert [f.finding for f in diagnose(store, store.run("one").id)] == []
    assert len({agent.run_id for agent in (ended, one, silent)}) == 3


class Loop:
    """A stored run with steps of 0.1 s, whose heartbeat is as late as one says."""

    def __init__(self):
        self.now = NOW
        self.job, self.next = None, 0
        self.attempt()

    def attempt(self, after=0.0):
        """Resume it, so many seconds after its last step."""
        self.now += after
        self.job = Job("sqlite:///gradwatch.db", f"ring at {self.next}", self.next)

    def train(self, steps, pause=0.0):
        """Take steps, after a pause."""
        times = self.now + pause + 0.1 * np.arange(1, steps + 1)
        self.now = times[-1]
        every = range(self.next, self.next + steps)
        records = batch(self.next, steps, time=times, pre_norm=1.0, loss=1.0).steps
        for part in np.split(records, range(10_000, steps, 10_000)):
            self.job.write(part)
        self.next = every.stop

    def stalled_after(self, seconds):
        """Whether it counts as stalled when its heart beats so long after its last step."""
        with Store("gradwatch.db") as store:
            (row,) = store.runs()
            row = dataclasses.replace(row, heartbeat_at=self.now + seconds)
            return stall_of(store, row, now=self.now + seconds + 1) is not None


def test_an_evaluation_is_a_stall_the_first_time_alone():
    """From the second on it is as long as one that the run has come back from."""
    loop = Loop()
    loop.train(500)
    assert not loop.stalled_after(29)
    assert loop.stalled_after(31)
    loop.train(500, pause=300)
    assert not loop.stalled_after(310)
    assert loop.stalled_after(460)


def test_an_evaluation_once_in_thirty_thousand_steps_is_remembered():
    """Though none of the steps that are read as they are shows it."""
    loop = Loop()
    loop.train(30_500)
    for _ in range(2):
        loop.train(30_000, pause=300)
    assert not loop.stalled_after(310)
    assert loop.stalled_after(600)


def test_blocks_that_were_slower_as_a_whole_hold_no_pause():
    """A phase of slow steps a while ago does not make the loop's hang invisible."""
    loop = Loop()
    for _ in range(10):
        loop.train(1000, pause=0.0)
        loop.now += 0.0
    slow = batch(loop.next, 10_000, time=loop.now + 2.0 * np.arange(1, 10_001), pre_norm=1.0).steps
    loop.job.write(slow)
    loop.now, loop.next = slow["time"][-1], loop.next + 10_000
    loop.train(40_000)
    assert not loop.stalled_after(29)
    assert loop.stalled_after(60)


def test_a_night_between_two_attempts_is_no_pause():
    """Neither where both are read as they are, nor where the first is blocks."""
    loop = Loop()
    loop.train(25_000)
    loop.attempt(after=40_000)
    loop.train(500)
    assert loop.stalled_after(31)
    loop.train(40_000)
    assert loop.stalled_after(31)


def test_a_store_that_was_out_of_reach_is_no_stall():
    """A job that cannot reach it gives neither steps nor heartbeats, for as long as it counts as live."""
    loop = Loop()
    loop.train(500)
    with Store("gradwatch.db") as store:
        (row,) = store.runs()
        row = dataclasses.replace(row, heartbeat_at=loop.now + 1)
        assert row.is_live(loop.now + 50)
        assert stall_of(store, row, now=loop.now + 50) is None
