"""Policies, by numbers worked out by hand."""

import dataclasses
import inspect
import json
import math
import re

import numpy as np
import pytest
import torch
from loops import greatest_difference, mlp, set_gradients, twins, watched

import gradwatch
from gradwatch.policies import ClipNorm, ClipValue, ObserveOnly, Policy, TargetRatio, build
from gradwatch.records import Clamp, Keep, Measurement, Scale, ScaleEach, Skip
from gradwatch.testing import MemorySink


def measurement(norm=5.0):
    return Measurement(norm, 2.0, [norm], [], [], 1.0)


def test_decisions_of_the_simple_policies():
    """Each says what to do, without looking at the gradient."""
    assert ClipNorm(2.0).decide(measurement(), None) == Scale(2.0)
    assert ClipValue(0.5).decide(measurement(), None) == Clamp(0.5)
    assert ObserveOnly().decide(measurement(), None) == Keep()
    assert ClipNorm(2.0).threshold(None) == 2.0
    assert ClipValue(0.5).threshold(None) is None


def test_describe_is_what_runs_keep():
    """Name and arguments, JSON-able."""
    assert ClipNorm(2.0).describe() == {"policy": "ClipNorm", "max_norm": 2.0, "norm_type": 2.0}
    assert json.loads(json.dumps(TargetRatio(cap=3).describe()))["cap"] == 3.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"low": 0.3, "high": 0.1},
        {"low": 0.0},
        {"high": 1.0},
        {"cap": -1},
        {"cap": math.nan},
        {"initial": 0},
    ],
)
def test_target_ratio_refuses_what_is_no_band(arguments):
    """The error names the argument."""
    with pytest.raises(gradwatch.ConfigurationError, match=next(iter(arguments))):
        TargetRatio(**arguments)


@pytest.mark.parametrize("value", ["1", "inf", True, None, -1, 0, math.nan, math.inf])
def test_clip_norm_refuses_what_is_no_number_above_0(value):
    """Text that would be one, too; the error names argument and value."""
    words = f"ClipNorm\\(max_norm={re.escape(repr(value))}\\): max_norm must be a finite number"
    with pytest.raises(gradwatch.ConfigurationError, match=words):
        gradwatch.ClipNorm(value)


def follow(policy, norms):
    state = policy.init()
    thresholds = []
    for norm in norms:
        thresholds.append(policy.threshold(state))
        state = policy.update(state, norm)
    return thresholds, state


def test_target_ratio_by_hand():
    """The first steps: the 80 % quantile of what was seen, the rise limited from the sixth on.

    norms 1, 2, 3: quantile(0.8) of [1] = 1; of [1, 2] = 1 + 0.8 = 1.8; of [1, 2, 3] = 1 + 1.6 = 2.6.
    After five norms 1..5 the quantile is 1 + 0.8·4 = 4.2 (seen 4 before: not limited); the sixth,
    100, makes it [1, 2, 3, 4, 5, 100] → position 4 → 5.0, but the limit is 4.2·exp(0.1) = 4.64.
    """
    thresholds, _ = follow(TargetRatio(), [1, 2, 3])
    assert thresholds == pytest.approx([1.0, 1.0, 1.8])
    thresholds, state = follow(TargetRatio(), [1, 2, 3, 4, 5, 100])
    assert thresholds[5] == pytest.approx(4.2)
    assert state.threshold == pytest.approx(4.2 * math.exp(0.1))


def test_target_ratio_offset_by_hand():
    """From the 21st norm on the offset moves by 0.05·([clipped] - 0.2).

    21 norms of 1: the quantile is 1 and the threshold 1, so the 21st (20 seen before it) is not
    clipped: offset -0.05·0.2 = -0.01, threshold exp(-0.01). The 22nd is above it: offset
    -0.01 + 0.05·0.8 = 0.03.
    """
    _, state = follow(TargetRatio(), [1.0] * 21)
    assert state.offset == pytest.approx(-0.01)
    assert state.threshold == pytest.approx(math.exp(-0.01))
    _, state = follow(TargetRatio(), [1.0] * 22)
    assert state.offset == pytest.approx(0.03)


