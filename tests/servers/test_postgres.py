"""A real PostgreSQL as the store: what is in it equals what was trained, whatever is done to it."""

import math
import subprocess
import sys
import threading
import time

import kills
import numpy as np
import pytest
import sqlalchemy as sa
import torch
from loops import mlp, set_gradients, train
from stores import write_run

import gradwatch
from gradwatch import Agent, errors, schema
from gradwatch.recorder import STEP_DTYPE
from gradwatch.records import Batch
from gradwatch.recovery import recover
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import run_info
from gradwatch_dashboards.doctor import examine
from gradwatch_monitor import Store
from gradwatch_monitor.migrations import configuration, migrate
from gradwatch_monitor.store import STEP_COLUMNS


@pytest.fixture
def url(postgres_server):
    """An empty database's URL."""
    return postgres_server.new_database()


@pytest.fixture
def query(postgres_server, url):
    """Rows of that database, by psycopg itself."""
    return lambda sql, *arguments: postgres_server.query(url, sql, *arguments)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def batch(first, count, *, time=1_700_000_000.0, flags=0, **columns):
    """Records as the worker hands them over."""
    steps = np.zeros(count, STEP_DTYPE)
    steps["step"] = np.arange(first, first + count)
    steps["time"], steps["flags"] = time, flags
    for name, values in columns.items():
        steps[name] = values
    return Batch(steps, (), (), (), (first, 0), (first + count, 0), {})


# -- what is stored ----------------------------------------------------------------------------


def test_sql_equals_what_was_trained(url, query):
    """Every column of `steps`, against the norms torch gives for the same gradients."""
    model = mlp()
    optimizer = adamw(model)
    agent = Agent(optimizer, model=model, run="first", store=url, tags={"lr": 0.01})
    expected = []
    for step in range(30):
        set_gradients(step, model)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        agent.log(loss=math.inf if step == 9 else step / 10)
        if step == 7:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        nan = step == 7
        expected.append(
            (step, None if step == 9 else step / 10, 0.01, None if nan else norm,
             None if nan else min(norm, 1.0), 1.0, None, not nan and norm > 1.0, nan, step == 9,
             nan)
        )  # fmt: skip
    assert agent.flush()
    rows = query(
        "SELECT step, loss, lr, pre_norm, post_norm, threshold, loss_scale, clipped, nonfinite,"
        " nonfinite_loss, skipped FROM steps WHERE run_id = 1 ORDER BY step"
    )
    assert len(rows) == 30
    for row, wanted in zip(rows, expected, strict=True):
        assert [v is None for v in row] == [v is None for v in wanted]
        numbers = [(v, w) for v, w in zip(row, wanted, strict=True) if v is not None]
        assert [v for v, _ in numbers] == pytest.approx([w for _, w in numbers], rel=1e-5)
    assert query("SELECT name, status, tags FROM runs") == [("first", "running", {"lr": 0.01})]
    ((data,),) = query("SELECT data FROM events WHERE kind = 'nonfinite_gradient' AND step = 7")
    assert data["parameters"] == {"0.weight": "nan"}
    assert query("SELECT DISTINCT parameter FROM layer_norms WHERE step = 7 ORDER BY 1") == sorted(
        (name,) for name, _ in model.named_parameters()
    )
    agent.close()
    assert query("SELECT status, ended_at IS NOT NULL FROM runs") == [("finished", True)]
    assert not agent._recording.channel.ring.path.exists()


@pytest.mark.parametrize("count", [5, 3000], ids=["one statement", "COPY"])
def test_what_is_not_finite_is_null_however_it_is_stored(url, query, count):
    """NaN and inf poison no average; flags are booleans; a record stored twice is there once."""
    sink = DatabaseSink(url)
    run = sink.open(run_info())
    norms = np.arange(count) + 0.5
    norms[1], norms[2], norms[3] = math.nan, math.inf, -math.inf
    sink.write(run, batch(0, count, pre_norm=norms, loss=math.nan, flags=1 | 8))
    assert query("SELECT count(*), count(pre_norm), count(loss) FROM steps") == [
        (count, count - 3, 0)
    ]
    ((average,),) = query("SELECT avg(pre_norm) FROM steps")
    assert average == pytest.approx(norms[np.isfinite(norms)].mean())
    assert query("SELECT DISTINCT clipped, nonfinite, nonfinite_loss, skipped FROM steps") == [
        (True, False, False, True)
    ]
    query("UPDATE rings SET step_cursor = 0")  # as if the records had come without it
    sink.write(run, batch(0, count, pre_norm=norms))
    assert query("SELECT count(*), min(clipped::int) FROM step_records") == [(count, 1)]
    sink.dispose()


