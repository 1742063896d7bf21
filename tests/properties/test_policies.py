"""What holds for every stream of norms."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.events import LossSpikes, NormSpikes
from gradwatch.norms import Meter, combine
from gradwatch.policies import (
    AdaptiveGradientClip,
    ClipLayerNorm,
    ClipNorm,
    ClipValue,
    PercentileClip,
    SkipSpikes,
    TargetRatio,
    ZClip,
    build,
    parse,
)
from gradwatch.records import Measurement, Scale
from gradwatch.scaling import Carrier

finite = st.floats(1e-8, 1e8)
poison = st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
caps = st.none() | st.floats(0.01, 100)
positives = st.floats(0.001, 1000)
plain = st.one_of(
    st.builds(TargetRatio, cap=caps, initial=positives),
    st.builds(
        PercentileClip,
        st.floats(0, 100),
        positives,
        st.integers(1, 40),
        st.integers(1, 40),
        positives,
    ),
    st.builds(ZClip, st.floats(0.01, 0.99), st.floats(0.1, 10), st.integers(2, 30), caps),
)
policies = plain | st.builds(SkipSpikes, plain, st.integers(4, 30), positives)
extreme = st.floats(min_value=5e-324, allow_infinity=False)
losses = st.none() | st.floats()


@given(policies | st.builds(ClipNorm, positives, st.just(math.inf) | positives))
def test_a_policy_is_what_it_is_written_and_described_as(policy):
    """As `str` writes it, with the module's name before it or not, and as JSON."""
    assert parse(str(policy)) == policy
    assert parse(f"clip=gradwatch.{policy}") == policy
    assert build(json.loads(json.dumps(policy.describe()))) == policy


@given(policies, st.lists(st.tuples(finite | poison, losses), max_size=120))
def test_nonfinite_norms_never_change_a_state(policy, stream):
    """The state after a stream is the state after its finite, positive norms alone."""
    state = clean = policy.init()
    for norm, loss in stream:
        state = policy.update(state, norm, loss)
        if math.isfinite(norm) and norm > 0:
            known = loss if loss is not None and math.isfinite(loss) else None
            clean = policy.update(clean, norm, known)
    assert state == clean


@given(policies, st.lists(extreme | finite | poison, max_size=120))
def test_thresholds_are_finite_positive_and_below_the_cap(policy, norms):
    """Whatever comes, from the least float to the greatest."""
    state = policy.init()
    cap = getattr(policy, "cap", None) or math.inf
    for norm in norms:
        threshold = policy.threshold(state)
        if threshold is not None:
            assert math.isfinite(threshold)
            assert 0 < threshold <= cap
        if math.isfinite(norm):
            decision = policy.decide(Measurement(norm, 2.0, [norm], [], [], 1.0), state)
            assert not isinstance(decision, Scale) or 0 < decision.max_norm < math.inf
        state = policy.update(state, norm)


numbers = st.floats(-1e6, 1e6, width=32)
rows = st.lists(numbers, min_size=3, max_size=3)
# (weight, gradient) of each element of a vector, or of each row of a matrix
tensors = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20) | st.lists(
    st.tuples(rows, rows), min_size=1, max_size=6
)


def unit_ratio(gradient, weight):
    """The greatest norm of a row over that of its weight, of at least 1e-3; a vector is one row."""
    norms, sizes = (torch.atleast_2d(t).double().flatten(1).norm(dim=1) for t in (gradient, weight))
    return (norms / sizes.clamp(min=1e-3)).max()


HELD = {  # what each policy holds at its limit
    ClipNorm: lambda gradient, _: gradient.norm(),
    ClipValue: lambda gradient, _: gradient.abs().max(),
    ClipLayerNorm: lambda gradient, _: gradient.double().norm(),
    AdaptiveGradientClip: unit_ratio,
}


