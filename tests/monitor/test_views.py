"""What pages show equals numpy over the stored steps."""

import contextlib
import math
import sqlite3

import numpy as np
import pytest
from stores import Job, lognormal, records, write_run

from gradwatch.recorder import FLAGS
from gradwatch_monitor import Store, views


@pytest.fixture
def store():
    write_run(norms=lognormal(1200, middle=1.5), nan_at=(100, 101), tags={"lr": 0.001})
    with Store("gradwatch.db") as opened:
        yield opened


@pytest.fixture
def timeline(store):
    timeline = views.Timeline(1)
    timeline.refresh(store)
    return timeline


def test_a_timeline_reads_only_what_is_new():
    """Refreshed while the run goes on, it equals the whole frame; a new attempt starts it over."""
    agent = write_run(steps=10, close=False)
    store = Store("gradwatch.db")
    timeline = views.Timeline(1)
    timeline.refresh(store)
    assert len(timeline) == 10
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute(
            "INSERT INTO step_records SELECT run_id, attempt, step + 10, time, loss, lr, 7.0, "
            "post_norm, threshold, loss_scale, clipped, nonfinite, nonfinite_loss, skipped "
            "FROM step_records"
        )
    timeline.refresh(store)
    assert timeline["step"].tolist() == list(range(20))
    assert timeline["pre_norm"][15] == 7.0
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("INSERT INTO attempts VALUES (1, 2, 5, 0, 2)")
    timeline.refresh(store)
    assert timeline["step"].tolist() == list(range(5))
    agent.close()


def test_steps_of_an_earlier_attempt_that_come_late_are_seen():
    """Recovered after the resumed run had gone on: between steps that were read already."""
    write_run(steps=10)
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("DELETE FROM step_records WHERE step > 4")
        connection.execute("UPDATE rings SET step_cursor = 5")
        connection.execute("INSERT INTO attempts VALUES (1, 2, 8, 0, 2)")
        copy = (
            "INSERT INTO step_records SELECT run_id, {}, {}, time, loss, lr, pre_norm, post_norm, "
            "threshold, loss_scale, clipped, nonfinite, nonfinite_loss, skipped FROM step_records "
            "WHERE attempt = 1 AND step BETWEEN {} AND {}"
        )
        connection.execute(copy.format(2, "step + 8", 0, 1))
    store = Store("gradwatch.db")
    timeline = views.Timeline(1)
    timeline.refresh(store)
    assert timeline["step"].tolist() == [0, 1, 2, 3, 4, 8, 9]
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute(copy.format(1, "step + 5", 0, 4))
        connection.execute("UPDATE rings SET step_cursor = 10")
    timeline.refresh(store)
    assert timeline["step"].tolist() == list(range(10))


@pytest.mark.parametrize("points", [10_000, 50])
def test_a_gap_in_the_steps_is_a_gap_in_every_line(points):
    """Between the steps around it a row without values; elsewhere the lines go on."""
    write_run(norms=lognormal(1200))
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("DELETE FROM step_records WHERE step BETWEEN 500 AND 799")
    timeline = views.Timeline(1)
    timeline.refresh(Store("gradwatch.db"))
    for frame, column in (
        (views.norms_chart(timeline, points), "pre_norm"),
        (views.clip_ratio(timeline, 100, points), "clip_ratio"),
        (views.loss_chart(timeline, points), "loss"),
    ):
        around = frame[frame["step"].between(499, 800)]
        assert around["step"].tolist() == [499, 500, 800]
        assert around[column].isna().tolist() == [False, True, False]
        assert frame["step"].is_monotonic_increasing
        assert frame[column].isna().sum() == 1


@pytest.mark.parametrize("threshold", [0.5, 1.0, 1.7, 100.0])
def test_what_if_is_numpys_share(timeline, threshold):
    """The share above the threshold of the finite norms after the first fifth."""
    norms = timeline["pre_norm"][240:]
    finite = norms[np.isfinite(norms)]
    assert views.what_if(timeline, threshold) == (np.mean(finite > threshold), len(finite))


def test_the_what_if_curve_agrees_with_what_if(timeline):
    """Every point of the curve, the thresholds asked for among them."""
    curve = views.what_if_curve(timeline, include=(1.2345, None, 1e9))
    assert 1.2345 in curve["threshold"].tolist()
    assert curve["threshold"].is_monotonic_increasing
    for threshold, ratio in curve.itertuples(index=False):
        assert ratio == views.what_if(timeline, threshold)[0]


def test_the_rolling_clip_ratio(timeline):
    """Of the last 100 steps, those with a finite norm; from the hundredth step on."""
    frame = views.clip_ratio(timeline, 100, points=10_000)
    clipped, finite = (
        np.convolve(flags, np.ones(100), mode="valid")
        for flags in (timeline["clipped"], np.isfinite(timeline["pre_norm"]))
    )
    expected = clipped / finite
    assert frame["step"].tolist() == list(range(99, 1200))
    np.testing.assert_allclose(frame["clip_ratio"], expected)
    assert views.clip_ratio(timeline, 5000).empty


