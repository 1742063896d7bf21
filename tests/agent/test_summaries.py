"""What a block's row says, against numpy on the records it was made from."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gradwatch import schema, summaries
from gradwatch.errors import StoreError

NORMAL = float(np.finfo(float).tiny)  # below, floats are too coarse for 0.8 %
norms = arrays(float, st.integers(1, 300), elements=st.floats(NORMAL, allow_infinity=False))


@settings(deadline=None)
@given(norms)
def test_a_histogram_keeps_each_norm_within_a_hundredth(values):
    """By rank: the k-th smallest read back is the k-th smallest, within 0.8 %."""
    histogram = summaries.decode([summaries.encode(values)])
    assert histogram.weights.sum() == len(values)
    back = np.repeat(summaries.middles(histogram.bins), histogram.weights)
    assert np.all(np.abs(back / np.sort(values) - 1) <= 0.008)


@settings(deadline=None)
@given(st.lists(norms, max_size=4))
def test_histograms_add_up(parts):
    """Those of several blocks merged are the histogram of all norms."""
    values, weights = summaries.merge(summaries.decode([summaries.encode(p) for p in parts]))
    every = np.concatenate([np.empty(0), *parts])
    whole = summaries.decode([summaries.encode(every)]) if len(every) else summaries.decode([])
    assert np.array_equal(values, summaries.middles(whole.bins))
    assert np.array_equal(weights, whole.weights)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-9, 1e9), st.integers(1, 9)), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_a_distribution_is_numpys(pairs, q):
    """Quantiles and shares of the values written out."""
    values, weights = np.array([v for v, _ in pairs]), np.array([w for _, w in pairs])
    every = np.repeat(values, weights)
    told = summaries.Distribution(values, weights)
    assert told.quantile(q) == pytest.approx(np.quantile(every, q), rel=1e-9)
    assert told.count == len(every)
    for threshold in (*values, 1.0):
        assert told.share(threshold) == pytest.approx((every > threshold).mean())
    assert np.array_equal(told.share(values), [told.share(v) for v in values])


def test_a_distribution_of_nothing():
    """No quantile, and nothing above a threshold."""
    nothing = summaries.Distribution(np.empty(0), np.empty(0, int))
    assert math.isnan(nothing.quantile(0.5))
    assert nothing.share(1.0) == 0
    assert nothing.share(np.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 49, 50, 51, 99, 100, 101, 250, 999, 1000])
def test_spikes_and_bursts_are_what_they_say(count):
    """Step by step, and window by window as numpy splits them."""
    values = np.random.default_rng(count).lognormal(0, 1, count)
    slow = [
        values[i] / np.median(values[i - 50 : i] if i >= 50 else values[:50]) for i in range(count)
    ]
    assert summaries.spikes(values) == pytest.approx(slow)
    windows = np.array_split(np.log(values), max(1, count // 100))
    slow = [np.quantile(w, 0.98) - np.median(w) for w in windows]
    assert summaries.bursts(values) == pytest.approx(slow)


def table(count, seed=0, **columns):
    """Records as they are read back, with everything in them that can be."""
    pick = np.random.default_rng(seed)
    records = {name: pick.lognormal(0, 1, count) for name in summaries.INPUTS}
    for name in ("clipped", "nonfinite", "nonfinite_loss", "skipped"):
        records[name] = (pick.random(count) < 0.1).astype(float)
    for name in ("loss", "pre_norm", "post_norm", "threshold", "loss_scale"):
        records[name][pick.random(count) < 0.1] = np.nan
    records["pre_norm"][pick.random(count) < 0.1] = 0.0
    return {**records, "step": np.arange(count) + 7000, **columns}


def test_a_row_is_numpys():
    """Counts, extremes, means and last values of a thousand records."""
    records = table(1000)
    (row,) = summaries.summarise(records)
    pre, loss = records["pre_norm"], records["loss"]
    positive = pre[pre > 0]
    overflow = (
        (records["skipped"] == 1) & (records["nonfinite"] == 0) & np.isnan(pre)
        & np.isfinite(records["loss_scale"])
    )  # fmt: skip
    assert row.pop("norms") == summaries.encode(positive)
    expected = {
        "first_step": 7000, "last_step": 7999, "last_time": records["time"][-1], "steps": 1000,
        "finite": np.isfinite(pre).sum(), "zeros": (pre == 0).sum(),
        **{name: records[name].sum()
           for name in ("clipped", "nonfinite", "nonfinite_loss", "skipped")},
        "amp_overflows": overflow.sum(),
        "no_gradient": (
            np.isnan(pre) & (records["nonfinite"] == 0) & (records["skipped"] == 0)
        ).sum(),
        "spike": summaries.spikes(positive).max(), "burst": summaries.bursts(positive).max(),
    }  # fmt: skip
    for name in ("pre_norm", "post_norm", "threshold", "loss", "lr", "loss_scale"):
        values = records[name][np.isfinite(records[name])]
        above = values[values > 0]
        expected[name] = values[-1]
        expected[f"{name}_max"] = values.max()
        if name in ("pre_norm", "post_norm", "threshold"):
            expected[f"{name}_min"] = above.min()
            expected[f"{name}_geomean"] = np.exp(np.log(above).mean())
            expected[f"{name}_count"] = len(above)
        else:
            expected[f"{name}_min"], expected[f"{name}_mean"] = values.min(), values.mean()
            expected[f"{name}_count"] = len(values)
    del expected["pre_norm_count"]  # it is finite - zeros
    expected["loss_geomean"] = np.exp(np.log(loss[np.isfinite(loss)]).mean())
    assert row == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, 0.0, 5e-324, 1.7e308, -1.7e308])
def test_a_row_holds_only_what_is_finite(value):
    """Whatever the records hold, what is stored is a number or nothing."""
    records = table(300, loss=np.full(300, value), pre_norm=np.full(300, abs(value)))
    (row,) = summaries.summarise(records)
    assert set(row) == {c.name for c in schema.step_summaries.columns if not c.primary_key}
    for name, told in row.items():
        assert told is None or name == "norms" or math.isfinite(told)


def test_which_blocks_a_batch_completes():
    """Those whose last step it has or has passed, of those it touches."""
    assert summaries.completed(np.arange(0, 999), 0) == []
    assert summaries.completed(np.arange(0, 1000), 0) == [0]
    assert summaries.completed(np.arange(990, 1010), 990) == [0]
    assert summaries.completed(np.arange(1500, 4000), 1500) == [1, 2, 3]
    # The steps 995 to 2004 were lost: block 0 has all it will ever have.
    assert summaries.completed(np.arange(2005, 2010), 995) == [0]
    assert summaries.completed(np.arange(0), 995) == []


def test_a_format_of_the_future_is_not_guessed():
    """The error names the version."""
    with pytest.raises(StoreError, match="version 2"):
        summaries.decode([summaries.encode(np.ones(3)), (2).to_bytes(4, "little")])