@pytest.mark.parametrize("count", [5, 3000], ids=["one statement", "COPY"])
def test_somebody_else_stored_from_this_ring(url, query, count):
    """A batch that does not begin where the cursor stands is refused, and the sink says why."""
    from gradwatch.sinks import CursorMovedError

    sink, other = DatabaseSink(url), DatabaseSink(url)
    run = sink.open(run_info())
    assert other.open(run_info()) == run
    sink.write(run, batch(0, 7))
    with pytest.raises(CursorMovedError) as caught:
        other.write(run, batch(0, count))
    assert (caught.value.steps, caught.value.events) == (7, 0)
    other.write(run, batch(7, count))
    with pytest.raises(CursorMovedError):
        sink.heartbeat(run)
    assert query("SELECT count(*), count(DISTINCT step) FROM step_records") == [
        (7 + count, 7 + count)
    ]
    sink.dispose()
    other.dispose()


def fill(url):
    """Two attempts, NaNs, events, layer norms and a finding's worth of a run."""
    model = mlp()
    optimizer = adamw(model)
    agent = Agent(optimizer, model=model, run="same", store=url)
    for step in range(40):
        set_gradients(step, model)
        if step in {5, 35}:
            model[2].weight.grad[0, 0] = math.nan
        agent.log(loss=1 / (1 + step))
        optimizer.step()
    agent.load_state_dict({**agent.state_dict(), "step": 30})
    for step in range(20):
        set_gradients(100 + step, model)
        optimizer.step()
    agent.close()


def test_both_databases_show_the_same(url):
    """The same training into SQLite and PostgreSQL: frames, events, summaries are equal."""
    fill("gradwatch.db")
    fill(url)
    with Store("gradwatch.db") as one, Store(url) as other:
        a, b = one.run("same"), other.run("same")
        assert (a.status, a.tags, a.settings["clip"]) == (b.status, b.tags, b.settings["clip"])
        frames = [store.steps(run.id).drop(columns="time") for store, run in ((one, a), (other, b))]
        assert len(frames[0]) == 50
        assert list(frames[0].columns) == [c for c in STEP_COLUMNS if c != "time"]
        assert frames[0].dtypes.equals(frames[1].dtypes)
        assert frames[0].equals(frames[1])
        told = [
            [(e.step, e.kind, e.severity, e.rank) for e in store.events(run.id)]
            for store, run in ((one, a), (other, b))
        ]
        assert told[0] == told[1]
        # That of step 35 belongs to what the second attempt hides.
        assert [step for step, kind, *_ in told[0] if kind == "nonfinite_gradient"] == [5]
        summaries = [store.summary(run.id) for store, run in ((one, a), (other, b))]
        assert summaries[0].last_time is not None
        for field in ("steps", "clipped", "nonfinite", "skipped", "last_step", "last_pre_norm"):
            assert getattr(summaries[0], field) == getattr(summaries[1], field)
        assert [len(store.findings(run.id)) for store, run in ((one, a), (other, b))] == [0, 0]
        assert one.last_step(a.id) == other.last_step(b.id) == 49


def test_an_empty_database_is_no_store_yet(url):
    """Nothing is wrong with it: the first job makes the tables."""
    with pytest.raises(errors.StoreNotFoundError, match="makes it at its first step"):
        Store(url)
    (check,) = (check for check in examine(url, {}) if check.subject == "store")
    assert (check.status, "not there yet" in check.detail) == ("ok", True)


