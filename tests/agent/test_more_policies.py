"""The policies by tensor, by unit, by percentile, by z-score, and the one that skips."""

import json
import math

import numpy as np
import pytest
import torch
from loops import mlp, set_gradients, state_of, states_equal
from torch import nn

import gradwatch
from gradwatch.policies import (
    AdaptiveGradientClip,
    ClipLayerNorm,
    ClipNorm,
    ObserveOnly,
    PercentileClip,
    SkipSpikes,
    TargetRatio,
    ZClip,
)
from gradwatch.records import Keep, Measurement, Scale, Skip
from gradwatch.testing import MemorySink


def of_norm(norm, loss=None):
    return Measurement(norm, 2.0, [norm], [], [], 1.0, loss)


def after(policy, norms, losses=None):
    state = policy.init()
    for i, norm in enumerate(norms):
        state = policy.update(state, norm, losses[i] if losses else None)
    return state


def step_with(policy, optimizer_of, model, sink=None, **arguments):
    """One wrapped SGD step at lr 1: parameters before it, and the gradient that was applied."""
    optimizer = optimizer_of(model.parameters())
    agent = gradwatch.Agent(
        optimizer, clip=policy, store=sink or MemorySink(), metrics_port=None, **arguments
    )
    before = [p.detach().double().numpy().copy() for p in model.parameters()]
    optimizer.step()
    applied = [
        b - p.detach().double().numpy() for b, p in zip(before, model.parameters(), strict=True)
    ]
    assert agent.flush()
    return before, applied


@pytest.fixture
def convnet():
    """Weights of every rank: 4-d, 2-d, vectors, and a scalar."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 4))
    model.register_parameter("scale", nn.Parameter(torch.tensor(0.3)))
    with torch.no_grad():
        model[0].bias.zero_()  # a weight of norm 0: eps stands in for it
    set_gradients(0, model, size=1.0)
    return model


def sgd(parameters, *, fused=False):
    return torch.optim.SGD(parameters, lr=1.0, fused=fused)


def unit_norms(array):
    """‖·‖ of each row, of a vector or a scalar as a whole."""
    if array.ndim <= 1:
        return np.linalg.norm(array)
    return np.sqrt((array**2).sum(axis=tuple(range(1, array.ndim)), keepdims=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clipping", [0.01, 1.0, 50.0])
def test_agc_agrees_with_the_published_formula_in_float64(convnet, clipping, fused):
    """Unit by unit: g ← g·M/max(‖g‖, 1e-6) where ‖g‖ > M = λ·max(‖w‖, 1e-3)."""
    gradients = [p.grad.double().numpy().copy() for p in convnet.parameters()]
    sink = MemorySink()
    before, applied = step_with(
        AdaptiveGradientClip(clipping), lambda p: sgd(p, fused=fused), convnet, sink
    )
    expected = []
    for w, g in zip(before, gradients, strict=True):
        most = clipping * np.maximum(unit_norms(w), 1e-3)
        norm = unit_norms(g)
        expected.append(np.where(norm > most, g * most / np.maximum(norm, 1e-6), g))
    for ours, theirs, w in zip(applied, expected, before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=3e-7 * max(1, np.abs(w).max()))
    record = sink.steps[0]
    flat = np.concatenate([e.ravel() for e in expected])
    assert record.post_norm == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    assert record.clipped == any(
        not np.array_equal(e, g) for e, g in zip(expected, gradients, strict=True)
    )
    assert math.isnan(record.threshold)


def test_agc_under_a_loss_scale_sees_the_true_gradient():
    """A GradScaler's factor is divided out before gradients are compared with weights."""
    model, twin = mlp(), mlp()
    set_gradients(0, model, twin)
    _, plain = step_with(AdaptiveGradientClip(0.1), sgd, twin)
    optimizer = sgd(model.parameters(), fused=True)
    gradwatch.wrap(optimizer, clip=AdaptiveGradientClip(0.1), store=MemorySink(), metrics_port=None)
    before = [p.detach().double().numpy().copy() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # as a loop does for its loss
    for p in model.parameters():
        p.grad.mul_(1024.0)
    scaler.step(optimizer)
    for b, p, expected in zip(before, model.parameters(), plain, strict=True):
        np.testing.assert_allclose(b - p.detach().double().numpy(), expected, atol=2e-6)


def test_agc_leaves_the_last_layer_to_a_policy_of_its_own():
    """A parameter group each: the head's gradient stays as it is."""
    model = mlp()
    set_gradients(0, model, size=100.0)
    head = [p.grad.clone() for p in model[-1].parameters()]
    groups = [
        {"params": [*model[0].parameters(), *model[2].parameters()]},
        {"params": model[-1].parameters()},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    clip = [AdaptiveGradientClip(), ObserveOnly()]
    gradwatch.wrap(optimizer, clip=clip, store=MemorySink(), metrics_port=None)
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model[-1].parameters(), head, strict=True))
    weight = model[0].weight
    assert float(weight.grad.norm()) < 0.02 * float(weight.detach().norm())


