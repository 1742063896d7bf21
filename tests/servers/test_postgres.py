"""A real PostgreSQL as the store: what is in it equals what was trained, whatever is done to it."""

import math
import time

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from loops import mlp, set_gradients, train
from stores import batch, write_run

from gradwatch import Agent, errors, schema
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import run_info
from gradwatch_dashboards.doctor import examine
from gradwatch_monitor import Store
from gradwatch_monitor.migrations import configuration, migrate
from gradwatch_monitor.store import STEP_COLUMNS


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


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


def test_a_database_of_encoding_sql_ascii_stores_and_reads_names(postgres_server):
    """Letters beyond ASCII are in it as UTF-8, and `Store` reads them back."""
    name = "prüfung-Ω"
    url = postgres_server.new_database(
        "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    )
    model = mlp()
    optimizer = adamw(model)
    agent = Agent(optimizer, model=model, run=name, store=url, tags={"größe": "ß"})
    train(model, optimizer, 5)
    agent.close()
    assert postgres_server.query(url, "SHOW server_encoding") in (
        [("SQL_ASCII",)],
        [(b"SQL_ASCII",)],
    )
    ((stored, steps),) = postgres_server.query(
        url, "SELECT convert_to(name, 'SQL_ASCII'), (SELECT count(*) FROM steps) FROM runs"
    )
    assert (stored, steps) == (name.encode(), 5)
    with Store(url) as store:
        assert [run.name for run in store.runs()] == [name]
