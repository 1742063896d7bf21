"""What a step of logging costs the training thread, gradwatch beside its peers.

The same five scalars a step (loss, learning rate, norm before and after, threshold), at 200 steps a
second as a small job has them, with the thread computing in between. gradwatch's figure is all its hooks do beside the one thing the
others leave to the loop: its recording, not its reading of the gradients.

    make bench-peers       # installs the peers in an environment of their own, .venv-peers
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import tempfile
import time
import warnings

import numpy as np
from pace import Work

STEPS = 2000
PACE = 1 / 200  # seconds
NAMES = ("loss", "lr", "pre_norm", "post_norm", "threshold")


def gradwatch_(folder):
    """The ring's `append`, with the worker, SQLite and the exporter running as in a job."""
    import torch

    import gradwatch

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    agent = gradwatch.Agent(optimizer, store=f"{folder}/peers.db")
    weight.grad = torch.ones(1)
    optimizer.step()
    append = agent._hooks.tape.ring.append
    return lambda step, values: append(step + 1, 1.7e9, 0.0, *values, 1.0, 0), agent.close


def tensorboard(folder):
    """`SummaryWriter.add_scalar`, five times."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def log(step, values):
        for name, value in zip(NAMES, values, strict=True):
            writer.add_scalar(name, value, step)

    return log, writer.close


def wandb(folder):
    """`run.log`, offline."""
    import wandb

    run = wandb.init(mode="offline", dir=folder, project="peers", settings={"silent": True})
    return (
        lambda step, values: run.log(dict(zip(NAMES, values, strict=True)), step=step),
        run.finish,
    )


def trackio(folder):
    """`trackio.log`, to its own local store."""
    os.environ["TRACKIO_DIR"] = folder
    import trackio

    trackio.init(project="peers")
    return lambda _, values: trackio.log(dict(zip(NAMES, values, strict=True))), trackio.finish


def mlflow(folder):
    """`log_metrics` without waiting, to SQLite."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.start_run()
    return (
        lambda step, values: mlflow.log_metrics(
            dict(zip(NAMES, values, strict=True)), step=step, synchronous=False
        ),
        mlflow.end_run,
    )


CONTESTANTS = {
    "gradwatch": gradwatch_,
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
    "mlflow": mlflow,
}


def nothing(_):
    """The measuring's own call, which is taken off every figure."""
    return lambda step, values: None, lambda: None  # noqa: ARG005


def measure(start, steps):
    """Median and 99th percentile of one step's logging, in microseconds."""
    generator = np.random.default_rng(0)
    values = generator.random((steps, 5)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        log, stop = start(folder)
        times = []
        work = Work()
        for step in range(steps):
            work.until(time.perf_counter() + PACE)
            began = time.perf_counter_ns()
            log(step, values[step])
            times.append(time.perf_counter_ns() - began)
        stop()
    return np.percentile(times[steps // 10 :], [50, 99]) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=CONTESTANTS, action="append")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    own, _ = measure(nothing, arguments.steps)
    print(f"taken off every figure: {own:.1f} µs, the measuring's own call\n")
    print("| logger | version | µs a step, median | 99th percentile |\n|---|---|---|---|")
    for name, start in CONTESTANTS.items():
        if arguments.only and name not in arguments.only:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"| {name} | not installed | | |")
            continue
        middle, tail = measure(start, arguments.steps) - own
        print(f"| {name} | {version} | {middle:,.1f} | {tail:,.1f} |", flush=True)


if __name__ == "__main__":
    main()
