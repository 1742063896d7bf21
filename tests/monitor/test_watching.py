"""What the monitor exports of live runs, read by Prometheus' own parser, and what it keeps."""

import math
import sqlite3
import time

import pytest
import torch
from live import live
from loops import mlp, set_gradients
from prometheus_client.parser import text_string_to_metric_families
from stores import lognormal, write_run

from gradwatch import Agent, ClipNorm, metrics
from gradwatch_monitor import Store, diagnose, recommend
from gradwatch_monitor.watching import SELDOM, Watch


def samples(watch):
    """(name, labels) → value."""
    families = text_string_to_metric_families(watch.exposition().decode())
    found = [
        (s.name, *sorted(s.labels.items()), s.value) for family in families for s in family.samples
    ]
    assert len({one[:-1] for one in found}) == len(found)  # Prometheus takes no series twice
    return {one[:-1]: one[-1] for one in found}


def stored(query):
    with sqlite3.connect("gradwatch.db") as connection:
        return connection.execute(query).fetchall()


def test_what_is_recommended_and_found_is_exported_for_live_runs_alone():
    """The very numbers of `recommend` and `diagnose`; every name is in the table of metrics."""
    write_run(run="ended", norms=lognormal(1500, middle=5.0))
    write_run(run="short", steps=3, close=False)
    with live(clip=ClipNorm(0.1)) as job, Store() as store:
        job.until(300)
        job.pause()
        assert job.agent.flush()
        watch = Watch()
        watch.look(store)
        live_run = store.run("live")
        made, found = recommend(store, live_run.id), diagnose(store, live_run.id)
        seen = samples(watch)
    assert {name for name, *_ in seen} == {metric.name for metric in metrics.MONITOR}
    assert all(math.isfinite(value) for value in seen.values())
    own = ("run", "live"), ("uid", live_run.uid)
    assert seen["gradwatch_recommended_threshold", *own] == made.threshold
    assert seen["gradwatch_predicted_clip_ratio", *own] == made.predicted_clip_ratio
    active = {f"{f.finding}" for f in found}
    assert "clipping_every_step" in active
    for finding in active:
        assert seen["gradwatch_finding_active", ("finding", finding), *own] == 1
    for finding in found:
        key = "gradwatch_finding_critical", ("finding", finding.finding), *own
        assert seen[key] == (finding.severity == "critical")
    assert not any(("run", "ended") in key for key in seen)
    assert not any(("run", "short") in key and "finding" not in key[0] for key in seen)


def test_a_finding_that_ends_is_exported_as_0_until_the_run_does():
    """So that an alert on it resolves; after the run's end nothing is left."""
    with live(clip=ClipNorm(0.1), middle=5.0) as job, Store() as store:
        job.until(300)
        watch = Watch()
        watch.look(store)
        key = (
            "gradwatch_finding_active", ("finding", "clipping_every_step"),
            ("run", "live"), ("uid", store.run("live").uid),
        )  # fmt: skip
        assert samples(watch)[key] == 1
        store.apply(1, 1e6, by="a test")
        job.until(job.step + 700)
        watch.look(store)
        assert samples(watch)[key] == 0
        (ended,) = [f for f in store.findings(1) if f.finding == "clipping_every_step"]
        assert ended.ended_at == pytest.approx(time.time(), abs=60)
    with Store() as store:
        watch.look(store)
    assert samples(watch) == {}


def test_what_was_recommended_stays_on_record():
    """A row when it is another; once a minute, and none where nothing has changed."""
    now = 0.0
    watch = Watch(clock=lambda: now)
    rows = "SELECT verdict, threshold, last_step FROM recommendations"
    with live() as job, Store() as store:
        job.until(20)
        job.pause()
        watch.look(store)
        assert [verdict for verdict, *_ in stored(rows)] == ["not_enough_data"]
        job.go_on()
        job.until(400)
        watch.look(store)
        assert len(stored(rows)) == 1
        now += SELDOM
        job.until(job.step + 1)
        watch.look(store)
        (_, (verdict, threshold, last_step)) = stored(rows)
        assert verdict != "not_enough_data"
        assert threshold == pytest.approx(7.6, rel=0.2)
        assert last_step >= 399
        now += SELDOM
        job.until(job.step + 1)
        watch.look(store)
        assert len(stored(rows)) == 2


def test_a_run_is_looked_at_once_more_after_its_end():
    """What went wrong in its last steps is found too."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    agent = Agent(optimizer, run="dies", store="gradwatch.db", metrics_port=None)
    watch = Watch()
    for step in range(100):
        set_gradients(step, model)
        if step == 99:
            assert agent.flush()
            with Store() as store:
                watch.look(store)
                assert store.findings(1) == []
            model[0].weight.grad.fill_(math.nan)
        optimizer.step()
    agent.close()
    with Store() as store:
        watch.look(store)
        (finding,) = store.findings(1)
    assert (finding.finding, finding.last_step) == ("nonfinite_gradient", 99)


def test_a_run_that_cannot_be_looked_at_keeps_nobody_from_the_others(monkeypatch):
    """Its error is raised after they were, in every round, and gone with its cause."""
    from gradwatch_monitor import watching

    agents = [
        write_run(run=name, steps=250, close=False, nan_at=(240,)) for name in ("odd", "sick")
    ]
    real = watching.diagnose

    def diagnose_(store, run_id):
        if store.run(run_id).name == "odd":
            raise ZeroDivisionError
        return real(store, run_id)

    monkeypatch.setattr(watching, "diagnose", diagnose_)
    watch = Watch()
    with Store() as store:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                watch.look(store)
        assert "nonfinite_gradient" in {f.finding for f in store.findings(store.run("sick").id)}
        assert store.findings(store.run("odd").id) == []
        monkeypatch.setattr(watching, "diagnose", real)
        watch.look(store)
        assert "nonfinite_gradient" in {f.finding for f in store.findings(store.run("odd").id)}
    for agent in agents:
        agent.close()


def test_two_live_runs_of_one_name_have_a_series_each():
    """Their uids tell them apart; what holds of one only is not said of the other."""
    agents = [write_run(run="same", steps=250, close=False, nan_at=at) for at in ((240, 245), ())]
    watch = Watch()
    with Store() as store:
        watch.look(store)
        uids = {run.uid for run in store.runs()}
    finding = ("finding", "nonfinite_gradient"), ("run", "same")
    seen = samples(watch)
    assert len(uids) == 2
    critical = {
        uid: seen.get(("gradwatch_finding_critical", *finding, ("uid", uid))) for uid in uids
    }
    assert sorted(critical.values(), key=str) == [1.0, None]
    for agent in agents:
        agent.close()
