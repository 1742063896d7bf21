"""Every query finds its rows by an index, by what both databases say of their own plans."""

import contextlib
import re
import time

import numpy as np
import pytest
import sqlalchemy as sa

from gradwatch import partitions, schema
from gradwatch.recorder import STEP_DTYPE
from gradwatch.records import Batch
from gradwatch.sinks import postgres, sqlite
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import run_info
from gradwatch_monitor import Store, recommend, timeline
from gradwatch_monitor.rows import Finding

RUNS, STEPS = 2000, 200
BLOCK = 50  # as if a block had so few steps
DAYS = [20_000, 20_001, 20_002]

# What has to be read from end to end: the list of all runs, and what has a row or a few.
WHOLE = {
    "runs": r"FROM runs ORDER BY runs.id DESC\s*(LIMIT .*)?$",
    "gradwatch_revision": "",
    "sqlite_master": "",
    "pg_": "",
    "staged_steps": "",
    "step_records_before": "",  # for times that no sane clock tells: empty here
    "step_records_after": "",
}


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def full(request, tmp_path_factory):
    """The URL of a store with many runs, each of two attempts, over three days."""
    if request.param == "postgresql":
        server = request.getfixturevalue("_postgres_server")
        if server.process is None or server.process.poll() is not None:
            server.start()
        url = server.new_database()
        engine = postgres.writing_engine(url)
    else:
        path = tmp_path_factory.mktemp("full") / "gradwatch.db"
        url = f"sqlite:///{path}"
        engine = sqlite.writing_engine(url, path)
    with engine.begin() as connection:
        schema.create(connection)
        if request.param == "postgresql":
            partitions.make(connection, DAYS)
        fill(connection)
    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    engine.dispose()
    return url


