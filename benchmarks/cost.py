"""What monitoring costs beside the step: recording, layer norms, import, memory.

.venv/bin/python benchmarks/cost.py
"""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from pace import Work
from rich.console import Console
from torch import nn

import gradwatch
from gradwatch.recorder import Ring
from gradwatch_dashboards.demo import BiLSTMWithAttention

RECORD = (0, 1.7e9, 5.0, 0.3, 1e-3, 2.5, 1.0, 1.0, float("nan"), 1)
IMPORTS = """
import json, sys, time
import torch
began = time.perf_counter()
import gradwatch
gradwatch.wrap
took = time.perf_counter() - began
heavy = {"streamlit", "pandas", "alembic", "altair", "matplotlib", "grafana_client", "sqlalchemy"}
print(json.dumps([took, sorted(heavy & set(sys.modules))]))
"""


def recording(folder):
    """Nanoseconds of `ring.append`, in a tight loop and at 1,000 a second; the loop's own out."""
    ring = Ring.create(folder / "a.ring", {}, steps=131_072, events=64)
    clock = time.perf_counter_ns

    def nothing(*fields):
        pass

    def tight(call):
        times = []
        for _ in range(200_000):
            began = clock()
            call(*RECORD)
            times.append(clock() - began)
        return median(times)

    def paced(call):
        times = []
        work = Work()
        for _ in range(3000):
            work.until(time.perf_counter() + 0.001)
            began = clock()
            call(*RECORD)
            times.append(clock() - began)
        return median(times)

    result = {how.__name__: how(ring.append) - how(nothing) for how in (tight, paced)}
    ring.close(remove=True)
    return result


def layer_norms(store):
    """A watched step with a sample of all layer norms every step against one with none."""
    torch.manual_seed(0)
    model = BiLSTMWithAttention(hidden=130)
    sides = []
    for every in (1, 0):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-5, fused=True)
        settings = gradwatch.Settings(layer_norms_every=every, store=store, metrics_port="off")
        agent = gradwatch.Agent(optimizer, model=twin, settings=settings)
        sides.append((twin, optimizer, agent, []))
    backward = Work()
    for i in range(1500):
        for twin, optimizer, _, times in sides[:: 1 if i % 2 else -1]:
            for p in twin.parameters():
                p.grad = torch.full_like(p, 0.01)
            backward.until(0.0)
            began = time.perf_counter_ns()
            optimizer.step()
            times.append(time.perf_counter_ns() - began)
    for _, _, agent, _ in sides:
        agent.close()
    on, off = (median(times[100:]) for *_, times in sides)
    return on / off


def imports():
    """Seconds of `import gradwatch` after `import torch`, the median of nine; heavy modules."""
    found = [
        json.loads(subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, check=True,
                                  text=True).stdout)
        for _ in range(9)
    ]  # fmt: skip
    return median(took for took, _ in found), found[0][1]


def memory(store, steps):
    """Resident megabytes at a tenth of the steps and after all of them."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.0, fused=True)
    settings = gradwatch.Settings(ring_steps=16_384, store=store, metrics_port="off")
    agent = gradwatch.Agent(optimizer, settings=settings)
    weight.grad = torch.ones(4)
    sizes = []
    for step in range(1, steps + 1):
        agent.log(loss=1.0)
        optimizer.step()
        if step in {steps // 10, steps}:
            assert agent.flush(60)
            sizes.append(_resident())
    agent.close()
    return sizes


def _resident():
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main():
    torch.set_num_threads(2)
    console = Console(width=120, highlight=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = recording(folder)
        console.print(f"recording, tight loop: {found['tight'] / 1e3:.2f} µs a step, median")
        console.print(f"recording, at 1,000 a second: {found['paced'] / 1e3:.2f} µs a step, median")
        ratio = layer_norms(f"{folder}/layers.db")
        console.print(f"layer norms every step / never: {ratio:.2f}")
        seconds, heavy = imports()
        console.print(f"import gradwatch after torch: {seconds:.3f} s; heavy modules: {heavy}")
        early, late = memory(f"{folder}/memory.db", 1_000_000)
        console.print(f"memory: {early:.1f} MB after 1e5 steps, {late:.1f} MB after 1e6")


if __name__ == "__main__":
    main()
