"""What is asked of a running job, read back from the record: undo, promises and outcomes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import live
from stores import lognormal

from gradwatch import ClipNorm, TargetRatio
from gradwatch.errors import NotControllableError
from gradwatch_monitor import Store
from gradwatch_monitor.applying import (
    Applied,
    Proposal,
    Stated,
    applied,
    in_force,
    last_in_force,
    outcomes,
    recommended,
    wait,
    wanted,
)
from gradwatch_monitor.recommend import History, recommend_from
from gradwatch_monitor.rows import Change


def change(number, *, step=0, reason=None, old=1.0, new=2.0):
    policy = ClipNorm(new)
    return Applied(
        number, step, 0.0, "ada@lab", reason, old, new,
        ClipNorm(old).describe(), policy.describe(), str(policy),
    )  # fmt: skip


def history(threshold=1.0, middle=0.9, count=3000):
    norms = lognormal(count, middle=middle)
    return History(
        norms, np.full(count, threshold), norms > threshold, np.zeros(count, bool),
        optimizer="AdamW",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reasons", "next_undone"),
    [
        ([], None),
        ([None], 1),
        ([None, "loose"], 2),
        ([None, None, "undo of change 2"], 1),
        ([None, None, "undo of change 2", "undo of change 1; worse"], None),
        ([None, None, "undo of change 2", None], 4),
        ([None, "undo of change 1", None, "undo of change 3"], None),
        ([None, "not an undo of change 1"], 2),
        # The undone change's timeline was given up: what it took back is not standing either.
        (["undo of change 7"], None),
    ],
)  # fmt: skip
def test_undo_walks_back_as_an_editors_does(reasons, next_undone):
    """Each undo takes back the last change that is still standing."""
    last = last_in_force([change(i, reason=why) for i, why in enumerate(reasons, start=1)])
    assert (last and last.change) == next_undone


shares = st.floats(0, 1)


@given(st.sampled_from(["change", "use_policy"]), shares, shares, shares, st.text())
def test_what_was_promised_is_read_back(verdict, ratio, low, high, why):
    """From the reason on record, to a tenth of a percent, whatever is written behind it."""
    stated = Stated(verdict, ratio, low, high)
    read = Stated.read(f"{stated}; {why}")
    assert read.verdict == verdict
    np.testing.assert_allclose((read.ratio, read.low, read.high), (ratio, low, high), atol=0.00051)
    assert Stated.read(f"because {stated}") is None
    assert Stated.read(None) is None


def test_the_promise_is_the_recommendations():
    """A constant's interval; of a policy, the band that it holds the share in."""
    made = recommend_from(history())
    assert Stated.read(recommended(made).why).low == pytest.approx(made.interval[0], abs=0.0006)
    policy = TargetRatio(cap=3.0)
    follows = dataclasses.replace(made, verdict="use_policy", policy=policy)
    assert Stated.of(follows) == Stated("use_policy", made.target, *made.band)
    assert recommended(follows).policy == policy


def test_what_is_in_force_is_not_applied_again():
    """A history from before the change goes on saying so; a few per cent are no difference."""
    made = recommend_from(history())
    assert not in_force(made)
    since = dataclasses.replace(made, current_threshold=made.threshold * 1.03)
    assert in_force(since)
    with pytest.raises(NotControllableError, match="in force already"):
        recommended(since)
    assert not in_force(dataclasses.replace(made, current_threshold=made.threshold * 1.1))


