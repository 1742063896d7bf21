"""Diagnosis: loops that go wrong in a known way are told so, and those that do not are left alone."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.amp import GradScaler
from windows import falling, layer_samples, window

import gradwatch
from gradwatch_monitor import Store, diagnose
from gradwatch_monitor.diagnose import OF_THE_AGENT, signs, window_of
from gradwatch_monitor.diagnosis import Window
from gradwatch_monitor.diagnosis.window import BadWeights

STEPS = 300
SEEDS = [0]  # `benchmarks/diagnosis.py` has three, and more loops


def perceptron(depth=2, activation=nn.ReLU, width=32):
    layers = [nn.Flatten(), nn.Linear(64, width), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def train(seed, model=None, lr=0.1, clip=None, *, scaler=None, each=lambda model, step, loss: loss):
    """A perceptron on the digits, watched; `each` may spoil a step's loss."""
    torch.manual_seed(seed)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    model = model or perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    agent = gradwatch.Agent(
        optimizer,
        model=model,
        clip=clip or gradwatch.ClipNorm(5.0),
        run="job",
        metrics_port=None,
        scaler=scaler,
        settings=gradwatch.Settings(layer_norms_every=20),
    )
    for step in range(STEPS):
        rows = torch.randint(0, len(x), (32,))
        loss = each(model, step, nn.functional.cross_entropy(model(x[rows]), y[rows]))
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # and no unscale_ before it
        agent.log(loss=loss)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    agent.close()


def found():
    with Store("gradwatch.db") as store:
        return {finding.finding: finding for finding in diagnose(store, store.run("job").id)}


def nan_loss(model, step, loss):
    return loss * math.nan if step == 250 else loss


def nan_gradient(model, step, loss):
    if step == 250:
        model[1].weight.register_hook(lambda grad: grad * math.nan)
    return loss


def dead_batch(model, step, loss):
    return loss * 0.0 if step % 50 == 49 else loss


