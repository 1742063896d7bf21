"""Does a recommendation hold on the next run? Real jobs, run again with what was recommended.

For each job and seed: run with `ClipNorm(1.0)`; ask for a recommendation; run with another seed
under what was recommended, and under the constant in any case; where that was a constant, one that
saves a run too, ask again of this run, and run a third time. Measured over the last 80 % of the steps. Beside it what simple methods
would have set.

    .venv/bin/python benchmarks/closed_loop.py
    .venv/bin/python benchmarks/closed_loop.py --only "CNN, digits" --seeds 3
    .venv/bin/python benchmarks/closed_loop.py --second      # on jobs that were made and labelled later
    .venv/bin/python benchmarks/closed_loop.py --third       # and on those made after these, or --fourth
    .venv/bin/python benchmarks/closed_loop.py --tuning      # what the rules were fitted on
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import tempfile
import time

import numpy as np
import torch
from jobs import in_band
from loop_tables import show
from workloads import FOURTH, JOBS, REPORTED, SECOND, THIRD, TUNING, ended, train

import gradwatch
from gradwatch_monitor import Store, recommend

BAND = (0.10, 0.30)
BURN_IN = 0.2
START = gradwatch.ClipNorm(1.0)
CONSTANTS_ARE = {"keep", "change"}  # verdicts that recommend a constant


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    clip_ratio: float  # over the last 80 % of the steps
    windows: float  # the share of 200-step windows after 100 steps that lie in the band
    ended: float  # the loss or score, less is better
    diverged: bool

    @property
    def in_band(self) -> bool:
        return BAND[0] <= self.clip_ratio <= BAND[1]


@dataclasses.dataclass(frozen=True)
class Chain:
    """First run, recommendation, second run, recommendation, third run."""

    job: str
    seed: int
    first: Outcome
    verdict: str
    policy: str | None
    threshold: float
    predicted: float
    interval: tuple[float, float]
    recommended: Outcome  # what to run with; the first policy where nothing is to be changed
    constant: Outcome  # `threshold` in any case
    # After a constant was recommended: asked again of the run under it, and run once more.
    second_verdict: str | None = None
    moved: float | None = None  # from the first constant to the second, as a factor
    second: Outcome | None = None


def run(job, policy, seed, folder):
    """One training run as a user has it, and the store it left."""
    workload = JOBS[job].make(seed)
    store = f"sqlite:///{folder}/{time.monotonic_ns()}.db"
    agent = gradwatch.Agent(
        workload.optimizer, model=workload.model, clip=policy, store=store, metrics_port=None
    )
    losses = train(workload, agent)
    agent.close()
    with Store(store) as opened:
        clipped = opened.steps(1).clipped.to_numpy()
    start, end = float(np.median(losses[:3])), float(np.mean(losses[-50:]))
    outcome = Outcome(
        clip_ratio=float(clipped[int(BURN_IN * len(clipped)) :].mean()),
        windows=in_band(clipped),
        ended=ended(workload, losses),
        diverged=not math.isfinite(end) or (workload.loss_tells and end > start),
    )
    return outcome, store


def asked(store):
    with Store(store) as opened:
        return recommend(opened, 1)


def chain(job, seed, seeds):
    """All that a user does, three times over."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        first, store = run(job, START, seed, folder)
        rec = asked(store)
        second_seed, third_seed = (seed + 1) % seeds, (seed + 2) % seeds
        offered = gradwatch.ClipNorm(rec.threshold)
        constant, store = run(job, offered, second_seed, folder)
        policy, recommended = rec.policy or START, constant
        if policy != offered:
            recommended, store = run(job, policy, second_seed, folder)
        made = Chain(
            job, seed, first, rec.verdict, rec.policy and str(rec.policy), rec.threshold,
            rec.predicted_clip_ratio, rec.interval, recommended, constant,
        )  # fmt: skip
        saves = rec.verdict == "fix_training" and policy != START
        if rec.verdict not in CONSTANTS_ARE and not saves:
            return made
        again = asked(store)
        held = again.policy or policy
        second, _ = run(job, held, third_seed, folder)
        moved = held.max_norm / policy.max_norm if again.verdict in CONSTANTS_ARE else None
        return dataclasses.replace(made, second_verdict=again.verdict, moved=moved, second=second)


def simple(job, name, seed):
    """One run under a simple method; constants are read from a run at 1.0 with another seed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        policy = POLICIES.get(name)
        if policy is None:
            _, store = run(job, START, seed, folder)
            with Store(store) as opened:
                norms = opened.steps(1).pre_norm.dropna().to_numpy()
            policy = gradwatch.ClipNorm(CONSTANTS[name](norms))
        return run(job, policy, seed + 1, folder)[0]


CONSTANTS = {
    "80th percentile": lambda norms: float(np.quantile(norms, 0.8)),
    "95th percentile × 2": lambda norms: 2 * float(np.quantile(norms, 0.95)),
}
POLICIES = {
    "fixed 1.0": START,
    "AutoClip, p = 10": gradwatch.PercentileClip(percentile=10, multiplier=1, history=10**6),
    "ZClip": gradwatch.ZClip(),
    "TargetRatio": gradwatch.TargetRatio(),
    "no clipping": gradwatch.ObserveOnly(),
}


def _task(task):
    kind, *arguments = task
    return task, (chain if kind == "chain" else simple)(*arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--only", choices=JOBS, metavar="JOB")
    kind.add_argument("--second", action="store_true", help="the second set of jobs")
    kind.add_argument("--third", action="store_true", help="the third set of jobs")
    kind.add_argument("--fourth", action="store_true", help="the fourth set of jobs")
    kind.add_argument("--tuning", action="store_true", help="the jobs that the rules come from")
    parser.add_argument("--seeds", type=int, default=5, help="of the closed loop")
    parser.add_argument("--others", type=int, default=3, help="seeds of the simple methods")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    sets = {"tuning": TUNING, "second": SECOND, "third": THIRD, "fourth": FOURTH}
    jobs = next((sets[name] for name in sets if getattr(arguments, name)), REPORTED)
    names = [arguments.only] if arguments.only else list(jobs)
    tasks = [
        ("chain", job, seed, arguments.seeds) for job in names for seed in range(arguments.seeds)
    ]
    tasks += [
        ("simple", job, method, 10 + seed)
        for job in names
        for method in (*CONSTANTS, *POLICIES)
        for seed in range(arguments.others)
    ]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        results = list(pool.imap_unordered(_task, tasks))
    chains = sorted(
        (r for t, r in results if t[0] == "chain"), key=lambda c: (names.index(c.job), c.seed)
    )
    others = [(t[1], t[2], r) for t, r in results if t[0] == "simple"]
    show(chains, others, JOBS)
    print(f"\n{len(results)} chains and runs in {(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
