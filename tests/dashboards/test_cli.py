"""The command line: every verb, its JSON, its exit status, and errors of one line."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from stores import lognormal, write_run
from typer.testing import CliRunner

from gradwatch import __version__, schema
from gradwatch_dashboards import cli, store_verbs
from gradwatch_monitor import Store, recommend, service


def test_runs(run):
    """A table for people, the same as JSON for programs."""
    write_run(run="one", steps=7, tags={"lr": 3})
    write_run(run="two", steps=5)
    status, text, _ = run("runs")
    assert status == 0
    assert text.index("two") < text.index("one")
    assert "--limit" not in text
    assert run("runs", "--limit", "1")[1].endswith("The latest 1: --limit shows more.\n")
    status, text, _ = run("runs", "--json", "--limit", "1")
    (row,) = json.loads(text)
    assert (row["name"], row["steps"], row["status"], row["live"]) == ("two", 5, "finished", False)


def test_show_equals_sql(run):
    """The counts of `show --json` are those of SQL."""
    write_run(nan_at=(299,))
    status, text, _ = run("show", "first", "--json")
    shown = json.loads(text)
    with sqlite3.connect("gradwatch.db") as connection:
        steps, finite, clipped, nonfinite = connection.execute(
            "SELECT count(*), count(pre_norm), sum(clipped), sum(nonfinite) FROM steps"
        ).fetchone()
    assert status == 1  # a NaN is a finding
    assert (shown["stored_steps"], shown["clipped"], shown["nonfinite"]) == (
        steps,
        clipped,
        nonfinite,
    )
    assert shown["clip_ratio"] == clipped / finite
    assert shown["events"][0]["data"]["parameters"] == {"2.weight": "nan"}
    status, text, _ = run("show", "first")
    assert f"{clipped:,} ({100 * clipped / finite:.1f} %), of {finite:,} steps" in text
    assert "it entered at 2.weight" in text


def test_a_loss_that_stands_still_is_said_where_nothing_is_found(run):
    """No rule can tell a job that does not learn from one that has nothing left to learn."""
    calm = lognormal(600, middle=0.5, spread=0.1)
    write_run(run="learns", norms=calm)
    write_run(run="stands", norms=calm)
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute(
            "UPDATE step_records SET loss = 2.3 WHERE run_id = (SELECT id FROM runs WHERE name = 'stands')"
        )
    status, learns, _ = run("diagnose", "learns")
    assert (status, "about where it began" in learns) == (0, False)
    status, stands, _ = run("diagnose", "stands")
    assert status == 0
    assert "But the loss is about where it began (2.3 at first, 2.3 at the end)" in stands


def test_runs_and_show_count_the_same_steps(run):
    """Those taken; `show` says too how many of them a prune has left."""
    write_run(steps=10)
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("DELETE FROM step_records WHERE step < 6")
    (listed,) = json.loads(run("runs", "--json")[1])
    shown = json.loads(run("show", "first", "--json")[1])
    assert (listed["steps"], shown["steps"], shown["stored_steps"]) == (10, 10, 4)
    assert "10, of which 4 are in the store" in run("show", "first")[1]


def test_show_names_the_exporter_of_a_run_that_has_not_ended(run):
    """Nobody answers there after it."""
    write_run(steps=3)
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("UPDATE runs SET metrics_url = 'http://here:1/metrics'")
    assert "http://here" not in run("show", "first")[1]
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("UPDATE runs SET status = 'running', ended_at = NULL")
    assert "http://here" in run("show", "first")[1]


def test_ui_says_that_there_is_no_store(run, monkeypatch):
    """In the terminal, before the page does."""
    monkeypatch.setattr("gradwatch_dashboards.web.serve.run", lambda *_, **__: 0)
    status, _, told = run("ui", "--store", "missing.db")
    assert (status, "there is no store at" in told) == (0, True)
    assert "missing.db yet" in told.replace("\n", "")
    write_run(steps=3)
    assert run("ui", "--store", "gradwatch.db")[2] == ""


def test_copy_counts_in_words(run):
    """One run is no runs."""
    write_run(steps=1)
    _, text, _ = run("store", "copy", "gradwatch.db", "other.db")
    assert "1 run, 1 step," in text.replace("\n", " ")
    _, text, _ = run("store", "copy", "gradwatch.db", "other.db")
    assert "0 runs, 0 steps," in text.replace("\n", " ")


def test_show_of_a_run_with_a_finding_exits_with_1(run):
    """While it lasts: a script can ask."""
    write_run(steps=3)
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute(
            "INSERT INTO findings (run_id, finding, severity, first_step, last_step, found_at, "
            "message, advice, data) VALUES (1, 'clipped_twice', 'warning', 0, 2, 0, 'It [b]burns.', 'Water.', '{}')"
        )
    status, text, _ = run("show", "first")
    assert (status, "warning: It [b]burns. Water." in text) == (1, True)
    assert run("show", "first", "--json")[0] == 1
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("UPDATE findings SET ended_at = 1")
    assert run("show", "first")[0] == 0


def test_recommend_is_the_librarys(run):
    """The same answer as from Python, and the line to copy."""
    write_run(norms=lognormal(1500, middle=0.9))
    with Store("gradwatch.db") as store:
        expected = recommend(store, 1)
    status, text, _ = run("recommend", "first", "--json")
    answer = json.loads(text)
    assert status == 0
    assert answer["threshold"] == expected.threshold
    assert answer["verdict"] == expected.verdict
    assert answer["interval"] == list(expected.interval)
    assert answer["sentence"] == expected.sentence
    status, text, _ = run("recommend", "first")
    assert expected.sentence in text
    assert f"clip=gradwatch.ClipNorm({expected.threshold})" in text


def test_the_store_comes_from_the_option_or_the_environment(run, monkeypatch):
    """`--store` before GRADWATCH_STORE before the file here."""
    write_run("a.db", run="in-a", steps=2)
    write_run("b.db", run="in-b", steps=2)
    monkeypatch.setenv("GRADWATCH_STORE", "a.db")
    assert "in-a" in run("runs")[1]
    assert "in-b" in run("runs", "--store", "sqlite:///b.db")[1]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("show", "nix"), 1, "no run 'nix'.*the latest are: first"),
        (("recommend", "nix", "--json"), 1, "no run 'nix'"),
        (("runs", "--store", "nix.db"), 1, "no store at .*nix.db"),
        (("runs", "--store", "mysql://me:secret@h/d"), 2, "SQLite or PostgreSQL"),
        (("recommend", "first", "--target", "0.9"), 2, "target=0.9"),
    ],
)
def test_errors_are_one_line_with_a_status(run, arguments, status, words):
    """1 for what is not there, 2 for what cannot be meant; no traceback, no secret."""
    write_run(steps=2)
    code, out, err = run(*arguments)
    assert code == status
    assert out == ""
    assert re.fullmatch(rf"gradwatch: [^\n]*{words}[^\n]*\n", err)
    assert "secret" not in err


@pytest.mark.parametrize("arguments", [("show",), ("runs", "--limit", "x"), ("nonsense",)])
def test_wrong_usage_is_status_2(run, arguments):
    """As every command line has it."""
    assert run(*arguments)[0] == 2


def test_a_store_that_was_written_over_is_told_by_every_verb(run):
    """Though its WAL has all its pages still; and none of them writes into it."""
    agent = write_run(steps=20, close=False)
    store = Path("gradwatch.db")
    assert Path("gradwatch.db-wal").stat().st_size > 0
    store.write_text("no database\n")
    for arguments in (
        ("runs",), ("show", "first"), ("doctor",), ("store", "check"), ("store", "migrate"),
        ("store", "prune", "--older-than", "1d"), ("store", "copy", "gradwatch.db", "other.db"),
        ("store", "copy", "other.db", "gradwatch.db"),
    ):  # fmt: skip
        if arguments[2:3] == ("other.db",):
            write_run("other.db", run="other", steps=2)
        status, text, errors = run(*arguments)
        assert status == 1, arguments
        assert "not a database" in text + errors, arguments
        assert store.read_text() == "no database\n", arguments
    assert "move the file away" in run("runs")[2]
    store.unlink()
    assert agent.flush(20)


def test_migrate(run):
    """An empty database becomes a store; a second time there is nothing to do."""
    sqlite3.connect("gradwatch.db").close()
    assert json.loads(run("store", "migrate", "--json")[1]) == {
        "before": None,
        "after": schema.REVISION,
    }
    assert "already" in run("store", "migrate")[1]


def test_a_missing_extra_is_named(run, monkeypatch):
    """`gradwatch ui` without streamlit says what to install."""
    from importlib.util import find_spec

    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "streamlit" else find_spec(name)
    )
    status, _, err = run("ui")
    assert status == 2
    assert "pip install 'gradwatch[monitor]'" in err


def test_every_verb_prints_json():
    """Each has --json, and says what it does."""
    for command in [*cli.app.registered_commands, *store_verbs.app.registered_commands]:
        path = [command.callback.__name__]
        if command in store_verbs.app.registered_commands:
            path.insert(0, "store")
        result = CliRunner().invoke(cli.app, [*path, "--help"])
        assert result.exit_code == 0
        assert "--json" in result.output
        assert command.callback.__doc__


def gradwatch(*arguments, **options):
    return subprocess.run(
        [shutil.which("gradwatch", path=str(Path(sys.executable).parent)), *arguments],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **options,
    )  # fmt: skip


def test_demo_trains_records_and_recommends():
    """The real verb: a store, a metrics URL, and a sentence with its numbers."""
    result = gradwatch("demo", "--no-ui", "--epochs", "4", "--json", "--store", "demo.db")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["metrics_url"].startswith("http://127.0.0.1:")
    with Store("demo.db") as store:
        run = store.run(answer["run"])
        summary = store.summary(run.id)
        kinds = {event.kind for event in store.events(run.id)}
    assert run.status == "finished"
    assert summary.steps == 4 * 45
    assert summary.nonfinite == 1
    assert {"nonfinite_gradient", "nonfinite_loss"} <= kinds
    assert answer["recommendation"]["sentence"].startswith("clipped ")

    shown = gradwatch("demo", "--no-ui", "--epochs", "1", "--store", "demo.db")
    assert shown.returncode == 0
    for word in ("Store", "demo.db", "Metrics", "http://127.0.0.1:", "Verdict", "clipped"):
        assert word in shown.stdout


def test_output_into_a_pipe_that_closes():
    """`gradwatch runs | head -1` ends without a traceback."""
    for i in range(3):
        write_run(run=f"run-{i}", steps=1)
    program = shutil.which("gradwatch", path=str(Path(sys.executable).parent))
    result = subprocess.run(
        f"{program} runs --json | head -c 1", shell=True, capture_output=True, text=True,
        check=False, env=os.environ,
    )  # fmt: skip
    assert result.stdout == "["
    assert "Traceback" not in result.stderr


def test_a_run_that_is_named_like_an_id_is_told_from_it(run):
    """By every verb that takes a run: a number is the id, `name:` and `uid:` say otherwise."""
    first = write_run(run="first", steps=20)
    named = write_run(run="1", steps=30)
    keys = [("1", 1), ("id:1", 1), ("name:1", 2), ("2", 2), ("name:first", 1)]
    keys += [(f"uid:{first.run_id}", 1), (f"uid:{named.run_id}", 2), (named.run_id, 2)]
    for key, expected in keys:
        assert json.loads(run("show", key, "--json")[1])["id"] == expected
        assert json.loads(run("recommend", key, "--json")[1])["run_id"] == expected
        last = {1: "Its last step, 19,", 2: "Its last step, 29,"}[expected]
        assert last in run("diagnose", key)[1]
    assert json.loads(run("report", "name:1", "--json")[1])["run_id"] == 2
    for key, name in (("1", "first"), ("name:1", "1")):
        assert f"run '{name}' is not running" in run("apply", key, "0.5")[2]


@pytest.mark.parametrize(
    "command",
    [
        ("show", "9" * 30),
        ("runs", "--store", "postgresql+nosuch://u:s3cret@127.0.0.1/x"),
        ("store", "migrate", "--store", "text.txt"),
        ("store", "migrate", "--store", "other.db"),
    ],
)
def test_bad_input_is_said_without_a_traceback(run, command):
    """Numbers no database counts to, drivers that are not there, files that are no store."""
    write_run(steps=2)
    Path("text.txt").write_text("no database " * 500)
    with sqlite3.connect("other.db") as connection:
        connection.execute("CREATE TABLE theirs (x)")
    status, text, errors = run(*command)
    assert status in {1, 2}
    assert errors.startswith("gradwatch: ")
    assert "Traceback" not in text + errors
    assert "s3cret" not in text + errors
    with sqlite3.connect("other.db") as connection:
        assert [name for (name,) in connection.execute("SELECT name FROM sqlite_master")] == [
            "theirs"
        ]


@pytest.mark.parametrize("verb", ["monitor", "ui"])
@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.7", "node7"])
def test_an_address_that_others_reach_has_to_be_said_to_be_trusted(run, verb, address):
    """Nothing asks for a password there, so nobody opens it unawares."""
    status, _, errors = run(verb, "--address", address)
    assert status == 2
    assert "--trusted-network" in errors


def test_a_trusted_network_is_bound(monkeypatch, run):
    """With the flag, what is asked for is done."""
    bound = []
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(service.Service, "run", lambda self: bound.append(self._server))
    status, _, _ = run("monitor", "--port", "0", "--address", "0.0.0.0", "--trusted-network")
    assert status == 0
    assert bound[0].server_address[0] == "0.0.0.0"
    bound[0].server_close()


def test_the_version(run):
    """As the package has it."""
    assert run("--version") == (0, f"{__version__}\n", "")
