"""How long it takes to store a full flight recorder that a killed job left.

.venv/bin/python benchmarks/recovery.py
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gradwatch.config import Settings
from gradwatch.recovery import recover

# The job: a store that cannot be reached, a ring of the default size filled to the brim.
JOB = """
import os, signal, torch, gradwatch
os.mkdir("gradwatch.db")
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.0)
agent = gradwatch.Agent(optimizer, metrics_port=None)
weight.grad = torch.ones(1)
optimizer.step()
ring = agent._recording.channel.ring
for step in range(1, ring.step_capacity):
    ring.append(step, 1.7e9 + step, step, 0.5, 1e-3, 2.0 + step % 7, 1.0, 1.0, float("nan"), 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def once() -> tuple[int, float]:
    """One killed job: (steps stored, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [sys.executable, "-c", JOB], cwd=folder, check=False, capture_output=True
        )
        if ended.returncode != -signal.SIGKILL:
            sys.exit("the job did not come to its end")
        Path(folder, "gradwatch.db").rmdir()
        before = time.perf_counter()
        found = recover(f"sqlite:///{folder}/gradwatch.db")
        seconds = time.perf_counter() - before
        if [one.problem for one in found] != [None]:
            sys.exit(f"not recovered: {found}")
        return found[0].steps, seconds


def main() -> None:
    """Print the row."""
    os.environ["GRADWATCH_METRICS_PORT"] = "off"
    measured = [once() for _ in range(5)]
    steps = {count for count, _ in measured}
    seconds = statistics.median(taken for _, taken in measured)
    if steps != {Settings().ring_steps}:
        sys.exit(f"a full ring holds {Settings().ring_steps}; {steps} were stored")
    print("| measure | figure |")
    print("|---|---|")
    print(f"| recovering a full ring ({max(steps):,} steps) into SQLite | {seconds:.2f} s |")


if __name__ == "__main__":
    main()