LOOPS = {
    "nonfinite_loss": {"each": nan_loss},
    "nonfinite_gradient": {"each": nan_gradient},
    "dead_gradient": {"each": dead_batch},
    "no_convergence": {"lr": 3.0, "clip": gradwatch.ClipNorm(1.0)},
    "clipping_every_step": {"clip": gradwatch.ClipNorm(0.01)},
    "clipping_most_steps": {"clip": gradwatch.ClipNorm(0.5), "lr": 0.05},
    "value_taken_for_a_norm": {"clip": gradwatch.ClipValue(1.0), "lr": 0.01},
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("finding", LOOPS)
def test_a_loop_that_goes_wrong_is_told_so(finding, seed):
    """What is wrong is named, with the steps, the numbers, what to do and the source."""
    train(seed, **LOOPS[finding])
    told = found()
    assert finding in told
    said = told[finding]
    assert 0 <= said.first_step <= said.last_step < STEPS
    assert any(character.isdigit() for character in said.message)
    assert said.advice
    assert said.data["source"]


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_that_vanish_on_their_way_back(seed):
    """Twelve sigmoid layers: the first learns next to nothing."""
    torch.manual_seed(seed)
    train(seed, perceptron(depth=12, activation=nn.Sigmoid), lr=0.01)
    assert found()["vanishing_gradients"].data["parameter"].split(".")[0] in {"1", "3"}


def test_a_first_loss_that_was_not_logged_is_no_explosion():
    """The weights grow as they do in training from a small start; the loss falls."""
    grown = layer_samples(np.geomspace(1, 10, 12)[:, None] * np.ones(3), np.ones((12, 3)))
    loss = falling()
    loss[0] = math.nan
    assert told(loss, layers=grown) == set()


def test_clipping_before_unscaling():
    """`clip_grad_norm_` on gradients that still carry the loss scale."""
    train(0, scaler=GradScaler("cpu", init_scale=1024.0), clip=gradwatch.ClipNorm(5.0))
    assert found()["not_unscaled"].severity == "critical"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_a_healthy_loop_is_left_alone(seed, lr):
    """Nothing at all is found, at any length of it."""
    train(seed, lr=lr)
    with Store("gradwatch.db") as store:
        window = window_of(store, 1)
    assert window.layers is not None
    for length in range(50, STEPS + 1, 50):
        cut = {
            f.name: getattr(window, f.name)[:length]
            for f in dataclasses.fields(Window)
            if f.name not in {"layers", "settings", "bad_weights"}
        }
        sampled = int((window.layers.step < length).sum())
        layers = dataclasses.replace(
            window.layers,
            **{
                name: getattr(window.layers, name)[:sampled]
                for name in ("step", "grad_norm", "weight_norm")
            },
        )
        assert signs(dataclasses.replace(window, layers=layers, **cut)) == []


def test_a_loss_that_leaps_and_one_that_flickers():
    """Leaps to half of the start count, those of a converged run do not."""
    noise = 1 + 0.05 * np.random.default_rng(0).normal(size=600)
    leaps = noise.copy()
    leaps[[200, 300, 400]] *= 5
    assert [s.finding for s in signs(window(leaps))] == ["loss_spikes"]
    flicker = leaps * 0.01
    assert signs(dataclasses.replace(window(flicker), first_losses=noise[:200])) == []
    never = window(leaps, threshold=np.full(600, 10.0))
    assert {s.finding for s in signs(never)} == {"loss_spikes", "threshold_never_reached"}


def test_a_loss_that_swings_and_one_that_is_noisy():
    """Steps that overshoot turn back each time; independent noise does so less."""
    generator = np.random.default_rng(0)
    noisy = np.exp(0.3 * generator.normal(size=300))
    assert signs(window(noisy)) == []
    swings = 1 + 0.4 * np.where(np.arange(300) % 2, 1.0, -1.0) + 0.02 * generator.normal(size=300)
    assert [s.finding for s in signs(window(swings))] == ["oscillating_loss"]


def told(*arguments, **facts):
    return {sign.finding for sign in signs(window(*arguments, **facts))}


def test_norms_that_leap_while_the_loss_stands_still():
    """Once in twenty steps, tenfold; not where the loss falls all the same."""
    norms = np.ones(600)
    norms[::20] = 10.0
    assert "exploding_gradients" in told(np.full(600, 2.0), norms)
    assert "exploding_gradients" not in told(falling(), norms)
    assert "exploding_gradients" not in told(np.full(600, 2.0), np.ones(600))


def test_steps_that_are_clipped_to_nothing_blow_nothing_up():
    """Batches a thousand times as large as others, and weights that have not moved: it is the data."""
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(9, 1.0, 600))
    loss = 3000 * np.exp(generator.normal(0, 0.6, 600))
    loss[0] = 2000.0
    weights = layer_samples(np.ones((12, 4)), np.ones((12, 4)))
    facts = {"layers": weights, "threshold": np.ones(600), "clipped": np.ones(600, dtype=bool)}
    for rate, moved in ((1e-6, False), (1e-3, True)):
        settings = {"optimizer": "SGD", "gain": 10.0, "tensors": 4, "learning_rates": [rate]}
        seen = signs(window(loss, norms, settings=settings, lr=np.full(600, rate), **facts))
        severity = {sign.finding: sign.severity for sign in seen}
        assert ("no_convergence" in severity) == moved
        assert severity["exploding_gradients"] == ("critical" if moved else "warning")


def test_weights_that_grow_with_the_loss():
    """Tenfold while the loss doubles; growth alone is no fault, nor is a loss alone; fivefold warns."""
    grown = layer_samples(np.geomspace(1, 10, 12)[:, None] * np.ones(3), np.ones((12, 3)))
    still = layer_samples(np.ones((12, 3)), np.ones((12, 3)))
    rising = np.linspace(1.0, 2.5, 600)
    assert "exploding_weights" in told(rising, layers=grown)
    assert "exploding_weights" not in told(falling(), layers=grown)
    assert "exploding_weights" not in told(rising, layers=still)
    nothing = np.empty(0)  # the run's beginning was pruned
    assert "exploding_weights" in told(rising, layers=grown, first_losses=nothing)
    fivefold = layer_samples(np.geomspace(1, 5, 12)[:, None] * np.ones(3), np.ones((12, 3)))
    for layers, severity in ((grown, "critical"), (fivefold, "warning")):
        (sign,) = signs(window(rising, layers=layers))
        assert (sign.finding, sign.severity) == ("exploding_weights", severity)


