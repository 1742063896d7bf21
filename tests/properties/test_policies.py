"""What holds for every stream of norms."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.events import LossSpikes, NormSpikes
from gradwatch.norms import Meter, combine
from gradwatch.policies import ClipNorm, ClipValue, TargetRatio
from gradwatch.scaling import Carrier

finite = st.floats(1e-8, 1e8)
poison = st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
policies = st.builds(
    TargetRatio, cap=st.none() | st.floats(0.01, 100), initial=st.floats(0.001, 1000)
)


@given(policies, st.lists(finite | poison, max_size=120))
def test_nonfinite_norms_never_change_a_state(policy, norms):
    """The state after a stream is the state after its finite, positive norms alone."""
    state = clean = policy.init()
    for norm in norms:
        state = policy.update(state, norm)
        if math.isfinite(norm) and norm > 0:
            clean = policy.update(clean, norm)
    assert state == clean


@given(policies, st.lists(finite | poison, max_size=120))
def test_thresholds_are_finite_positive_and_below_the_cap(policy, norms):
    """Whatever comes."""
    state = policy.init()
    for norm in norms:
        threshold = policy.threshold(state)
        assert math.isfinite(threshold)
        assert threshold > 0
        assert threshold <= (policy.cap or math.inf)
        state = policy.update(state, norm)


gradients = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)


@given(gradients, st.floats(1e-3, 1e3), st.sampled_from([ClipNorm, ClipValue]))
def test_clipping_twice_equals_once(values, limit, kind):
    """A gradient that is clipped is within the limit, and stays as it is."""
    parameter = torch.nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    carrier, meter, policy = Carrier(optimizer, fold=True), Meter(), kind(limit)
    results = []
    for _ in range(2):
        measured = meter.measure([parameter], [parameter.grad])
        carrier.carry_out(optimizer, policy.decide(measured, None), measured, fold=False)
        results.append(parameter.grad.clone())
    # The 1e-6 beside the norm, which is torch's too, leaves a clipped gradient a little shorter.
    slack = 2e-6 / limit + 1e-6
    torch.testing.assert_close(results[0], results[1], rtol=slack, atol=0)
    size = results[0].norm() if kind is ClipNorm else results[0].abs().max()
    assert size <= limit * (1 + 1e-5)


@given(st.lists(finite, max_size=150))
def test_norm_spikes_are_those_of_the_definition(norms):
    """Above 5 times the median of the 50 before, from 20 on; a burst is told once."""
    detector = NormSpikes()
    since = 5
    for i, norm in enumerate(norms):
        before = sorted(norms[max(0, i - 50) : i])
        above = len(before) >= 20 and norm > 5 * before[len(before) // 2]
        since += 1
        found = detector.observe(norm)
        assert (found is not None) == (above and since > 5)
        if found is not None:
            assert found == before[len(before) // 2]
        if above:
            since = 0


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


@given(st.lists(st.floats(0, 1e30), max_size=10), st.sampled_from([1.0, 2.0, 3.0, math.inf]))
def test_combined_norms_are_those_of_numpy(norms, p):
    """The norm of a concatenation, from the norms of its parts."""
    expected = np.linalg.norm(norms, p) if norms else 0.0
    np.testing.assert_allclose(combine(norms, p), expected, rtol=1e-9)
