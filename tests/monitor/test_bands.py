"""What the charts of long runs draw, against numpy and pandas over every single step."""

import math

import numpy as np
import pytest
import sqlalchemy as sa
from stores import NOW, STEP_DTYPE, records, write

from gradwatch import schema
from gradwatch.recorder import FLAGS
from gradwatch_dashboards.web import bands as drawn
from gradwatch_dashboards.web import charts
from gradwatch_monitor import Store, migrations, views

NEW = (
    "lr", "lr_min", "lr_mean", "lr_max", "lr_count", "post_norm", "loss_scale", "loss_count",
    "pre_norm_geomean", "post_norm_geomean", "threshold_geomean", "loss_geomean", "no_gradient",
    "post_norm_count", "threshold_count", "loss_scale_min", "loss_scale_mean", "loss_scale_max",
    "loss_scale_count",
)  # fmt: skip


def smooth(count):
    """A job as most are: the loss falls, the rate is a cosine, norms are lognormal."""
    steps, at = np.zeros(count, STEP_DTYPE), np.arange(count)
    pick = np.random.default_rng(0)
    steps["step"], steps["time"] = at, NOW + at / 10
    steps["loss"] = 0.3 + 2.5 * np.exp(-at / (count / 5))
    steps["lr"] = 3e-4 * 0.5 * (1 + np.cos(math.pi * at / count))
    steps["pre_norm"] = pick.lognormal(0, 0.4, count)
    steps["threshold"], steps["loss_scale"] = 1.0, math.nan
    steps["post_norm"] = np.minimum(steps["pre_norm"], 1.0)
    steps["flags"] = np.where(steps["pre_norm"] > 1.0, FLAGS.CLIPPED, 0)
    return steps


def timeline_of(url):
    with Store(url) as store:
        timeline = views.Timeline(1)
        timeline.refresh(store)
        return timeline, store.steps(1)


@pytest.fixture(params=[41_000, 130_000], ids=["every step is read", "blocks"])
def smooth_run(request, new_store):
    """A store with one such run."""
    url = new_store()
    write(url, smooth(request.param))
    return timeline_of(url)


def test_a_falling_loss_never_rises_in_a_chart(smooth_run):
    """Neither the mean nor the last value, the least or the greatest of the bands."""
    timeline, _ = smooth_run
    losses = views.loss_chart(timeline)
    for name in ("loss_min", "loss_mean", "loss_max", "loss_last"):
        assert np.all(np.diff(losses[name]) < 0)


def test_bands_are_those_of_the_steps(smooth_run):
    """Least, mean, greatest and last of each band, as pandas has them from single steps."""
    timeline, steps = smooth_run
    for chart, name, mean in (
        (views.loss_chart(timeline), "loss", "mean"),
        (views.lr_chart(timeline), "lr", "mean"),
        (views.norms_chart(timeline), "pre_norm", "geomean"),
        (views.norms_chart(timeline), "post_norm", "geomean"),
    ):
        assert chart["step"].iloc[0] == 0
        assert chart["to"].iloc[-1] == len(steps)
        assert (chart["step"].iloc[1:].to_numpy() == chart["to"].iloc[:-1].to_numpy()).all()
        grouped = steps.groupby(np.searchsorted(chart["step"], steps["step"], side="right"))[name]
        assert chart[f"{name}_min"].to_numpy() == pytest.approx(grouped.min().to_numpy())
        assert chart[f"{name}_max"].to_numpy() == pytest.approx(grouped.max().to_numpy())
        assert chart[f"{name}_last"].to_numpy() == pytest.approx(grouped.last().to_numpy())
        expected = (
            grouped.mean() if mean == "mean" else np.exp(grouped.apply(lambda v: np.log(v).mean()))
        )
        assert chart[f"{name}_{mean}"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-9)


def test_the_clip_ratio_of_a_band_is_that_of_its_steps(smooth_run):
    """Clipped steps over those with a finite norm."""
    timeline, steps = smooth_run
    ratios = views.clip_ratio(timeline, 100)
    grouped = steps.groupby(np.searchsorted(ratios["step"], steps["step"], side="right"))
    expected = grouped["clipped"].sum() / grouped["pre_norm"].count()
    assert ratios["clip_ratio"].to_numpy() == pytest.approx(expected.to_numpy())


def test_a_cosine_shows_all_of_itself(smooth_run):
    """From its height to nearly 0, and within a thousandth of the cosine in between."""
    timeline, steps = smooth_run
    rates = views.lr_chart(timeline)
    middle = (rates["step"] + rates["to"] - 1) / 2
    cosine = 3e-4 * 0.5 * (1 + np.cos(math.pi * middle / len(steps)))
    assert rates["lr_mean"].to_numpy() == pytest.approx(cosine.to_numpy(), abs=3e-7)


def test_the_marks_of_a_chart_are_those_values(smooth_run):
    """What Vega is given: a range and a mean for each band, and an end for the last one."""
    timeline, _ = smooth_run
    losses = views.loss_chart(timeline)
    tidy = drawn.tidy(losses, {"loss": "loss"})
    rows = drawn.stepped(tidy, "least", "greatest").dropna()
    assert rows["step"].to_numpy()[:-1] == pytest.approx(losses["step"].to_numpy())
    assert rows["step"].iloc[-1] == losses["to"].iloc[-1]
    assert rows["greatest"].to_numpy()[:-1] == pytest.approx(losses["loss_max"].to_numpy())
    assert charts.lr(views.lr_chart(timeline)).to_dict()["layer"]


@pytest.mark.parametrize("count", [30_000, 130_000])
def test_migrating_fills_in_what_an_older_version_has_not_summed_up(new_store, count):
    """From the records; a block without them stays unknown, and its rate is drawn as such."""
    url = new_store()
    write(url, records(0, count) if count < 100_000 else smooth(count))
    engine = sa.create_engine(url)
    table = schema.step_summaries
    with engine.connect() as connection:
        before = connection.execute(sa.select(table).order_by(table.c.block)).all()
    with engine.begin() as connection:
        connection.execute(sa.update(table).values(dict.fromkeys(NEW)))
        connection.execute(
            sa.delete(schema.step_records).where(schema.step_records.c.step.between(2000, 2010))
        )
    migrations.migrate(url)
    with engine.connect() as connection:
        after = connection.execute(sa.select(table).order_by(table.c.block)).all()
    engine.dispose()
    for old, new in zip(before, after, strict=True):
        for name in NEW:
            told, expected = getattr(new, name), getattr(old, name)
            assert told == (None if old.block == 2 else pytest.approx(expected)), name
