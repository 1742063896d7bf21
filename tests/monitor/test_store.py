"""Reading a store: what was written, read-only, and errors that say what is there."""

import dataclasses
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from stores import write_run

from gradwatch import errors, schema
from gradwatch_monitor import Store
from gradwatch_monitor.migrations import configuration, migrate
from gradwatch_monitor.store import STEP_COLUMNS, status_of


def query(sql, path="gradwatch.db"):
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return connection.execute(sql).fetchall()


def test_steps_are_the_visible_timeline():
    """The frame has the record's columns, NULL as NaN, flags as booleans."""
    write_run(nan_at=(7,))
    with Store("gradwatch.db") as store:
        frame = store.steps(store.run("first").id)
    assert list(frame.columns) == list(STEP_COLUMNS)
    rows = query(f"SELECT {', '.join(STEP_COLUMNS)} FROM steps ORDER BY step")
    assert len(frame) == len(rows) == 300
    for i in (0, 7, 299):
        for name, value in zip(STEP_COLUMNS, rows[i], strict=True):
            got = frame[name][i]
            assert np.isnan(got) if value is None else got == value
    assert frame["clipped"].dtype == bool


def test_steps_take_a_range():
    """`start` and `stop` bound the steps, `stop` left out."""
    write_run(steps=50)
    with Store("gradwatch.db") as store:
        assert store.steps(1, 10, 20)["step"].tolist() == list(range(10, 20))
        assert len(store.steps(99)) == 0


def test_runs_by_name_uid_and_id():
    """A name means its latest run."""
    first, second = write_run(steps=3), write_run(steps=4)
    with Store("gradwatch.db") as store:
        assert [run.id for run in store.runs()] == [2, 1]
        assert store.run("first").id == 2
        assert store.run(first.run_id).id == 1
        assert store.run(1).uid == first.run_id
        assert store.run("2").uid == second.run_id
        assert len(store.runs(status="finished", limit=1)) == 1
        assert store.runs(status="failed") == []


def test_ids_names_and_uids_are_told_apart(monkeypatch):
    """A number is an id, whatever runs are named; a prefix says what is meant, as SQL has it."""
    write_run(steps=3)
    for name, uid in (("1", "uid-a"), ("77", "78"), ("uid:1", "first"), ("first", "uid-d")):
        monkeypatch.setenv("GRADWATCH_RUN_ID", uid)
        write_run(run=name, steps=3)
    rows = query("SELECT id, name, uid FROM runs ORDER BY id")
    with Store("gradwatch.db") as store:
        for run, name, uid in rows:
            assert store.run(run).id == store.run(str(run)).id == store.run(f"id:{run}").id == run
            assert store.run(f"uid:{uid}").id == run
            latest = max(i for i, other, _ in rows if other == name)
            assert store.run(f"name:{name}").id == latest
        assert store.run("first").name == "first"
        assert store.run("uid-a").id == 2
        for key, hint in (("77", "`name:77`"), ("78", "`uid:78`")):
            with pytest.raises(
                errors.RunNotFoundError, match=f"with the id '{key}'.*; {hint} would"
            ):
                store.run(key)
        for key in ("id:first", "uid:1", "name:uid-a", "9" * 5000, "id:-1", "name:\0", "\u0663"):
            with pytest.raises(errors.RunNotFoundError):
                store.run(key)


def test_a_run_that_is_not_there_names_those_that_are():
    """The error says which runs there are."""
    write_run(steps=3)
    with Store("gradwatch.db") as store:
        for key in ("nix", 17):
            with pytest.raises(errors.RunNotFoundError, match=r"the latest are: first"):
                store.run(key)


def test_summary_equals_sql():
    """Counts and last values."""
    write_run(nan_at=(3, 299))
    with Store("gradwatch.db") as store:
        summary = store.summary(1)
    ((steps, finite, clipped, nonfinite, skipped),) = query(
        "SELECT count(*), count(pre_norm), sum(clipped), sum(nonfinite), sum(skipped) FROM steps"
    )
    assert (summary.steps, summary.finite, summary.clipped) == (steps, finite, clipped)
    assert (summary.nonfinite, summary.skipped, summary.amp_overflows) == (nonfinite, skipped, 0)
    assert summary.clip_ratio == clipped / finite
    assert summary.last_step == 299
    ((norm,),) = query("SELECT pre_norm FROM steps WHERE step = 298")
    assert summary.last_pre_norm == norm
    assert summary.last_threshold == 1.0


def test_events_leave_out_what_a_later_attempt_hides():
    """Events belong to the timeline as steps do."""
    agent = write_run(steps=20, nan_at=(5, 15), close=False)
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("INSERT INTO attempts VALUES (1, 2, 10, 0, 2)")
    with Store("gradwatch.db") as store:
        assert [e.step for e in store.events(1, kind="nonfinite_gradient")] == [5]
        assert store.last_step(1) == 9
    agent.close()


def test_reading_never_writes():
    """Every connection is read-only: it can change nothing and hold up nobody."""
    write_run(steps=5)
    store = Store("gradwatch.db")
    with pytest.raises(errors.StoreError, match="readonly"), store._reading() as connection:
        connection.execute(sa.text("DELETE FROM runs"))
    with store._reading() as reading:
        reading.execute(sa.select(schema.runs)).all()
        write_run(steps=5)  # while a reader is in the middle
    assert len(store.runs()) == 2
    store.close()


