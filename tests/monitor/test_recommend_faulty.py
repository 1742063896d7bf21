"""Recommendations for runs that no threshold mends: what is wrong is said first."""

import math

import numpy as np
import pytest
import torch
from stores import lognormal
from windows import history

import gradwatch
from gradwatch import ClipNorm
from gradwatch_monitor import Store, diagnose, recommend
from gradwatch_monitor.diagnosis import Sign
from gradwatch_monitor.recommend import recommend_from


@pytest.mark.parametrize("finite", [30, 200])
def test_a_run_of_nan_is_no_matter_of_data(finite):
    """Few norms are there because it is broken."""
    norms = np.full(1000, math.nan)
    norms[:finite] = lognormal(finite)
    result = recommend_from(history(norms))
    assert (result.verdict, result.policy) == ("fix_training", ClipNorm(1.0))
    assert (result.threshold, result.interval) == (None, None)
    assert "100.0 % of the steps have a NaN or inf in the gradient" in result.sentence


def test_a_loss_that_blew_up_is_no_matter_of_thresholds():
    """It leapt at the start and ended no lower than it began; a policy gradient's says nothing."""
    norms = lognormal(1000, middle=0.3, spread=0.1)
    norms[5:40] *= 60
    loss = np.full(1000, 2.5) + 0.1 * np.random.default_rng(0).normal(size=1000)
    loss[0], loss[5:40] = 2.3, 12.0
    diverged = recommend_from(history(norms, loss=loss))
    assert diverged.verdict == "fix_training"
    assert any("2.3 at first" in reason for reason in diverged.reasons)
    both_signs = recommend_from(history(norms, loss=loss - 2.5))
    assert not any("loss" in reason for reason in both_signs.reasons)


def test_what_is_critical_is_said_before_a_threshold_is_kept():
    """`diagnose` and `recommend` are read side by side: they may not contradict each other."""
    norms = lognormal(1000, middle=0.7)
    for severity in ("critical", "warning"):
        sign = Sign("exploding_gradients", severity, 1.2, (0, 999), "norms leap", "", "")
        told = recommend_from(history(norms, signs={sign.finding: sign}))
        assert told.verdict == "keep"
        assert ("to be mended first: norms leap" in told.reasons) == (severity == "critical")


@pytest.mark.parametrize(("last", "still"), [(1.9, True), (1.5, False), (2.5, False)])
def test_a_loss_that_stands_still_is_not_called_healthy(last, still):
    """Whatever the norms say: told beside the verdict, which it does not change."""
    loss = np.linspace(2.0, last, 1000)
    told = recommend_from(history(lognormal(1000, middle=0.1, spread=0.2), loss=loss))
    assert told.verdict == "not_needed"
    said = [reason for reason in told.reasons if "about where it began (2 at first" in reason]
    assert bool(said) == still
    assert any("the run is healthy as it is" in reason for reason in told.reasons) != still


def test_weights_that_exploded_are_a_divergence():
    """Whatever the norms at the start: `diagnose` calls it critical, so no policy is offered."""
    sign = Sign("exploding_weights", "critical", 2.0, (0, 999), "the weights grew", "", "")
    seen = history(lognormal(1000, middle=5.0), optimizer="SGD", signs={sign.finding: sign})
    told = recommend_from(seen)
    assert (told.verdict, told.policy) == ("fix_training", ClipNorm(0.1))
    assert told.reasons[0] == "the training diverged: the weights grew"
    dead = np.where(np.arange(1000) < 150, 5.0, 0.0)  # what exploded has died
    told = recommend_from(history(dead, optimizer="SGD", signs={sign.finding: sign}))
    assert (told.verdict, told.policy) == ("fix_training", ClipNorm(1.0))


def test_weights_that_grew_by_little_are_no_divergence():
    """As a policy's do that learns to win more: a warning, and no verdict."""
    sign = Sign("exploding_weights", "warning", 1.2, (0, 999), "the weights grew", "", "")
    told = recommend_from(history(lognormal(1000, middle=5.0), signs={sign.finding: sign}))
    assert told.verdict != "fix_training"


