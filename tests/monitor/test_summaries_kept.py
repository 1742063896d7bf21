"""Summaries of blocks outlive what is done to a store: pruning, copying, checking, migrating."""

import numpy as np
import pytest
import sqlalchemy as sa
from stores import NOW, Job, records, write
from summed import check, summed_up

from gradwatch import schema
from gradwatch_monitor import Store, copying, integrity, recommend, retention
from gradwatch_monitor.history import History

DAY = 86_400


def test_a_prune_keeps_the_summaries(new_store):
    """Steps that are too old go, what was told of them stays; with the run its summaries go."""
    url = new_store()
    steps = records(0, 30_000)
    steps["time"] = NOW - np.where(steps["step"] < 12_000, 40 * DAY, 1 * DAY) + steps["step"] / 1e3
    write(url, steps)
    retention.prune(url, 30, now=NOW)
    with Store(url) as store:
        assert len(store.steps(1)) == 18_000
        assert store.summary(1).steps == 30_000
        assert History.of(store, 1).steps == 30_000
    assert integrity.check(url) == []
    retention.prune(url, 30, now=NOW + 100 * DAY)
    assert summed_up(url) == {}


def test_a_copy_has_them(new_store):
    """Row for row, also those of a run that has gone on since, and of steps that were pruned."""
    source, target = new_store(), new_store()
    steps = records(0, 5500)
    job = Job(source, "ring", 0)
    job.write(steps[:2500])
    copying.copy(source, target)
    assert summed_up(target).keys() == {(1, 0), (1, 1)}
    job.write(steps[2500:])
    job.end()
    copying.copy(source, target)
    assert summed_up(target) == summed_up(source) == check(target)


def test_check_finds_rows_that_are_wrong(new_store):
    """One of fewer steps than there are, and one of a run that is not there."""
    url = new_store()
    write(url, records(0, 3000))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE step_summaries SET steps = 990 WHERE block = 1")
        connection.exec_driver_sql("UPDATE step_summaries SET run_id = 9 WHERE block = 2")
    engine.dispose()
    found = integrity.check(url)
    assert [problem.kind for problem in found] == ["orphan", "summary"]
    assert "steps 1000 to 1999" in found[1].detail


def test_migrating_sums_up_what_is_stored(new_store):
    """A store of the revision before has after it what the agent would have written."""
    from gradwatch_monitor.migrations import migrate

    url = new_store()
    write(url, records(0, 4300), "ring-1")
    write(url, records(3700, 1500), "ring-2")
    before = summed_up(url)
    assert len(before) == 6  # 0 to 3, and 3 and 4 of the second
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE step_summaries")
        connection.exec_driver_sql("UPDATE gradwatch_revision SET version_num = '0002'")
    engine.dispose()
    seen = []
    assert migrate(url, progress=lambda *of: seen.append(of)) == ("0002", schema.REVISION)
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert summed_up(url) == before


@pytest.mark.parametrize("length", [900, 2500])
def test_a_prune_keeps_what_is_told_of_a_runs_last_block(new_store, length):
    """It is not whole, so nobody had summed it up; nor one that a later attempt cuts."""
    url = new_store()
    first = records(0, length)
    first["time"] = NOW - 50 * DAY + first["step"]
    write(url, first)
    again = records(length - 300, 1700, seed=1)
    again["time"] = NOW - 40 * DAY + again["step"]
    job = Job(url, "again", length - 300)
    job.write(again)
    job.end()
    recent = records(length + 1400, 10, seed=2)  # a step that is left keeps the run
    recent["time"] = NOW
    job = Job(url, "recent", length + 1400)
    job.write(recent)
    job.end()
    with Store(url) as store:
        before, frame = store.summary(1), store.steps(1)
    assert before.steps == len(frame) == length + 1410
    retention.prune(url, 30, now=NOW + 1)
    with Store(url) as store:
        assert len(store.steps(1)) == 10
        assert store.summary(1) == before
        assert History.of(store, 1).steps == length + 1410
    assert integrity.check(url) == []
    retention.prune(url, 30, now=NOW + 1)
    with Store(url) as store:
        assert store.summary(1) == before


def test_a_loss_whose_beginning_was_pruned_measures_no_progress(new_store):
    """The first that is left is not the first that there was: nobody is said to have diverged."""
    url = new_store()
    steps = records(0, 60_000, odd=0.0)
    steps["loss"] = 5 * np.exp(-steps["step"] / 3000) + 0.1
    steps["loss"][200:260] = 12.0
    steps["pre_norm"][200:1400:5] *= 12
    steps["time"] = NOW - np.where(steps["step"] < 50_000, 40 * DAY, 1 * DAY) + steps["step"] / 1e3
    write(url, steps)
    with Store(url) as store:
        before = recommend(store, 1)
        assert History.of(store, 1).losses.first == pytest.approx(5.1)
    retention.prune(url, 30, now=NOW)
    with Store(url) as store:
        assert History.of(store, 1).losses is None
        assert recommend(store, 1).verdict == before.verdict
    resumed = new_store()
    write(resumed, steps[5000:25_000])
    with Store(resumed) as store:
        assert History.of(store, 1).losses is None