def test_findings_are_stored_and_read(url):
    """A loop that clips before the step is named in PostgreSQL too."""
    model = mlp()
    optimizer = adamw(model)
    agent = Agent(optimizer, model=model, store=url, run="twice")
    for step in range(200):
        set_gradients(step, model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    agent.close()
    with Store(url) as store:
        (finding,) = store.findings(store.run("twice").id)
    assert "clip" in finding.message


def test_a_threshold_applied_through_postgres_is_taken(url):
    """`Store.apply` writes, the live run takes it and confirms; reading cannot write."""
    model = mlp()
    optimizer = adamw(model)
    agent = Agent(optimizer, model=model, store=url, run="live", remote_control=True)
    train(model, optimizer, 3)
    assert agent.flush()
    with Store(url) as store:
        run = store.run("live")
        asked = store.apply(run.id, 0.25, by="test", reason="because")
        deadline = time.monotonic() + 30
        while agent.threshold != 0.25:
            train(model, optimizer, 1)
            assert time.monotonic() < deadline
        assert agent.flush()
        (change,) = store.changes(run.id)
        assert (change.id, change.threshold, change.previous) == (asked.id, 0.25, 1.0)
        assert change.applied_step is not None
        frame = store.steps(run.id)
        assert set(frame["threshold"][change.applied_step :]) == {0.25}
        with pytest.raises(errors.StoreError, match="read-only"), store._reading() as connection:
            connection.execute(sa.text("DELETE FROM layer_norms"))
    agent.close()


# -- the schema --------------------------------------------------------------------------------


def shape(query):
    """All that PostgreSQL's catalogue says of columns, indexes, constraints and views."""
    return [
        query(sql)
        for sql in (
            (
                "SELECT table_name, column_name, ordinal_position, data_type, is_nullable, "
                "character_maximum_length FROM information_schema.columns "
                "WHERE table_schema = 'public' ORDER BY table_name, column_name"
            ),
            "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1",
            (
                "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) "
                "FROM pg_constraint WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2"
            ),
            "SELECT pg_get_viewdef('steps'::regclass)",
            (
                "SELECT relname, reloptions, pg_get_expr(relpartbound, oid), relkind FROM pg_class "
                "WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
            ),
            "SELECT * FROM gradwatch_revision",
        )
    ]


def without_positions(columns):
    """A column that was added later stands last."""
    return [(table, column, *rest) for table, column, _, *rest in columns]


def test_migrations_make_what_the_agent_makes(postgres_server):
    """PostgreSQL's own catalogue cannot tell a migrated empty database from the agent's."""
    agents, migrated = postgres_server.new_database(), postgres_server.new_database()
    sink = DatabaseSink(agents)
    sink.open(run_info())
    sink.dispose()
    assert migrate(migrated) == (None, schema.REVISION)
    assert migrate(migrated) == (schema.REVISION, schema.REVISION)
    one, other = (shape(lambda sql, u=u: postgres_server.query(u, sql)) for u in (agents, migrated))
    assert without_positions(one[0]) == without_positions(other[0])
    assert one[1:] == other[1:]
    write_run(migrated, steps=5)
    with Store(migrated) as store:
        assert len(store.steps(1)) == 5


def test_a_store_of_the_first_revision_is_migrated_with_all_it_holds(url, query):
    """Two attempts stored under 0001 show the same timeline after, in the partitions of their days."""
    from alembic import command

    engine = sa.create_engine(url)
    with engine.begin() as connection:
        command.upgrade(configuration(connection), "0001")
    engine.dispose()
    query(
        "INSERT INTO runs VALUES (DEFAULT, 'u', 'n', 'j', 5.0, NULL, 5.0, 'running', 'h', 1, 1, "
        "'{}', '{}', NULL)"
    )
    query("INSERT INTO attempts VALUES (1, 1, 0), (1, 2, 3)")
    for attempt, step in [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 3)]:
        query(
            "INSERT INTO step_records (run_id, attempt, step, time, clipped, nonfinite, "
            "nonfinite_loss, skipped) VALUES (1, %s, %s, %s, false, false, false, false)",
            attempt, step, 1.7e9 + 86_400 * step,
        )  # fmt: skip
    with pytest.raises(errors.StoreRevisionError, match="store migrate"):
        Store(url)
    assert migrate(url) == ("0001", schema.REVISION)
    assert query("SELECT attempt, step FROM steps ORDER BY step") == [
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 3),
    ]
    assert query("SELECT started_at, position FROM attempts ORDER BY 2") == [(5.0, 1.0), (5.0, 2.0)]
    assert query("SELECT count(DISTINCT tableoid), count(*) FROM step_records") == [(5, 6)]
    sink = DatabaseSink(url)
    sink.write(sink.open(run_info()), batch(0, 3))
    assert query("SELECT count(*) FROM steps") == [(7,)]
    sink.dispose()


