"""After how long without a step a loop counts as stalled."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.pace import Pace, PaceKeeper, pace_of


def loop(*seconds):
    """Step numbers and times of a loop whose intervals are these."""
    times = 1_700_000_000.0 + np.concatenate([[0.0], np.cumsum(seconds)])
    return np.arange(len(times)), times


def test_a_fast_loop_is_given_half_a_minute():
    """Ten times 10 ms is no time in which anybody would call a loop stalled."""
    assert pace_of(*loop(*[0.01] * 500)).patience == 30.0


def test_a_slow_loop_is_given_ten_steps():
    """The usual step is the median: single slow steps do not move it."""
    assert pace_of(*loop(*[20.0] * 100, 25.0, *[20.0] * 10)).patience == pytest.approx(200.0)


def test_a_loop_that_has_evaluated_before_is_given_half_as_long_again():
    """A pause of five minutes once an epoch is no stall from the second on."""
    epoch = [0.1] * 300
    assert pace_of(*loop(*epoch)).patience == 30.0
    assert pace_of(*loop(*epoch, 300.0, *epoch)).patience == pytest.approx(450.0)


@pytest.mark.parametrize("seconds", [(), (0.0,)])
def test_one_step_shows_no_interval(seconds):
    """Of none or one nothing is known; two are enough."""
    pace = pace_of(*loop(*seconds))
    assert (pace is None) == (not seconds)
    assert pace_of(np.arange(0), np.empty(0)) is None


def test_what_lies_between_two_attempts_is_no_pause():
    """A job that was resumed after a night is watched as closely as before."""
    steps, times = loop(*[1.0] * 100, 30_000.0, *[1.0] * 100)
    assert pace_of(steps, times).patience == pytest.approx(45_000.0)
    assert pace_of(steps, times, starts=(0, 101)).patience == 30.0


def test_records_that_are_missing_are_no_pause():
    """Where every hundredth is on record, an interval is a hundred steps."""
    steps, times = loop(*[1.0] * 20_000)
    assert pace_of(steps[::100], times[::100]) == Pace(1.0, 1.0)


def test_a_clock_that_is_set_back_is_no_negative_time():
    """Nor does it make the usual step shorter than it is."""
    assert pace_of(*loop(*[2.0] * 50, -3600.0, *[2.0] * 50)) == Pace(2.0, 2.0)


@given(
    st.lists(st.floats(0.0, 1e4, width=32), min_size=2, max_size=60),
    st.integers(1, 20),
    st.booleans(),
)
def test_batch_by_batch_it_is_what_it_is_at_once(seconds, size, thinned):
    """Whatever batches the records come in."""
    steps, times = loop(*seconds)
    if thinned:
        steps = steps * 3
    keeper = PaceKeeper()
    for start in range(0, len(steps), size):
        keeper.add(steps[start : start + size], times[start : start + size])
    at_once = pace_of(steps, times)
    assert keeper.pace().usual == at_once.usual
    if not thinned:  # else the usual time that is taken off is the one known by then
        assert keeper.pace().longest == at_once.longest
