"""`gradwatch apply` on a job that is really running."""

import dataclasses
import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from live import live
from stores import write_run

import gradwatch_monitor
from gradwatch import ClipNorm, TargetRatio
from gradwatch_monitor import Store, recommend
from gradwatch_monitor.applying import Stated, applied


def requests():
    with sqlite3.connect("gradwatch.db") as connection:
        return connection.execute("SELECT * FROM threshold_changes").fetchall()


def test_a_threshold_is_taken_and_confirmed(run):
    """From → to at a step, with who and why on record."""
    with live() as job, Store() as store:
        status, text, _ = run("apply", "live", "0.25", "--reason", "too loose")
        assert status == 0
        assert re.fullmatch(r"live: 1 → 0\.25 from step \d+ on \(change 1\)\n", text)
        assert job.agent.threshold == 0.25
        status, text, _ = run("apply", "live", "0.5", "--json", "--yes")
        change = json.loads(text)
        assert (status, change["threshold"], change["previous"]) == (0, 0.5, 0.25)
        second, first = store.changes(1)
    assert re.fullmatch(r".+@.+", first.requested_by)
    assert (first.reason, second.reason) == ("too loose", None)
    assert second.applied_step == change["applied_step"]


def test_another_writer_is_waited_for(run):
    """One that has the store for a second is no reason to apply nothing."""
    with live() as job:
        job.until(5)
        other = sqlite3.connect("gradwatch.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(1.0, other.execute, ["ROLLBACK"])
        timer.start()
        status, text, _ = run("apply", "live", "0.25")
        timer.join()
        other.close()
    assert (status, "0.25 from step" in text) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "--recommended"),
        (("1.0", "--recommended"), 2, "one of: a threshold"),
        (("--undo", "--policy", "ClipNorm(1)"), 2, "one of: a threshold"),
        (("--", "-1"), 2, "max_norm=-1.0): max_norm must be a finite number above 0"),
        (("nan",), 2, "max_norm must be a finite number above 0"),
        (("inf",), 2, "max_norm must be a finite number above 0"),
        (("--policy", "Clip(1)"), 2, "no policy is called 'Clip'; there are"),
        (("--policy", "ClipNorm(__import__('os'))"), 2, "no policy is called '__import__'"),
        (("--undo",), 1, "there is nothing to undo"),
        (("--recommended",), 1, "not enough data"),
        (("--policy", "ClipValue(1)"), 1, "did not take it: ClipValue(1.0) can only be chosen"),
    ],
)
def test_errors_are_one_line_with_a_status(run, arguments, code, words):
    """2 for what cannot be meant, 1 for what is refused; the job clips as before."""
    with live() as job:
        if "--recommended" in arguments:
            job.pause()  # it would be enough soon
        status, text, errors = run("apply", "live", *arguments)
        assert (status, text, errors.count("\n")) == (code, "", 1)
        assert words in errors
        assert job.agent.threshold == 1.0
        assert len(requests()) == ("ClipValue(1)" in arguments)


def test_a_run_that_cannot_be_changed_is_told_with_what_to_do(run):
    """Not there, ended, or not allowed: status 1, and nothing is written."""
    write_run(run="ended", steps=2)
    with live(remote_control=None):
        for name, words in (
            ("nobody", "no run 'nobody'"),
            ("ended", "its status is finished"),
            ("live", "GRADWATCH_REMOTE_CONTROL=1 or wrap(..., remote_control=True)"),
        ):
            status, text, errors = run("apply", name, "0.5")
            assert (status, text, errors.count("\n")) == (1, "", 1)
            assert words in errors
    assert requests() == []


def test_a_job_without_remote_control_is_never_changed(run):
    """Not by the verb, and not by who writes the table: every step is clipped as its script says."""
    with live(remote_control=None) as job:
        assert run("apply", "live", "0.5")[0] == 1
        assert requests() == []
        with sqlite3.connect("gradwatch.db") as connection:
            connection.execute(
                "INSERT INTO threshold_changes (run_id, requested_at, requested_by, threshold) "
                "VALUES (1, 0, 'mallory', 0.5)"
            )
        seen = job.step
        job.until(seen + 500)
    with sqlite3.connect("gradwatch.db") as connection:
        assert connection.execute("SELECT DISTINCT threshold FROM steps").fetchall() == [(1.0,)]
        ((greatest,),) = connection.execute("SELECT max(post_norm) FROM steps")
    assert greatest == pytest.approx(1.0)


def test_what_is_recommended_is_applied_with_what_it_promises(run):
    """The threshold of `gradwatch recommend`; its interval stays on record."""
    with live(middle=0.9) as job, Store() as store:
        job.until(1200)
        job.pause()
        assert job.agent.flush()
        expected = recommend(store, 1)
        assert expected.verdict == "change"
        job.go_on()
        status, text, _ = run("apply", "live", "--recommended", "--reason", "as told")
        assert status == 0
        (change,) = applied(store, 1)
        assert job.agent.threshold == change.new == pytest.approx(expected.threshold, rel=0.2)
        assert f"1 → {change.new:.6g} from step {change.step:,} on" in text
        stated = Stated.read(change.reason)
        assert change.reason.endswith("; as told")
        assert stated.low < 0.2 < stated.high


