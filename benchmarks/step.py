"""A watched step against `clip_grad_norm_` + `step`: alternating calls in one process.

Everything is on: ring, worker, SQLite, exporter, and a process that scrapes it every second. The
gradients are written anew before every call, and all threads put to work, outside the time taken.
Prints medians and their ratio; the ratio is what can be compared from machine to machine. The floor
is what no monitoring that reads the gradients can go below: one read of them and the bare step.

    make bench
    .venv/bin/python benchmarks/step.py --rounds 0.2     # a fifth of the rounds, for a quick look
    .venv/bin/python benchmarks/step.py --device cuda
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from pace import Work
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import gradwatch
from gradwatch.norms import Meter
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


class Job:
    """One model with one optimizer, on which the ways of taking a step take turns.

    They share weights, state and gradients, as they would share the caches of a job; the hooks are
    taken off for the turns of others.
    """

    def __init__(self, make_model, make_optimizer, device, store, max_norm):
        torch.manual_seed(0)
        model = make_model().to(device)
        self.max_norm, self.device = max_norm, device
        self.params = list(model.parameters())
        self.optimizer = make_optimizer(self.params)
        self.gradients = [torch.randn_like(p) for p in self.params]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.agent = gradwatch.Agent(
            self.optimizer, model=model, clip=gradwatch.ClipNorm(max_norm), store=store
        )
        before, after = (
            self.optimizer._optimizer_step_pre_hooks,
            self.optimizer._optimizer_step_post_hooks,
        )
        self._on = [(before, dict(before)), (after, dict(after))]
        self._meter, self._backward = Meter(), Work()
        self._divisor = torch.full((), 2.0, device=device)

    def alone(self):
        """The step, and nothing else."""
        self.optimizer.step()

    def torch(self):
        """What people do: `clip_grad_norm_` + `step`."""
        nn.utils.clip_grad_norm_(self.params, self.max_norm)
        self.optimizer.step()

    def floor(self):
        """One read of the gradients, and the step; clipping left to the kernel where it can."""
        self._meter.measure(self.params, [p.grad for p in self.params])
        self.optimizer.step()

    watched = alone  # by the hooks

    def times(self, rounds):
        """Median microseconds of each way. Ten rounds to warm up; the order turns."""
        taken = {"alone": [], "torch": [], "floor": [], "watched": []}
        ways = list(taken)
        for i in range(rounds + 10):
            for way in ways[i % 4 :] + ways[: i % 4]:
                taken[way].append(self._timed(way))
        assert self.agent.flush(30), "not all records were stored"
        self.agent.close()
        return {way: median(times[10:]) / 1e3 for way, times in taken.items()}

    def _timed(self, way):
        for hooks, ours in self._on:
            hooks.update(ours) if way == "watched" else hooks.clear()
        folds = way == "floor" and self.max_norm < 1e9 and self.agent._hooks.folds
        if folds:
            self.optimizer.grad_scale = self._divisor
        for p, g in zip(self.params, self.gradients, strict=True):
            p.grad.copy_(g)
        # A job's backward pass has just had all threads at work: none has to be woken up.
        self._backward.until(0.0)
        if self.device != "cpu":
            torch.cuda.synchronize()
        step = getattr(self, way)
        began = time.perf_counter_ns()
        step()
        if self.device != "cpu":
            torch.cuda.synchronize()
        took = time.perf_counter_ns() - began
        if folds:
            del self.optimizer.grad_scale
        return took


def row(times):
    """One line's cells: microseconds, then the ratios to torch's."""
    alone, torchs, floor, watched = times.values()
    return [
        *(f"{value:,.0f}" for value in (alone, torchs, watched)),
        f"{watched / torchs:.2f}",
        f"{floor / torchs:.2f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=float, default=1.0, help="times the usual rounds")
    parser.add_argument("--model", choices=MODELS, help="only this one")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
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
    for heading in ("optimizer", "model", "parameters", "clipped"):
        table.add_column(heading)
    for heading in ("step alone", "torch", "watched", "watched / torch", "floor / torch"):
        table.add_column(heading, justify="right")
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
                    if arguments.model not in {None, name}:
                        continue
                    if name == "transformer, large" and optimizer != "AdamW, fused":
                        continue
                    count = max(20, int(rounds * arguments.rounds))
                    for clipped, limit in (("no step", 1e9), ("every step", 1.0)):
                        job = Job(make_model, make_optimizer, arguments.device, store, limit)
                        size = sum(p.numel() for p in job.params) / 1e6
                        cells = row(job.times(count))
                        table.add_row(optimizer, name, f"{size:.2f} M", clipped, *cells)
        finally:
            scraper.terminate()
            scraper.wait()
    console.print(table)


if __name__ == "__main__":
    main()
