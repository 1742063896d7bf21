"""Looking after a store: what is too old goes, copies show the same, damage is found."""

import json
import sqlite3
import time

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa
import torch
from loops import mlp, set_gradients
from stores import write_run

from gradwatch import Agent, errors, schema
from gradwatch.recorder import STEP_DTYPE
from gradwatch.records import Batch, Event, LayerNorms
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import run_info
from gradwatch_monitor import Store, copying, integrity, retention
from gradwatch_monitor.maintenance import Maintained

DAY = 86_400
NOW = 1_700_000_000.0  # 2023-11-14 22:13:20


@pytest.fixture(params=["sqlite", "postgres"])
def stores(request, tmp_path):
    """Makes URLs of new stores, of either kind."""
    if request.param == "postgres":
        return request.getfixturevalue("postgres_server").new_database
    names = iter("abcdefgh")
    return lambda: f"sqlite:///{tmp_path}/{next(names)}.db"


def write(url, name, days_ago, *, live=False, now=NOW):
    """A run with ten steps, an event and a layer sample on each of these days before `now`."""
    clock = {"now": now - 86_400 * min(days_ago)}
    sink = DatabaseSink(url, lambda: clock["now"])
    run = sink.open(run_info(uid=name, name=name, ring=name, started_at=now - DAY * max(days_ago)))
    at = 0
    for day in sorted(days_ago, reverse=True):
        steps = np.zeros(10, STEP_DTYPE)
        steps["step"] = at + np.arange(10)
        steps["time"] = now - DAY * day + np.arange(10)
        steps["pre_norm"] = at + np.arange(10) + 0.5
        event = Event("loss_spike", at, now - DAY * day, "info", f"day {day}", {"day": day})
        layers = LayerNorms(at, ["a", "b"], [1.0, 2.0], [3.0, 4.0])
        sink.write(run, Batch(steps, [event], [layers], [], (at, at), (at + 10, at + 10), {}))
        at += 10
    if live:
        clock["now"] = now
        sink.heartbeat(run)
        sink.dispose()
    else:
        sink.close(run, "finished")


def content(url):
    """What a reader sees: by run, its steps, its events, how many layer norms."""
    with Store(url) as store, store._reading() as connection:
        return {
            run.uid: (
                store.steps(run.id).to_csv(),
                [(e.step, e.time, e.message, dict(e.data)) for e in store.events(run.id)],
                connection.exec_driver_sql(
                    f"SELECT step, parameter, grad_norm FROM layer_norms WHERE run_id = {run.id} "
                    "ORDER BY step, parameter"
                ).fetchall(),
                run.status,
            )
            for run in store.runs()
        }


def test_prune_removes_what_is_older_by_whole_days(stores):
    """Whole UTC days before the limit; a live run keeps all; a run that is left empty goes."""
    url = stores()
    write(url, "old", [50, 40])
    write(url, "both", [40, 31, 30, 1])
    write(url, "live", [40, 1], live=True)
    pruned = retention.prune(url, 30, now=NOW)
    assert pruned.before == 1_697_328_000.0  # 2023-10-15 00:00, 30 days before the day that is now
    assert (pruned.steps, pruned.layer_norms, pruned.events, pruned.runs) == (40, 8, 4, 1)
    with Store(url) as store:
        assert {run.uid: len(store.steps(run.id)) for run in store.runs()} == {
            "both": 20, "live": 20,
        }  # fmt: skip
        both = store.run("both").id
        assert store.steps(both)["step"].tolist() == list(range(20, 40))
        assert [e.step for e in store.events(both)] == [30, 20]
    assert [row[:2] for row in content(url)["both"][2]] == [
        (20, "a"), (20, "b"), (30, "a"), (30, "b"),
    ]  # fmt: skip
    again = retention.prune(url, 30, now=NOW)
    assert (again.steps, again.layer_norms, again.events, again.runs) == (0, 0, 0, 0)
    assert integrity.check(url) == []


def test_prune_drops_whole_partitions(postgres_server):
    """On PostgreSQL a day is dropped, unless a live run has steps in it."""
    url = postgres_server.new_database()
    write(url, "old", [50, 40])
    write(url, "live", [40], live=True)
    pruned = retention.prune(url, 30, now=NOW)
    assert pruned.partitions == ("step_records_20230925",)
    assert pruned.steps == 20
    tables = postgres_server.query(
        url, "SELECT relname FROM pg_class WHERE relname LIKE 'step_records_2%' AND relkind = 'r'"
    )
    assert tables == [("step_records_20231005",)]


def test_a_live_run_goes_on_while_its_store_is_pruned(stores):
    """The run that records now loses nothing, before or after."""
    url = stores()
    write(url, "old", [50, 40], now=time.time())
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    agent = Agent(optimizer, store=url, run="now")
    for step in range(40):
        set_gradients(step, model)
        optimizer.step()
        if step == 20:
            assert agent.flush(30)
            assert retention.prune(url, 30).runs == 1
    assert agent.flush(30)
    agent.close()
    with Store(url) as store:
        assert len(store.steps(store.run("now").id)) == 40


