"""Stores written by real runs, and long ones written as the worker does, for tests that read them."""

import math

import numpy as np
import torch
from loops import mlp, set_gradients

import gradwatch
from gradwatch import Agent
from gradwatch.recorder import FLAGS, STEP_DTYPE
from gradwatch.records import Batch
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import run_info

NOW = 1_700_000_000.0
NUMBERS = ("loss", "pre_norm", "post_norm", "threshold", "loss_scale")


def write_run(store="gradwatch.db", *, run="first", steps=300, nan_at=(), seed=0, close=True,
              policy=None, norms=None, loss=True, tags=None):  # fmt: skip
    """A run with the given gradients (random ones where `norms` is None); its agent."""
    model = mlp(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    agent = Agent(
        optimizer, model=model, clip=policy or gradwatch.ClipNorm(1.0), run=run, store=store,
        tags=tags,
    )  # fmt: skip
    for step in range(steps if norms is None else len(norms)):
        set_gradients(step + 1000 * seed, model)
        if norms is not None:
            total = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            for p in model.parameters():
                p.grad.mul_(float(norms[step]) / total)
        if step in nan_at:
            model[2].weight.grad[0, 0] = math.nan
        if loss and not step % loss:  # a number: each so-manieth
            agent.log(loss=2.0 / (1 + step / 50) + 0.01 * math.sin(step))
        optimizer.step()
    assert agent.flush()
    if close:
        agent.close()
    agent.kept = optimizer  # a run ends with its optimizer
    return agent


def lognormal(count, *, middle=1.0, spread=0.5, seed=0):
    """Norms as healthy runs have them."""
    return middle * np.exp(spread * np.random.default_rng(seed).normal(size=count))


def records(start, count, seed=0, odd=0.02):
    """Steps of which some are NaN, inf, 0 or huge."""
    pick = np.random.default_rng(seed)
    steps = np.zeros(count, STEP_DTYPE)
    steps["step"], steps["time"] = np.arange(start, start + count), NOW + np.arange(count)
    for name in NUMBERS:
        steps[name] = pick.lognormal(0, 0.5, count)
        for value in (math.nan, math.inf, 0.0, 1e100):
            steps[name][pick.random(count) < odd] = value
    steps["threshold"] = np.where(np.isfinite(steps["threshold"]), 1.0, math.nan)
    steps["flags"] = pick.choice([0, 0, 0, *vars_of_flags()], count)
    return steps


def vars_of_flags():
    return [FLAGS.CLIPPED, FLAGS.NONFINITE, FLAGS.NONFINITE_LOSS, FLAGS.SKIPPED]


class Job:
    """An attempt as the worker stores it: batches and a cursor."""

    def __init__(self, url, ring, start, **info):
        self.sink = DatabaseSink(url, lambda: NOW)
        self.run = self.sink.open(run_info(ring=ring, uid="u", start_step=start, **info))
        self.at = 0

    def write(self, steps, passed=None):
        """Store some; `passed` are how many the cursor moves, where some were lost."""
        end = self.at + (len(steps) if passed is None else passed)
        batch = Batch(steps, (), (), (), (self.at, 0), (end, 0), {})
        self.sink.write(self.run, batch)
        self.at = end

    def end(self, status="finished"):
        self.sink.close(self.run, status)


def write(url, steps, ring="ring", every=20_000):
    """A whole run."""
    job = Job(url, ring, int(steps["step"][0]))
    for part in np.split(steps, range(every, len(steps), every)):
        job.write(part)
    job.end()


def batch(first, count, *, time=1_700_000_000.0, flags=0, **columns):
    """Records as the worker hands them over."""
    steps = np.zeros(count, STEP_DTYPE)
    steps["step"] = np.arange(first, first + count)
    steps["time"], steps["flags"] = time, flags
    for name, values in columns.items():
        steps[name] = values
    return Batch(steps, (), (), (), (first, 0), (first + count, 0), {})