@pytest.mark.parametrize("cap", [4.0, 1e9])
def test_target_ratio_agrees_with_numpy(cap):
    """Against the published lines, written once more with numpy; uncapped it keeps its band."""
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(size=500)) * np.linspace(5, 1, 500)
    window, offset, threshold = [], 0.0, 1.0
    expected = []
    for norm in norms:
        expected.append(threshold)
        seen = len(window)
        window = [*window, norm][-50:]
        if seen >= 20:
            offset = np.clip(offset + 0.05 * ((norm > threshold) - 0.2), -1, 1)
        new = np.quantile(window, 0.8) * np.exp(offset)
        if seen >= 5:
            new = min(new, threshold * np.exp(0.1))
        threshold = min(new, cap)
    thresholds, _ = follow(TargetRatio(cap=cap), norms)
    assert thresholds == pytest.approx(expected, rel=1e-9)
    clipped = np.mean(norms[100:] > np.array(thresholds[100:]))
    assert clipped > 0.3 if cap == 4.0 else 0.1 < clipped < 0.3


def test_one_spike_hardly_moves_target_ratio():
    """A 1000-fold spike is clipped at the threshold before it, and moves it by less than 5 %."""
    generator = np.random.default_rng(1)
    norms = list(np.exp(generator.normal(size=200) * 0.3))
    _, before = follow(TargetRatio(), norms)
    after = TargetRatio().update(before, 1000 * before.threshold)
    assert abs(after.threshold / before.threshold - 1) < 0.05


def test_target_ratio_never_passes_its_cap():
    """However long a burst lasts."""
    thresholds, state = follow(TargetRatio(cap=3.0), [1.0] * 50 + [1e6] * 60)
    assert max(*thresholds, state.threshold) <= 3.0


@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0, -1.0])
def test_target_ratio_learns_nothing_from_a_norm_that_is_none(norm):
    """Such a norm leaves the state as it was."""
    _, state = follow(TargetRatio(), [1.0, 2.0])
    assert TargetRatio().update(state, norm) is state


def test_target_ratio_state_round_trip():
    """Through plain JSON and back."""
    policy = TargetRatio()
    _, state = follow(policy, [1.0, 2.0, 3.0])
    assert policy.load(json.loads(json.dumps(policy.dump(state)))) == state


class _PerTensor(Policy[int]):
    """What a later policy may need: its own factor for each tensor, learning as it goes."""

    def init(self):
        return 0

    def decide(self, measurement, state):
        return ScaleEach([1.0 / (state + i + 1) for i in range(len(measurement.grads))])

    def update(self, state, norm, loss=None):
        return state + 1


class _PerUnit(Policy[None]):
    """A factor for each output unit (row) of each tensor."""

    def init(self):
        return None

    def decide(self, measurement, state):
        return ScaleEach([torch.full((g.shape[0],) + (1,) * (g.dim() - 1), 0.5)
                          for g in measurement.grads])  # fmt: skip


class _SkipOdd(Policy[int]):
    """Skips every second step."""

    def init(self):
        return 0

    def decide(self, measurement, state):
        return Skip("odd") if state % 2 else Keep()

    def update(self, state, norm, loss=None):
        return state + 1


