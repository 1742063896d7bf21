"""A process with more runs than are worth exporting: what is shown, counted, and said."""

import pytest
from loops import one_parameter, step_once
from prometheus_client.parser import text_string_to_metric_families
from stores import batch

from gradwatch import Agent
from gradwatch.sinks.prometheus import PrometheusSink
from gradwatch.testing import ManualClock, MemorySink, run_info

MOST = 20  # by default


def series(sink):
    """(name, run, uid) → values of all series, by Prometheus' own parser."""
    found = {}
    for family in text_string_to_metric_families(sink.exposition()):
        for sample in family.samples:
            labels = sample.labels
            key = sample.name, labels.get("run"), labels.get("uid")
            found.setdefault(key, []).append(sample.value)
    return found


def shown(sink, name="gradwatch_steps_total"):
    return [run for its, run, _ in series(sink) if its == name]


def active(sink):
    return {run: values for (its, run, _), values in series(sink).items()
            if its == "gradwatch_run_active"}  # fmt: skip


def left_out(sink):
    ((count,),) = [v for (name, *_), v in series(sink).items()
                   if name == "gradwatch_runs_not_exported"]  # fmt: skip
    return count


def trial(number):
    return run_info(name=f"trial-{number}", uid=f"uid-{number}", ring=f"ring-{number}")


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def sink(clock):
    return PrometheusSink(clock.monotonic)


def test_of_many_live_runs_the_first_have_all_series_and_each_says_that_it_lives(sink):
    """The number of series is bounded by the setting, not by the number of runs."""
    runs = [sink.open(trial(number)) for number in range(150)]
    for run in runs:
        sink.write(run, batch(0, 3, pre_norm=1.0, loss=1.0))
    assert shown(sink) == [f"trial-{number}" for number in range(MOST)]
    assert active(sink) == {f"trial-{number}": [1.0] for number in range(150)}
    assert left_out(sink) == 130
    lines = [line for line in sink.exposition().split("\n") if line and line[0] != "#"]
    assert len(lines) < MOST * 110 + 150


def test_a_run_that_was_left_out_has_its_true_counts_once_there_is_room(sink):
    """It was counted all along."""
    runs = [sink.open(trial(number)) for number in range(MOST + 1)]
    for run in runs:
        sink.write(run, batch(0, 7, pre_norm=1.0))
    assert "trial-20" not in shown(sink)
    sink.close(runs[3], "finished")
    found = series(sink)
    assert found["gradwatch_steps_total", "trial-20", None] == [7.0]
    assert ("gradwatch_steps_total", "trial-3", None) not in found
    assert left_out(sink) == 1


def test_trials_one_after_another_leave_only_the_last(sink, clock):
    """A hundred that have ended are not a hundred series each for a quarter of an hour."""
    for number in range(100):
        sink.write(run := sink.open(trial(number)), batch(0, 3, pre_norm=1.0))
        sink.close(run, "finished")
        clock.advance(2)
    assert sorted(shown(sink)) == sorted(f"trial-{number}" for number in range(80, 100))
    assert left_out(sink) == 80
    clock.advance(900)
    assert shown(sink) == []
    assert left_out(sink) == 0


def test_whoever_was_told_that_a_run_lives_is_told_that_it_ended(sink, clock):
    """For a quarter of an hour, or a run that ended well would be missed once its process is gone."""
    ended, told = [], 0
    for number in range(100):
        run = sink.open(trial(number))
        if number % 10 == 0:
            assert active(sink)[f"trial-{number}"] == [1.0]
            told += 1
        sink.close(run, "finished")
        ended.append(run.name)
        clock.advance(2)
    said = active(sink)
    assert all(said[f"trial-{number}"] == [0.0] for number in range(0, 100, 10))
    assert len(said) == MOST + told - 2  # of the last twenty, two were told
    clock.advance(901)
    assert active(sink) == {}


def test_a_name_that_is_used_again_does_not_hide_how_the_run_before_ended(sink):
    """Two runs of one name are two series: of the first, that it ended."""
    for uid in ("a", "b"):
        run = sink.open(run_info(name="same", uid=uid, ring=uid))
        active(sink)
        if uid == "a":
            sink.close(run, "finished")
    found = {uid: values for (name, _, uid), values in series(sink).items()
             if name == "gradwatch_run_active"}  # fmt: skip
    assert found == {"a": [0.0], "b": [1.0]}


def test_a_run_that_goes_on_lives_though_it_was_let_go_of(sink):
    """Its own uid is live again, and said to be so once."""
    runs = [sink.open(trial(number)) for number in range(MOST)]
    first = sink.open(trial(99))
    active(sink)
    sink.close(first, None)
    assert active(sink)["trial-99"] == [0.0]
    sink.open(trial(99))
    assert active(sink)["trial-99"] == [1.0]
    assert len(runs) == MOST


def test_a_failed_run_of_a_process_that_lives_on_is_not_missed_for_ever(sink, clock):
    """Nothing is said at first, for the process may die of it; ten minutes later it has not."""
    run = sink.open(trial(0))
    assert active(sink) == {"trial-0": [1.0]}
    sink.close(run, "failed")
    clock.advance(599)
    assert active(sink) == {}
    clock.advance(2)
    assert active(sink) == {"trial-0": [0.0]}


def test_real_trials_are_bounded_by_the_setting_and_it_is_said_once(monkeypatch, caplog):
    """Eight optimizers under a limit of three: one line in the job's log, which names the setting."""
    monkeypatch.setenv("GRADWATCH_METRICS_RUNS", "3")
    kept = []
    for number in range(8):
        _, optimizer = one_parameter()
        agent = Agent(optimizer, store=MemorySink(), run=f"trial-{number}")
        step_once(optimizer)
        assert agent.flush()
        kept.append((optimizer, agent))
    sink = agent._recording.pipeline.metrics
    assert shown(sink) == ["trial-0", "trial-1", "trial-2"]
    assert left_out(sink) == 5
    for _, agent in kept:
        agent.close()
    assert len(shown(sink)) == 3
    (message,) = caplog.messages
    assert "more than 3 runs" in message
    assert "GRADWATCH_METRICS_RUNS" in message
