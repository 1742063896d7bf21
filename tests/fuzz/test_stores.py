"""Stores of which cells, tables or bytes were written over: every verb answers, and loses nothing."""

import json
import sqlite3

import fuzzing
import torch
from fuzzing import DAMAGES, check_answer, damage, mutations
from hypothesis import given
from hypothesis import strategies as st

import gradwatch

RUNS = st.sampled_from(["good", "long", "changed", "2", "nobody", "9" * 30])
READING = st.sampled_from(
    [
        ("runs",), ("runs", "--json", "--limit", "3"), ("show", "RUN"), ("show", "RUN", "--json"),
        ("recommend", "RUN"), ("recommend", "RUN", "--json"),
        ("diagnose", "RUN"), ("diagnose", "RUN", "--json"),
        ("store", "check"), ("store", "check", "--json"), ("doctor",),
    ]
)  # fmt: skip
WRITING = st.sampled_from(
    [
        ("apply", "RUN", "0.7", "--no-wait"), ("apply", "RUN", "--undo", "--no-wait"),
        ("apply", "RUN", "--recommended", "--timeout", "0", "--json"), ("recover",),
        ("store", "migrate"), ("store", "copy", "gradwatch.db", "copied.db"),
    ]
)  # fmt: skip
PRUNE = ("store", "prune", "--older-than", "1d")


def call(run, verb, name):
    """One verb on one run; its status and output, which must be an answer."""
    arguments = [name if part == "RUN" else part for part in verb]
    status, out, err = run(*arguments)
    check_answer(arguments, status, out, err)
    return status, out


def test_values_that_cannot_be_right(run, copy, whole_store, budget):
    """All verbs answer, all runs are listed, and reading has changed nothing in the file."""

    @given(mutations(whole_store), RUNS, READING, READING, WRITING)
    def check(mutations, name, first, second, writing):
        path = copy(mutations)
        before = fuzzing.rows(path)
        status, out = call(run, ("runs", "--json"), name)
        assert status == 0
        with fuzzing.connected(path) as connection:
            ids = {row[0] for row in connection.execute("SELECT id FROM runs")}
        assert {row["id"] for row in json.loads(out)} == ids
        call(run, first, name)
        call(run, second, name)
        assert fuzzing.rows(path) == before
        call(run, writing, name)
        call(run, writing, name)
        after = fuzzing.rows(path)
        for table, kept in before.items():
            assert len(after[table]) >= len(kept), (writing, table)
        call(run, PRUNE, name)

    budget.spend(0.25, check)


def test_reports_of_values_that_cannot_be_right(run, copy, whole_store, budget):
    """A report is drawn or refused in a sentence."""

    @given(mutations(whole_store), RUNS)
    def check(mutations, name):
        copy(mutations)
        call(run, ("report", "RUN", "-o", "report.html"), name)

    budget.spend(0.1, check)


def test_jobs_on_stores_of_values_that_cannot_be_right(copy, whole_store, budget):
    """A job on such a store trains, whether it begins a run there or goes on with one."""

    @given(mutations(whole_store), st.sampled_from([None, "good", "changed"]))
    def check(mutations, resumed):
        path = copy()
        with fuzzing.connected(path) as connection:
            uids = dict(connection.execute("SELECT name, uid FROM runs"))
        for mutation in mutations:
            mutation.apply(path)
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        settings = gradwatch.Settings(run_id=uids.get(resumed), close_timeout=0.5)
        with gradwatch.Agent(optimizer, store=str(path), settings=settings, remote_control=True):
            for _ in range(3):
                weight.grad = torch.tensor([0.3, 0.0, 0.4])
                optimizer.step()
        assert torch.allclose(weight.detach(), torch.tensor([0.91, 1.0, 0.88]))

    budget.spend(0.1, check)


def test_files_that_are_damaged(run, copy, budget):
    """Bytes written over, cut off or added, to the store or to what lies beside it."""

    @given(
        DAMAGES,
        st.sampled_from(["", "", "-wal", "-shm", "-journal"]),
        RUNS,
        READING,
        READING | WRITING,
    )
    def check(damages, beside, name, first, second):
        path = copy()
        other = path.with_name(path.name + beside)
        if beside:
            other.write_bytes(path.read_bytes()[:9000])
        for damaged in damages:
            damage(other, *damaged)
        for verb in (("runs",), first, second):
            call(run, verb, name)

    budget.spend(0.1, check)


def test_tables_and_columns_that_are_missing(run, copy, whole_store, budget):
    """A schema that is not what its revision says."""
    places = fuzzing.columns(whole_store)
    tables = sorted({table for table, _ in places})
    statements = st.sampled_from(
        [f'ALTER TABLE "{table}" RENAME COLUMN "{column}" TO "gone"' for table, column in places]
        + [f'DROP TABLE "{table}"' for table in tables]
        + [f'DELETE FROM "{table}"' for table in tables]
        + ["DROP VIEW steps", "CREATE TABLE other (x)"]
    )

    @given(statements, RUNS, READING, READING | WRITING)
    def check(change, name, first, second):
        with fuzzing.connected(copy()) as connection:
            connection.execute("PRAGMA foreign_keys = 0")
            try:
                connection.execute(change)
            except sqlite3.OperationalError:  # a view needs it
                connection.execute("DROP VIEW steps")
                connection.execute(change)
        for verb in (("runs",), first, second):
            call(run, verb, name)

    budget.spend(0.1, check)
