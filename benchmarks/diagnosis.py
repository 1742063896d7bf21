"""What `gradwatch diagnose` finds in real runs whose fault is known, and in those that have none.

Every loop of `workloads/spoiled.py`, and healthy jobs, with three seeds. The rules look every 50
steps, as the monitor does round by round, and findings open and end as they do there.

    .venv/bin/python benchmarks/diagnosis.py
    .venv/bin/python benchmarks/diagnosis.py --only norm_drift
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import multiprocessing
import tempfile

import numpy as np
import torch
from workloads import FOURTH, JOBS, THIRD
from workloads.spoiled import SPOILED, Spoiled

import gradwatch
from gradwatch_monitor import Store
from gradwatch_monitor.diagnose import OF_THE_AGENT, signs, window_of

SEEDS = 3
EVERY = 50
HEALTHY = [
    "LSTM, adding", "char-LSTM, source text", "GPT, source text", "BiLSTM with attention, digits",
    "CNN, digits", "VAE, digits", "GRU, sunspots", "actor-critic, cart and pole",
    "logistic regression, table", "lstm_co2", "char_gru", "char_convolutions", "gpt_plain",
    "perceptron", "cnn_normed", "encoder", "autoencoder", "contrastive", "tabular",
    "calm_regression",
]  # fmt: skip
FRESH = [name for name, job in {**THIRD, **FOURTH}.items() if job.expected != "fix_training"]


@dataclasses.dataclass
class Seen:
    """What was found in one run: finding → severity, and how often findings opened."""

    job: str
    seed: int
    severity: dict[str, str]
    opened: collections.Counter[str]


def train(job, seed, store):
    if job in SPOILED:
        spoiled = SPOILED[job](seed)
    else:
        spoiled = Spoiled(JOBS[job].make(seed), gradwatch.ClipNorm(1.0))
    agent = gradwatch.Agent(
        spoiled.workload.optimizer, model=spoiled.workload.model, clip=spoiled.clip, store=store,
        scaler=spoiled.scaler, metrics_port=None, settings=gradwatch.Settings(layer_norms_every=50),
    )  # fmt: skip
    spoiled.train(agent)
    agent.close()


def until(window, length):
    """The window as it was after so many steps."""
    cut = {
        field.name: value[:length]
        for field in dataclasses.fields(window)
        if isinstance(value := getattr(window, field.name), np.ndarray)
    }
    layers = window.layers
    if layers is not None:
        past = layers.step < window.step[length - 1] + 1
        layers = dataclasses.replace(
            layers, step=layers.step[past], grad_norm=layers.grad_norm[past],
            weight_norm=layers.weight_norm[past],
        ) if past.any() else None  # fmt: skip
    return dataclasses.replace(window, layers=layers, **cut)


def look(case):
    job, seed = case
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/gradwatch.db"
        train(job, seed, store)
        with Store(store) as opened:
            window = window_of(opened, 1)
            told = [f for f in opened.findings(1) if f.finding in OF_THE_AGENT]
    seen = Seen(job, seed, {f.finding: f.severity for f in told}, collections.Counter())
    holds: set[str] = set()
    for length in range(EVERY, len(window) + 1, EVERY):
        found = signs(until(window, length), holds)
        seen.opened.update({s.finding for s in found} - holds)
        holds = {sign.finding for sign in found}
        seen.severity.update({sign.finding: sign.severity for sign in found})
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--only", choices=[*SPOILED, *HEALTHY, *FRESH], metavar="LOOP")
    kind.add_argument("--fresh", action="store_true", help="healthy jobs no rule comes from")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    jobs = (
        [arguments.only] if arguments.only else FRESH if arguments.fresh else [*SPOILED, *HEALTHY]
    )
    cases = [(job, seed) for job in jobs for seed in range(arguments.seeds)]
    with multiprocessing.Pool(2) as pool:
        runs = collections.defaultdict(list)
        for seen in pool.imap(look, cases):
            runs[seen.job].append(seen)
    spoiled = [job for job in jobs if job in SPOILED]
    print("| loop | told | what else was said |\n|---|---|---|")
    for job in spoiled:
        found = sum(job in seen.severity for seen in runs[job])
        others = collections.Counter(f for seen in runs[job] for f in seen.severity if f != job)
        said = ", ".join(f"{name} ({count})" for name, count in others.most_common())
        print(f"| {job} | {found} of {len(runs[job])} | {said} |", flush=True)
    print("\n| healthy job | critical | what was said |\n|---|---|---|")
    for job in [job for job in jobs if job not in SPOILED]:
        critical = sum("critical" in seen.severity.values() for seen in runs[job])
        counts = collections.Counter(f for seen in runs[job] for f in seen.severity)
        said = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
        print(f"| {job} | {critical} of {len(runs[job])} | {said} |")
    every = [seen for job in jobs for seen in runs[job]]
    told = [job in seen.severity for job in spoiled for seen in runs[job]]
    healthy = [seen for seen in every if seen.job not in SPOILED]
    again = sum(count - 1 for seen in every for count in seen.opened.values())
    critical = sum("critical" in seen.severity.values() for seen in healthy)
    print(f"\nrecall {np.mean(told) if told else 1.0:.2f} over {len(told)} runs; critical findings on "
          f"{critical} of {len(healthy)} healthy runs; findings that opened twice or more: {again}")  # fmt: skip


if __name__ == "__main__":
    main()