def test_outcomes_are_numpys():
    """Shares before and after each change, over finite norms, steps missing or not."""
    norms = lognormal(1000, middle=2.0)
    norms[[100, 101, 500, 501]] = np.nan, 0.0, np.inf, 0.0
    step = np.arange(1000) + np.where(np.arange(1000) > 300, 50, 0)  # 50 were lost
    threshold = np.select([step < 200, step < 700], [1.0, 3.0], 2.5)
    clipped = np.isfinite(norms) & (norms > threshold)
    promise = str(Stated("change", 0.2, 0.1, 0.3))
    first = change(1, step=200, new=3.0, reason=promise)
    second = change(2, step=700, old=3.0, new=2.5)
    last = change(3, step=1040, old=2.5, new=9.0, reason=promise)
    found = outcomes([first, second, last], step, norms, clipped)
    good = np.isfinite(norms)
    for outcome, start, stop in zip(found, (200, 700, 1040), (700, 1040, 2000), strict=True):
        since = good & (step >= start) & (step < stop)
        assert outcome.steps == since.sum()
        assert outcome.would == np.mean(norms[good & (step < start)] > outcome.applied.new)
        if since.sum() >= 50:
            assert outcome.ratio == clipped[since].mean()
    assert found[0].kept == (0.1 <= found[0].ratio <= 0.3)
    assert "stated (10–30 %)" in str(found[0])
    assert found[1].kept is None
    assert (found[2].ratio, found[2].kept) == (None, None)
    assert str(found[2]) == "10 steps since then: too few to tell"
    assert outcomes([], step, norms, clipped) == []


def test_a_promise_that_was_not_kept_is_told():
    """Not as stated."""
    norms = lognormal(400)
    made = change(1, step=100, new=1.0, reason=str(Stated("change", 0.2, 0.1, 0.3)))
    (outcome,) = outcomes([made], np.arange(400), norms, norms > 1.0)
    assert outcome.kept is False
    assert "not as stated (10–30 %)" in str(outcome)


def test_a_request_that_this_version_cannot_read_is_shown_all_the_same():
    """The row of a newer version's policy."""
    row = Change(1, 0.0, "ada", None, None, {"policy": "Newer"}, None, None, None, None)
    assert wanted(row) == "Newer"
    assert wanted(dataclasses.replace(row, threshold=0.5, policy=None)) == "0.5"


def test_a_reason_that_sounds_like_an_undo_is_none():
    """Somebody's own words are never read as ours."""
    with live() as job, Store() as store:
        job.until(10)
        for threshold, reason in ((0.8, None), (0.5, "undo of change 1 was not enough"),
                                  (0.4, "undo of change 2")):  # fmt: skip
            asked = Proposal(threshold).ask(store, 1, by="ada", reason=reason)
            assert wait(store, 1, asked, 60).applied_step
            job.until(job.step + 1)
        assert job.agent.flush()
        last = last_in_force(applied(store, 1))
        assert (last.change, last.new) == (3, 0.4)
        assert Stated.read(last.reason) is None


def test_what_a_policy_holds_in_the_band_is_kept():
    """The recommended one was applied: it is not named again, nor applied again."""
    norms = lognormal(2000, middle=3.0, spread=0.2) * np.exp(np.linspace(0.45, -0.45, 2000))
    threshold, clipped = [], []
    policy = TargetRatio(cap=9.0)
    state = policy.init()
    for norm in norms:
        threshold.append(state.threshold)
        clipped.append(norm > state.threshold)
        state = policy.learn(state, norm, None)
    told = History(norms, np.array(threshold), np.array(clipped), np.zeros(2000, bool),
                   policy="TargetRatio", changed_at=400)  # fmt: skip
    made = recommend_from(told)
    assert (made.verdict, made.policy) == ("keep", None)
    assert "TargetRatio holds 2" in made.reasons[0]
    assert "inside the band" in made.reasons[0]
    with pytest.raises(NotControllableError, match="keep"):
        recommended(made)
    # Where too few steps tell, the policy in force is known by its name.
    early = recommend_from(dataclasses.replace(told, changed_at=1970))
    assert early.verdict == "use_policy"
    with pytest.raises(NotControllableError, match="TargetRatio is in force already"):
        recommended(early)


def test_the_share_told_is_of_what_is_in_force():
    """Steps before a change that was applied do not count for it."""
    norms = lognormal(2000)
    constant = float(np.quantile(norms, 0.8))
    threshold = np.where(np.arange(2000) < 1500, 0.01, constant)
    told = History(norms, threshold, norms > threshold, np.zeros(2000, bool),
                   policy="ClipNorm", changed_at=1500)  # fmt: skip
    made = recommend_from(told)
    assert made.current_clip_ratio == (norms > threshold)[1500:].mean()
    assert (made.verdict, made.current_threshold) == ("keep", constant)