def test_norms_that_rise_by_and_by():
    """Threefold over the window; up and down again is no drift."""
    level = np.exp(0.1 * np.random.default_rng(0).normal(size=1000))
    assert told(falling(1000), level * np.geomspace(1, 4, 1000)) == {"norm_drift"}
    assert (
        told(falling(1000), level * np.r_[np.geomspace(1, 4, 500), np.geomspace(4, 1, 500)])
        == set()
    )
    assert told(falling(1000), level * np.geomspace(4, 1, 1000)) == set()


def test_one_layer_that_is_nearly_all_of_the_norm():
    """98 % of its square; of four, one with half is none."""
    most = layer_samples(np.ones((5, 4)), [[7.0, 0.5, 0.5, 0.5]] * 5)
    half = layer_samples(np.ones((5, 4)), [[1.7, 1.0, 1.0, 1.0]] * 5)
    assert told(falling(), layers=most) == {"dominating_layer"}
    assert told(falling(), layers=half) == set()


def test_a_loss_scaler_that_finds_no_scale():
    """One step in ten overflows, or the scale fell under 1; one overflow in 200 steps is routine."""

    def scaled(overflows, scale):
        norms = np.ones(600)
        norms[overflows] = math.nan
        skipped = np.zeros(600, bool)
        skipped[overflows] = True
        return told(falling(), norms, skipped=skipped, loss_scale=np.full(600, scale))

    assert scaled(slice(400, 600, 10), 1024.0) == {"loss_scale_trouble"}
    assert scaled(slice(0, 0), 0.5) == {"loss_scale_trouble"}
    assert scaled(slice(500, 501), 1024.0) == set()


def test_clipping_that_alone_keeps_a_run_alive():
    """Norms of a hundred times the threshold now and then; a low threshold makes none of that."""
    norms = np.full(600, 0.5)
    norms[::40] = 100.0
    facts = {"threshold": np.ones(600), "clipped": norms > 1.0}
    assert "clipping_keeps_it_alive" in told(falling(), norms, **facts)
    assert told(falling(), np.full(600, 0.5), **facts | {"clipped": np.zeros(600, bool)}) == set()
    high = np.full(600, 30.0)
    assert "clipping_keeps_it_alive" not in told(falling(), high, **facts | {"clipped": high > 1})


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_wall_of_scaled_norms_is_told_from_one_of_true_norms(unscaled, changes):
    """A loop that unscales first clips at 1.0 whatever the scale; one that does not, at 1.0 / scale."""
    scale = np.where(np.arange(600) < 500, 1024.0, 2048.0) if changes else np.full(600, 1024.0)
    norms = np.minimum(np.random.default_rng(0).lognormal(1.0, 0.5, 600), 1.0)
    seen = norms if unscaled else norms / scale
    assert ("not_unscaled" in told(falling(), seen, loss_scale=scale)) == (not unscaled)


def test_clipping_keeps_no_run_by_adam_alive():
    """Its steps are as long without; and nothing keeps a run alive that is lost."""
    norms = np.where(np.arange(600) % 50 == 0, 30.0, 0.5)
    facts = {"clipped": norms > 1, "threshold": np.full(600, 1.0)}
    for optimizer, expected in (("SGD", True), ("AdamW", False)):
        said = told(falling(), norms, **facts, settings={"optimizer": optimizer})
        assert ("clipping_keeps_it_alive" in said) == expected