def fill(connection):
    """The same rows in both databases."""
    series = {
        "postgresql": "SELECT generate_series(0, {0} - 1) AS n",
        "sqlite": "WITH RECURSIVE t(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM t WHERE n < {0} - 1)"
        " SELECT n FROM t",
    }[connection.dialect.name]
    many = f"({series.format(RUNS)}) AS r, ({series.format(STEPS)}) AS s"
    runs = f"({series.format(RUNS)}) AS r"
    start = DAYS[0] * partitions.DAY_SECONDS
    clock = f"{start} + (r.n * {STEPS} + s.n) * {len(DAYS) * partitions.DAY_SECONDS / RUNS / STEPS}"
    no_norms = {"postgresql": r"'\x01000000'::bytea", "sqlite": "x'01000000'"}[
        connection.dialect.name
    ]
    yes, no = ("true", "false") if connection.dialect.name == "postgresql" else ("1", "0")
    for sql in (
        f"""INSERT INTO runs (uid, name, job, started_at, heartbeat_at, status, host, pid,
            world_size, tags, settings)
            SELECT 'uid-' || r.n, 'run-' || (r.n % 100), 'job', {start}, {start},
            CASE WHEN r.n % 50 = 0 THEN 'running' ELSE 'finished' END, 'host', 1, 1, '{{}}', '{{}}'
            FROM {runs}""",
        *(
            f"INSERT INTO attempts SELECT r.n + 1, {a}, {begins}, {start}, {a} FROM {runs}"
            for a, begins in ((1, 0), (2, STEPS // 2))
        ),
        f"""INSERT INTO rings
            SELECT 'ring-' || r.n, r.n + 1, 2, 0, 'host', NULL, {STEPS}, 0 FROM {runs}""",
        *(
            f"""INSERT INTO step_records SELECT r.n + 1, {a}, s.n, {clock}, 1, 1, 1, 1, 1, NULL,
                {no}, {no}, {no}, {yes} FROM {many} WHERE {which}"""
            for a, which in ((1, f"s.n < {STEPS * 6 // 10}"), (2, f"s.n >= {STEPS // 2}"))
        ),
        *(
            f"""INSERT INTO step_summaries (run_id, attempt, block, first_step, last_step, last_time,
                steps, finite, zeros, clipped, nonfinite, nonfinite_loss, skipped, amp_overflows,
                norms)
                SELECT r.n + 1, {a}, s.n, s.n * {BLOCK}, s.n * {BLOCK} + {BLOCK - 1}, {start},
                {BLOCK}, 0, 0, 0, 0, 0, 0, 0, {no_norms}
                FROM {runs}, ({series.format(20)}) AS s"""
            for a in (1, 2)
        ),
        f"""INSERT INTO events (run_id, attempt, step, time, kind, severity, message, data)
            SELECT r.n + 1, 2, s.n, {clock}, 'loss_spike', 'info', 'text', '{{}}'
            FROM {many} WHERE s.n % 10 = 9""",
        f"""INSERT INTO layer_norms
            SELECT r.n + 1, 2, s.n, 'p', 1, 1 FROM {many} WHERE s.n % 10 = 9""",
        f"""INSERT INTO findings (run_id, finding, severity, first_step, last_step, found_at,
            message, advice, data)
            SELECT r.n + 1, 'f' || s.n, 'info', 0, 1, {start}, 'm', 'a', '{{}}'
            FROM {runs}, ({series.format(5)}) AS s""",
        f"""INSERT INTO threshold_changes (run_id, requested_at, requested_by, threshold, applied_at)
            SELECT r.n + 1, {start}, 'me', 1.0, 1.0 FROM {runs}, ({series.format(5)}) AS s""",
        f"""INSERT INTO recommendations (run_id, made_at, last_step, verdict, reasons)
            SELECT r.n + 1, {start}, 9, 'keep', '[]' FROM {runs}, ({series.format(5)}) AS s""",
    ):
        connection.execute(sa.text(sql.replace(":", "\\:")))


def batch(first, count, now):
    """Records as the worker hands them over."""
    steps = np.zeros(count, STEP_DTYPE)
    steps["step"], steps["time"] = np.arange(first, first + count), now
    return Batch(steps, (), (), (), (first, 0), (first + count, 0), {})


@contextlib.contextmanager
def overheard():
    """Collects every statement that is executed meanwhile, with its values."""
    heard = []

    def hear(_connection, _cursor, statement, values, _context, many):
        heard.append((statement, values[0] if many else values))

    sa.event.listen(sa.Engine, "before_cursor_execute", hear)
    yield heard
    sa.event.remove(sa.Engine, "before_cursor_execute", hear)


def is_whole(table, statement):
    """Whether this table has to be read from end to end to answer this."""
    return any(table.startswith(t) and re.search(which, statement) for t, which in WHOLE.items())


def scanned(url, heard):
    """Of each statement, the tables that are read from end to end to answer it."""
    engine = sa.create_engine(url)
    found = []
    with engine.connect() as connection:
        if any("staged_steps" in statement for statement, _ in heard):
            connection.exec_driver_sql(next(s for s, _ in heard if "TEMPORARY" in s))
        on_postgres = connection.dialect.name == "postgresql"
        explain = "EXPLAIN " if on_postgres else "EXPLAIN QUERY PLAN "
        scan = r"Seq Scan on (\w+)" if on_postgres else r"^SCAN (\w+)(?! USING)"
        for statement, values in heard:
            if re.match(r"\s*(SELECT|WITH|UPDATE|INSERT|DELETE)\b", statement) is None:
                continue
            rows = connection.exec_driver_sql(explain + statement, values).fetchall()
            plan = "\n".join(str(row[-1]) for row in rows)
            found += [
                (table, statement, plan)
                for table in re.findall(scan, plan, re.MULTILINE)
                if not is_whole(table, statement)
            ]
        connection.rollback()
    engine.dispose()
    return found


def test_what_readers_ask(full, monkeypatch):
    """Each method of `Store`; the run is long enough to have blocks."""
    monkeypatch.setattr(timeline, "BLOCK", BLOCK)
    finding = Finding("f1", "info", 0, 1, 0.0, None, "m", "a", {})
    asked = {
        "name": lambda s: s.name,
        "runs": lambda s: (s.runs(), s.runs(limit=5), s.runs(status="running")),
        "run": lambda s: (s.run("run-7"), s.run("uid-7"), s.run(7)),
        "steps": lambda s: (s.steps(7), s.steps(7, 50, 150), s.steps(7, start=180)),
        "columns": lambda s: s.columns(7, ["step", "pre_norm"], stop=50),
        "long": lambda s: s.long(7, ["step", "pre_norm"], recent=50),
        "summary": lambda s: s.summary(7),
        "last_step": lambda s: s.last_step(7),
        "last_taken": lambda s: s.last_taken(7),
        "attempt_starts": lambda s: s.attempt_starts(7),
        "left_out": lambda s: s.left_out(7),
        "past": lambda s: s.past(7),
        "events": lambda s: (s.events(7), s.events(7, kind="loss_spike", limit=3)),
        "findings": lambda s: s.findings(7),
        "note_findings": lambda s: (s.note_findings(7, [finding], keep={"f0"}), s.findings(7)),
        "note_recommendation": lambda s: (s.note_recommendation(7, 9, recommend(s, 7)),),
        "first_loss": lambda s: (s.first_loss(7),),
        "layers": lambda s: s.layers(7),
        "changes": lambda s: s.changes(7),
        "last_change": lambda s: (s.last_change(7),),
    }
    not_queries = {"close", "apply"}
    assert set(asked) == {n for n in dir(Store) if not n.startswith("_")} - not_queries
    with Store(full) as store, overheard() as heard:
        for ask in asked.values():
            assert ask(store) is not None
    assert len(heard) > len(asked)
    assert any("step_summaries.norms" in statement for statement, _ in heard)
    assert scanned(full, heard) == []


def test_what_writers_ask(full):
    """A run that comes, is stored, asked about and ends; one that was killed; a change."""
    sink = DatabaseSink(full)
    now = time.time()
    with overheard() as heard:
        run = sink.open(run_info(ring="ring-a", name="run-7"))
        for first, count in ((0, 10), (10, 1000)):
            sink.write(run, batch(first, count, now))
        sink.heartbeat(run)
        sink.requested(run.uid, 0)
        sink.refuse(1, "no")
        sink.close(run, "finished")
        dead = sink.open(run_info(ring="ring-b", uid="uid-9", recovered=True))
        sink.write(dead, batch(0, 10, now))
        sink.close(dead, "crashed")
    assert len(heard) > 12
    if sink._path is None:  # said past SQLAlchemy
        heard.append((postgres._STORE_SMALL, (1, 0, "ring-1", 0, 0, now, *["{}"] * 9)))
    assert scanned(full, heard) == []


def test_the_view_finds_its_rows_by_the_key(full):
    """What somebody types into a database's own shell."""
    heard = [
        ("SELECT * FROM steps WHERE run_id = 7", ()),
        ("SELECT step, loss FROM steps WHERE run_id = 7 AND step BETWEEN 50 AND 150", ()),
        ("SELECT max(step) FROM steps WHERE run_id = 7", ()),
    ]
    assert scanned(full, heard) == []
    engine = sa.create_engine(full)
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT step FROM steps WHERE run_id = 7 ORDER BY step"))
        assert np.array_equal(rows.scalars().all(), np.arange(STEPS))
    engine.dispose()


def test_it_can_fail(full):
    """A question that no index answers is found."""
    tables = {
        table for table, *_ in scanned(full, [("SELECT * FROM events WHERE message = 'x'", ())])
    }
    assert tables == {"events"}
