"""A watched step against `clip_grad_norm_` + `step`: alternating calls in one process.

Everything is on: ring, worker, SQLite, exporter, and a process that scrapes it every second. The
gradients are written anew before every call, outside the time taken. Prints medians and their
ratio; the ratio is what can be compared from machine to machine.

    make bench
    .venv/bin/python benchmarks/step.py --rounds 0.2     # a fifth of the rounds, for a quick look
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import gradwatch
from gradwatch_dashboards.demo import BiLSTMWithAttention

THREADS = 2
MODELS = {
    "LSTM": (lambda: nn.ModuleList([nn.LSTM(8, 68, 2), nn.Linear(68, 10)]), 4000),
    "BiLSTM": (lambda: BiLSTMWithAttention(hidden=130), 1500),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True),
            8,
            enable_nested_tensor=False,
        ),
        60,
    ),
    "transformer, large": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True),
            8,
            enable_nested_tensor=False,
        ),
        20,
    ),
}
OPTIMIZERS = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-5),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9, fused=True),
}
SCRAPER = """
import sys, time, urllib.request
while True:
    urllib.request.urlopen(sys.argv[1]).read()
    time.sleep(1)
"""


class Contestant:
    """A model with its optimizer and a way to take a step."""

    def __init__(self, model, make_optimizer):
        self.model = copy.deepcopy(model)
        self.params = list(self.model.parameters())
        self.optimizer = make_optimizer(self.params)
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.times = []

    def step(self):
        self.optimizer.step()

    def timed(self, gradients):
        for p, g in zip(self.params, gradients, strict=True):
            p.grad.copy_(g)
        began = time.perf_counter_ns()
        self.step()
        self.times.append(time.perf_counter_ns() - began)


class Torch(Contestant):
    """`clip_grad_norm_` + `step`, unwatched."""

    def __init__(self, model, make_optimizer, max_norm):
        super().__init__(model, make_optimizer)
        self.max_norm = max_norm

    def step(self):
        nn.utils.clip_grad_norm_(self.params, self.max_norm)
        self.optimizer.step()


class Watched(Contestant):
    """The same optimizer, wrapped."""

    def __init__(self, model, make_optimizer, max_norm, store):
        super().__init__(model, make_optimizer)
        self.agent = gradwatch.Agent(
            self.optimizer, model=self.model, clip=gradwatch.ClipNorm(max_norm), store=store
        )


def compare(make_model, make_optimizer, rounds, store):
    """Median microseconds of each way, clipping and not, and of a step that does neither."""
    torch.manual_seed(0)
    model = make_model()
    bare = Contestant(model, make_optimizer)
    pairs = {
        kind: (Torch(model, make_optimizer, limit), Watched(model, make_optimizer, limit, store))
        for kind, limit in (("unclipped", 1e9), ("clipped", 1.0))
    }
    everyone = [bare, *itertools.chain(*pairs.values())]
    gradients = [torch.randn_like(p) for p in bare.params]
    # Ten rounds to warm up; the order turns, so that nobody always follows the same other.
    for i in range(rounds + 10):
        for contestant in everyone[i % 5 :] + everyone[: i % 5]:
            contestant.timed(gradients)
    for _, watched in pairs.values():
        assert watched.agent.flush(30), "not all records were stored"
        watched.agent.close()
    taken = {kind: tuple(median(c.times[10:]) / 1e3 for c in pair) for kind, pair in pairs.items()}
    return median(bare.times[10:]) / 1e3, taken, sum(p.numel() for p in bare.params)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=float, default=1.0, help="times the usual rounds")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="only this one")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    console = Console(width=140, highlight=False)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"gradwatch {gradwatch.__version__}"
    )
    table = Table(title="microseconds a step, medians of alternating calls", box=box.MARKDOWN)
    for heading in ("optimizer", "model", "parameters"):
        table.add_column(heading)
    table.add_column("step alone", justify="right")
    for kind in ("unclipped", "clipped"):
        table.add_column(f"torch, {kind}", justify="right")
        table.add_column("watched", justify="right")
        table.add_column("ratio", justify="right")
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/bench.db"
        keeper = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        agent = gradwatch.Agent(keeper, store=store, run="keeps the exporter")
        scraper = subprocess.Popen([sys.executable, "-c", SCRAPER, agent.metrics_url])
        try:
            for optimizer, make_optimizer in OPTIMIZERS.items():
                if arguments.optimizer not in {None, optimizer}:
                    continue
                for name, (make_model, rounds) in MODELS.items():
                    if name == "transformer, large" and optimizer != "AdamW, fused":
                        continue
                    count = max(20, int(rounds * arguments.rounds))
                    alone, taken, size = compare(make_model, make_optimizer, count, store)
                    cells = [optimizer, name, f"{size / 1e6:.2f} M", f"{alone:,.0f}"]
                    for torchs, ours in taken.values():
                        cells += [f"{torchs:,.0f}", f"{ours:,.0f}", f"{ours / torchs:.2f}"]
                    table.add_row(*cells)
        finally:
            scraper.terminate()
            scraper.wait()
    console.print(table)


if __name__ == "__main__":
    main()
