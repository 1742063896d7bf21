"""PostgreSQL with many writers: one schema, and a partition for every day."""

import math
import subprocess
import sys
import threading

import numpy as np
from stores import batch

from gradwatch.sinks.database import DatabaseSink
from gradwatch.testing import run_info

WRITER = """
import sys, torch, gradwatch
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.ones(10))
optimizer = torch.optim.SGD([weight], lr=0.1)
agent = gradwatch.Agent(optimizer, store=sys.argv[1], run="same")
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    weight.grad = torch.full((10,), float(i + 1))
    optimizer.step()
assert agent.flush(30)
print("stored", flush=True)
sys.stdin.readline()
"""


def test_four_processes_write_one_new_store(url, query):
    """Started at once on an empty database: every step once, each run its own name."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, url], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    for word in ("ready\n", "stored\n"):
        for process in processes:
            assert process.stdout.readline() == word
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
    for process in processes:
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
        assert not told
    rows = query("SELECT name, status, count(*) FROM runs JOIN steps ON run_id = id GROUP BY 1, 2")
    assert sorted(rows) == [(n, "finished", 300) for n in ("same", "same-2", "same-3", "same-4")]


# -- days --------------------------------------------------------------------------------------


def test_every_day_has_its_partition(url, query):
    """A batch over midnights makes what it needs; what no clock can say goes to the outer ones."""
    sink = DatabaseSink(url)
    run = sink.open(run_info())
    midnight = 1_700_006_400.0  # 2023-11-15
    absurd = [0.0, -5.0, 1e300, math.inf, math.nan, 4_102_444_800.0, 1_577_836_799.9]
    times = [midnight - 0.001, midnight, midnight + 86_399.9, midnight + 86_400, *absurd]
    sink.write(run, batch(0, len(times), time=times))
    found = dict(query("SELECT tableoid::regclass::text, count(*) FROM step_records GROUP BY 1"))
    assert found == {
        "step_records_20231114": 1,
        "step_records_20231115": 2,
        "step_records_20231116": 1,
        "step_records_before": 5,  # 0, −5, inf and NaN, which are no time, and the end of 2019
        "step_records_after": 2,
    }
    assert query("SELECT count(*) FROM steps") == [(len(times),)]
    sink.dispose()


def test_a_day_that_was_dropped_is_made_again(url, query):
    """Somebody drops a partition under a live run: a late record of that day is stored all the same."""
    sink = DatabaseSink(url)
    run = sink.open(run_info())
    sink.write(run, batch(0, 3))
    query("DROP TABLE step_records_20231114")
    sink.write(run, batch(3, 3))
    sink.write(run, batch(6, 1000))
    query("ALTER TABLE step_records DETACH PARTITION step_records_20231114")
    sink.write(run, batch(1006, 3))
    assert query("SELECT count(*) FROM steps") == [(1006,)]
    sink.dispose()


def test_many_make_one_day_at_once(postgres_server, url, query):
    """Twelve connections at one midnight: one partition, no error, every record once."""
    first = DatabaseSink(url)
    first.open(run_info(ring="ring-0", uid="0"))
    barrier = threading.Barrier(12)
    failures = []

    def write(n):
        sink = DatabaseSink(url)
        run = sink.open(run_info(ring=f"ring-{n}", uid=str(n)))
        barrier.wait()
        try:
            sink.write(run, batch(0, 20, time=1.7e9 + 86_400 * np.arange(20)))
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)
        sink.dispose()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.dispose()
    assert failures == []
    assert query("SELECT count(*), count(DISTINCT tableoid) FROM step_records") == [(240, 20)]


def test_a_new_day_waits_for_no_reader(postgres_server, url):
    """A reader in the middle of a long look holds up no new partition, nor the other way round."""
    sink = DatabaseSink(url)
    run = sink.open(run_info())
    sink.write(run, batch(0, 3))
    with postgres_server.connect(url.rpartition("/")[2]) as reader, reader.transaction():
        reader.execute("SELECT count(*) FROM steps")
        reader.execute("SET LOCAL lock_timeout TO '1s'")
        sink.write(run, batch(3, 3, time=1.8e9))
        held = reader.execute(
            "SELECT count(*) FROM pg_locks WHERE relation = 'step_records'::regclass "
            "AND mode = 'AccessExclusiveLock'"
        ).fetchone()
        assert held == (0,)
        assert reader.execute("SELECT count(*) FROM steps").fetchone() == (6,)
    sink.dispose()


# -- a server that goes away -------------------------------------------------------------------
