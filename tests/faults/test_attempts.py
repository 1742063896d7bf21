"""Which run a recovered ring belongs to: attempts, ranks and databases."""

import time
from pathlib import Path

import pytest
import ranks
import torch
from jobs import wait_until
from kills import about_nobody, killed, query, rings

from gradwatch.recorder import Ring
from gradwatch.recovery import left_behind, recover
from gradwatch.sinks import NullSink


def test_killed_and_resumed_three_times_shows_the_last_timeline():
    """From older checkpoints, one resume dying before its predecessor's last step."""
    lengths = [(0, 1000), (600, 50), (400, 900), (1200, 300)]
    for start, count in lengths:
        killed(
            f"agent = begin(); agent.load_state_dict({{**agent.state_dict(), 'run_id': 'u', 'step': {start}}})\n"
            f"steps({count})"
        )
    recover("sqlite:///gradwatch.db")
    assert query("SELECT count(*) FROM runs") == [(1,)]
    timeline = query(
        "SELECT s.step, a.start_step FROM steps s JOIN attempts a "
        "ON a.run_id = s.run_id AND a.attempt = s.attempt ORDER BY s.step"
    )
    expected = {}
    for j, (start, count) in enumerate(lengths):
        bound = min([s for s, _ in lengths[j + 1 :]], default=10**9)
        expected.update({step: start for step in range(start, start + count) if step < bound})
    assert timeline == sorted(expected.items())
    assert query("SELECT count(*) FROM step_records") == [(sum(n for _, n in lengths),)]
    assert query("SELECT status FROM runs") == [("crashed",)]


def test_an_attempt_that_reaches_the_store_last_hides_nothing():
    """The middle one of three ran while the store could not be reached."""
    script = (
        "agent = begin()\n"
        "agent.load_state_dict({**agent.state_dict(), 'run_id': 'u', 'step': %d})\nsteps(%d)"
    )
    killed(script % (0, 100))
    recover("sqlite:///gradwatch.db")
    elsewhere = {"GRADWATCH_RING_DIR": str(Path("other").absolute())}
    Path("hidden").mkdir()
    for path in Path().glob("gradwatch.db*"):
        path.rename(Path("hidden") / path.name)
    Path("gradwatch.db").mkdir()
    killed(script % (60, 30), **elsewhere)
    Path("gradwatch.db").rmdir()
    for path in Path("hidden").iterdir():
        path.rename(path.name)
    killed(script % (80, 100))
    recover("sqlite:///gradwatch.db")
    recover("sqlite:///gradwatch.db", [Path("other").absolute()])
    assert query("SELECT attempt, position, start_step FROM attempts ORDER BY position") == [
        (1, 1.0, 0), (3, 1.5, 60), (2, 2.0, 80),
    ]  # fmt: skip
    assert query("SELECT attempt, min(step), max(step) FROM steps GROUP BY attempt") == [
        (1, 0, 59), (2, 80, 179), (3, 60, 79),
    ]  # fmt: skip
    assert query("SELECT status FROM runs") == [("crashed",)]


def test_all_ranks_of_a_job_are_recovered_as_one_run(tmp_path):
    """Steps are rank 0's; what another rank had to tell, its own loss, is there under its name."""
    Path("gradwatch.db").mkdir()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        ranks.run(ranks.killed, 2, tmp_path)
    wait_until(lambda: len(rings()) == 2)
    Path("gradwatch.db").rmdir()
    found = recover("sqlite:///gradwatch.db")
    assert sorted((one.rank, one.steps, one.problem) for one in found) == [
        (0, 5, None), (1, 0, None),
    ]  # fmt: skip
    assert query("SELECT world_size, status FROM runs") == [(2, "crashed")]
    assert query("SELECT count(*) FROM steps") == [(5,)]
    assert query("SELECT rank, step FROM events WHERE kind = 'nonfinite_loss'") == [(1, 3)]


SERVER = "postgresql+psycopg://me@h:5432/gw"


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("postgresql+psycopg://other:secret@H/gw", True),
        ("postgresql://me@h/gw?sslmode=require", True),
        ("postgresql+psycopg://me@/gw?host=h", True),
        ("postgresql+psycopg://me@/gw?host=h&port=5432", True),
        ("postgresql+psycopg://me@elsewhere:1/x?host=h&port=5432&dbname=gw", True),
        ("postgresql+psycopg://me@h:5432/gw?host=other", False),
        ("postgresql+psycopg://me@h:5432/gw?hostaddr=10.0.0.1", False),
        ("postgresql+psycopg://me@h:5432/gw?port=5433", False),
        ("postgresql+psycopg://me@h:5432/gw?dbname=other", False),
        ("postgresql+psycopg://me@h:5433/gw", False),
        ("postgresql+psycopg://me@/gw", False),
        ("sqlite:////gw", False),
    ],
)
def test_a_ring_goes_to_the_very_database_it_was_recorded_for(tmp_path, url, same):
    """By host, port and name as the driver is told them; user, driver and options may differ."""
    ring = Ring.create(tmp_path / "a.ring", about_nobody(SERVER), steps=64, events=64)
    ring.append(0, time.time(), *[1.0] * 7, 0)
    ring.close()
    left = left_behind([tmp_path], url, NullSink(), lambda *_: None, lambda *_: None)
    assert len(list(left)) == same
