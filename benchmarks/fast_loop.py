"""A job whose steps are very fast: how many of them reach the store, with the loop in the same process.

A wrapped optimizer of one small parameter is stepped at a stated rate, by the clock: after each burst
the loop waits until the rate is met, as a loop that is bound by something else does. Worker, SQLite, exporter and
the flight recorder are those of every job. Prints the steps that were taken, stored and lost, the
seconds that `close()` took, and the processor time of the process.

    .venv/bin/python benchmarks/fast_loop.py                        # 20,000 steps a second for 30 s
    .venv/bin/python benchmarks/fast_loop.py --rate 20000 --seconds 300
    .venv/bin/python benchmarks/fast_loop.py --rate 0               # as fast as it goes
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from pathlib import Path

import torch

import gradwatch

BURST = 20


def main() -> None:
    """Take steps, end the run, and count what the store holds with plain SQL."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=20_000, help="steps a second; 0: no limit")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument(
        "--store", default=None, help="default: an SQLite file in a temporary folder"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fast.db"
        weight = torch.nn.Parameter(torch.ones(8))
        optimizer = torch.optim.SGD([weight], lr=1e-6, fused=True)
        weight.grad = torch.ones(8)
        agent = gradwatch.Agent(optimizer, store=given.store or str(path), metrics_port=0)
        began, processor = time.perf_counter(), time.process_time()
        taken = 0
        while (passed := time.perf_counter() - began) < given.seconds:
            if given.rate and taken > given.rate * passed:
                time.sleep(BURST / given.rate / 2)
                continue
            for _ in range(BURST):
                optimizer.step()
            taken += BURST
        lasted = time.perf_counter() - began
        ended = time.perf_counter()
        agent.close()
        closing = time.perf_counter() - ended
        dropped = agent._recording.channel.dropped() if agent._recording.channel else {}
        print(f"taken    {taken:>12,} in {lasted:.1f} s: {taken / lasted:,.0f} a second")
        if given.store is None:
            with sqlite3.connect(path) as store:
                (stored,) = store.execute("SELECT count(*) FROM steps").fetchone()
            print(f"stored   {stored:>12,}, {100 * stored / taken:.2f} %")
        print(f"lost     {sum(dropped.values()):>12,} {dropped or ''}")
        print(f"close()  {closing:>12.2f} s")
        print(f"process  {time.process_time() - processor:>12.1f} s of processor time")


if __name__ == "__main__":
    main()