def test_a_loss_that_reaches_zero_is_a_run_that_learns():
    """Cross-entropy is exactly 0 in the end; norms that leap from next to nothing are no explosion."""
    norms = 1e-6 * np.random.default_rng(0).lognormal(0.0, 1.5, 2000)
    assert "exploding_gradients" in told(np.full(2000, 1.0), norms)
    assert "exploding_gradients" not in told(
        np.maximum(np.linspace(1e-4, -1e-5, 2000), 0.0), norms, first_losses=np.linspace(2, 1, 200)
    )


@pytest.mark.parametrize("start", [0, 700])
def test_a_loss_that_is_nan_ever_since_is_told_with_the_step(start):
    """Not with the last 200 steps, which say nothing of where it began."""
    bad = np.arange(1000) >= start
    now = window(np.where(bad, math.nan, 1.0), nonfinite_loss=bad)
    (sign,) = [sign for sign in signs(now) if sign.finding == "nonfinite_loss"]
    assert sign.steps == (start, 999)
    if start:
        assert sign.message == "the loss was NaN or inf in every step since step 700"
        assert sign.advice.endswith("Go on from a checkpoint before step 700.")
        skipped = dataclasses.replace(now, skipped=bad)
        (sign,) = [sign for sign in signs(skipped) if sign.finding == "nonfinite_loss"]
        assert sign.advice.endswith("the weights are still those from before them.")
    else:
        assert sign.message == "the loss was NaN or inf in all of the last 1,000 steps"


def test_steps_before_a_change_are_not_counted_as_clipped_at_what_is_in_force_now():
    """A tight threshold was loosened: nothing is clipped at the new one."""
    threshold = np.where(np.arange(1000) < 700, 0.01, 100.0)
    clipped = threshold < 1.0
    loosened = told(falling(1000), np.full(1000, 1.0), threshold=threshold, clipped=clipped)
    assert loosened & {"clipping_every_step", "clipping_most_steps"} == set()
    early = {"threshold": np.full(700, 0.01), "clipped": np.ones(700, bool)}
    assert "clipping_every_step" in told(falling(700), np.full(700, 1.0), **early)
    # A policy that moves its threshold is asked about all of its steps.
    moving = {"threshold": np.linspace(0.1, 0.2, 700), "clipped": np.ones(700, bool)}
    assert "clipping_every_step" in told(falling(700), np.full(700, 1.0), **moving)
    # It was taken back for a constant: nobody says of its steps what the constant did.
    moving["threshold"][-60:], moving["clipped"][-60:] = 5.0, False
    assert told(falling(700), np.full(700, 1.0), **moving) == set()


def test_where_the_loop_clips_before_nothing_is_said_of_what_the_agent_clips():
    """Norms end at the loop's 0.5; that all are above 0.1 is then not to be mended first."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    agent = gradwatch.Agent(optimizer, clip=gradwatch.ClipNorm(0.1), run="twice", metrics_port=None)

    def steps(count, loops_own):
        for row in torch.randn(count, 4, generator=torch.Generator().manual_seed(count)):
            optimizer.zero_grad()
            (weight * row).sum().backward()
            if loops_own:
                nn.utils.clip_grad_norm_([weight], 0.5)
            optimizer.step()
        assert agent.flush()
        with Store() as store:
            return [f.finding for f in diagnose(store, 1)]

    assert steps(300, loops_own=True) == ["clipped_twice"]
    # Its own clipping is taken out: then that is over, and what it hid is told.
    # (That the norms leapt up then is true as well.)
    assert steps(600, loops_own=False) == ["clipping_every_step", "norm_drift"]
    agent.close()


def test_what_was_found_does_not_flicker_and_ends_with_its_cause():
    """Open at a strength of 1, closed under 0.7; in between it stays as it was."""
    shares = np.r_[np.linspace(0.1, 0.9, 60), np.linspace(0.9, 0.1, 60)]
    open_, changes = set(), 0
    generator = np.random.default_rng(0)
    for share in shares:
        clipped = generator.random(500) < share
        now = window(np.ones(500), threshold=np.full(500, 1.0), clipped=clipped)
        after = {s.finding for s in signs(now, open_)}
        changes += after != open_
        open_ = after
    assert (open_, changes) == (set(), 2)


def test_the_monitor_keeps_findings_and_ends_them():
    """In the store, first seen when; ended when gone; the agent's own are left to it."""
    train(0, clip=gradwatch.ClipNorm(0.01))
    with Store("gradwatch.db") as store:
        first = diagnose(store, 1)
        store.note_findings(1, first, keep=OF_THE_AGENT)
        (kept,) = [f for f in store.findings(1) if f.finding == "clipping_every_step"]
        assert kept.ended_at is None
        again = diagnose(store, 1)
        assert [f.found_at for f in again] == [f.found_at for f in first]
        store.note_findings(1, again, keep=OF_THE_AGENT)
        store.note_findings(1, [], keep=OF_THE_AGENT)
        assert all(f.ended_at is not None for f in store.findings(1))
        assert len(store.findings(1)) == len(first)


