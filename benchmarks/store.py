"""What the stores take: one fast job into SQLite, a thousand runs into PostgreSQL, bytes a step.

.venv/bin/python benchmarks/store.py [--seconds 60] [--runs 1000]

All through the real path: flight recorder, worker, sink. PostgreSQL's programs are found as the
tests find them; how late a record is comes from the server's own commit timestamps.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import sqlite3
import sys
import tempfile
import time
import uuid
from pathlib import Path

from rich.console import Console

from gradwatch.channel import Channel
from gradwatch.config import Settings
from gradwatch.pipeline import Pipeline
from gradwatch.recorder import Ring
from gradwatch.sinks import NullSink
from gradwatch.testing import run_info

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


SLOTS = 20  # in a tenth of a second: the runs' steps are spread over them


def attach(pipeline, url, folder, name, steps):
    """A channel as `wrap` makes it, with a ring file of its own; its ring."""
    ring_id = uuid.uuid4().hex
    info = {"uid": uuid.uuid4().hex, "name": name, "ring": ring_id, "started_at": time.time(),
            "pid": os.getpid()}  # fmt: skip
    info = run_info(**info)
    ring = Ring.create(folder / f"{ring_id}.ring", {}, steps=steps, events=64)
    channel = Channel(info, ring, pipeline.store_sink(url), NullSink(), parameters=list)
    pipeline.attach(channel, Settings(store=url))
    return channel


def record(ring, step, pick):
    norm = pick.lognormvariate(0, 0.5)
    ring.append(step, time.time(), time.monotonic(), 1 / (1 + step), 1e-3, norm, min(norm, 1.0),
                1.0, math.nan, int(norm > 1))  # fmt: skip


def one_job(folder, seconds, pace):
    """Rows for one run at `pace` records a second into SQLite."""
    url = f"sqlite:///{folder}/one.db"
    pipeline = Pipeline()
    channel = attach(pipeline, url, folder, "one", 131_072)
    pick = random.Random(0)
    began = time.perf_counter()
    step, worst = 0, 0
    while (now := time.perf_counter()) < began + seconds:
        while step < (now - began) * pace:
            record(channel.ring, step, pick)
            step += 1
        worst = max(worst, channel.backlog())
        time.sleep(0.002)
    took = time.perf_counter() - began
    assert pipeline.flush(channel, 60)
    caught_up = time.perf_counter() - began - took
    pipeline.close(channel, "finished", 30)
    pipeline.shutdown("finished", 30)
    with sqlite3.connect(f"{folder}/one.db") as connection:
        ((stored,),) = connection.execute("SELECT count(*) FROM steps")
    connection.close()
    size = Path(f"{folder}/one.db").stat().st_size
    return [
        (
            f"SQLite, one job: {step / took:,.0f} records/s for {took:.0f} s: {stored:,} of {step:,} "
            f"stored, greatest backlog {worst:,} of 131,072, caught up in {caught_up:.2f} s"
        ),
        f"SQLite: {size / stored:.1f} bytes a step, all files and tables",
    ]


def fleet(url, folder, runs, seconds, gate, told):
    """One process with many runs of ten steps a second."""
    pipeline = Pipeline()
    channels = [attach(pipeline, url, folder, f"run-{os.getpid()}-{i}", 4096) for i in range(runs)]
    for channel in channels:  # registered before it begins, as jobs that started at other times are
        while not channel.store.run:
            time.sleep(0.05)
    told.put("ready")
    gate.wait()
    before = time.process_time()
    pick = random.Random(os.getpid())
    slots = [[channel.ring for channel in channels[i::SLOTS]] for i in range(SLOTS)]
    began = time.monotonic()
    for slot in range(int(seconds * 10) * SLOTS):
        pause = began + slot * 0.1 / SLOTS - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        for ring in slots[slot % SLOTS]:
            record(ring, slot // SLOTS, pick)
    cpu = time.process_time() - before
    stored = all(pipeline.flush(channel, 30) for channel in channels)
    told.put(
        (stored, int(seconds * 10) * runs, sum(sum(c.dropped().values()) for c in channels), cpu)
    )
    pipeline.shutdown("finished", 120)


def many_jobs(folder, runs, seconds, processes):
    """Rows for a fleet into a PostgreSQL on this machine."""
    import postgres

    server = postgres.PostgresServer(postgres.find_program("initdb"))
    server.start(track_commit_timestamp="on", fsync="on", max_wal_size="4GB")
    url = server.new_database()
    try:
        context = multiprocessing.get_context("spawn")
        gate, told = context.Event(), context.Queue()
        jobs = [
            context.Process(
                target=fleet, args=(url, folder, runs // processes, seconds, gate, told)
            )
            for _ in range(processes)
        ]
        for job in jobs:
            job.start()
        for _ in jobs:
            assert told.get(timeout=300) == "ready"
        gate.set()
        ends = [told.get(timeout=seconds + 300) for _ in jobs]
        for job in jobs:
            job.join(200)
        return list(rows_of_fleet(server, url, ends, runs, seconds))
    finally:
        server.remove()


def rows_of_fleet(server, url, ends, runs, seconds):
    written = sum(count for _, count, _, _ in ends)
    ((stored,),) = server.query(url, "SELECT count(*) FROM steps")
    late = "extract(epoch FROM pg_xact_commit_timestamp(xmin)) - time"
    days = server.query(
        url, "SELECT inhrelid::regclass::text FROM pg_inherits "
        "WHERE inhparent = 'step_records'::regclass",
    )  # fmt: skip
    union = " UNION ALL ".join(f"SELECT {late} AS late FROM {day}" for (day,) in days)
    ((p50, p99, worst),) = server.query(
        url,
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY late), "
        f"percentile_cont(0.99) WITHIN GROUP (ORDER BY late), max(late) FROM ({union}) all_days",
    )
    ((size,),) = server.query(
        url, "SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits "
        "WHERE inhparent = 'step_records'::regclass",
    )  # fmt: skip
    cpu = sum(used for *_, used in ends)
    yield (
        f"PostgreSQL, {runs:,} runs × 10 steps/s for {seconds:.0f} s from {len(ends)} processes: "
        f"{stored:,} of {written:,} stored ({'none' if all(e[0] for e in ends) else 'some'} late "
        f"at the end, {sum(e[2] for e in ends)} dropped); from record to commit: median "
        f"{p50:.2f} s, 99 % within {p99:.2f} s, worst {worst:.2f} s; the processes' own CPU: "
        f"{cpu / seconds:.2f} cores"
    )
    yield f"PostgreSQL: {float(size) / stored:.1f} bytes a step, table and key"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--pace", type=float, default=60_000.0)
    parser.add_argument("--only", choices=["sqlite", "postgres"])
    chosen = parser.parse_args()
    out = Console(soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as name:
        if chosen.only != "postgres":
            for row in one_job(Path(name), min(chosen.seconds, 30.0), chosen.pace):
                out.print(row)
        if chosen.only != "sqlite":
            for row in many_jobs(Path(name), chosen.runs, chosen.seconds, chosen.processes):
                out.print(row)


if __name__ == "__main__":
    main()
