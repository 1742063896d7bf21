"""Which verdict is right for each reported job: by training it, not by asking the recommender.

With five seeds that no other table uses: runs at `ClipNorm(1.0)`, and runs at the constant that the
simplest method reads from another seed's run at 1.0, the 80th percentile of its norms after the
first fifth. Whatever is told of the clipped share is of the steps after the first fifth. A label of
the third and the fourth set is the same for `--first-seed` 20 and 30.

- not_needed: at 1.0 no seed clips more than 5 % of the steps;
- keep: at 1.0, four of five seeds lie in the band, and so evenly that within each of them the share
  moves by no more than 10 points, which is from 20 % to the edge of the band (standard deviation over
  eight windows, less what chance makes);
- change: at the constant, the same;
- use_policy: none of these. `fix_training` is what a job is made to be.

    .venv/bin/python benchmarks/labels.py
    .venv/bin/python benchmarks/labels.py --second             # or --third, --fourth
    .venv/bin/python benchmarks/labels.py --first-seed 30      # is a label the same with five others?
"""

from __future__ import annotations

import argparse
import math
import multiprocessing

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from workloads import FOURTH, JOBS, REPORTED, SECOND, THIRD, TUNING, train

import gradwatch
from gradwatch.testing import MemorySink

SEEDS = 5
BAND = (0.10, 0.30)
RARELY, STEADY, WINDOWS, ENOUGH = 0.05, 0.10, 8, 4


def run(task):
    """The norms and the clip flags after the first fifth of one run."""
    job, threshold, seed = task
    torch.set_num_threads(1)
    workload, sink = JOBS[job].make(seed), MemorySink()
    agent = gradwatch.Agent(
        workload.optimizer, clip=gradwatch.ClipNorm(threshold), store=sink, metrics_port=None
    )
    train(workload, agent)
    agent.close()
    rows = sink.rows[len(sink.rows) // 5 :]
    return rows["pre_norm"], rows["flags"] & 1


def unsteadiness(clipped):
    """How the share moves over the windows, in its own unit."""
    share = clipped.mean()
    chance = share * (1 - share) * WINDOWS / len(clipped)
    windows = [window.mean() for window in np.array_split(clipped, WINDOWS)]
    return math.sqrt(max(0.0, np.var(windows) - chance))


def label(job, at_one, held):
    """The verdict that the runs call for."""
    if JOBS[job].expected == "fix_training":
        return "fix_training"
    ratios = [clipped.mean() for _, clipped in at_one]
    if max(ratios) <= RARELY:
        return "not_needed"
    if _holds(at_one):
        return "keep"
    return "change" if _holds(held) else "use_policy"


def _holds(runs):
    good = [BAND[0] <= c.mean() <= BAND[1] and unsteadiness(c) <= STEADY for _, c in runs]
    return sum(good) >= ENOUGH


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--tuning", action="store_true", help="the jobs that the rules come from")
    kind.add_argument("--second", action="store_true", help="the second set of jobs")
    kind.add_argument("--third", action="store_true", help="the third set of jobs")
    kind.add_argument("--fourth", action="store_true", help="the fourth set of jobs")
    kind.add_argument("--only", choices=JOBS, metavar="JOB")
    parser.add_argument("--first-seed", type=int, default=20)
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + SEEDS)
    sets = {"tuning": TUNING, "second": SECOND, "third": THIRD, "fourth": FOURTH}
    chosen = next((sets[name] for name in sets if getattr(arguments, name)), REPORTED)
    jobs = [arguments.only] if arguments.only else list(chosen)
    table = Table(box=box.MARKDOWN)
    for heading in ("job", "label", "clipped at 1.0, %", "constants", "clipped at these, %",
                    "moves by, points"):  # fmt: skip
        table.add_column(heading)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        at_one = dict(
            zip(jobs, _by_job(pool, jobs, [[1.0] * SEEDS] * len(jobs), seeds), strict=True)
        )
        constants = {
            job: [float(np.nanquantile(norms, 0.8)) for norms, _ in at_one[job]] for job in jobs
        }
        turned = [constants[job][-1:] + constants[job][:-1] for job in jobs]
        held = dict(zip(jobs, _by_job(pool, jobs, turned, seeds), strict=True))
    for job in jobs:
        table.add_row(
            job, label(job, at_one[job], held[job]), _percent(c.mean() for _, c in at_one[job]),
            " ".join(f"{c:.3g}" for c in constants[job]), _percent(c.mean() for _, c in held[job]),
            _percent(unsteadiness(c) for _, c in held[job]),
        )  # fmt: skip
    Console(width=160, highlight=False).print(table)


def _by_job(pool, jobs, thresholds, seeds):
    tasks = [
        (job, threshold, seed)
        for job, those in zip(jobs, thresholds, strict=True)
        for threshold, seed in zip(those, seeds, strict=True)
    ]
    runs = pool.map(run, tasks, chunksize=1)
    return [runs[i : i + SEEDS] for i in range(0, len(runs), SEEDS)]


def _percent(values):
    return " ".join(f"{100 * value:.0f}" for value in values)


if __name__ == "__main__":
    main()
