"""What a fault of the store costs the training: the slowest steps with and without it, in turns.

Run as root, which may mount the small disk that is filled.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from pace import Work

import gradwatch

ROUNDS, STEPS, PACE_SECONDS = 5, 1500, 0.001


@contextlib.contextmanager
def locked(store):
    connection = sqlite3.connect(store, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield
    connection.execute("COMMIT")
    connection.close()


@contextlib.contextmanager
def disk_full(store):
    filler = store.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    yield
    filler.unlink()


@contextlib.contextmanager
def folder_gone(store):
    shutil.rmtree(store.parent)
    store.parent.write_text("")
    yield
    store.parent.unlink()


@contextlib.contextmanager
def written_over(store):
    with store.open("r+b") as file:
        file.write(b"a text\n" * 2000)
        file.truncate()
    yield
    store.unlink()


FAULTS = {
    "locked by another": locked,
    "disk full": disk_full,
    "folder gone": folder_gone,
    "file written over": written_over,
}


class Loop:
    """A small model's training, whose steps are timed."""

    def __init__(self, store):
        self.work, self.taken = Work(), 0
        model = torch.nn.LSTM(16, 64, 2)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.parameters = list(model.parameters())
        self.agent = gradwatch.Agent(self.optimizer, model=model, store=str(store))

    def steps(self, count):
        """Milliseconds of each."""
        found = []
        for _ in range(count):
            for p in self.parameters:
                p.grad = torch.full_like(p, 0.01)
            self.work.until(time.perf_counter() + PACE_SECONDS)
            before = time.perf_counter()
            self.optimizer.step()
            found.append((time.perf_counter() - before) * 1e3)
        self.taken += count
        return found


class Warnings(logging.Handler):
    """Counts what the user is told."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, _record):
        self.count += 1


def measure(fault, folder, told):
    store = folder / "store" / "runs.db"
    store.parent.mkdir()
    loop = Loop(store)
    loop.steps(200)
    taken = {False: [], True: []}
    before = told.count
    for _ in range(ROUNDS):
        assert loop.agent.flush(60)
        taken[False] += loop.steps(STEPS)
        assert loop.agent.flush(60)
        with fault(store):
            taken[True] += loop.steps(STEPS)
        assert loop.agent.flush(60)
    loop.agent.close()
    with contextlib.closing(sqlite3.connect(store)) as connection:
        ((stored,),) = connection.execute("SELECT count(*) FROM steps")
    return taken, told.count - before, stored, loop.taken - stored


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    globals()["ROUNDS"] = parser.parse_args().rounds
    torch.set_num_threads(1)
    os.environ["GRADWATCH_METRICS_PORT"] = "off"
    told = Warnings()
    logging.getLogger("gradwatch").addHandler(told)
    logging.getLogger("gradwatch").propagate = False
    print(f"{ROUNDS} rounds of {STEPS} steps without the fault, then as many with it; ms a step\n")
    print(f"{'fault':<20}{'slowest':>17}{'2nd':>15}{'median':>17}  told  stored  lost")
    for name, fault in FAULTS.items():
        folder = Path(tempfile.mkdtemp())
        mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
        if name == "disk full" and subprocess.run(mount, check=False).returncode:
            print(f"{name:<20} needs the right to mount a disk")
            continue
        taken, warnings, stored, lost = measure(fault, folder, told)
        calm, under = (sorted(taken[key]) for key in (False, True))
        pairs = [(calm[-1], under[-1]), (calm[-2], under[-2])]
        pairs.append((calm[len(calm) // 2], under[len(under) // 2]))
        shown = "".join(f"{a:>9.2f}{b:>8.2f}" for a, b in pairs)
        print(f"{name:<20}{shown}{warnings:>6}{stored:>8}{lost:>6}", flush=True)
        if name == "disk full":
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
