"""A learning rate that is too high for the weights: told of Adam, and held down by clipping SGD."""

import dataclasses
import math
import uuid

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from stores import lognormal
from torch import nn
from windows import falling, history, layer_samples, window

import gradwatch
from gradwatch import ClipNorm
from gradwatch_monitor import Recommendation, Store, diagnose, recommend
from gradwatch_monitor.diagnose import signs
from gradwatch_monitor.diagnosis import Sign
from gradwatch_monitor.history import History
from gradwatch_monitor.recommend import recommend_from
from gradwatch_monitor.rows import Finding


@dataclasses.dataclass
class Trained:
    """What a run came to, and what is said of it."""

    loss: float
    size: float  # the weights' root mean square at the latest five samples, by numpy's float64
    norm: float  # and their norm
    told: Recommendation
    history: History
    found: dict[str, Finding]


def trained(clip, make, *, seed=0, steps=500, activation=nn.ReLU, policies=1, schedule=False):
    """A classifier of digits; `make` makes its optimizer from parameter groups."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 10)
    )
    params = list(model.parameters())
    halves = [params] if policies == 1 else [params[:2], params[2:]]
    optimizer = make([{"params": half} for half in halves])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if schedule else None
    store = f"sqlite:///{uuid.uuid4()}.db"
    clip = clip if policies == 1 else [clip] * policies
    agent = gradwatch.Agent(optimizer, model=model, clip=clip, store=store, metrics_port=None)
    sizes = []
    for _ in range(steps):
        rows = torch.randint(0, len(images), (32,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        agent.log(loss=loss)
        flat = np.concatenate([p.detach().numpy().ravel() for p in params]).astype(np.float64)
        sizes.append(np.sqrt((flat**2).mean()))
        optimizer.step()
        if scheduler:
            scheduler.step()
    agent.close()
    with Store(store) as opened:
        # At every hundredth step, and where a norm was a spike.
        sampled = sorted({step for step, _, _, weight in opened.layers(1) if weight is not None})
        size = float(np.median([sizes[step] for step in sampled[-5:]]))
        return Trained(
            loss.item(), size, size * math.sqrt(len(flat)), recommend(opened, 1), History.of(opened, 1),
            {finding.finding: finding for finding in diagnose(opened, 1)},
        )  # fmt: skip


def by_sgd(lr, **options):
    return lambda groups: torch.optim.SGD(groups, lr=lr, **options)


@pytest.mark.parametrize(
    ("activation", "every"), [(nn.Tanh, "100"), (nn.ReLU, "100"), (nn.Tanh, "1")]
)
def test_adam_at_a_rate_that_carries_the_weights_off(activation, every, monkeypatch):
    """Units that saturate for it are no fault of the network.

    Where the layers' gradients are sampled at each step, the weights still are at every hundredth.
    """
    monkeypatch.setenv("GRADWATCH_LAYER_NORMS_EVERY", every)
    run = trained(
        ClipNorm(1.0), lambda groups: torch.optim.Adam(groups, lr=0.5), activation=activation
    )
    said = run.found["learning_rate_too_high"]
    assert "vanishing_gradients" not in run.found
    assert said.severity == "critical"
    assert said.data["learning_rate"] == 0.5
    assert said.data["relative"] == pytest.approx(0.5 / run.size, rel=1e-3)
    assert run.told.verdict == "fix_training"


def test_rates_that_are_not_too_high():
    """A tenth of it; an optimizer whose steps follow the gradient; groups at rates of their own."""
    weights = np.ones((5, 4)) * 10.0  # 4 tensors of 100 elements: each weight is 1
    layers = layer_samples(weights, np.ones((5, 4)))

    def said(rate, loss=None, layers=layers, **settings):
        facts = {
            "optimizer": "AdamW", "learning_rates": [0.2], "tensors": 4, "parameters": 400, **settings,
        }  # fmt: skip
        lr = np.broadcast_to(rate, 600)
        losses = falling() if loss is None else loss
        seen = signs(window(losses, layers=layers, lr=lr, settings=facts))
        return {sign.finding: sign for sign in seen}.get("learning_rate_too_high")

    sign = said(0.2)
    assert (sign.severity, sign.data["relative"]) == ("warning", pytest.approx(0.2))
    assert "20 % of the weights' size" in sign.message
    assert said(0.02) is None
    assert said(0.12) is None
    assert said(0.12, np.full(600, 2.0)).severity == "critical"  # where nothing is learnt
    assert said(0.2, np.full(600, math.nan)).severity == "warning"  # of which nothing is known
    assert said(0.2, optimizer="SGD") is None
    assert said(0.2, learning_rates=[0.2, 0.01]) is None
    assert said(0.2, tensors=3) is None  # a group was added
    # Weights that are 0 and stay it for want of a gradient: not the rate's fault.
    still = np.array([[0.0, 0.0, 0.0, 0.1]] * 5)
    assert said(0.2, layers=layer_samples(still, still)) is None
    # A schedule that has come down: the rate at the time of the samples counts, and is the one told.
    assert said(np.where(np.arange(600) < 90, 0.2, 0.001)) is None
    at_its_end = said(np.where(np.arange(600) < 580, 0.2, 0.0))
    assert at_its_end.data["learning_rate"] == pytest.approx(0.2)


@pytest.mark.parametrize("severity", ["critical", "warning"])
def test_a_learning_rate_too_high_comes_before_any_threshold(severity):
    """Where nothing is learnt that is the verdict; where it learns all the same, a remark."""
    sign = Sign("learning_rate_too_high", severity, 1.2, (0, 999), "at a rate of 0.2 it", "", "")
    seen = history(lognormal(1000, middle=5.0), optimizer="Adam", signs={sign.finding: sign})
    told = recommend_from(seen)
    assert any("at a rate of 0.2 it" in reason for reason in told.reasons)
    without = recommend_from(dataclasses.replace(seen, signs={}))
    if severity == "critical":
        assert (told.verdict, told.policy) == ("fix_training", ClipNorm(1.0))
    else:
        assert (told.verdict, told.policy) == (without.verdict, without.policy)
        assert "fix_training" not in told.verdict


@pytest.mark.parametrize(("moves", "verdict"), [(0.02, "use_policy"), (0.04, "fix_training")])
def test_clipping_that_holds_a_learning_rate_down_is_not_loosened(moves, verdict):
    """By SGD: at 5, as the band asks, a step is 10 or 20 % of the weights."""
    norms = lognormal(1000, middle=4.2, spread=0.2)
    told = recommend_from(history(norms, optimizer="SGD", moves=moves))
    assert told.threshold == pytest.approx(5.0, rel=0.1)
    assert told.verdict == verdict
    if verdict == "fix_training":
        assert told.policy == ClipNorm(1.0)
        stride = moves * told.threshold
        assert f"move the weights by up to {100 * stride:.0f} % of their norm" in told.reasons[0]
        assert f"lower the learning rate {stride / 0.03:.0f}-fold" in told.reasons[1]
    by_another_norm = history(norms, optimizer="SGD", moves=moves, norm_type=1.0)
    assert recommend_from(by_another_norm).verdict != "fix_training"
    by_adam = recommend_from(history(norms, optimizer="Adam", moves=None))
    assert by_adam.verdict != "fix_training"
    in_the_band = recommend_from(history(lognormal(1000, middle=0.7), optimizer="SGD", moves=1.0))
    assert in_the_band.verdict == "keep"


@pytest.mark.parametrize(
    ("policies", "schedule"),
    [(1, True), (2, False)],
    ids=["a rate that comes down", "two policies"],
)
def test_a_rate_that_is_held_down_is_told_of(policies, schedule):
    """The next run begins at the height of the schedule; several policies hold it down as one does."""
    run = trained(ClipNorm(0.05), by_sgd(5.0), steps=1000, policies=policies, schedule=schedule)
    assert run.told.verdict == "fix_training"
    assert run.history.moves == pytest.approx(5.0 / run.norm, rel=1e-3)
    assert "holds down a learning rate that is too high" in run.told.reasons[0]
    assert run.told.policy == (ClipNorm(0.05) if policies == 1 else None)


@pytest.mark.parametrize(
    ("momentum", "dampening", "factor"), [(0.9, 0.9, 1.0), (0.5, 0.0, 2.0), (1.0, 0.0, None)]
)
def test_what_momentum_makes_of_a_step(momentum, dampening, factor):
    """(1 - dampening) / (1 - momentum) of it, by torch's own step; without end, nothing is said."""
    weight = nn.Parameter(torch.zeros(1))
    plain = by_sgd(0.001, momentum=momentum, dampening=dampening)([weight])
    for _ in range(200):
        weight.grad = torch.ones(1)
        before = weight.item()
        plain.step()
    run = trained(ClipNorm(1.0), by_sgd(0.001, momentum=momentum, dampening=dampening), steps=250)
    if factor is None:
        assert run.history.moves is None
    else:
        assert (before - weight.item()) / 0.001 == pytest.approx(factor, rel=1e-3)
        assert run.history.moves == pytest.approx(0.001 * factor / run.norm, rel=1e-3)


@pytest.mark.parametrize(("lr", "momentum"), [(5.0, 0.0), (3.0, 0.9)])
def test_what_saves_a_run_is_told_again_of_that_run(lr, momentum):
    """A rate far too high: a tight constant saves it, and the next answer does not take it back."""
    make = by_sgd(lr, momentum=momentum)
    first = trained(ClipNorm(1.0), make, seed=0)
    assert first.told.verdict == "fix_training"
    assert first.loss > 2.0
    tight = trained(first.told.policy, make, seed=1)
    assert tight.loss < 0.5
    assert (tight.told.verdict, tight.told.policy) == ("fix_training", first.told.policy)
    again = trained(tight.told.policy, make, seed=2)
    assert again.loss < 0.5
    assert again.told.policy == first.told.policy