@pytest.mark.parametrize("fused", [False, True])
def test_clip_layer_norm_agrees_with_float64(convnet, fused):
    """g_i ← g_i·min(1, c/‖g_i‖), and the post-clip norm is that of the result."""
    gradients = [p.grad.double().numpy().copy() for p in convnet.parameters()]
    limit = float(np.median([np.linalg.norm(g) for g in gradients]))
    sink = MemorySink()
    _, applied = step_with(ClipLayerNorm(limit), lambda p: sgd(p, fused=fused), convnet, sink)
    expected = [g * min(1.0, limit / np.linalg.norm(g)) for g in gradients]
    for ours, theirs in zip(applied, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    flat = np.concatenate([e.ravel() for e in expected])
    assert sink.steps[0].post_norm == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    assert sink.steps[0].clipped


def test_clip_layer_norm_that_has_nothing_to_do_changes_nothing(convnet):
    """Not clipped, gradients untouched, post-clip norm equal to the pre-clip one."""
    before = [p.grad.clone() for p in convnet.parameters()]
    sink = MemorySink()
    step_with(ClipLayerNorm(1e6), sgd, convnet, sink)
    assert all(torch.equal(p.grad, b) for p, b in zip(convnet.parameters(), before, strict=True))
    assert not sink.steps[0].clipped
    assert sink.steps[0].post_norm == sink.steps[0].pre_norm


def test_percentile_clip_by_hand():
    """Median of the last three, the current one included, times two; 10 until three are seen.

    norms 1, 5, 3, 100: the first two are clipped at 10; then 2·median(1, 5, 3) = 6;
    then, 1 forgotten, 2·median(5, 3, 100) = 10. At 100 clipped to 10.
    """
    policy = PercentileClip(50, multiplier=2, history=3, warmup=3, initial=10)
    state, thresholds = policy.init(), []
    for norm in (1.0, 5.0, 3.0, 100.0):
        thresholds.append(policy.decide(of_norm(norm), state).max_norm)
        state = policy.update(state, norm)
    assert thresholds == [10, 10, 6, 10]
    assert policy.threshold(state) == 10  # with nothing new


def test_percentile_clip_agrees_with_numpy_and_autoclip():
    """Over a stream longer than the history; AutoClip is percentile 10, multiplier 1."""
    norms = np.exp(np.random.default_rng(0).normal(size=400))
    for policy in (PercentileClip(95, history=100), PercentileClip(10, 1.0, 10_000, 1, 1.0)):
        state = policy.init()
        for i, norm in enumerate(norms):
            got = policy.decide(of_norm(norm), state).max_norm
            window = norms[max(0, i + 1 - policy.history) : i + 1]
            if i + 1 >= policy.warmup:
                assert got == pytest.approx(
                    policy.multiplier * np.percentile(window, policy.percentile), rel=1e-12
                )
            else:
                assert got == policy.initial
            state = policy.update(state, norm)


def test_the_recorded_threshold_is_the_one_that_was_used():
    """A percentile that takes in the step's own norm: clipped exactly where pre > threshold."""
    model = mlp()
    optimizer = sgd(model.parameters(), fused=True)
    policy = PercentileClip(50, multiplier=1, warmup=2, initial=0.1)
    agent = gradwatch.Agent(optimizer, clip=policy, store=(sink := MemorySink()), metrics_port=None)
    for step in range(20):
        set_gradients(step, model)
        optimizer.step()
    assert agent.flush()
    norms = np.array([s.pre_norm for s in sink.steps])
    for i, record in enumerate(sink.steps):
        expected = np.percentile(norms[: i + 1], 50) if i else 0.1
        assert record.threshold == pytest.approx(expected)
        assert record.clipped == (record.pre_norm > record.threshold - 1e-6)
        assert record.post_norm == pytest.approx(min(record.pre_norm, record.threshold), rel=1e-4)


def test_zclip_by_hand():
    """Warm-up 9, 11: μ = 10, σ² = 1, z* = 2.

    15 has z = 5 > 2: τ = 10 + 4·1/5 = 10.8. Then μ = 0.9·10 + 0.1·10.8 = 10.08 and
    σ² = 0.9·1 + 0.1·(10.8 - 10.08)² = 0.95184. 12 has z = 1.97 < 2: let through;
    μ = 0.9·10.08 + 0.1·12 = 10.272, σ² = 0.9·0.95184 + 0.1·(12 - 10.272)² = 1.1552544.
    """
    policy = ZClip(alpha=0.9, z_threshold=2.0, warmup=2, max_norm=50.0)
    assert policy.decide(of_norm(99.0), policy.init()) == Scale(50.0)
    state = after(policy, [9.0, 11.0])
    assert (state.mean, state.variance) == (10.0, 1.0)
    assert policy.threshold(state) == 12.0
    assert policy.decide(of_norm(15.0), state).max_norm == pytest.approx(10.8)
    state = policy.update(state, 15.0)
    assert (state.mean, state.variance) == pytest.approx((10.08, 0.95184))
    assert policy.decide(of_norm(12.0), state).max_norm > 12.0  # let through
    state = policy.update(state, 12.0)
    assert (state.mean, state.variance) == pytest.approx((10.272, 1.1552544))


def test_zclip_agrees_with_the_published_rule_in_numpy():
    """Over 300 norms with spikes among them; `max_norm` limits what is applied, never μ and σ."""
    generator = np.random.default_rng(4)
    norms = np.exp(generator.normal(size=300) * 0.3) * np.where(generator.random(300) < 0.03, 50, 1)
    policy, limit = ZClip(), 1.0
    state = policy.init()
    mean = variance = None
    for i, n in enumerate(norms):
        if i == 25:
            mean, variance = norms[:25].mean(), norms[:25].var()
        expected = min(n, limit)
        if i >= 25:
            z = (n - mean) / np.sqrt(variance)
            tau = mean + 2.5**2 * np.sqrt(variance) / z if z > 2.5 else n
            expected = min(tau, limit)
            mean = 0.97 * mean + 0.03 * tau
            variance = 0.97 * variance + 0.03 * (tau - mean) ** 2
        got = policy.decide(of_norm(n), state)
        assert min(n, got.max_norm) == pytest.approx(expected, rel=1e-9)
        state = policy.update(state, n)
    assert (state.mean, state.variance) == pytest.approx((mean, variance), rel=1e-9)


def test_zclip_without_max_norm_keeps_the_warm_up():
    """None is no limit: nothing is clipped until mean and deviation are known."""
    policy = ZClip(warmup=2, max_norm=None)
    assert policy.decide(of_norm(1e9), policy.init()) == Keep()
    assert policy.threshold(policy.init()) is None
    state = after(policy, [9.0, 11.0])
    assert policy.decide(of_norm(1000.0), state).max_norm == pytest.approx(10 + 6.25 / 990)


def test_skip_spikes_by_hand():
    """Four values 1, 3, 1, 3: mean 2, std (n - 1) = 1.1547; limit at sigma 2: 4.309."""
    policy = SkipSpikes(ClipNorm(2.5), window=8, sigma=2.0)
    state = after(policy, [1.0, 3.0, 1.0, 3.0], [10.0, 30.0, 10.0, 30.0])
    assert policy.decide(of_norm(4.30), state) == Scale(2.5)
    decision = policy.decide(of_norm(4.32), state)
    assert isinstance(decision, Skip)
    assert decision.data["limit"] == pytest.approx(2 + 2 * 1.1547005)
    # The loss, ten times as large: 20 + 2·11.547 = 43.09.
    assert policy.decide(of_norm(1.0, 43.0), state) == Scale(2.5)
    assert policy.decide(of_norm(1.0, 43.2), state).data["of"] == "loss"
    assert isinstance(policy.decide(of_norm(1.0, math.nan), state), Skip)
    # Half a window has to be seen, and equal values say nothing.
    assert policy.decide(of_norm(1e9), after(policy, [1.0, 3.0, 1.0])) == Scale(2.5)
    assert policy.decide(of_norm(1.1), after(policy, [1.0] * 8)) == Scale(2.5)


def test_skip_spikes_agrees_with_torch_std_mean():
    """The rule as it is published, with torch's own statistics over the last 128."""
    values = np.exp(np.random.default_rng(5).normal(size=400))
    policy = SkipSpikes(ObserveOnly(), sigma=3.0)
    state, skipped = policy.init(), 0
    for i, value in enumerate(values):
        window = torch.tensor(values[max(0, i - 128) : i])
        expected = False
        if len(window) >= 64:
            std, mean = torch.std_mean(window)
            expected = bool(value > mean + 3 * std)
        assert isinstance(policy.decide(of_norm(value), state), Skip) == expected
        skipped += expected
        state = policy.update(state, value)
    assert skipped > 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_spike_is_skipped_and_on_record(fused):
    """Parameters and optimizer state bit-identical across it; flag, event and counter say so."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    policy = SkipSpikes(ClipNorm(1.0), window=20)
    agent = gradwatch.Agent(optimizer, clip=policy, store=(sink := MemorySink()), metrics_port=None)
    for step in range(30):
        set_gradients(step, model, size=1e4 if step == 15 else 1.0)
        parameters = [p.detach().clone() for p in model.parameters()]
        state = state_of(optimizer)
        agent.log(loss=1.0 + step % 3 + (1000 if step == 25 else 0))
        optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
        assert same == (step in {15, 25})
        assert step not in {15, 25} or states_equal(state, state_of(optimizer))
    assert agent.flush()
    assert [s.step for s in sink.steps if s.skipped] == [15, 25]
    events = {e.step: e for e in sink.events if e.kind == "spike_skipped"}
    assert (events[15].data["of"], events[25].data["of"]) == ("gradient norm", "loss")
    assert math.isnan(sink.steps[15].post_norm)


ALL = [
    PercentileClip(80, multiplier=1, history=30, warmup=5),
    ZClip(warmup=5),
    TargetRatio(cap=5.0),
    SkipSpikes(TargetRatio(), window=10),
    SkipSpikes(PercentileClip(history=20)),
]


@pytest.mark.parametrize("policy", ALL, ids=str)
@pytest.mark.parametrize("count", [0, 3, 40])
def test_state_round_trip(policy, count):
    """Through plain JSON and back, in the warm-up and after it; and it goes on the same."""
    norms = list(np.exp(np.random.default_rng(6).normal(size=count)))
    state = after(policy, norms, norms)
    loaded = policy.load(json.loads(json.dumps(policy.dump(state), allow_nan=False)))
    assert loaded == state
    for norm in (2.0, 0.5, 9.0):
        assert policy.decide(of_norm(norm, norm), loaded) == policy.decide(
            of_norm(norm, norm), state
        )
        loaded, state = policy.update(loaded, norm, norm), policy.update(state, norm, norm)
    assert json.loads(json.dumps(policy.describe()))["policy"] == type(policy).__name__


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ClipLayerNorm(-1), "max_norm"),
        (lambda: AdaptiveGradientClip(0), "clipping"),
        (lambda: AdaptiveGradientClip(eps=math.nan), "eps"),
        (lambda: PercentileClip(101), "percentile"),
        (lambda: PercentileClip(math.nan), "percentile"),
        (lambda: PercentileClip(history=0), "history"),
        (lambda: PercentileClip(warmup=1.5), "warmup"),
        (lambda: PercentileClip(initial=-1), "initial"),
        (lambda: PercentileClip(multiplier=math.inf), "multiplier"),
        (lambda: ZClip(alpha=1.0), "alpha"),
        (lambda: ZClip(z_threshold=0), "z_threshold"),
        (lambda: ZClip(warmup=1), "warmup"),
        (lambda: ZClip(max_norm=-3), "max_norm"),
        (lambda: SkipSpikes(1.0), "policy"),
        (lambda: SkipSpikes(SkipSpikes(ClipNorm(1.0))), "policy"),
        (lambda: SkipSpikes(ClipNorm(1.0), window=2), "window"),
        (lambda: SkipSpikes(ClipNorm(1.0), sigma=0), "sigma"),
    ],
)
def test_wrong_arguments_are_named(make, name):
    """The error names the argument."""
    with pytest.raises(gradwatch.ConfigurationError, match=name):
        make()


def test_skip_spikes_is_refused_under_lbfgs():
    """It steps several times inside one step()."""
    optimizer = torch.optim.LBFGS(mlp().parameters())
    with pytest.raises(gradwatch.ConfigurationError, match="LBFGS"):
        gradwatch.wrap(optimizer, clip=SkipSpikes(ClipNorm(1.0)), on_nonfinite="raise")
