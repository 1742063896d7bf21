"""The worker: finalizers, stores and sinks that fail under it."""

import gc
import sqlite3
import threading
import urllib.request

import pytest
import torch
from jobs import wait_until
from loops import one_parameter, watched

from gradwatch import process
from gradwatch.channel import Channel
from gradwatch.delivery import Delivery
from gradwatch.recorder import Ring
from gradwatch.sinks import NullSink
from gradwatch.testing import ManualClock, MemorySink, run_info
from gradwatch.troubles import Troubles


def test_the_garbage_collector_may_end_a_run_anywhere(monkeypatch):
    """Inside the lock of the very event that wakes the worker: it takes no lock, so none can hang."""
    weight, optimizer = one_parameter()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # a reference cycle
    agent, sink = watched(optimizer)
    weight.grad = torch.ones(4)
    optimizer.step()
    assert agent.flush()
    pipeline = process.pipeline()
    done = threading.Event()

    def collect():
        # What the collector does in the middle of Event.set, whose lock is not reentrant.
        with pipeline._wake._cond:
            gc.collect()
        done.set()

    del weight, optimizer, scheduler
    threading.Thread(target=collect, daemon=True).start()
    assert done.wait(20), "the finalizer waits for a lock that its own thread holds"
    channel = agent._recording.channel
    assert channel.closed.wait(20)
    assert sink.statuses == ["finished"]
    assert agent.flush()


def steps_in(path):
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT count(*) FROM steps").fetchone()[0]


@pytest.mark.parametrize("fork", [False, True])
def test_a_store_that_is_deleted_is_made_anew(tmp_path, fork, caplog):
    """With all that the flight recorder holds; `flush` tells the truth."""
    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer, store="runs.db")
    for half in range(2):
        for _ in range(5):
            weight.grad = torch.ones(4)
            optimizer.step()
        assert agent.flush()
        if half == 0:
            for file in tmp_path.glob("runs.db*"):
                if file.is_file():
                    file.unlink()
            if fork:
                process.pipeline().before_fork()
                process.pipeline().after_fork()
    agent.close()
    assert steps_in("runs.db") == 10
    assert caplog.text.count("deleted or emptied") == 1
    assert not list(tmp_path.glob("*.rings/*.ring"))


def test_a_locked_store_is_one_warning_and_the_end_is_on_record(caplog):
    """Another writer holds the lock for two seconds while the run goes on and ends."""
    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer, store="runs.db")
    weight.grad = torch.ones(4)
    optimizer.step()
    assert agent.flush()
    locked, release = threading.Event(), threading.Event()

    def lock():
        connection = sqlite3.connect("runs.db", isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        locked.set()
        release.wait(2.0)
        connection.execute("ROLLBACK")
        connection.close()

    holder = threading.Thread(target=lock)
    holder.start()
    assert locked.wait(10)
    for _ in range(20):
        weight.grad = torch.ones(4)
        optimizer.step()
    agent.close()
    release.set()
    holder.join()
    assert steps_in("runs.db") == 21
    with sqlite3.connect("runs.db") as connection:
        status, ended = connection.execute("SELECT status, ended_at FROM runs").fetchone()
    assert status == "finished"
    assert ended is not None
    assert caplog.text.count("database is locked") <= 1


def test_a_sink_that_raises_anything_stops_no_other():
    """A user's own sink with a bug: said once; the exporter has the steps."""

    class Broken(MemorySink):
        def write(self, run, batch):
            raise TypeError("a bug")

    weight, optimizer = one_parameter()
    agent, _ = watched(optimizer, store=Broken(), metrics_port=0)
    weight.grad = torch.ones(4)
    optimizer.step()
    assert not agent.flush(0.5)

    def scraped():
        return urllib.request.urlopen(agent.metrics_url).read().decode()

    wait_until(lambda: 'gradwatch_steps_total{rank="0",run="' in scraped())
    agent.close()


def test_a_flight_recorder_file_that_is_deleted_is_said_once(tmp_path, caplog):
    """Within a minute, though the store takes all: a crash would be the next to show it."""
    path = tmp_path / "x.ring"
    ring = Ring.create(path, {}, steps=10, events=64)
    channel = Channel(run_info(), ring, NullSink(), NullSink(), parameters=list)
    clock = ManualClock()
    delivery = Delivery(clock, Troubles())
    delivery.serve(channel)
    path.unlink()
    assert not caplog.messages
    for _ in range(10):
        clock.advance(60.0)
        delivery.serve(channel)
    (message,) = caplog.messages
    assert str(path) in message
    assert "GRADWATCH_RING_DIR" in message
    ring.close()