def test_steps_that_are_clipped_to_nothing_blow_up_no_loss():
    """Batches of very different sizes, summed: norms and losses leap by themselves, all along."""
    generator = np.random.default_rng(0)
    size = np.exp(generator.normal(0, 0.5, 1000))
    size[20:30] = 6.0
    loss = 3000 * np.exp(generator.normal(0, 0.6, 1000))
    loss[:5] = 2000.0
    told = {
        moves: recommend_from(history(1e4 * size, loss=loss, optimizer="SGD", moves=moves))
        for moves in (1e-6, 1e-2)
    }
    assert told[1e-6].verdict == "use_policy"
    assert "gets on slowly" in told[1e-6].reasons[1]
    assert told[1e-2].verdict == "fix_training"


def test_after_a_divergence_a_tight_constant_is_a_lower_learning_rate_by_sgd_alone():
    """A tenth of the usual norm; by Adam nothing of the kind."""
    norms = lognormal(1000, middle=0.3, spread=0.1)
    norms[5:40] *= 60
    loss = np.full(1000, 2.5)
    loss[0], loss[5:40] = 2.3, 12.0
    by_sgd = recommend_from(history(norms, loss=loss, optimizer="SGD"))
    assert by_sgd.verdict == "fix_training"
    assert by_sgd.policy == ClipNorm(0.03)
    assert any("a tenth of what it usually was" in reason for reason in by_sgd.reasons)
    held_back = recommend_from(history(10 * norms, loss=loss, optimizer="SGD"))  # at 1.0
    assert held_back.policy == ClipNorm(0.1)
    by_adam = recommend_from(history(norms, loss=loss, optimizer="Adam"))
    assert by_adam.policy == ClipNorm(1.0)
    assert any("no threshold mends that" in reason for reason in by_adam.reasons)


def test_leaps_of_a_run_that_learns_are_no_explosion():
    """The loss falls to a fifth: a threshold, not another learning rate."""
    norms = lognormal(1000, middle=2.0)
    norms[::20] *= 50
    learns = recommend_from(history(norms, loss=np.geomspace(2.0, 0.01, 1000)))
    assert learns.verdict == "use_policy"
    stuck = recommend_from(history(norms, loss=np.linspace(2.0, 1.9, 1000)))
    assert stuck.verdict == "fix_training"


@pytest.fixture
def forgetful(tmp_path):
    """Really trains: `forgetful(steps, zeroes)` goes on with the same run, by a loop that zeroes or not."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    url = f"sqlite:///{tmp_path}/forgotten.db"

    def go_on(steps, resume=None, *, zeroes):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        agent = gradwatch.Agent(optimizer, store=url, metrics_port=None, run="job")
        if resume:
            agent.load_state_dict(resume)
        for _ in range(steps):
            if zeroes:
                optimizer.zero_grad()
            x = torch.randn(32, 8)
            loss = (model(x)[:, 0] - x.sum(1)).square().mean()
            loss.backward()
            agent.log(loss=loss)
            optimizer.step()
        state = agent.state_dict()
        agent.close()
        return url, state

    return go_on


def test_a_loop_that_zeroes_nothing_is_mended_before_its_threshold(forgetful):
    """Clipped all along, and its loss falls all the same; said before a threshold can be told."""
    url, _ = forgetful(30, zeroes=False)
    with Store(url) as store:
        early = recommend(store, 1)
    assert (early.verdict, early.threshold) == ("fix_training", None)
    assert "not zeroed" in early.reasons[0]
    url, _ = forgetful(200, zeroes=False)
    with Store(url) as store:
        result, found = recommend(store, 2), diagnose(store, 2)
    assert (result.verdict, result.policy) == ("fix_training", ClipNorm(1.0))
    assert "not zeroed" in result.reasons[0]
    assert "zero_grad()" in result.reasons[1]
    assert not any("learning rate" in reason for reason in result.reasons)
    assert found[0].finding == "gradients_not_zeroed"
    assert {f.finding for f in found}.isdisjoint({"clipping_every_step", "clipping_most_steps"})


def test_a_loop_that_was_mended_and_resumed_is_told_so_no_more(forgetful):
    """As soon as it has gone on for so long that it would have been seen."""
    state = None
    for steps, zeroes, told in ((200, False, True), (100, True, True), (501, True, False)):
        url, state = forgetful(steps, state, zeroes=zeroes)
        with Store(url) as store:
            result, found = recommend(store, 1), diagnose(store, 1)
            assert len(store.runs()) == 1
        assert ("gradients_not_zeroed" in {f.finding for f in found}) == told
        assert any("not zeroed" in reason for reason in result.reasons) == told
