"""What a further run would clip, held against further runs: gradient descent, run again."""

import math

import numpy as np
import pytest
import torch
from stores import records, write

from gradwatch.recorder import FLAGS
from gradwatch_monitor import Store
from gradwatch_monitor.history import COLUMNS, History
from gradwatch_monitor.rerun import rerun_of

BURN_IN = 0.2
STEPS = 2000


def descend(threshold, *, make=torch.optim.SGD, lr=0.02, noise=0.0, seed=0, steps=STEPS):
    """Norms of a descent into a quadratic bowl under torch's own clipping."""
    generator = torch.Generator().manual_seed(seed)
    curvature = torch.logspace(-1.5, 0, 30)
    x = torch.nn.Parameter(3 * torch.randn(30, generator=torch.Generator().manual_seed(99)))
    optimizer = make([x], lr=lr)
    norms = []
    for _ in range(steps):
        x.grad = curvature * x.detach() + noise * torch.randn(30, generator=generator)
        norms.append(float(torch.nn.utils.clip_grad_norm_([x], threshold)))
        optimizer.step()
    return np.array(norms)


def history(norms, threshold, optimizer="SGD"):
    thresholds = np.full(len(norms), float(threshold))
    return History(norms, thresholds, norms > threshold, ~np.isfinite(norms), optimizer=optimizer)


def late(norms, threshold):
    """The share of the steps that were clipped, after the first fifth."""
    return (norms[len(norms) // 5 :] > threshold).mean()


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    ("was", "to"), [(1e9, 1.0), (1e9, 0.6), (2.0, 0.8), (0.7, 1.2), (0.8, 1e9)]
)
def test_a_run_by_sgd_is_slower_or_faster_past_its_large_norms(was, to, noise):
    """Clipped more, or less, than the run on record: the share that a real re-run then has."""
    norms = descend(was, noise=noise)
    rerun = rerun_of(history(norms, was), BURN_IN)
    real = late(descend(to, noise=noise, seed=1), to)
    assert rerun.share(to) == pytest.approx(real, abs=0.03)


def test_the_norms_of_the_first_run_alone_would_mislead():
    """A constant that was above the norms of all but a few steps is reached by most of the next run's."""
    norms = descend(1e9)
    threshold = float(np.quantile(norms[STEPS // 5 :], 0.8))
    real = late(descend(threshold), threshold)
    assert real > 0.35
    assert rerun_of(history(norms, 1e9), BURN_IN).share(threshold) == pytest.approx(real, abs=0.03)


def test_the_threshold_is_the_one_that_clips_the_share():
    """Found by bisection, and tried by running it."""
    rerun = rerun_of(history(descend(1e9), 1e9), BURN_IN)
    threshold = rerun.threshold(0.2)
    assert rerun.share(threshold) == pytest.approx(0.2, abs=0.01)
    assert late(descend(threshold), threshold) == pytest.approx(0.2, abs=0.02)


def test_what_lies_past_the_record_is_not_known():
    """A run that was held back shows only the beginning of one that is not."""
    held = descend(0.02)
    rerun = rerun_of(history(held, 0.02), BURN_IN)
    reached = np.minimum(1.0, 0.02 / held).sum()  # steps of a free run that it is worth, about
    assert reached < 0.2 * STEPS
    assert rerun.known(1e9) == 0.0
    assert rerun.known(0.02) == 1.0
    assert rerun.known(0.01) == 1.0
    half = [k for c in (0.022, 0.03, 0.06) if 0 < (k := rerun.known(c)) < 1]
    assert half == sorted(half, reverse=True)
    assert half


def test_adam_takes_the_same_steps_whatever_the_factor():
    """There the shares are those of the run on record, and a re-run bears that out."""
    norms = descend(1e9, make=torch.optim.Adam, lr=0.003)
    told = history(norms, 1e9, optimizer="Adam")
    threshold = float(np.quantile(norms[STEPS // 5 :], 0.8))
    share = rerun_of(told, BURN_IN).share(threshold)
    assert share == late(norms, threshold)
    real = late(descend(threshold, make=torch.optim.Adam, lr=0.003), threshold)
    assert share == pytest.approx(real, abs=0.06)


def test_where_nothing_is_clipped_nothing_changes():
    """Windows at the pace that they had: the shares of this run, the norms of a part of a window too."""
    norms = descend(1e9, noise=0.3)[:1990]
    rerun = rerun_of(history(norms, 1e9), BURN_IN)
    top = norms.max()
    assert rerun.share(top) == 0.0
    assert rerun.known(top) == 1.0
    near = float(np.quantile(norms[400:], 0.99))
    assert rerun.share(near) == pytest.approx(late(norms, near), abs=0.01)


def test_thresholds_that_moved_and_runs_that_only_observed():
    """The pace on record is that of each step's own threshold; without one, full."""
    norms = descend(1e9)
    free = rerun_of(history(norms, math.nan), BURN_IN)
    assert free.share(1.0) == rerun_of(history(norms, 1e9), BURN_IN).share(1.0)
    tight = descend(0.8)
    moved = np.where(np.arange(STEPS) < STEPS // 2, 0.8, 1e9)
    both = History(tight, moved, tight > moved, ~np.isfinite(tight), optimizer="SGD")
    shares = [rerun_of(h, BURN_IN).share(1.0)
              for h in (history(tight, 0.8), both, history(tight, 1e9))]  # fmt: skip
    assert shares[0] <= shares[1] <= shares[2]
    assert shares[0] < shares[2]


def test_long_runs_are_repaced_by_their_blocks():
    """Within what the blocks' bins can tell, of a run whose norms fall."""
    steps = records(0, 120_000, odd=0.0)
    steps["pre_norm"] *= np.exp(np.linspace(1.0, -1.0, len(steps)))
    steps["threshold"] = 3.0
    steps["flags"] = np.where(steps["pre_norm"] > 3.0, FLAGS.CLIPPED, 0)
    write("sqlite:///long.db", steps)
    with Store("long.db") as store:
        blocks = History.of(store, 1)
        columns = store.columns(1, COLUMNS)
    assert blocks.blocks.steps == 100_000
    exact = History(*(columns[name] for name in COLUMNS), optimizer="SGD")
    told = History(*(getattr(blocks, name) for name in COLUMNS), optimizer="SGD",
                   blocks=blocks.blocks, first_loss=blocks.first_loss)  # fmt: skip
    ours, theirs = rerun_of(told, BURN_IN), rerun_of(exact, BURN_IN)
    for share in (0.1, 0.2, 0.5):
        assert ours.threshold(share) == pytest.approx(theirs.threshold(share), rel=0.02)
    for threshold in (0.5, 1.0, 2.0):
        assert ours.share(threshold) == pytest.approx(theirs.share(threshold), abs=0.01)
        assert ours.known(threshold) == pytest.approx(theirs.known(threshold), abs=0.01)
