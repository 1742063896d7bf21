"""Recommendations: the numbers against numpy, each verdict from a history that calls for it."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from stores import lognormal, write_run
from windows import history

from gradwatch import ClipNorm, ConfigurationError, ObserveOnly, TargetRatio
from gradwatch_monitor import Store, recommend
from gradwatch_monitor.evidence import AT_LEAST
from gradwatch_monitor.history import History
from gradwatch_monitor.recommend import recommend_from


def test_the_numbers_are_those_of_numpy():
    """Threshold, predicted and current ratio after the first fifth of a run, from a real store."""
    norms = lognormal(600, middle=2.0)
    write_run(norms=norms)
    with Store("gradwatch.db") as store:
        result = recommend(store, store.run("first").id)
        frame = store.steps(1)
    late = frame[120:]
    low, high = np.quantile(norms[120:], [0.75, 0.85])
    assert result.threshold == pytest.approx(math.sqrt(low * high), rel=5e-3)
    assert result.predicted_clip_ratio == pytest.approx((late.pre_norm > result.threshold).mean())
    assert abs(result.predicted_clip_ratio - 0.20) < 0.02
    assert result.current_clip_ratio == late.clipped.mean()
    assert result.current_threshold == 1.0
    assert result.steps == 600
    assert result.interval[0] < result.predicted_clip_ratio < result.interval[1]


@pytest.mark.parametrize("target", [0.12, 0.20, 0.28])
def test_the_target_is_what_is_clipped(target):
    """Another share of the steps, another constant."""
    result = recommend_from(history(lognormal(2000)), target=target)
    assert result.predicted_clip_ratio == pytest.approx(target, abs=0.02)


def test_change_outside_the_band():
    """Two in five are clipped at 1.0, steadily: the constant that clips a fifth."""
    result = recommend_from(history(lognormal(1000, middle=0.9), optimizer="SGD"))
    assert result.verdict == "change"
    assert result.policy == ClipNorm(result.threshold)
    assert result.sentence.startswith(
        "clipped 38 % of steps at 1 after the first fifth of the run; "
    )
    share = f"{100 * result.predicted_clip_ratio:.0f} %"
    assert f"{result.threshold:g} would clip {share} of the next run" in result.sentence
    assert any("provisional" in reason for reason in result.reasons)


def test_what_every_step_was_clipped_at_tells_little_of_a_run_by_sgd():
    """It has seen the beginning of the next one: a policy, and an interval that admits it."""
    result = recommend_from(history(lognormal(1000, middle=9.0), optimizer="SGD"))
    assert result.verdict == "use_policy"
    assert isinstance(result.policy, TargetRatio)
    assert any("cap on the learning rate" in reason for reason in result.reasons)
    (why,) = [reason for reason in result.reasons if "SGD gets on slowly" in reason]
    # A free run takes 1 / mean(1 / n) of this one's steps for one of its own: it is not through the
    # first fifth of the next one, which is left out.
    assert (1 / lognormal(1000, middle=9.0)).mean() < 0.2
    assert "this run shows next to nothing of what one at" in why
    low, high = result.interval
    assert high - low > 0.8
    norms = lognormal(1000, middle=3.0)
    half = recommend_from(history(norms, optimizer="SGD"))
    (why,) = [reason for reason in half.reasons if "SGD gets on slowly" in reason]
    known = int(re.search(r"shows the first (\d+) %", why)[1])
    assert 1 <= known < 100 * (1 / norms).mean() + 1


def test_a_constant_far_from_what_was_in_force_is_not_counted_on():
    """Nor by Adam, whose steps are as long: the next run clips so much less that it is another one."""
    result = recommend_from(history(lognormal(1000, middle=9.0), optimizer="AdamW"))
    assert result.verdict == "use_policy"
    assert any("clipped so much less" in reason for reason in result.reasons)
    assert result.threshold == pytest.approx(9.0 * np.exp(0.5 * 0.84), rel=0.1)


def test_where_clipping_slows_a_run_down_that_is_said():
    """By SGD, norms that fall: at the constant, more of the next run is clipped than of this one."""
    falling = np.exp(np.linspace(0.0, -2.0, 1500)) * lognormal(1500, spread=0.05)
    by_sgd = recommend_from(history(falling, threshold=1e3, optimizer="SGD"))
    by_adam = recommend_from(history(falling, threshold=1e3, optimizer="AdamW"))
    assert by_sgd.threshold > 1.15 * by_adam.threshold
    assert by_sgd.predicted_clip_ratio == pytest.approx(0.2, abs=0.03)
    (reason,) = [reason for reason in by_sgd.reasons if "slower past the large ones" in reason]
    late = falling[300:]
    assert reason.startswith(f"{100 * (late > by_sgd.threshold).mean():.0f} % of this run's norms")
    assert not any("past the large ones" in reason for reason in by_adam.reasons)


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop", "Adagrad"])
def test_who_rescales_gradients_is_told_something_else_than_sgd(optimizer):
    """There a constant scale caps no learning rate."""
    result = recommend_from(history(lognormal(1000, middle=4.0), optimizer=optimizer))
    assert not any("learning rate" in reason for reason in result.reasons)
    assert any("rescales every parameter" in reason for reason in result.reasons)


def test_keep_inside_the_band():
    """A threshold that clips a fifth is left as it is."""
    norms = lognormal(1000)
    result = recommend_from(history(norms, threshold=float(np.quantile(norms, 0.8))))
    assert (result.verdict, result.policy) == ("keep", None)


def test_what_clips_a_fifth_in_bursts_is_no_constant_to_keep():
    """How many bursts there are differs from seed to seed; a controller clips them much as now."""
    norms = lognormal(1000, spread=0.3)
    norms[400:550] *= 2.5
    result = recommend_from(history(norms, threshold=1.6))
    assert 0.10 < result.current_clip_ratio < 0.30
    assert (result.verdict, result.policy) == ("use_policy", TargetRatio(cap=2.4, initial=1.6))
    assert "unevenly" in result.reasons[0]
    norms[550:640] *= 2.5
    at_the_edge = recommend_from(history(norms, threshold=1.6))
    assert 0.30 < at_the_edge.current_clip_ratio < 0.33
    assert at_the_edge.policy == result.policy
    evenly = lognormal(1000)
    at_the_edge = recommend_from(history(evenly, threshold=float(np.quantile(evenly[200:], 0.69))))
    assert at_the_edge.verdict == "change"


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("changed_at", [400, 500])
def test_a_constant_that_was_applied_and_does_its_work_is_kept(changed_at, optimizer):
    """How evenly it clips is asked of the steps since; before it, nearly all were clipped."""
    norms = lognormal(1000)
    held = float(np.quantile(norms[changed_at:], 0.8))
    threshold = np.where(np.arange(1000) < changed_at, 0.5 * held, held)
    result = recommend_from(
        history(norms, threshold=threshold, changed_at=changed_at, optimizer=optimizer)
    )
    assert (result.verdict, result.policy) == ("keep", None)
    assert "evenly so" in result.reasons[0]


def test_what_no_controller_can_follow_is_kept_though_uneven():
    """`TargetRatio` is of L2 norms."""
    norms = lognormal(1000, spread=0.3)
    norms[400:550] *= 2.5
    result = recommend_from(history(norms, threshold=1.6, norm_type=math.inf))
    assert (result.verdict, result.policy) == ("keep", None)
    assert "its share moves" in result.reasons[0]
    assert not any("above the band" in reason for reason in result.reasons)


@pytest.mark.parametrize("threshold", [1000.0, None])
def test_a_healthy_run_needs_no_clipping(threshold):
    """Clipped rarely, or watched only, and no spikes: nothing is wrong, and that is said."""
    result = recommend_from(history(lognormal(1000, spread=0.2), threshold=threshold))
    assert (result.verdict, result.policy) == ("not_needed", None)
    assert result.threshold is not None
    assert any("nothing is wrong" in reason for reason in result.reasons)


def test_drifting_norms_need_a_policy():
    """No constant stays in the band: a controller with a cap is named."""
    drift = np.linspace(0.45, -0.45, 2000)
    result = recommend_from(history(lognormal(2000, middle=3.0, spread=0.2) * np.exp(drift)))
    assert result.verdict == "use_policy"
    assert isinstance(result.policy, TargetRatio)
    assert result.policy.cap == pytest.approx(1.5 * result.threshold, rel=1e-2)
    assert result.threshold is not None


def test_a_cap_has_room_for_what_a_run_ends_at():
    """Norms that rise need it; a run by SGD that was clipped to next to nothing tells little of it."""
    drift = np.linspace(-0.45, 0.45, 2000)
    norms = lognormal(2000, middle=3.0, spread=0.2) * np.exp(drift)
    rising = recommend_from(history(norms))
    end = np.quantile(norms[-200:], 0.8)
    assert end > 1.2 * rising.threshold
    assert rising.policy.cap == pytest.approx(1.5 * end, rel=1e-2)
    by_sgd = recommend_from(history(100 * norms, optimizer="SGD"))
    assert by_sgd.policy.cap == pytest.approx(3 * by_sgd.threshold, rel=1e-2)


def test_exploding_norms_are_a_training_problem():
    """Bursts within 100 steps, with the tight threshold biting: keep it, fix the training."""
    norms = lognormal(1000, middle=2.0)
    norms[::20] *= 50
    result = recommend_from(history(norms))
    assert result.verdict == "fix_training"
    assert result.policy == ClipNorm(1.0)
    assert any("explode" in reason for reason in result.reasons)


def test_nonfinite_gradients_come_first():
    """More than one step in a hundred NaN: where it enters comes before any threshold."""
    norms = lognormal(1000)
    norms[::50] = math.nan
    result = recommend_from(history(norms))
    assert result.verdict == "fix_training"
    assert "2.0 %" in result.reasons[0]
    assert math.isfinite(result.threshold)


@pytest.mark.parametrize("count", [0, 1, AT_LEAST, 61])
def test_too_few_steps_say_so(count):
    """No threshold, no interval, and how many are needed."""
    result = recommend_from(history(lognormal(count)))
    assert result.verdict == "not_enough_data"
    assert (result.threshold, result.interval, result.policy) == (None, None, None)
    assert str(AT_LEAST) in result.sentence


def test_the_interval_is_wider_early():
    """After 100 steps it says less than after 2,000."""
    widths = []
    for count in (100, 400, 2000):
        low, high = recommend_from(history(lognormal(count))).interval
        widths.append(high - low)
    assert widths[0] > widths[1]
    assert widths[0] > widths[2]


def test_nan_and_inf_poison_nothing():
    """A few non-finite steps leave every number finite and nearly the same."""
    norms = lognormal(2000, middle=3.0)
    clean = recommend_from(history(norms))
    norms[[5, 700, 1900]] = [math.nan, math.inf, math.nan]
    spoilt = recommend_from(history(norms))
    assert spoilt.verdict == clean.verdict
    assert spoilt.threshold == pytest.approx(clean.threshold, rel=0.01)


def test_it_is_json():
    """As the command line prints it."""
    text = json.dumps(recommend_from(history(lognormal(1000, middle=0.9))).as_dict(), default=str)
    assert json.loads(text)["policy"]["policy"] == "ClipNorm"


@pytest.mark.parametrize(
    ("target", "band", "name"),
    [(0.2, (0.3, 0.1), "band"), (0.5, (0.1, 0.3), "target"), (0.2, (0.0, 0.3), "band")],
)
def test_wrong_bands_are_named(target, band, name):
    """The error says which argument, and what a band is."""
    with pytest.raises(ConfigurationError, match=name):
        recommend_from(history(lognormal(100)), target=target, band=band)


def test_a_run_that_only_observes(tmp_path):
    """Without a threshold there is no current ratio; the constant is given all the same."""
    norms = lognormal(400, middle=3.0, spread=0.9)
    write_run(norms=norms, policy=ObserveOnly())
    with Store("gradwatch.db") as store:
        result = recommend(store, 1)
    assert result.current_clip_ratio is None
    assert result.sentence.startswith(f"{result.threshold:g} would clip")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.005, 0.02, 0.04])
def test_a_healthy_run_clipped_rarely_is_told_that_nothing_is_wrong(seed, share):
    """At 2 % as at half a percent; and what would put it in the band."""
    norms = lognormal(1500, spread=0.3, seed=seed)
    result = recommend_from(history(norms, threshold=float(np.quantile(norms, 1 - share))))
    assert (result.verdict, result.policy) == ("not_needed", None)
    assert any("would put it in the band" in reason for reason in result.reasons)


@pytest.mark.parametrize("count", [80, 150, 300, 1000])
def test_chance_is_not_drift(count):
    """Independent norms of one distribution: a constant, or what is said is that it is early."""
    results = [recommend_from(history(lognormal(count, middle=0.9, seed=s))) for s in range(40)]
    drifting = [r for r in results if any("the norms drift" in reason for reason in r.reasons)]
    assert len(drifting) <= (8 if count < 200 else 4)
    if count == 1000:
        assert [r.verdict for r in results].count("change") >= 36


def test_another_policy_s_clipping_is_not_called_none():
    """ClipValue has no threshold of the norm, and clips all the same."""
    norms = lognormal(600, spread=0.2)
    told = history(norms, threshold=None, policy="ClipValue")
    told.clipped[:] = True
    result = recommend_from(told)
    assert result.verdict == "change"
    assert any("ClipValue clips by another measure" in reason for reason in result.reasons)
    several = recommend_from(history(norms, threshold=None, policy="ClipNorm, ClipNorm"))
    assert any("each by a policy of its own" in reason for reason in several.reasons)


def test_the_norm_type_is_kept():
    """A threshold for maximum norms, read off maximum norms; from a real store too."""
    result = recommend_from(history(lognormal(800, middle=9.0), norm_type=math.inf))
    assert result.policy == ClipNorm(result.threshold, math.inf)
    write_run(norms=lognormal(300, middle=9.0), policy=ClipNorm(1.0, math.inf))
    with Store("gradwatch.db") as store:
        found = recommend(store, 1)
    assert found.policy.norm_type == math.inf


def test_growing_norms_are_not_healthy():
    """Growth is found at any threshold."""
    growth = np.exp(np.linspace(0, 7, 1500)) * lognormal(1500, spread=0.1)
    for threshold in (1e4, None):
        result = recommend_from(history(growth, threshold=threshold))
        assert result.verdict == "fix_training"
        assert "grows" in result.reasons[0]
        assert not any("keep the tight" in reason for reason in result.reasons)


def test_norms_that_grow_while_the_loss_falls_do_not_explode():
    """A likelihood's do, as it sharpens: 54 to 36 nats. Where the loss has not fallen they do."""
    growth = np.exp(np.linspace(0, 2, 1500)) * lognormal(1500, middle=30.0, spread=0.1)
    for last, verdict in ((36.0, "use_policy"), (53.0, "fix_training"), (80.0, "fix_training")):
        loss = np.linspace(54.0, last, 1500)
        assert recommend_from(history(growth, loss=loss)).verdict == verdict


