"""Does `TargetRatio` hold its band? Small real jobs, each under a policy, counted over windows.

For each job: the share of all 200-step windows after 100 steps of warm-up in which 10–30 % of the
steps were clipped; and on a recurrent network that explodes, how many seeds solve their task.

    .venv/bin/python benchmarks/jobs.py
    .venv/bin/python benchmarks/jobs.py --only "CNN, digits" --seeds 1
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from workloads import REPORTED, ended, train

import gradwatch
from gradwatch.testing import MemorySink

WINDOW, WARMUP = 200, 100
EXPLODES = "tanh RNN, temporal order"
SOLVED = 0.01  # the share of sequences told wrong up to which that task is solved
BOTH = (gradwatch.TargetRatio(), gradwatch.ClipNorm(1.0))
JOBS = {
    EXPLODES: (5, (gradwatch.TargetRatio(cap=3.0), *BOTH, gradwatch.ObserveOnly())),
    "char-LSTM, source text": (3, BOTH),
    "CNN, digits": (3, BOTH),
    "actor-critic, cart and pole": (3, BOTH),
}


def in_band(clipped, low=0.10, high=0.30):
    """The share of windows whose clip ratio lies in the band."""
    ratios = np.convolve(clipped[WARMUP:], np.ones(WINDOW) / WINDOW, mode="valid")
    return float(np.mean((ratios >= low - 1e-9) & (ratios <= high + 1e-9)))


def run(job, policy, seed):
    """The share of windows in the band, and how the job ended."""
    workload, sink = REPORTED[job].make(seed), MemorySink()
    agent = gradwatch.Agent(workload.optimizer, clip=policy, store=sink, metrics_port=None)
    losses = train(workload, agent)
    agent.close()
    return in_band(np.array([record.clipped for record in sink.steps])), ended(workload, losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=JOBS)
    parser.add_argument("--seeds", type=int, help="instead of 5 of the RNN, 3 of the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="share of 200-step windows in the band of 10–30 %", box=box.MARKDOWN)
    headings = ("job", "policy", "seeds", "windows in the band", "worst seed", "solved", "ended at")
    for heading in (*headings, "s"):
        table.add_column(heading)
    for job, (usual, policies) in JOBS.items():
        if arguments.only not in {None, job}:
            continue
        for policy in policies:
            began = time.perf_counter()
            results = [run(job, policy, seed) for seed in range(arguments.seeds or usual)]
            shares = [share for share, _ in results]
            solved = sum(end <= SOLVED for _, end in results)
            table.add_row(
                job,
                str(policy),
                str(len(results)),
                f"{np.mean(shares):.1%}",
                f"{min(shares):.1%}",
                f"{solved} of {len(results)}" if job == EXPLODES else "",
                "; ".join(f"{end:.4g}" for _, end in results),
                f"{time.perf_counter() - began:.0f}",
            )
    Console(width=220, highlight=False).print(table)


if __name__ == "__main__":
    main()
