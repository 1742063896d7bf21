"""PostgreSQL that stops, dies or loses what it had: nothing of the records is lost."""

import subprocess
import sys
import time

import kills
import numpy as np
import pytest
import torch
from loops import mlp, train

import gradwatch
from gradwatch import Agent, process
from gradwatch.recovery import recover


def started(url, name, **settings):
    """A run that has stored ten steps, and looks at the store only when it has more."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    quiet = gradwatch.Settings(heartbeat_interval=30, **settings)
    agent = Agent(optimizer, model=model, store=url, run=name, settings=quiet)
    train(model, optimizer, 10)
    assert agent.flush(30)
    return agent, model, optimizer


def test_a_server_that_is_stopped_and_started(postgres_server, url, query, caplog):
    """Training goes on, one warning; what was recorded meanwhile is stored afterwards."""
    agent, model, optimizer = started(url, "patient")
    postgres_server.stop()
    train(model, optimizer, 500)
    assert not agent.flush(0.3)
    train(model, optimizer, 500)
    assert not agent.flush(0.3)
    postgres_server.start()
    assert agent.flush(60)
    agent.close()
    assert query("SELECT count(*), min(step), max(step) FROM steps") == [(1010, 0, 1009)]
    assert len([m for m in caplog.messages if "records are kept" in m]) == 1
    assert "is the server up, and the URL right?" in caplog.text
    assert "takes records again" in caplog.messages[-1]
    assert {record.name for record in caplog.records} == {"gradwatch"}
    assert not agent._recording.channel.ring.path.exists()


def seconds(act):
    """How long a call takes."""
    start = time.monotonic()
    act()
    return time.monotonic() - start


def test_a_server_that_hangs_holds_close_as_long_as_the_setting_says(
    postgres_server, url, query, caplog
):
    """The rest is in the flight recorder, which the warning names, and no step is missing in the end."""
    assert gradwatch.Settings().close_timeout == 3.0
    agent, model, optimizer = started(url, "held", close_timeout=0.5)
    with postgres_server.hanging():
        train(model, optimizer, 100)
        assert seconds(agent.close) < 1.5
        channel = agent._recording.channel
        told = [m for m in caplog.messages if "ended before all of it was stored" in m]
        assert len(told) == 1
        assert str(channel.ring.path) in told[0]
    assert channel.closed.wait(30)
    channel.store.sink.dispose()
    recover(url)
    assert query("SELECT count(*), count(DISTINCT step) FROM step_records") == [(110, 110)]
    assert len([m for m in caplog.messages if "ended before all of it was stored" in m]) == 1


def test_a_server_that_hangs_holds_the_first_fork_as_long_as_the_setting_says(postgres_server, url):
    """The next does not wait, and the worker goes on once the server does."""
    assert gradwatch.Settings().fork_timeout == 0.2
    agent, model, optimizer = started(url, "forks")
    with postgres_server.hanging():
        train(model, optimizer, 100)
        assert not agent.flush(0.5)  # it waits for the server's answer by now
        took = [seconds(fork) for _ in range(2)]
        assert 0.2 <= took[0] < 1.0
        assert took[1] < 0.1
    assert agent.flush(30)
    agent.close()


def fork():
    """What a fork waits for, without the child."""
    process.pipeline().before_fork()
    process.pipeline().after_fork()


@pytest.fixture
def forgetful(postgres_server):
    """The server, keeping commits that need not be durable in memory until it is asked to stop."""
    postgres_server.stop()
    postgres_server.start(wal_writer_delay="10s")
    yield postgres_server
    postgres_server.stop()


def lose(server, query, agent, model, optimizer, stored):
    """Store, and kill the server at once, until it has lost some of it; how many steps there were.

    It writes every ten seconds all the same, and may do so in between.
    """
    for _ in range(5):
        train(model, optimizer, 300)
        stored += 300
        assert agent.flush(30)
        server.kill()
        server.start(wal_writer_delay="10s")
        if query("SELECT count(*) FROM steps")[0][0] < stored:
            return stored
    return pytest.fail("the server has lost nothing in five kills")


def test_a_server_that_is_killed_loses_nothing(forgetful, url, query):
    """`kill -9` of the server under a live run, which has lost steps that it had said it stored."""
    agent, model, optimizer = started(url, "robust")
    steps = lose(forgetful, query, agent, model, optimizer, 10) + 100
    train(model, optimizer, 100)
    assert agent.flush(60)
    agent.close()
    assert query("SELECT count(*), count(DISTINCT step), max(step) FROM step_records") == [
        (steps, steps, steps - 1)
    ]
    assert query("SELECT status FROM runs") == [("finished",)]


def test_a_run_that_ends_after_the_server_was_killed_keeps_its_ring(forgetful, url, query):
    """All was stored, then the server lost it: the end of the run finds out and stores it again."""
    agent, model, optimizer = started(url, "last")
    steps = lose(forgetful, query, agent, model, optimizer, 10)
    agent.close()
    assert query("SELECT count(*), max(step) FROM step_records") == [(steps, steps - 1)]
    assert not agent._recording.channel.ring.path.exists()


def test_what_has_ended_is_durable(forgetful, url, query):
    """Once a run's ring is removed, killing the server loses nothing of it."""
    agent, *_ = started(url, "ended")
    agent.close()
    assert not agent._recording.channel.ring.path.exists()
    forgetful.kill()
    forgetful.start()
    assert query("SELECT status, count(*) FROM runs JOIN steps ON run_id = id GROUP BY 1") == [
        ("finished", 10)
    ]


