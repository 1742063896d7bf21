"""A skipped step is no step: the optimizer is as it would be had the step never been asked for."""

import functools
import warnings

import pytest
import torch
import zoo
from loops import watched

from gradwatch import ClipNorm

STEPS = 6
SPOILT = 99  # the number of the batch with a NaN


@pytest.fixture(autouse=True)
def _quiet():
    """What these packages deprecate is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(name, make, how, *, spoilt_before=None, clip=None):
    """What is left after the loop: with a spoilt step before that number, or without one."""
    loop = zoo.Loop(make)
    loop.create_graph = name in zoo.SECOND_ORDER
    loop.sparse = name == "torch.SparseAdam"
    agent, sink = watched(loop.optimizer, model=loop.net, clip=clip or ClipNorm(1e6))
    left = []
    for number in range(STEPS):
        if number == spoilt_before:
            getattr(loop, how)(SPOILT, nan=True)
            left.append(loop.result())
            assert agent.last.nonfinite
            assert agent.last.skipped
        if number in {0, 3}:
            left.append(loop.result())
        getattr(loop, how)(number)
    assert agent.flush()
    assert len(sink.steps) == STEPS + (spoilt_before is not None)
    assert not any(torch.isnan(p).any() for p in loop.net.parameters())
    agent.close()
    return left, loop.result()


@functools.cache
def undisturbed(name, how):
    """A run that never had the spoilt step: what it was before steps 0 and 3, and its end."""
    make = zoo.OPTIMIZERS.get(name) or zoo.TWO_PASS[name]
    (at_first, at_third), end = trained(name, make, how)
    return {0: at_first, 3: at_third}, end


def assert_left_out(name, how, at):
    make = zoo.OPTIMIZERS.get(name) or zoo.TWO_PASS[name]
    before, end = undisturbed(name, how)
    left, ours = trained(name, make, how, spoilt_before=at)
    after_the_spoilt_step = left[0 if at == 0 else 1]
    assert after_the_spoilt_step == before[at]
    assert ours == end


def needs_a_closure(name):
    return any(part in name for part in zoo.NEEDS_A_CLOSURE)


ALL = [name for name in zoo.OPTIMIZERS if name not in zoo.REFUSED]
WITHOUT_A_CLOSURE = [name for name in ALL if not needs_a_closure(name)]
# Of torch's own, Adam stands for those whose `step` evaluates the closure first.
WITH_A_CLOSURE = [
    name for name in ALL if name not in zoo.SECOND_ORDER and name != "torch.SparseAdam"
]


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("name", WITHOUT_A_CLOSURE)
def test_a_step_with_a_nan_is_left_out(name, at):
    """Weights, state, groups and attributes at once after it, and at the end, bit for bit."""
    assert_left_out(name, "step", at)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("name", WITH_A_CLOSURE)
def test_a_step_whose_closure_makes_a_nan_is_left_out(name, at):
    """Those that move weights or state before they evaluate it are put back."""
    assert_left_out(name, "step_with_loss" if name == "po.alig" else "step_with_closure", at)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("name", zoo.TWO_PASS)
def test_a_two_pass_step_with_a_nan_is_left_out(name, at):
    """SAM and its variants: the weights that the first pass made NaN are put back."""
    hows = {"GSAM": "step_with_outputs", "WSAM": "step_with_closure"}
    assert_left_out(name, hows.get(name, "step_after_backward"), at)