def test_somebody_elses_database_is_left_alone(url, query):
    """Tables of the same names that are not ours: refused by agent, reader and migration."""
    query("CREATE TABLE runs (x int)")
    from gradwatch.sinks import SinkError

    with pytest.raises(SinkError, match="not a gradwatch store.*runs"):
        DatabaseSink(url).open(run_info())
    with pytest.raises(errors.StoreError, match="not a gradwatch store"):
        Store(url)
    with pytest.raises(errors.StoreError, match="not a gradwatch store"):
        migrate(url)
    assert query("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(1,)]


WRITER = """
import sys, torch, gradwatch
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.ones(10))
optimizer = torch.optim.SGD([weight], lr=0.1)
agent = gradwatch.Agent(optimizer, store=sys.argv[1], run="same")
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    weight.grad = torch.full((10,), float(i + 1))
    optimizer.step()
assert agent.flush(30)
print("stored", flush=True)
sys.stdin.readline()
"""


def test_four_processes_write_one_new_store(url, query):
    """Started at once on an empty database: every step once, each run its own name."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, url], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    for word in ("ready\n", "stored\n"):
        for process in processes:
            assert process.stdout.readline() == word
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
    for process in processes:
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
        assert not told
    rows = query("SELECT name, status, count(*) FROM runs JOIN steps ON run_id = id GROUP BY 1, 2")
    assert sorted(rows) == [(n, "finished", 300) for n in ("same", "same-2", "same-3", "same-4")]


# -- days --------------------------------------------------------------------------------------


def test_every_day_has_its_partition(url, query):
    """A batch over midnights makes what it needs; what no clock can say goes to the outer ones."""
    sink = DatabaseSink(url)
    run = sink.open(run_info())
    midnight = 1_700_006_400.0  # 2023-11-15
    absurd = [0.0, -5.0, 1e300, math.inf, math.nan, 4_102_444_800.0, 1_577_836_799.9]
    times = [midnight - 0.001, midnight, midnight + 86_399.9, midnight + 86_400, *absurd]
    sink.write(run, batch(0, len(times), time=times))
    found = dict(query("SELECT tableoid::regclass::text, count(*) FROM step_records GROUP BY 1"))
    assert found == {
        "step_records_20231114": 1,
        "step_records_20231115": 2,
        "step_records_20231116": 1,
        "step_records_before": 5,  # 0, −5, inf and NaN, which are no time, and the end of 2019
        "step_records_after": 2,
    }
    assert query("SELECT count(*) FROM steps") == [(len(times),)]
    sink.dispose()


def test_a_day_that_was_dropped_is_made_again(url, query):
    """Somebody drops a partition under a live run: a late record of that day is stored all the same."""
    sink = DatabaseSink(url)
    run = sink.open(run_info())
    sink.write(run, batch(0, 3))
    query("DROP TABLE step_records_20231114")
    sink.write(run, batch(3, 3))
    sink.write(run, batch(6, 1000))
    query("ALTER TABLE step_records DETACH PARTITION step_records_20231114")
    sink.write(run, batch(1006, 3))
    assert query("SELECT count(*) FROM steps") == [(1006,)]
    sink.dispose()


def test_many_make_one_day_at_once(postgres_server, url, query):
    """Twelve connections at one midnight: one partition, no error, every record once."""
    first = DatabaseSink(url)
    first.open(run_info(ring="ring-0", uid="0"))
    barrier = threading.Barrier(12)
    failures = []

    def write(n):
        sink = DatabaseSink(url)
        run = sink.open(run_info(ring=f"ring-{n}", uid=str(n)))
        barrier.wait()
        try:
            sink.write(run, batch(0, 20, time=1.7e9 + 86_400 * np.arange(20)))
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)
        sink.dispose()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.dispose()
    assert failures == []
    assert query("SELECT count(*), count(DISTINCT tableoid) FROM step_records") == [(240, 20)]


def test_a_new_day_waits_for_no_reader(postgres_server, url):
    """A reader in the middle of a long look holds up no new partition, nor the other way round."""
    sink = DatabaseSink(url)
    run = sink.open(run_info())
    sink.write(run, batch(0, 3))
    with postgres_server.connect(url.rpartition("/")[2]) as reader, reader.transaction():
        reader.execute("SELECT count(*) FROM steps")
        reader.execute("SET LOCAL lock_timeout TO '1s'")
        sink.write(run, batch(3, 3, time=1.8e9))
        held = reader.execute(
            "SELECT count(*) FROM pg_locks WHERE relation = 'step_records'::regclass "
            "AND mode = 'AccessExclusiveLock'"
        ).fetchone()
        assert held == (0,)
        assert reader.execute("SELECT count(*) FROM steps").fetchone() == (6,)
    sink.dispose()


# -- a server that goes away -------------------------------------------------------------------


def started(url, name):
    """A run that has stored ten steps, and looks at the store only when it has more."""
    model = mlp()
    optimizer = adamw(model)
    quiet = gradwatch.Settings(heartbeat_interval=30)
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