def test_thinning_keeps_extremes_and_gaps():
    """About as many points as asked for, the greatest and least among them, wide gaps as gaps."""
    values = np.random.default_rng(0).normal(size=100_000)
    values[60_123] = 50.0
    values[20_000:30_000] = math.nan
    values[7] = math.nan
    keep = views.thin(values, 1000)
    assert len(keep) <= 1010
    assert 60_123 in keep
    assert int(np.nanargmin(values)) in keep
    assert sum(20_000 <= k < 30_000 for k in keep) == 1
    assert views.thin(np.arange(5.0), 10).tolist() == [0, 1, 2, 3, 4]
    assert views.thin(np.full(5000, math.nan), 100).tolist() == [0, 4999]


def test_norms_chart_is_fit_for_a_log_axis(timeline):
    """No zero, no infinity; clipped steps are those on record."""
    frame = views.norms_chart(timeline, points=5000)
    assert len(frame) == 1200
    assert (frame["pre_norm"].dropna() > 0).all()
    assert frame["clipped"].sum() == timeline["clipped"].sum()


def test_events_table_names_parameters_and_origin(store):
    """One row an event, readable as it is."""
    table = views.events_table(store, 1)
    nan = table[table["kind"] == "nonfinite_gradient"]
    assert nan["step"].tolist() == [101, 100]
    assert set(nan["parameters"]) == {"2.weight"}
    assert set(nan["origin"]) == {"2.weight"}


def test_runs_table(store):
    """One row a run."""
    write_run(run="second", steps=3)
    table = views.runs_table(store)
    assert table["name"].tolist() == ["second", "first"]
    assert table["steps"].tolist() == [3, 1200]
    assert table["tags"].tolist() == ["", "lr=0.001"]


def test_stretches_of_nan_are_drawn_as_such():
    """Ten in a row or more, to the run's end; the axis shows all steps, those without a norm too."""
    write_run(steps=60, nan_at=(3, *range(10, 19), *range(30, 40), *range(45, 60)))
    with Store("gradwatch.db") as store:
        timeline = views.Timeline(1)
        timeline.refresh(store)
    assert views.nonfinite_stretches(timeline).to_numpy().tolist() == [[30, 39], [45, 59]]
    frame = views.norms_chart(timeline, 20)
    assert (frame["step"].min(), frame["step"].max()) == (0, 59)


def test_a_loss_that_is_logged_now_and_then_is_a_line(store):
    """Steps without one are left out; one that was NaN, or a record that is missing, is a gap."""
    write_run(run="tenth", steps=300, loss=10)
    with Store("gradwatch.db") as opened:
        timeline = views.Timeline(opened.run("tenth").id)
        timeline.refresh(opened)
        losses = views.loss_chart(timeline)
        assert losses["step"].tolist() == list(range(0, 300, 10))
        assert losses["loss"].notna().all()
        with contextlib.closing(sqlite3.connect("gradwatch.db")) as connection, connection:
            connection.execute(
                "UPDATE step_records SET loss = NULL, nonfinite_loss = 1 "
                "WHERE step = 100 AND run_id = ?", (timeline.run_id,),
            )  # fmt: skip
        timeline = views.Timeline(timeline.run_id)
        timeline.refresh(opened)
    losses = views.loss_chart(timeline)
    assert losses.loc[losses["loss"].isna(), "step"].tolist() == [100]


def test_losses_that_were_nan_are_a_gap_however_many_there_are():
    """Also where the line is thinned, and where some were logged a thousand steps apart."""
    steps = records(0, 45_000, odd=0.0)
    steps["flags"] = 0
    at = steps["step"]
    steps["loss"] = np.where(
        (at % 10 == 0) & ((at < 5000) | (at > 20_000)) | (at % 4000 == 0), 1.0, np.nan
    )
    bad = (at >= 30_000) & (at < 35_000) & (at % 10 == 0)
    steps["loss"][bad], steps["flags"][bad] = np.nan, FLAGS.NONFINITE_LOSS
    job = Job("sqlite:///gradwatch.db", "ring", 0)
    job.write(steps)
    job.sink.dispose()
    with Store("gradwatch.db") as store:
        timeline = views.Timeline(1)
        timeline.refresh(store)
    losses = views.loss_chart(timeline)
    assert timeline.blocks.steps > 20_000
    unknown = losses[losses["loss_last"].isna()]
    assert len(unknown)
    assert (unknown["step"].ge(29_000) & unknown["to"].le(36_000)).all()
    known = losses[losses["loss_last"].notna()]
    assert (known[["loss_min", "loss_mean", "loss_max", "loss_last"]] == 1.0).all(axis=None)


def test_a_run_without_losses_or_norms():
    """Empty frames, not errors."""
    write_run(steps=3, loss=False, nan_at=(0, 1, 2))
    with Store("gradwatch.db") as store:
        timeline = views.Timeline(1)
        timeline.refresh(store)
    assert views.loss_chart(timeline).empty
    assert views.what_if_curve(timeline).empty
    assert views.what_if(timeline, 1.0) == (0.0, 0)