@pytest.mark.parametrize("text", ["30", "30h", "0d", "-1d", "d", ""])
def test_an_age_that_is_none_says_what_would_be_right(text):
    """Whole days, weeks or years."""
    with pytest.raises(errors.ConfigurationError, match="30d, 8w, 1y"):
        retention.days(text)


def test_ages():
    """30d, 8w, 1y."""
    assert [retention.days(text) for text in ("30d", "8w", "1y")] == [30, 56, 365]


def fill(url):
    """Two runs by real training, one resumed, and a run by hand."""
    first = write_run(url, run="first", steps=60, nan_at=(7,), close=False)
    first.load_state_dict({**first.state_dict(), "step": 40})
    model = mlp()
    for step in range(30):
        for mine, other in zip(
            first.kept.param_groups[0]["params"], model.parameters(), strict=True
        ):
            mine.grad = torch.full_like(other, 0.01 * step)
        first.kept.step()
    first.close()
    write(url, "by hand", [3, 1])


def test_a_prune_that_was_cut_short_is_finished_by_the_next(postgres_server):
    """PostgreSQL's half-made DETACH, left by a reader that held it up, stops nothing for good."""
    url = postgres_server.new_database()
    write(url, "old", [40, 39])
    (first, second) = sorted(
        day for (day,) in postgres_server.query(
            url, "SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid "
            "WHERE relname ~ '[0-9]$'",
        )
    )  # fmt: skip
    database = url.rpartition("/")[2]
    with postgres_server.connect(database) as prune, postgres_server.connect(database) as reader:
        prune.execute(f"ALTER TABLE step_records DETACH PARTITION {second}")  # and not dropped
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM step_records")
        prune.execute("SET lock_timeout TO '300ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            prune.execute(f"ALTER TABLE step_records DETACH PARTITION {first} CONCURRENTLY")
    retention.prune(url, 30, now=NOW)
    assert postgres_server.query(
        url, "SELECT relname FROM pg_class WHERE relname IN (%s, %s)", first, second
    ) == []  # fmt: skip


def test_a_copy_shows_the_same(stores, postgres_server, tmp_path):
    """To SQLite and to PostgreSQL, from either; run twice nothing is twice."""
    source = stores()
    fill(source)
    wanted = content(source)
    assert len(wanted) == 2
    for target in (f"sqlite:///{tmp_path}/copy.db", postgres_server.new_database()):
        write(target, "was there", [2])  # so that ids differ
        there = content(target)
        copied = copying.copy(source, target)
        assert (copied.runs, copied.steps) == (2, 60 + 30 + 20)
        assert content(target) == {**wanted, **there}
        again = copying.copy(source, target)
        assert (again.runs, again.steps, again.layer_norms, again.others) == (0, 0, 0, 0)
        assert content(target) == {**wanted, **there}
        assert integrity.check(target) == []


def test_what_changes_is_copied_as_it_is_now(stores):
    """A finding that grew, a change that was made meanwhile, a run that ended: none is there twice."""
    source, target = stores(), stores()
    write(source, "one", [9, 8, 7, 6])
    finding = {"run_id": 1, "finding": "f", "severity": "info", "first_step": 0, "found_at": 0.0,
               "message": "m", "advice": "a", "data": {}}  # fmt: skip
    change = {"run_id": 1, "requested_at": 5.0, "requested_by": "me", "threshold": 0.5}
    with Maintained(source) as store, store.transaction() as connection:
        connection.execute(sa.insert(schema.findings).values(**finding, last_step=1))
        connection.execute(sa.insert(schema.threshold_changes).values(**change))
        connection.execute(sa.update(schema.runs).values(status="running"))
    copying.copy(source, target)
    with Maintained(source) as store, store.transaction() as connection:
        connection.execute(sa.update(schema.findings).values(last_step=3))
        connection.execute(sa.update(schema.threshold_changes).values(applied_step=2))
        connection.execute(sa.update(schema.runs).values(status="crashed"))
    for _ in range(2):
        copying.copy(source, target)
        with Store(target) as copied:
            assert [found.last_step for found in copied.findings(1)] == [3]
            assert [made.applied_step for made in copied.changes(1)] == [2]
            assert copied.run(1).status == "crashed"


def test_a_copy_that_was_cut_short_goes_on(stores, tmp_path, monkeypatch):
    """Killed after some batches; then run again, also when the source has grown since."""
    source, target = stores(), stores()
    write(source, "one", [9, 8, 7, 6])
    store, calls = copying._store, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return store(*arguments)

    monkeypatch.setattr(copying, "_BATCH", 8)
    monkeypatch.setattr(copying, "_store", dies)
    with pytest.raises(KeyboardInterrupt):
        copying.copy(source, target)
    monkeypatch.setattr(copying, "_store", store)
    write(source, "two", [2])
    assert copying.copy(source, target).steps == 40 - 16 + 10
    assert content(target) == content(source)


def test_a_store_is_not_copied_into_itself(tmp_path):
    """However its path is written."""
    write_run(steps=3)
    with pytest.raises(errors.ConfigurationError, match="the same"):
        copying.copy("gradwatch.db", f"sqlite:///{tmp_path}/gradwatch.db")


def test_a_whole_store_has_no_problems(stores):
    """Two attempts, a NaN, dropped nothing."""
    url = stores()
    fill(url)
    assert integrity.check(url) == []


def change(url, request, *statements):
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            for sql in statements:
                connection.execute(sql)
        connection.close()
    else:
        for sql in statements:
            request.getfixturevalue("postgres_server").query(url, sql)


@pytest.mark.parametrize(
    ("statement", "kind", "words"),
    [
        ("DELETE FROM step_records WHERE step BETWEEN 5 AND 6", "missing", "'one'.*2 of the steps"),
        ("DELETE FROM step_records WHERE step >= 18", "missing", "'one'.*2 of the steps 0 to 19"),
        ("UPDATE step_records SET attempt = 9 WHERE step = 19", "orphan", "attempt 9 of run 1"),
        ("UPDATE layer_norms SET run_id = 77", "orphan", "layer_norms has rows of attempt 1 of run 77"),
        ("UPDATE gradwatch_revision SET version_num = '9999'", "store", "'9999'.*upgrade"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(stores, request, statement, kind, words):
    """Each fault by its kind, with the run it is in."""
    import re

    url = stores()
    write(url, "one", [2, 1])
    assert integrity.check(url) == []
    change(url, request, statement)
    found = integrity.check(url)
    assert kind in {problem.kind for problem in found}
    assert any(re.search(words, problem.detail) for problem in found)


def test_a_step_that_could_not_be_recorded_is_a_counted_gap(tmp_path, monkeypatch):
    """The agent's own failure is told by an event, also that of the last step; not as damage."""
    url = f"sqlite:///{tmp_path}/one.db"
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    agent = Agent(optimizer, store=url, metrics_port=None)
    for step in range(8):
        with monkeypatch.context() as patch:
            if step in {3, 4, 7}:
                patch.setattr("gradwatch.part.Part.measure", lambda *_: 1 / 0)
            weight.grad = torch.ones(3)
            optimizer.step()
    agent.close()
    assert integrity.check(url) == []
    with sqlite3.connect(tmp_path / "one.db") as connection:
        assert connection.execute(
            "SELECT sum(json_extract(data, '$.error')) FROM events WHERE kind = 'records_dropped'"
        ).fetchall() == [(3,)]
        connection.execute("DELETE FROM step_records WHERE step = 5")
    (problem,) = integrity.check(url)
    assert problem.kind == "missing"


def test_a_step_that_is_there_twice_is_found(postgres_server):
    """PostgreSQL's key cannot keep it out, for the time is in it."""
    url = postgres_server.new_database()
    write(url, "one", [1])
    postgres_server.query(
        url, "INSERT INTO step_records SELECT run_id, attempt, step, time + 1, loss, lr, pre_norm, "
        "post_norm, threshold, loss_scale, clipped, nonfinite, nonfinite_loss, skipped "
        "FROM step_records WHERE step = 4",
    )  # fmt: skip
    (problem,) = integrity.check(url)
    assert problem.kind == "doubled"


def test_a_damaged_file_is_found(tmp_path):
    """Pages overwritten in the middle of an SQLite file."""
    url = f"sqlite:///{tmp_path}/x.db"
    write(url, "one", list(range(1, 60)))
    path = tmp_path / "x.db"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 3000] = b"\xa5" * 3000
    path.write_bytes(whole)
    assert integrity.check(url)


def test_the_verbs(run, stores, request):
    """Text for people, JSON for programs, nothing on stderr that is no terminal, exit statuses."""
    url, target = stores(), stores()
    write(url, "one", [2, 1])
    status, text, told = run("store", "check", "--store", url)
    assert (status, text, told) == (0, "Nothing is wrong.\n", "")
    status, text, _ = run("store", "copy", url, target, "--json")
    assert (status, json.loads(text)) == (
        0, {"runs": 1, "steps": 20, "layer_norms": 4, "others": 2},
    )  # fmt: skip
    status, text, told = run("store", "prune", "--older-than", "1d", "--store", target, "--json")
    assert (status, told) == (0, "")
    assert (json.loads(text)["steps"], json.loads(text)["runs"]) == (20, 1)
    assert run("store", "prune", "--older-than", "soon", "--store", target)[0] == 2
    change(url, request, "DELETE FROM step_records WHERE step = 3")
    status, text, _ = run("store", "check", "--store", url)
    assert status == 1
    assert "missing" in text
    status, _, told = run("store", "check", "--store", "nix.db")
    assert status == 1
    assert "nix.db" in told
