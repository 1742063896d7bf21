"""A job that is faster than its store: even thinning, every event kept, the newest kept, all said."""

import json
import sqlite3

import numpy as np
from typer.testing import CliRunner

from gradwatch.channel import Channel
from gradwatch.delivery import Delivery
from gradwatch.events import encode_event, nonfinite_loss
from gradwatch.layout import FLAGS
from gradwatch.recorder import Ring
from gradwatch.sinks import NullSink
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import ManualClock, run_info
from gradwatch.thinning import Thinning, sampled
from gradwatch.troubles import Troubles
from gradwatch_dashboards.cli import app
from gradwatch_monitor import Store
from gradwatch_monitor.integrity import check

CAPACITY, CAME, EVENTS_EACH = 2**15, 12_000, 5_000
STEPS = 335_000


class SlowStore(DatabaseSink):
    """While it stores a batch, the job takes `CAME` steps: three times what a batch stores."""

    def __init__(self, url, clock, ring):
        super().__init__(url, clock.time)
        self.ring, self.clock, self.taken = ring, clock, 0

    def take(self):
        for step in range(self.taken, min(self.taken + CAME, STEPS)):
            # Every other step is clipped.
            clipped = FLAGS.CLIPPED if step % 2 else 0
            self.ring.append(
                step, 1e9 + step, float(step), 1.0, 0.1, 2.0, 1.0, 1.0, float("nan"), clipped
            )
            if step % EVENTS_EACH == 0:
                self.ring.append_event(encode_event(nonfinite_loss(step, 1e9, 0, float("nan"))))
            self.taken = step + 1

    def write(self, run, batch):
        super().write(run, batch)
        self.take()
        self.clock.advance(1.0)


def query(sql):
    with sqlite3.connect("file:gradwatch.db?mode=ro", uri=True) as connection:
        return connection.execute(sql).fetchall()


def test_a_job_three_times_as_fast_as_the_store_is_thinned_evenly_and_it_is_said(tmp_path):
    """Nothing is overwritten, all events and the newest steps are there; each figure is SQL's."""
    ring, clock = Ring.create(tmp_path / "x.ring", {}, steps=CAPACITY, events=512), ManualClock()
    store = SlowStore("sqlite:///gradwatch.db", clock, ring)
    channel = Channel(run_info(), ring, store, NullSink(), parameters=list)
    delivery = Delivery(clock, Troubles())
    store.take()
    while store.taken < STEPS:
        delivery.serve(channel)
        last = query("SELECT max(step) FROM steps")[0][0]
        assert store.taken - last <= CAPACITY  # the store follows the job
    channel.end("finished", clock.monotonic() + 60.0)
    delivery.serve(channel)
    assert channel.complete

    steps = np.array(query("SELECT step FROM steps ORDER BY step")).ravel()
    missing = STEPS - len(steps)
    assert missing > STEPS // 3
    assert channel.dropped() == {"thinned": missing}
    dropped = [
        json.loads(d) for (d,) in query("SELECT data FROM events WHERE kind = 'records_dropped'")
    ]
    assert sum(data["thinned"] for data in dropped) == missing
    assert 1 <= len(dropped) <= clock.monotonic() / 60 + 1
    told = query("SELECT count(*) FROM events WHERE kind = 'nonfinite_loss'")
    assert told == [(STEPS // EVENTS_EACH,)]
    # The newest, one by one: those that waited when the run ended.
    assert steps[-100:].tolist() == [*range(STEPS - 100, STEPS)]

    every = dropped[-1]["every"]
    assert every == 4
    even = steps[(steps >= STEPS // 2) & (steps < STEPS - CAPACITY)]
    groups = np.unique(even // every, return_counts=True)
    assert groups[1][1:-1].tolist() == [1] * (len(groups[1]) - 2)
    assert np.diff(groups[0]).max() == 1  # no group is without one
    assert abs(np.mean(even % 2) - 0.5) < 0.02  # as many clipped as there were

    shown = CliRunner().invoke(app, ["show", "1", "--store", "gradwatch.db"]).output
    assert f"{missing:,} steps were left out evenly" in " ".join(shown.split())
    assert f"{len(steps):,} are in the store" in " ".join(shown.split())
    with Store("gradwatch.db") as opened:
        assert opened.left_out(1) == missing
    assert check("gradwatch.db") == []


def test_a_store_that_was_away_and_is_fast_enough_is_not_thinned():
    """What waits after an outage is stored whole, as long as it gets less from batch to batch."""
    thinning = Thinning(131_072)
    for _ in range(50):
        thinning.plan(120_000)
        thinning.failed()
    assert {thinning.plan(waiting) for waiting in range(120_000, 0, -thinning.rows // 2)} == {1}


def test_thinning_ends_when_the_store_keeps_up():
    """Half as many after each thirty batches before which hardly a step waited."""
    thinning = Thinning(131_072)
    plans = [thinning.plan(waiting) for waiting in (40_000, 50_000, 60_000, 70_000, 90_000)]
    assert plans == [1, 1, 2, 4, 8]
    assert thinning.plan(1_000) == 8
    assert [thinning.plan(1_000) for _ in range(200)][-1] == 1


def test_one_of_each_group_is_sampled_at_places_that_vary():
    """Uniformly, by the chi-squared statistic of numpy's counts."""
    for every in (2, 8, 64):
        chosen = np.flatnonzero(sampled(np.arange(every * 10_000), every))
        assert (chosen // every).tolist() == [*range(10_000)]
        counts = np.bincount(chosen % every, minlength=every)
        expected = 10_000 / every
        assert ((counts - expected) ** 2 / expected).sum() < every + 6 * np.sqrt(2 * every)
