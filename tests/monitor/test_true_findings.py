"""What is said of healthy runs with something unusual about them, and of runs that are beyond help."""

import math
import re

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from stores import lognormal
from torch import nn
from windows import falling, history, layer_samples, window

import gradwatch
from gradwatch_monitor import Store, diagnose, recommend
from gradwatch_monitor.diagnose import signs
from gradwatch_monitor.recommend import recommend_from


def said_of(make, clip, *, log=True, bias=0.0, steps=1000):
    """A classifier of digits: the findings of its run, the recommendation, and its last loss."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float(), torch.tensor(digits.target)
    images = (images - images.mean(0)) / (images.std(0) + 1e-6)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    nn.init.constant_(model[2].bias, bias)
    optimizer = make(model.parameters())
    agent = gradwatch.Agent(
        optimizer, model=model, clip=clip, store="sqlite:///gradwatch.db", metrics_port=None
    )
    for _ in range(steps):
        rows = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        if log:
            agent.log(loss=loss)
        optimizer.step()
    agent.close()
    with Store("gradwatch.db") as store:
        found = {finding.finding: finding for finding in diagnose(store, 1)}
        return found, recommend(store, 1), loss.item()


def test_a_loss_that_is_not_logged_is_no_explosion():
    """Norms that leap while they fall are those of a run that converges; else it is not known."""
    found, told, last = said_of(
        lambda p: torch.optim.Adam(p, lr=3e-3), gradwatch.ClipNorm(1.0), log=False
    )
    assert last < 0.05
    assert "exploding_gradients" not in found
    assert told.verdict != "fix_training"
    norms = np.ones(600)
    norms[::20] = 10.0
    (sign,) = signs(window(np.full(600, math.nan), norms))
    assert (sign.finding, sign.severity) == ("exploding_gradients", "warning")
    assert "agent.log(loss=loss)" in sign.message
    assert signs(window(np.full(600, math.nan), norms * np.geomspace(1, 0.01, 600))) == []


def test_a_policy_that_follows_the_norms_keeps_nothing_alive():
    """Its threshold falls with the norms as the run converges; a constant's tells something."""
    found, _, last = said_of(
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), gradwatch.TargetRatio(cap=5.0), steps=1500
    )  # fmt: skip
    assert last < 0.05
    assert "clipping_keeps_it_alive" not in found
    norms = np.ones(600)
    norms[::20] = 20.0
    facts = {"clipped": norms > 1.0, "settings": {"optimizer": "SGD"}}
    constant = signs(window(falling(), norms, threshold=np.full(600, 1.0), **facts))
    assert "clipping_keeps_it_alive" in {sign.finding for sign in constant}


def test_weights_whose_gradient_is_exactly_0():
    """A layer of dead units: nothing that comes before it learns, and no policy revives it."""
    found, told, last = said_of(
        lambda p: torch.optim.SGD(p, lr=0.05), gradwatch.ClipNorm(1.0), bias=-100.0, steps=400
    )
    assert last > 2.0
    assert found["vanishing_gradients"].data["parameter"] == "0.weight"
    assert "exactly 0" in found["vanishing_gradients"].message
    assert "dominating_layer" not in found
    assert not any("healthy as it is" in reason for reason in told.reasons)
    grads = np.ones((5, 4))
    grads[:4, 0] = 0.0  # not at the last sample
    layers = layer_samples(np.ones((5, 4)), grads)
    assert signs(window(falling(), layers=layers)) == []


@pytest.mark.parametrize(("run_up", "step"), [(0, 590), (6, 584)])
def test_the_checkpoint_to_go_on_from_is_from_before_the_loss_ran_away(run_up, step):
    """The weights of a step whose loss is a million times what is usual are no good either."""
    loss = falling()
    loss[590 - run_up : 590] = 10.0 ** np.arange(3, 3 + run_up)
    loss[590:] = math.nan
    found = signs(window(loss, nonfinite_loss=np.isnan(loss)))
    (sign,) = [sign for sign in found if sign.finding == "nonfinite_loss"]
    assert f"before step {step:,}." in sign.advice


def test_the_threshold_and_not_the_rate_is_what_sgd_stands_still_for():
    """Where nearly every step is clipped."""
    norms, loss = lognormal(1000, middle=2.0), np.full(1000, 2.3)
    loose, tight = (
        recommend_from(history(norms, threshold=at, optimizer="SGD", loss=loss)).reasons
        for at in (10.0, 0.001)
    )
    assert any("look at the learning rate" in reason for reason in loose)
    assert not any("look at the learning rate" in reason for reason in tight)
    assert any("a cap on the learning rate" in reason for reason in tight)


def test_a_single_spike_is_the_reason_that_is_given():
    """Nothing else tells this run from one that needs no clipping."""
    norms = lognormal(1000, middle=0.2, spread=0.3)
    assert recommend_from(history(norms)).verdict == "not_needed"
    norms[700] = 3.0
    told = recommend_from(history(norms))
    assert told.verdict in {"change", "use_policy"}
    (reason,) = [reason for reason in told.reasons if "guards against the next one" in reason]
    usual = max(np.median(part) for part in (norms[650:700], norms[:200], norms[200:]))
    assert float(re.search(r"a norm ([\d.]+) times", reason)[1]) == pytest.approx(
        3.0 / usual, rel=0.01
    )