def test_no_store_says_how_one_comes_to_be():
    """The error names the file, and what makes it."""
    with pytest.raises(errors.StoreNotFoundError, match=r"nix\.db.*gradwatch\.wrap"):
        Store("nix.db")
    Path("nix.db").touch()  # a job was killed as it made it
    left = Path("nix.db.rings/x.ring")
    left.parent.mkdir()
    left.touch()
    with pytest.raises(errors.StoreNotFoundError, match=r"nix\.db\.rings.*gradwatch recover"):
        Store("nix.db")


def test_a_store_whose_making_was_cut_short_is_none(tmp_path):
    """Killed in the middle: what SQLite would roll back first, who only reads cannot."""
    script = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 5")
connection.execute("CREATE TABLE runs (x)")
connection.execute("BEGIN")
connection.execute("INSERT INTO runs VALUES (zeroblob(1000000))")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script, "nix.db"], check=True)
    assert (tmp_path / "nix.db-journal").stat().st_size > 0
    with pytest.raises(errors.StoreNotFoundError, match=r"nix\.db.*gradwatch\.wrap"):
        Store("nix.db")


def test_stores_that_are_none_are_refused(tmp_path):
    """A text file, somebody else's database, a future schema."""
    (tmp_path / "text.db").write_text("no database " * 999)
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE t (x)")
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE runs (x)")
    with sqlite3.connect(tmp_path / "future.db") as connection:
        connection.execute("CREATE TABLE gradwatch_revision (version_num TEXT)")
        connection.execute("INSERT INTO gradwatch_revision VALUES ('9999')")
    (tmp_path / "folder.db").mkdir()
    for name, kind, words in (
        ("folder.db", errors.StoreError, "is a folder; name the store's file"),
        ("text.db", errors.StoreError, "not a database.*is that the store"),
        ("other.db", errors.StoreError, "not a gradwatch store"),
        ("mlflow.db", errors.StoreError, "not a gradwatch store.*runs"),
        ("future.db", errors.StoreRevisionError, "'9999'.*upgrade gradwatch"),
    ):
        with pytest.raises(kind, match=words) as caught:
            Store(str(tmp_path / name))
        assert name in str(caught.value)


def test_a_finished_store_in_a_folder_nobody_can_write(tmp_path, monkeypatch):
    """A copied store is read as it lies."""
    write_run(steps=5)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with Store("gradwatch.db") as store:
        assert len(store.steps(1)) == 5
    assert not list(tmp_path.glob("gradwatch.db-*"))


def test_a_run_without_a_sign_of_life_is_silent():
    """Its status still says running; what people are shown says silent."""
    agent = write_run(steps=5, close=False)
    with Store("gradwatch.db") as store:
        run = store.run("first")
    agent.close()
    assert run.is_live()
    assert status_of(run) == "running"
    assert status_of(dataclasses.replace(run, heartbeat_at=time.time() - 100)) == "silent"


# -- migrations ------------------------------------------------------------------------------------


def test_migrations_make_what_the_agent_makes(tmp_path):
    """Alembic finds no difference, and the view is the same, byte for byte."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    write_run("agents.db", steps=1)
    sqlite3.connect("alembics.db").close()
    assert migrate("alembics.db") == (None, schema.REVISION)
    assert migrate("alembics.db") == (schema.REVISION, schema.REVISION)
    views = []
    for path in ("agents.db", "alembics.db"):
        engine = sa.create_engine(f"sqlite:///{path}")
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"version_table": schema.VERSION_TABLE}
            )
            assert compare_metadata(context, schema.metadata) == []
        engine.dispose()
        views.append(query("SELECT sql FROM sqlite_master WHERE type = 'view'", path))
    assert views[0] == views[1]
    write_run("alembics.db", steps=5)
    with Store("alembics.db") as store:
        assert len(store.steps(1)) == 5


def test_a_store_of_the_first_revision_is_migrated_with_all_it_holds():
    """Two attempts stored under 0001 show the same timeline after."""
    from alembic import command

    sqlite3.connect("old.db").close()
    engine = sa.create_engine("sqlite:///old.db")
    with engine.begin() as connection:
        command.upgrade(configuration(connection), "0001")
        for statement in (
            (
                "INSERT INTO runs VALUES (1, 'u', 'n', 'j', 5.0, NULL, 5.0, 'running', 'h', 1, 1, "
                "'{}', '{}', NULL)"
            ),
            "INSERT INTO attempts VALUES (1, 1, 0), (1, 2, 3)",
            *(
                "INSERT INTO step_records (run_id, attempt, step, time, clipped, nonfinite, "
                f"nonfinite_loss, skipped) VALUES (1, {a}, {step}, 0.5, 0, 0, 0, 0)"
                for a, step in [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 3)]
            ),
        ):
            connection.exec_driver_sql(statement)
    engine.dispose()
    with pytest.raises(errors.StoreRevisionError, match="store migrate"):
        Store("old.db")
    assert migrate("old.db") == ("0001", schema.REVISION)
    assert query("SELECT attempt, step FROM steps ORDER BY step", "old.db") == [
        (1, 0), (1, 1), (1, 2), (2, 3),
    ]  # fmt: skip
    assert query("SELECT started_at, position FROM attempts", "old.db") == [(5.0, 1.0), (5.0, 2.0)]


def test_the_newest_migration_is_the_agents_revision():
    """One head, and it is the revision that the agent stamps."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(configuration(None))
    assert script.get_heads() == [schema.REVISION]


def test_migrating_nothing_is_an_error():
    """No file is made by mistake."""
    with pytest.raises(errors.StoreNotFoundError):
        migrate("nix.db")
