"""What readers wait for as a run grows: recommend, the what-if curve, the run page, show.

.venv/bin/python benchmarks/long_run.py [--steps 10000 100000 1000000 10000000] [--only sqlite]

One run grows through the sink, batch by batch as the worker hands them over; at each length the
store is opened anew and asked. PostgreSQL's programs are found as the tests find them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from gradwatch.recorder import FLAGS, STEP_DTYPE
from gradwatch.records import Batch
from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import run_info
from gradwatch_monitor import Store, recommend, views

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

BATCH = 20_000
START = 1_700_000_000.0
PACE = 100.0  # steps a second, by their own times: ten million are a bit more than a day
out = Console(soft_wrap=True, highlight=False)


def batch(first, count, pick):
    """Steps of a run whose norms drift and are clipped at 1.0 about a fifth of the time."""
    steps = np.zeros(count, STEP_DTYPE)
    at = np.arange(first, first + count)
    norms = pick.lognormal(-0.45 + 0.1 * np.sin(at / 50_000), 0.5, count)
    steps["step"], steps["time"] = at, START + at / PACE
    steps["loss"], steps["lr"] = 2.0 + pick.normal(0, 0.1, count), 1e-3
    steps["pre_norm"], steps["post_norm"] = norms, np.minimum(norms, 1.0)
    steps["threshold"], steps["loss_scale"] = 1.0, np.nan
    steps["flags"] = np.where(norms > 1.0, FLAGS.CLIPPED, 0)
    return Batch(steps, (), (), (), (first, 0), (first + count, 0), {})


def what_if(store):
    timeline = views.Timeline(1)
    timeline.refresh(store)
    return views.what_if_curve(timeline)


def page(store):
    """All data that the run page draws, read anew."""
    timeline = views.Timeline(1)
    timeline.refresh(store)
    store.summary(1)
    views.norms_chart(timeline)
    views.clip_ratio(timeline, 100)
    views.loss_chart(timeline)
    views.what_if_curve(timeline)
    views.events_table(store, 1)


READS = {
    "recommend": lambda store: recommend(store, 1),
    "what-if curve": what_if,
    "show": lambda store: store.summary(1),
    "run page": page,
}


def seconds(url, read, rounds):
    """The median over some rounds, the opening of the store included."""
    taken = []
    for _ in range(rounds):
        before = time.perf_counter()
        with Store(url) as store:
            read(store)
        taken.append(time.perf_counter() - before)
    return statistics.median(taken)


def grow(kind, url, lengths, rounds):
    """Rows for one store."""
    sink, pick, done = DatabaseSink(url, lambda: START), np.random.default_rng(0), 0
    # By SGD: the optimizer whose runs cost a recommendation the most.
    run = sink.open(run_info(name="long", ring="long", settings={"optimizer": "SGD"}))
    writing = 0.0
    for length in lengths:
        while done < length:
            news = batch(done, min(BATCH, length - done), pick)
            before = time.perf_counter()
            sink.write(run, news)
            writing += time.perf_counter() - before
            done += len(news.steps)
        times = [f"{1000 * seconds(url, read, rounds):,.0f} ms" for read in READS.values()]
        out.print("| " + " | ".join([kind, f"{length:,}", *times]) + " |")
    sink.close(run, "finished")
    return f"{kind}: {done / writing:,.0f} records a second through the sink"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["sqlite", "postgres"])
    chosen = parser.parse_args()
    notes = []
    out.print("| store | steps | " + " | ".join(READS) + " |")
    out.print("|---|---|" + "---|" * len(READS))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if chosen.only != "postgres":
            file = Path(folder, "long.db")
            notes.append(grow("SQLite", f"sqlite:///{file}", chosen.steps, chosen.rounds))
            notes.append(f"SQLite: {file.stat().st_size / max(chosen.steps):.1f} bytes a step")
        if chosen.only != "sqlite":
            import postgres

            server = postgres.PostgresServer(postgres.find_program("initdb"))
            stack.callback(server.remove)
            server.start(max_wal_size="4GB")
            url = server.new_database()
            notes.append(grow("PostgreSQL", url, chosen.steps, chosen.rounds))
    for note in notes:
        out.print(note)


if __name__ == "__main__":
    main()