@pytest.mark.parametrize("fused", [False, True])
def test_policies_by_tensor_unit_and_skipping_fit_the_border(fused):
    """The border between deciding and carrying out holds for policies that are not there yet."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    agent = gradwatch.Agent(
        optimizer, clip=_PerTensor(), store=(sink := MemorySink()), metrics_port=None
    )
    for step in range(2):
        set_gradients(step, model)
        grads = [p.grad.clone() for p in model.parameters()]
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for i, (p, b, g) in enumerate(zip(model.parameters(), before, grads, strict=True)):
            torch.testing.assert_close(p.detach(), b - g / (step + i + 1))
    assert agent.flush()
    scaled = [float(g.norm()) / (i + 2) for i, g in enumerate(grads)]
    assert sink.steps[1].post_norm == pytest.approx(math.hypot(*scaled), rel=1e-6)

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    gradwatch.wrap(optimizer, clip=_PerUnit(), store=MemorySink(), metrics_port=None)
    set_gradients(0, model)
    weight, gradient = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), weight - gradient / 2)

    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, fused=fused)
    agent = gradwatch.Agent(
        optimizer, clip=_SkipOdd(), store=(sink := MemorySink()), metrics_port=None
    )
    for step in range(4):
        set_gradients(step, model)
        weight = model[0].weight.detach().clone()
        optimizer.step()
        assert torch.equal(weight, model[0].weight.detach()) == bool(step % 2)
    assert agent.flush()
    assert [(r.skipped, r.nonfinite) for r in sink.steps] == [(bool(s % 2), False)
                                                              for s in range(4)]  # fmt: skip


def _half(measurement, state):
    return Scale(measurement.norm / 2)


@pytest.mark.parametrize(
    "builtin",
    [
        ClipNorm(1.0),
        ClipValue(0.1),
        ObserveOnly(),
        TargetRatio(),
        gradwatch.AdaptiveGradientClip(),
        gradwatch.ClipLayerNorm(1.0),
        gradwatch.PercentileClip(),
        gradwatch.SkipSpikes(ClipNorm(1.0)),
        gradwatch.ZClip(),
    ],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_class_with_a_decide_of_its_own_is_asked(builtin, fused):
    """Whatever it inherits from: each step is scaled to half its norm, as SGD shows."""
    kind = type(builtin)
    heir = type("Heir", (kind,), {"decide": lambda _, *both: _half(*both)})
    policy = heir(**{f.name: getattr(builtin, f.name) for f in dataclasses.fields(builtin)})
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    agent, sink = watched(optimizer, clip=policy)
    for step in range(3):
        set_gradients(step, model)
        expected = [p.detach() - p.grad / 2 for p in model.parameters()]
        optimizer.step()
        found = [p.detach() for p in model.parameters()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert agent.flush()
    assert all(r.post_norm == pytest.approx(r.pre_norm / 2, rel=1e-3) for r in sink.steps)


@pytest.mark.parametrize(
    "decision",
    [None, 1.0, Scale(math.nan), Scale(-1.0), Scale(0.0), Clamp(math.nan), Clamp(-1.0)],
    ids=repr,
)
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_no_decision_is_not_carried_out(decision, fused, caplog):
    """It is said once, and the step is clipped as torch does it at the policy's threshold."""
    ours, theirs = twins()
    heir = type("Heir", (ClipNorm,), {"decide": lambda *_: decision})
    wrapped = torch.optim.SGD(ours.parameters(), lr=0.1, fused=fused)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1)
    watched(wrapped, clip=heir(1.0))
    for step in range(3):
        set_gradients(step, ours, theirs)
        wrapped.step()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        plain.step()
    assert greatest_difference(ours, theirs) < 1e-6
    assert len(caplog.records) == 1
    assert "a step could not be recorded" in caplog.text


@pytest.mark.parametrize(
    "policy",
    [
        gradwatch.AdaptiveGradientClip(0.02),
        gradwatch.ClipLayerNorm(2.0),
        gradwatch.ClipNorm(2.0, norm_type=1.0),
        gradwatch.ClipValue(0.5),
        gradwatch.ObserveOnly(),
        gradwatch.PercentileClip(90),
        gradwatch.SkipSpikes(gradwatch.TargetRatio(cap=3.0), window=64),
        gradwatch.TargetRatio(cap=3.0),
        gradwatch.ZClip(),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_a_policy_can_be_built_from_its_description(policy):
    """Through JSON, as the store keeps it; the description holds the arguments and nothing else."""
    description = json.loads(json.dumps(policy.describe()))
    assert build(description) == policy
    arguments = set(inspect.signature(type(policy)).parameters)
    assert set(description) - {"policy", "inner"} == arguments - {"policy"}