@pytest.mark.parametrize("kind", HELD)
@given(tensors, st.floats(1e-3, 1e3))
def test_clipping_twice_equals_once(kind, pairs, limit):
    """A gradient that is clipped is within the limit, and stays as it is."""
    weight, gradient = torch.tensor(pairs).unbind(1)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    carrier, meter, policy = Carrier(optimizer, fold=True), Meter(), kind(limit)
    results = []
    for _ in range(2):
        measured = meter.measure([parameter], [parameter.grad])
        decision = policy.decide(measured, None)
        # Only one factor for all can be left to the optimizer's kernel.
        carrier.carry_out(optimizer, decision, measured, fold=kind is not ClipNorm)
        results.append(parameter.grad.clone())
    # The 1e-6 beside the norm, which is torch's too, leaves a clipped gradient a little shorter.
    slack = {ClipNorm: 2e-6 / limit + 1e-6, ClipValue: 0}.get(kind, 1e-5)
    least = 0 if kind in {ClipNorm, ClipValue} else 1e-30
    torch.testing.assert_close(results[0], results[1], rtol=slack, atol=least)
    assert HELD[kind](results[0], weight) <= limit * (1 + 1e-5)


def norm_spikes(norms):
    """By definition, step → median: above 5 times the median of the 50 before, and 4 deviations.

    From 20 on; those of a burst are one.
    """
    found, since = {}, 5
    for i, norm in enumerate(norms):
        before = np.sort(norms[max(0, i - 50) : i])
        since += 1
        if len(before) < 20:
            continue
        median = before[len(before) // 2]
        moves = np.sort(np.diff(np.log(norms[max(0, i - 50) : i])))
        quarter = len(moves) // 4
        deviation = (moves[~quarter] - moves[quarter]) / (1.349 * np.sqrt(2))
        if norm > 5 * median and np.log(norm / median) > 4 * deviation:
            if since > 5:
                found[i] = median
            since = 0
    return found


@given(st.lists(st.floats(0.1, 1.5) | st.floats(0.7, 1.5) | finite, max_size=150))
def test_norm_spikes_are_those_of_the_definition(norms):
    """Whatever the norms are."""
    detector = NormSpikes()
    found = {i: detector.observe(norm) for i, norm in enumerate(norms)}
    assert {i: median for i, median in found.items() if median is not None} == norm_spikes(norms)


@pytest.mark.parametrize("spread", [0.3, 0.5, 0.8, 1.2])
def test_norms_that_flicker_spike_seldom(spread):
    """As a small batch's do once a run has learnt; a norm that stands out is told among them."""
    norms = np.exp(np.random.default_rng(0).normal(0.0, spread, 20_000))
    norms *= np.geomspace(1, 1e-8, 20_000)  # as it converges, on its way
    norms[10_000] = 1e4 * np.median(norms[9_950:10_000])
    norms[15_000] = 5.2 * np.median(norms[14_950:15_000])
    detector = NormSpikes()
    found = [i for i, norm in enumerate(norms) if detector.observe(norm) is not None]
    assert found == list(norm_spikes(norms))
    assert 10_000 in found
    assert len(found) < 10  # a thousand times by the median alone


@given(st.lists(st.floats(-1e3, 1e3), min_size=60, max_size=400))
def test_loss_spikes_are_those_of_the_definition(losses):
    """Above mean + 6 standard deviations of the 128 before, from 64 on."""
    detector = LossSpikes()
    for i, loss in enumerate(losses):
        window = np.array(losses[max(0, i - 128) : i])
        found = detector.observe(loss)
        if len(window) < 64:
            assert found is None
            continue
        limit = window.mean() + 6 * window.std()
        if abs(loss - limit) > 1e-6 * (1 + abs(limit)) and window.std() > 1e-6:
            assert (found is not None) == (loss > limit)


sizes = st.just(0.0) | st.floats(1e-60, 1e30)  # numpy squares and cubes them unscaled


@given(st.lists(sizes, max_size=10), st.sampled_from([1.0, 2.0, 3.0, math.inf]))
def test_combined_norms_are_those_of_numpy(norms, p):
    """The norm of a concatenation, from the norms of its parts."""
    expected = np.linalg.norm(norms, p) if norms else 0.0
    np.testing.assert_allclose(combine(norms, p), expected, rtol=1e-9)
