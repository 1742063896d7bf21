"""Runs longer than what is read step by step: what their summaries say equals the steps themselves."""

import dataclasses
import sqlite3

import kills
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import NOW, Job, records, write
from summed import check

from gradwatch import ClipNorm, TargetRatio
from gradwatch.recorder import FLAGS
from gradwatch.recovery import recover
from gradwatch_monitor import Store, integrity, recommend, views
from gradwatch_monitor.history import COLUMNS, History

attempts = st.lists(
    st.tuples(
        st.integers(0, 2500),  # how far before the end of the last one it begins
        st.integers(1, 3200),  # steps
        st.lists(st.integers(1, 3000), max_size=6),  # cuts between batches
        st.sampled_from(["ends", "is killed", "loses some"]),
    ),
    min_size=1,
    max_size=3,
)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(attempts, st.integers(0, 99))
def test_a_row_is_what_the_table_says(new_store, told, seed):
    """Whatever the batches, resumes, losses and kills: the same as made from the steps."""
    url, at = new_store(), 0
    for number, (back, count, cuts, fate) in enumerate(told):
        start = max(0, at - back)
        steps = records(start, count, seed + number)
        parts = np.split(steps, sorted({cut for cut in cuts if cut < count}))
        job = Job(url, f"ring-{number}", start)
        for i, part in enumerate(parts):
            if fate == "loses some" and i == len(parts) // 2:
                job.write(part[len(part) // 2 :], passed=len(part))
                continue
            job.write(part)
            if fate == "is killed" and i == len(parts) // 2:
                job.sink.dispose()
                before, job = job.at, Job(url, f"ring-{number}", start, recovered=True)
                job.at = before  # as the database says: what follows is the recoverer's
        job.end("crashed" if fate == "is killed" else "finished")
        at = start + count
    check(url)
    assert [p for p in integrity.check(url) if p.kind != "missing"] == []


def test_killed_jobs_are_summed_up_by_who_recovers_them():
    """Killed at full speed, some blocks stored and some not; then `recover`."""
    with kills.Factory("gradwatch.db") as factory:
        for number, count in enumerate((1500, 3700, 900)):
            factory.start_and_kill(number, lambda seen, count=count: seen >= count)
    recover("sqlite:///gradwatch.db")
    with sqlite3.connect("gradwatch.db") as connection:
        found = connection.execute(
            "SELECT run_id, step / 1000, count(*), sum(clipped), max(pre_norm), max(loss) "
            "FROM step_records r GROUP BY 1, 2 HAVING max(step) % 1000 = 999 ORDER BY 1, 2"
        ).fetchall()
        assert len(found) >= 4
        assert found == connection.execute(
            "SELECT run_id, block, steps, clipped, pre_norm_max, loss_max FROM step_summaries "
            "ORDER BY 1, 2"
        ).fetchall()  # fmt: skip


LONG = 43_210


@pytest.fixture
def long(new_store):
    """The URL of a run of 43,210 steps with a gap, and a resume in the middle of a block."""
    url = new_store()
    steps = records(0, LONG, odd=0.001)
    first = Job(url, "ring-1", 0)
    first.write(steps[:4000])
    first.write(steps[5000:9900], passed=5900)  # a whole block was lost
    first.end()
    second = Job(url, "ring-2", 7700)
    for part in np.split(steps[7700:], [900, 20_000]):
        second.write(part)
    second.end()
    return url


def agrees(url):
    """What is told of the long run, against numpy on each of its steps."""
    with Store(url) as store:
        frame = store.steps(1)
        told = store.summary(1)
        history = History.of(store, 1)
        timeline = views.Timeline(1)
        timeline.refresh(store)
    assert len(frame) == LONG - 1000
    assert told.steps == history.steps == len(timeline) == len(frame)
    assert told.finite == history.since(0.0).finite == frame.pre_norm.notna().sum()
    assert told.clip_ratio == history.since(0.0).clip_ratio == frame.clipped.sum() / told.finite
    assert (told.clipped, told.nonfinite, told.skipped) == tuple(
        frame[name].sum() for name in ("clipped", "nonfinite", "skipped")
    )
    overflow = frame.skipped & ~frame.nonfinite & frame.pre_norm.isna() & frame.loss_scale.notna()
    assert told.amp_overflows == overflow.sum()
    assert told.last_step == LONG - 1
    for name in ("time", "loss", "pre_norm", "threshold"):
        assert getattr(told, f"last_{name}") == frame[name].dropna().iloc[-1]
    norms = frame.pre_norm[frame.pre_norm > 0].to_numpy()
    for q in (0.0, 0.01, 0.5, 0.8, 0.99, 1.0):
        assert history.quantile(q) == pytest.approx(np.quantile(norms, q), rel=0.008)
    for threshold in (0.3, 1.0, 2.2):
        finite = frame.pre_norm.dropna().to_numpy()  # those of 0 too
        low, high = ((finite > threshold * factor).mean() for factor in (1.016, 1 / 1.016))
        assert low <= history.ratio(threshold) <= high
    curve = views.what_if_curve(timeline)
    assert curve.clip_ratio.tolist() == [history.since(0.2).ratio(t) for t in curve.threshold]
    for windows in (history.windows(8, 0.2), history.windows(3)):
        assert sum(window.steps for window in windows) in {
            len(frame), history.since(0.2).steps
        }  # fmt: skip
    assert history.since(0.2).steps == pytest.approx(0.8 * len(frame), abs=1000)
    recent = frame[frame.step >= 23_000]
    assert np.array_equal(timeline["step"], recent.step)
    assert np.array_equal(history.pre_norm, recent.pre_norm, equal_nan=True)
    return history, frame


def test_a_long_run_is_told_as_its_steps_are(long):
    """Counts and last values exactly, norms within 0.8 %, the last 20,000 steps as they are."""
    history, frame = agrees(long)
    assert history.blocks.steps == (frame.step < 23_000).sum()
    assert np.all(np.diff(history.blocks.column("first_step")) > 0)
    assert history.per_block["steps"].sum() == len(frame)
    assert history.per_block["clipped"].sum() == frame.clipped.sum()
    assert history.weights.sum() == history.since(0.0).count == (frame.pre_norm > 0).sum()
    assert len(history.values) == len(history.weights) == len(history.block)
    assert np.all(np.diff(history.block) >= 0)
    assert history.block[-1] == len(history.per_block["spike"]) - 1


def test_without_its_rows_a_block_is_read(long):
    """Some summaries are gone, then all of them: nothing else is told."""
    engine = sa.create_engine(long)
    for where in ("block IN (1, 4, 5, 6, 21)", "1 = 1"):
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DELETE FROM step_summaries WHERE {where}")
        agrees(long)
    engine.dispose()


def test_windows_are_the_levels_of_their_time(new_store):
    """A run whose norms double in its second half: each window has its own."""
    url = new_store()
    steps = records(0, 60_000, odd=0.0)
    steps["pre_norm"][30_000:] *= 2
    write(url, steps)
    with Store(url) as store:
        history = History.of(store, 1)
    plain = History(*(steps[name] if name in steps.dtype.names else
                      steps["flags"] & FLAGS.CLIPPED != 0 for name in COLUMNS))  # fmt: skip
    for told, exact in zip(history.windows(4), plain.windows(4), strict=True):
        for q in (0.1, 0.5, 0.9):
            assert told.quantile(q) == pytest.approx(exact.quantile(q), rel=0.008)
        assert told.clip_ratio == exact.clip_ratio
        assert told.spike == pytest.approx(exact.spike, rel=0.2)
    levels = history.since(0.0).levels(0.5)
    assert np.median(levels[:25]) * 2 == pytest.approx(np.median(levels[-25:]), rel=0.1)
    last = np.quantile(steps["pre_norm"][48_000:], 0.8)
    assert history.quantile(0.8, since=0.8) == pytest.approx(last, rel=0.008)


def test_the_verdict_is_that_of_the_steps(new_store):
    """The recommendation for a long run is the one its exact norms call for."""
    from gradwatch_monitor.recommend import recommend_from

    url = new_store()
    steps = records(0, 70_000, odd=0.0)
    steps["flags"] = np.where(steps["pre_norm"] > 1.0, FLAGS.CLIPPED, 0)
    write(url, steps)
    with Store(url) as store:
        told = recommend(store, 1)
        columns = store.columns(1, COLUMNS)
    exact = recommend_from(History(*(columns[name] for name in COLUMNS)))
    assert told.verdict == exact.verdict
    assert told.threshold == pytest.approx(exact.threshold, rel=0.01)
    assert told.current_clip_ratio == exact.current_clip_ratio
    assert told.predicted_clip_ratio == pytest.approx(exact.predicted_clip_ratio, abs=0.01)
    assert told.interval == pytest.approx(exact.interval, abs=0.01)


def test_charts_of_a_long_run_keep_its_extremes(long):
    """The greatest norm and loss of all steps are drawn, in few bands, by step, no false gap."""
    with Store(long) as store:
        frame = store.steps(1)
        timeline = views.Timeline(1)
        timeline.refresh(store)
    norms, losses = views.norms_chart(timeline, 800), views.loss_chart(timeline, 800)
    assert norms.pre_norm_max.max() == frame.pre_norm.max()
    assert losses.loss_max.max() == frame.loss.max()
    assert losses.loss_min.min() == frame.loss.min()
    ratios = views.clip_ratio(timeline, 100, 800)
    for chart in (norms, losses, ratios):
        assert len(chart) <= 300
        assert np.all(np.diff(chart.step) >= 0)
    first = frame[frame.step < ratios.to.iloc[0]]
    assert ratios.clip_ratio.iloc[0] == first.clipped.sum() / first.pre_norm.notna().sum()
    assert timeline.last_step == LONG - 1
    assert norms.to.iloc[-1] == LONG


def test_a_live_timeline_goes_on(new_store):
    """New steps come one by one, and in time the older ones become blocks."""
    url = new_store()
    steps = records(0, 90_000)
    job, timeline = Job(url, "ring", 0), views.Timeline(1)
    with Store(url) as store:
        for start in range(0, len(steps), 15_000):
            job.write(steps[start : start + 15_000])
            timeline.refresh(store)
            assert len(timeline) == start + 15_000
            assert timeline.last_step == start + 14_999
            assert len(timeline["step"]) <= 55_000
    assert timeline.blocks.steps
    job.end()


def test_what_came_of_a_change_is_told_of_all_the_steps(new_store):
    """Of those that are blocks by now too: counts and shares are numpy's, what they would have been nearly."""
    from gradwatch_monitor.applying import Applied, outcomes

    url = new_store()
    steps = records(0, 60_000, odd=0.0)
    steps["threshold"] = np.select([steps["step"] < 1234, steps["step"] < 45_678], [1.0, 1.5], 3.0)
    steps["flags"] = np.where(steps["pre_norm"] > steps["threshold"], FLAGS.CLIPPED, 0)
    write(url, steps)
    made = [
        Applied(i, at, NOW, "ada", None, 1.0, new, None, ClipNorm(new).describe(), "")
        for i, (at, new) in enumerate([(1234, 1.5), (10_000, 1.5), (45_678, 3.0)])
    ]
    with Store(url) as store:
        timeline = views.Timeline(1)
        timeline.refresh(store)
        assert timeline.blocks.steps == 40_000
        told = timeline.outcomes(store, made)
        assert timeline.outcomes(store, []) == []
    exact = outcomes(made, steps["step"], steps["pre_norm"], steps["flags"] > 0)
    assert [o.steps for o in told] == [8766, 35_678, 14_322]
    for ours, theirs in zip(told, exact, strict=True):
        assert (ours.steps, ours.ratio) == (theirs.steps, pytest.approx(theirs.ratio))
        assert ours.would == pytest.approx(theirs.would, abs=0.01)
    moving = dataclasses.replace(made[0], after=TargetRatio().describe())
    (followed,) = outcomes([moving], steps["step"], steps["pre_norm"], steps["flags"] > 0)
    assert followed.would is None  # its first threshold says nothing of what it clips
