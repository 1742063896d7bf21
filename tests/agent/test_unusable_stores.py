"""Stores that cannot be written: it is said once, training goes on, nothing recorded is lost."""

import logging
import re
import sqlite3
import time

import pytest
import torch
from jobs import query, wait_until
from loops import mlp, train

from gradwatch import Agent


def begin(store="gradwatch.db"):
    """A job: agent, model and optimizer."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return Agent(optimizer, model=model, store=str(store)), model, optimizer


def broken_stores(tmp_path):
    """Kinds of stores that cannot be written, and the words the warning has for each."""
    (tmp_path / "text.db").write_text("this is no database, but a text of more than a page" * 99)
    with sqlite3.connect(tmp_path / "future.db") as connection:
        connection.execute("CREATE TABLE gradwatch_revision (version_num TEXT)")
        connection.execute("INSERT INTO gradwatch_revision VALUES ('9999')")
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE runs (id TEXT)")
    (tmp_path / "file").write_text("")
    return {
        "text.db": "file is not a database",
        "future.db": "schema revision is '9999'.*upgrade gradwatch",
        "mlflow.db": "not a gradwatch store.*runs",
        "file/gradwatch.db": "File exists|Not a directory",
    }


@pytest.mark.parametrize("store", ["text.db", "future.db", "mlflow.db", "file/gradwatch.db"])
def test_training_goes_on_without_a_store(store, tmp_path, caplog):
    """One warning that says why and where the records are; nothing recorded is lost."""
    words = broken_stores(tmp_path)[store]
    agent, model, optimizer = begin(tmp_path / store)
    losses = train(model, optimizer, 60)
    assert losses[-1] < losses[0]
    assert not agent.flush(0.5)
    ring = agent._recording.channel.ring
    assert len(ring.read_steps(0).records) == 60
    wait_until(lambda: caplog.messages)
    time.sleep(0.3)  # several more tries of the worker
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert str(ring.path) in warned[0].getMessage()
    assert re.search(words, warned[0].getMessage())
    agent._recording.pipeline.close(agent._recording.channel, "finished", 0.2)
    assert ring.path.exists()


def test_records_are_stored_when_the_fault_clears(tmp_path, caplog):
    """The store comes back: all that waited in the ring is stored, and that is said."""
    (tmp_path / "later.db").write_text("this is no database, but a text of more than a page" * 99)
    agent, model, optimizer = begin(tmp_path / "later.db")
    train(model, optimizer, 40)
    assert not agent.flush(0.3)
    wait_until(lambda: caplog.messages)
    (tmp_path / "later.db").unlink()
    assert agent.flush(10)
    assert query("later.db", "SELECT count(*) FROM steps") == [(40,)]
    assert "takes records again" in caplog.messages[-1]


def test_a_job_that_ends_at_once_says_why_nothing_was_stored(tmp_path, caplog):
    """Though it had no time to see whether the fault would pass."""
    (tmp_path / "folder").mkdir()
    agent, model, optimizer = begin(tmp_path / "folder")
    train(model, optimizer, 3)
    agent.close()
    why, left = caplog.messages
    assert "unable to open database file (this user has to be able to write" in why
    assert "gradwatch recover" in left
    agent._recording.channel.ring.path.unlink(missing_ok=True)


def test_a_locked_database_holds_nothing_up(caplog):
    """Another writer holds the lock: steps go on, and are stored once it lets go."""
    agent, model, optimizer = begin()
    train(model, optimizer, 3)
    assert agent.flush()
    other = sqlite3.connect("gradwatch.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    train(model, optimizer, 50)
    assert not agent.flush(0.5)
    other.execute("COMMIT")
    other.close()
    assert agent.flush(15)
    assert query("gradwatch.db", "SELECT count(*) FROM steps") == [(53,)]
    assert sum("locked" in m for m in caplog.messages) <= 1


def test_a_password_is_never_shown(caplog):
    """Not in a warning, not in the run's settings, not in the ring."""
    store = "postgresql+psycopg://someone:s3cret@127.0.0.1:1/db?password=s3cret"
    agent, model, optimizer = begin(store)
    train(model, optimizer, 3)
    assert not agent.flush(1.0)
    wait_until(lambda: caplog.messages)
    assert not any("s3cret" in message for message in caplog.messages)
    assert b"s3cret" not in agent._recording.channel.ring.path.read_bytes()
    assert "s3cret" not in repr(agent._recording.settings)
    agent._recording.pipeline.close(agent._recording.channel, "finished", 0.1)
    agent._recording.channel.ring.path.unlink()
