"""Stores written by real runs, for tests that read them."""

import math

import numpy as np
import torch
from loops import mlp, set_gradients

import gradwatch
from gradwatch import Agent


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
        if loss:
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
