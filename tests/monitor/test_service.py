"""The monitor as people run it: a process of its own, asked over HTTP."""

import contextlib
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import kills
import pytest
from jobs import stored, wait_until
from stores import write_run

from gradwatch_monitor import Store, service

CLI = "from gradwatch_dashboards.cli import main; main()"


@contextlib.contextmanager
def monitor(*arguments):
    """`gradwatch monitor`; its URL and the process."""
    command = [sys.executable, "-c", CLI, "monitor", "--port", "0",
               "--interval", "0.2", *arguments]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("Monitor: http://127.0.0.1:"), line + process.stderr.read()
        yield line.split()[1], process
    finally:
        process.kill()
        process.communicate()


def get(url):
    """Status and value."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize(
    "moment",
    [lambda _: stored("gradwatch.db") > 0, lambda steps: steps and Path("gradwatch.db").exists()],
    ids=["stored", "made"],
)
def test_it_recovers_what_killed_jobs_left(moment):
    """Without anybody's asking; it says so once, and goes when it is told to.

    One of them is killed while it makes the store, which then is an empty file.
    """
    with kills.Factory("gradwatch.db") as factory, monitor() as (url, process):
        wait_until(lambda: get(f"{url}healthz")[0] == 200)
        factory.start_and_kill(7, moment)
        assert process.stdout.readline().startswith("job-7: crashed at step ")
        with Store() as store:
            assert store.run("uid-7").status == "crashed"
            assert store.summary(1).steps - kills.returned(7) in {0, 1}
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 0


def test_it_tells_prometheus_where_live_runs_are():
    """One entry for an exporter, however many runs share it; none for those that ended."""
    write_run(run="ended", steps=2)
    live = [write_run(run=name, steps=2, close=False) for name in "ab"]
    with monitor() as (url, _):
        status, found = get(f"{url}sd")
    assert status == 200
    (entry,) = found
    (target,) = entry["targets"]
    assert live[0].metrics_url == f"http://{target}/metrics"
    labels = entry["labels"]
    assert all(isinstance(value, str) for value in labels.values())
    assert labels["__metrics_path__"] == "/metrics"
    assert {name for name in labels if not name.startswith("__")} == set()


def test_prometheus_finds_the_monitor_by_a_file(monkeypatch):
    """Under the address that it is told to have, for as long as it runs."""
    monkeypatch.setenv("GRADWATCH_SD_DIR", "targets")
    monkeypatch.setenv("GRADWATCH_ADVERTISED_ADDR", "monitor.cluster")
    with monitor() as (url, process):
        wait_until(lambda: list(Path("targets").glob("*.json")))
        (path,) = Path("targets").glob("*.json")
        (entry,) = json.loads(path.read_text())
        assert entry["targets"] == [f"monitor.cluster:{url.rsplit(':', 1)[1].rstrip('/')}"]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert not path.exists()


def test_a_store_that_cannot_be_read_is_not_healthy():
    """It says why, and is well again once that is mended; nothing ends it."""
    Path("gradwatch.db").write_text("no database\n" * 100)
    with monitor() as (url, process):
        wait_until(lambda: get(f"{url}healthz")[0] == 503)
        assert "not a database" in get(f"{url}healthz")[1]["problem"]
        assert get(f"{url}sd")[0] == 503
        Path("gradwatch.db").unlink()
        wait_until(lambda: get(f"{url}healthz")[0] == 200)
        assert get(f"{url}sd") == (200, [])
        assert get(f"{url}nowhere") == (404, {"pages": ["/healthz", "/metrics", "/sd"]})
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert len(said.strip().split("\n")) == 2  # the fault, and that it is over


def test_a_port_that_is_taken():
    """A usage error that says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(service.ConfigurationError, match="try --port"):
            service.Service("gradwatch.db", port=port)


def test_what_cannot_be_recovered_is_told_once():
    """A file that is no flight recorder stays, and is mentioned in one round only."""
    folder = Path("gradwatch.db.rings")
    folder.mkdir()
    (folder / "broken.ring").write_bytes(b"nothing" * 1000)
    told = []
    made = service.Service("gradwatch.db", port=0, report=told.append)
    for _ in range(3):
        made.round()
    assert [one.path.name for one in told] == ["broken.ring"]
    made._server.server_close()
    assert (folder / "broken.ring").exists()


def test_a_silent_run_is_no_target():
    """Its process is gone, or hangs: Prometheus would find nobody there."""
    write_run(run="silent", steps=2, close=False)
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute("UPDATE runs SET heartbeat_at = ?", (time.time() - 3600,))
    with Store() as store:
        assert service.targets(store.runs()) == []


def test_it_binds_an_address_of_the_sixth_version():
    """Its URL has brackets."""
    made = service.Service("gradwatch.db", address="::1", port=0)
    assert made.url.startswith("http://[::1]:")
    made._server.server_close()