@pytest.mark.parametrize("verdict", ["keep", "not_needed", "fix_training", "not_enough_data"])
def test_where_nothing_is_to_be_applied_the_reason_is_told(run, monkeypatch, verdict):
    """Even where a threshold is there to be named; with one that is named it is applied."""
    with live() as job, Store() as store:
        job.until(200)
        made = dataclasses.replace(
            recommend(store, 1), verdict=verdict, policy=ClipNorm(3.0), reasons=("because of it",)
        )
        monkeypatch.setattr(gradwatch_monitor, "recommend", lambda *_: made)
        status, text, errors = run("apply", "live", "--recommended", "--json")
        assert (status, text) == (1, "")
        assert f"the verdict is “{verdict.replace('_', ' ')}”: because of it" in errors
        assert requests() == []
        assert run("apply", "live", "3")[0] == 0


def test_undo_walks_back(run):
    """Policies included, one change at a time, until the job clips as its script says."""
    with live(clip=TargetRatio(cap=4.0, initial=2.0)) as job, Store() as store:
        job.until(100)
        part = job.agent._hooks.parts[0]
        assert run("apply", "live", "2.5")[0] == 0
        assert run("apply", "live", "--policy", "TargetRatio(cap=3)")[0] == 0
        assert run("apply", "live", "0.5")[0] == 0
        first, second, third = applied(store, 1)
        status, text, _ = run("apply", "live", "--undo", "--reason", "worse")
        assert status == 0
        assert "0.5 → TargetRatio(cap=3.0" in text
        # It begins where it was when it was replaced, not at the threshold of a first step.
        assert part.policy == TargetRatio(cap=3.0, initial=third.old)
        assert applied(store, 1)[-1].reason == f"undo of change {third.change}; worse"
        assert "TargetRatio(cap=3.0, initial=2.5) → ClipNorm(0.5)" in store.events(1)[1].message
        assert run("apply", "live", "--undo")[0] == 0
        assert job.agent.threshold == second.old == 2.5
        # A change after an undo is undone first.
        assert run("apply", "live", "7")[0] == 0
        assert run("apply", "live", "--undo")[0] == 0
        assert job.agent.threshold == 2.5
        assert run("apply", "live", "--undo")[0] == 0
        assert part.policy == TargetRatio(cap=4.0, initial=first.old)
        status, _, errors = run("apply", "live", "--undo")
        assert (status, "nothing to undo" in errors) == (1, True)


def test_a_policy_begins_where_the_threshold_was(run):
    """Not at a first threshold of its own that nobody named; and what it replaced is told."""
    with live() as job, Store() as store:
        job.until(100)
        status, text, _ = run("apply", "live", "--policy", "PercentileClip(95, multiplier=2)")
        assert status == 0
        assert "live: 1 → PercentileClip(initial=1.0) from step" in text
        assert applied(store, 1)[0].new == 1.0
        assert run("apply", "live", "--policy", "PercentileClip(initial=7)")[0] == 0
        assert applied(store, 1)[1].after["initial"] == 7
        status, text, _ = run("apply", "live", "2")
        assert status == 0
        assert re.search(r"^live: PercentileClip\(initial=7.0\) at [\d.]+ → 2 from step", text)


def test_a_job_that_takes_no_step(run):
    """Told once the time is over; it stays asked for, is not undone meanwhile, and taken later."""
    with live() as job, Store() as store:
        job.pause()
        status, text, errors = run("apply", "live", "0.5", "--timeout", "1")
        assert (status, text) == (1, "")
        assert "has not taken it yet (change 1); it stays asked for" in errors
        status, _, errors = run("apply", "live", "--undo")
        assert (status, "change 1 has not been taken yet" in errors) == (1, True)
        job.go_on()
        while store.changes(1)[0].applied_at is None:
            job.until(job.step + 1)
        assert job.agent.threshold == 0.5


def test_nobody_waits_who_does_not_want_to(run):
    """Status 0 once it is asked for."""
    with live() as job:
        job.pause()
        status, text, _ = run("apply", "live", "0.5", "--no-wait")
        assert (status, text) == (0, "live: 0.5 is asked for (change 1)\n")
        assert len(requests()) == 1


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 1), ("", 1)])
def test_at_a_terminal_it_asks(answer, status):
    """No is the default; nothing is written then."""
    program = Path(sys.executable).parent / "gradwatch"
    with live() as job:
        terminal, other = pty.openpty()
        asking = subprocess.Popen(
            [program, "apply", "live", "0.5"], stdin=other, stdout=other, stderr=other
        )
        os.close(other)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(terminal, 1000)
        os.write(terminal, f"{answer}\n".encode())
        assert asking.wait(60) == status
        os.close(terminal)
        assert b"live: 1 \xe2\x86\x92 0.5. Apply it?" in shown
        assert job.agent.threshold == (0.5 if status == 0 else 1.0)
        assert len(requests()) == (status == 0)
