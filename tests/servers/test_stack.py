"""`make stack`: everything starts, answers, and is gone after Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from alerting import free_port
from jobs import wait_until

PORTS = ("PROMETHEUS", "ALERTMANAGER", "MONITOR", "DASHBOARD")


def processes(folder):
    """The command lines of all processes that were started for this stack."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"GRADWATCH_SD_DIR={folder}/targets".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


@pytest.fixture
def stack(server_program, tmp_path):
    """Starts it, with ports of its own or those given."""
    server_program("prometheus", "prometheus")
    server_program("prometheus-alertmanager", "prometheus-alertmanager")
    started = []

    def start(**ports):
        environ = {f"{name}_PORT": str(ports.get(name, free_port())) for name in PORTS}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "gradwatch_dashboards.stack", str(tmp_path / "stack")],
                env=os.environ | environ, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for orphans in /proc")
def test_it_starts_answers_and_leaves_nothing(stack, tmp_path):
    """Every URL that it prints answers; Ctrl-C ends all, and the job ends well."""
    process = stack()
    lines = []
    while not lines or not lines[-1].startswith("State and logs: "):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    urls = {line.split()[0]: line.split()[1] for line in lines if "http://" in line}
    assert set(urls) == {"prometheus", "alertmanager", "monitor", "dashboard"}
    for name, url in urls.items():
        path = "healthz" if name == "monitor" else ""
        with urllib.request.urlopen(url + path, timeout=10) as answer:
            assert answer.status == 200
    assert len(processes(tmp_path / "stack")) >= 5
    assert (
        len(list((tmp_path / "stack" / "targets").glob("*.json"))) == 2
    )  # the job's, the monitor's

    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output.endswith("Ending.\n")
    assert processes(tmp_path / "stack") == []
    assert list((tmp_path / "stack" / "targets").iterdir()) == []


def test_a_port_that_is_taken_is_told_before_anything_starts(stack, tmp_path):
    """A port that another's server has is not taken for ours; no process is left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = stack(PROMETHEUS=port)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"port {port} cannot be had (Address already in use): set PROMETHEUS_PORT" in errors
    wait_until(lambda: processes(tmp_path / "stack") == [])


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for orphans in /proc")
def test_what_does_not_start_is_told_and_the_others_are_ended(stack, tmp_path, monkeypatch):
    """With the end of its log."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "prometheus-alertmanager"
    program.write_text("#!/bin/sh\necho 'there is no room for state' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    process = stack()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "alertmanager does not start" in errors
    assert "there is no room for state" in errors
    wait_until(lambda: processes(tmp_path / "stack") == [])