def test_norms_that_rose_as_a_threshold_was_loosened_do_not_explode():
    """What came with a change is of the change; what grows after it grows."""
    norms = lognormal(2000, spread=0.2)
    norms[800:] *= 5
    changed = {"threshold": np.where(np.arange(2000) < 800, 1.0, 8.0), "changed_at": 800}
    assert recommend_from(history(norms, **changed)).verdict == "not_needed"
    norms[800:] *= np.exp(np.linspace(0, 3, 1200))
    result = recommend_from(history(norms, **changed))
    assert (result.verdict, "grows" in result.reasons[0]) == ("fix_training", True)


def test_where_the_band_would_do_harm_that_is_said():
    """Norms that fall a hundredfold: what clips a fifth of the end chokes the start."""
    falling = np.exp(np.linspace(0, -7, 1500)) * lognormal(1500, spread=0.1)
    result = recommend_from(history(falling, threshold=0.9))
    assert (result.verdict, result.policy) == ("not_needed", None)
    assert any("would do harm" in reason for reason in result.reasons)
    # By Adam steps are as long without clipping: there it kept nothing in hand.
    by_adam = recommend_from(history(falling, threshold=0.1, optimizer="AdamW"))
    assert (by_adam.verdict, by_adam.policy) == ("use_policy", TargetRatio(cap=0.15, initial=0.1))
    clipped_at_first = recommend_from(history(falling, threshold=0.1, optimizer="SGD"))
    assert clipped_at_first.verdict == "fix_training"
    assert clipped_at_first.policy == ClipNorm(0.1)
    assert any("choke" in reason for reason in clipped_at_first.reasons)