def test_a_database_that_was_emptied_gets_the_run_anew(url, query, caplog):
    """Every table dropped under a live run: schema and run are made again from the ring."""
    agent, model, optimizer = started(url, "phoenix")
    query("DROP SCHEMA public CASCADE")
    query("CREATE SCHEMA public")
    train(model, optimizer, 10)
    assert agent.flush(30)
    agent.close()
    assert query("SELECT count(*), max(step) FROM steps") == [(20, 19)]
    assert any("stored anew" in m for m in caplog.messages)


FORKER = """
import os, sys, torch, gradwatch
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.ones(10))
optimizer = torch.optim.SGD([weight], lr=0.1)
agent = gradwatch.Agent(optimizer, store=sys.argv[1], run="parent")
def steps(count):
    for i in range(count):
        weight.grad = torch.full((10,), float(i + 1))
        optimizer.step()
steps(10)
assert agent.flush(30)
child = os.fork()
if child == 0:
    steps(3)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
steps(10)
assert agent.flush(30)
agent.close()
"""


def test_a_connection_does_not_cross_a_fork(url, query):
    """A forked child that ends like any program leaves the parent's connection alone."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKER, url], capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert query("SELECT count(*) FROM steps") == [(20,)]


def test_a_server_that_is_slower_than_the_job_is_sent_one_step_in_several(
    postgres_server, url, query
):
    """Evenly, without a full ring, and as many as SQL misses are counted."""
    agent, _, _ = started(url, "fast", ring_steps=16_384)
    with postgres_server.connect(url.rpartition("/")[2]) as connection:
        connection.execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN PERFORM pg_sleep(0.25); RETURN NULL; END$$"
        )
        connection.execute(
            "CREATE TRIGGER slow AFTER INSERT ON step_records FOR EACH STATEMENT "
            "EXECUTE FUNCTION slow()"
        )
    channel, steps = agent._recording.channel, 120_000
    for step in range(10, steps):
        channel.ring.append(step, time.time(), step / 1e3, 1.0, 0.1, 1.0, 1.0, 1.0, 1.0, 0)
        # As fast as the store allows without a full ring, however busy the machine is.
        while step % 250 == 0 and step - channel.store.steps > 12_000:
            time.sleep(0.001)
    agent.close()
    stored = np.array(query("SELECT step FROM steps ORDER BY step"), dtype=int).ravel()
    assert agent._recording.channel.dropped() == {"thinned": steps - len(stored)}
    assert len(stored) < 0.8 * steps
    assert stored[-100:].tolist() == list(range(steps - 100, steps))
    told = [
        e["thinned"] for (e,) in query("SELECT data FROM events WHERE kind = 'records_dropped'")
    ]
    assert sum(told) == steps - len(stored)
    # One of each so many steps in a row: no gap is wider than two such groups.
    (every,) = query(
        "SELECT max((data->>'every')::int) FROM events WHERE kind = 'records_dropped'"
    )[0]
    assert np.diff(stored).max() < 2 * every


# -- jobs that are killed ----------------------------------------------------------------------


@pytest.mark.parametrize("server_dies", [False, True])
def test_a_killed_job_is_recovered(postgres_server, url, query, server_dies):
    """`kill -9` of jobs, and of the server with them: no step is missing, none is there twice."""
    jobs = range(10)
    with kills.Factory(url) as factory:
        for number in jobs:
            factory.start_and_kill(number, lambda seen, n=number: seen >= 1 + 300 * n)
    if server_dies:  # with what it had taken and not written yet
        postgres_server.kill()
        postgres_server.start()
    found = recover(url)
    assert [one.problem for one in found if one.problem] == []
    stored = dict(query("SELECT uid, count(*) FROM runs JOIN steps ON run_id = id GROUP BY uid"))
    for number in jobs:
        # The kill may have come between the record and the note that step() had returned.
        assert stored[f"uid-{number}"] - kills.returned(number) in {0, 1}
    assert query("SELECT count(*) FROM runs WHERE status != 'crashed' OR ended_at IS NULL") == [
        (0,)
    ]
    assert query(
        "SELECT count(*) FROM (SELECT count(*) n, max(step) m, count(DISTINCT step) d "
        "FROM step_records GROUP BY run_id) AS t WHERE n != m + 1 OR n != d"
    ) == [(0,)]
    assert recover(url) == []