def test_the_verb(capsys):
    """`gradwatch diagnose`: exit status 1 on a finding, the same as JSON."""
    train(0, clip=gradwatch.ClipNorm(0.01))
    run = subprocess.run(
        [sys.executable, "-c", "from gradwatch_dashboards.cli import main; main()",
         "diagnose", "job", "--json"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    told = {finding["finding"] for finding in json.loads(run.stdout)}
    assert "clipping_every_step" in told


@pytest.mark.parametrize("on_nonfinite", ["skip", "ignore"])
def test_weights_that_the_optimizer_made_nan_are_a_finding(on_nonfinite):
    """0/0 in the update: said with parameter and step, and neither loss nor data are blamed."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=0.0)
    agent = gradwatch.Agent(
        optimizer, model=model, run="job", metrics_port=None, on_nonfinite=on_nonfinite
    )
    for step in range(40):
        optimizer.zero_grad()
        loss = model(torch.ones(4, 64)).square().mean()
        loss.backward()
        agent.log(loss=loss)
        if step == 20:
            for values in optimizer.state[model[1].weight].values():
                values.zero_()
            model[1].weight.grad = torch.zeros_like(model[1].weight)
        optimizer.step()
        assert bool(model[1].weight.isfinite().all()) == (step < 20)
    agent.close()
    with Store() as store:
        found = {f.finding: f for f in diagnose(store, store.run("job").id)}
    assert not {"nonfinite_loss", "nonfinite_gradient"} & found.keys()
    finding = found["nonfinite_weights"]
    assert finding.severity == "critical"
    assert (finding.data["parameter"], finding.data["step"]) == ("1.weight", 21)
    assert "neither the forward pass nor the data" in finding.advice


def test_weights_that_became_nan_by_a_loss_are_told_with_that_loss():
    """The gradient of NaN was applied: the loss is said, and the weights are."""
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = gradwatch.Agent(
        optimizer, model=model, run="job", metrics_port=None, on_nonfinite="ignore"
    )
    for step in range(40):
        optimizer.zero_grad()
        loss = model(torch.ones(4, 64)).square().mean() * (math.nan if step == 20 else 1.0)
        loss.backward()
        agent.log(loss=loss)
        optimizer.step()
    agent.close()
    with Store() as store:
        found = {f.finding: f for f in diagnose(store, store.run("job").id)}
    assert {"nonfinite_loss", "nonfinite_weights"} <= found.keys()
    assert "was applied" in found["nonfinite_weights"].advice


def test_weights_that_are_finite_again_are_no_finding():
    """A checkpoint was loaded: gradients are finite from then on."""
    loss = np.ones(300)
    bad = np.arange(300) >= 100
    norms = np.where(bad, np.nan, 1.0)
    weights = BadWeights(100, "0.weight", 1, 4)
    spoilt = window(loss, norms, nonfinite=bad, bad_weights=weights)
    assert "nonfinite_weights" in {sign.finding for sign in signs(spoilt)}
    norms[250:] = 1.0
    mended = window(loss, norms, nonfinite=bad & (np.arange(300) < 250), bad_weights=weights)
    assert "nonfinite_weights" not in {sign.finding for sign in signs(mended)}