def test_norms_behind_the_loops_own_clipping_tell_no_threshold():
    """Seven in ten lie at one number: nothing can be read from that, and it is said why."""
    norms = np.minimum(lognormal(1000, middle=0.8), 0.5)
    norms[norms == 0.5] -= 5e-7
    hidden = recommend_from(history(norms, clipped_before=True))
    assert (hidden.verdict, hidden.threshold, hidden.policy) == ("not_enough_data", None, None)
    share = 100 * (norms[-500:] > 0.4999).mean()
    assert f"{share:.0f} % of the last norms are exactly 0.5" in hidden.sentence
    # The loop was mended, and the run resumed: what was seen then hides nothing now.
    mended = np.concatenate([norms, lognormal(1000, middle=0.8)])
    assert recommend_from(history(mended, clipped_before=True)).threshold is not None


def test_shares_since_a_change_are_said_to_be_that():
    """Half of the first thousand steps were clipped; since the change, none."""
    norms = lognormal(1300)
    told = history(norms, threshold=100.0)
    clipped = np.where(np.arange(1300) < 1000, norms > 1.0, told.clipped)
    result = recommend_from(dataclasses.replace(told, clipped=clipped, changed_at=1000))
    words = "in the 300 steps since the last change"
    assert f"clipped 0 % of steps at 100 {words}" in result.sentence
    assert all("after the first fifth" not in reason for reason in result.reasons)


def test_narrow_norms_get_as_many_digits_as_they_need():
    """Norms of 10.02 ± 0.008: three digits would clip all of them."""
    norms = 10.02 + 0.008 * np.random.default_rng(0).normal(size=1000)
    result = recommend_from(history(norms))
    assert result.predicted_clip_ratio == pytest.approx(0.2, abs=0.03)


def test_a_threshold_that_moved_is_not_said_to_have_clipped_it_all():
    """The sentence names a threshold only where it was in force all along."""
    norms = lognormal(1000)
    thresholds = np.where(np.arange(1000) < 900, 0.1, 50.0)
    clipped = norms > thresholds
    result = recommend_from(History(norms, thresholds, clipped, ~np.isfinite(norms)))
    assert " at " not in result.sentence.split(";")[0]
    assert result.current_threshold == 50.0
