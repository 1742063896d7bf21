"""What can become of the exporter under a job: training and the store go on."""

import contextlib
import json
import socket
import struct
import urllib.request
from pathlib import Path

import pytest
from jobs import check_stored, query, stored, wait_until
from typer.testing import CliRunner

from gradwatch_dashboards.cli import app

# The exporter's thread ends once there is a file of that name.
MORTAL = """
import os
from gradwatch.sinks import scrapers
scrapers._PATIENCE_SECONDS = 1.0
def each(step):
    if os.path.exists("die"):
        os.unlink("die")
        agent._recording.pipeline._exporter._server.shutdown()
"""


def begin(factory, tmp_path):
    """A job with an exporter: it, its store, where it is scraped."""
    store = tmp_path / "runs.db"
    job = factory.start(tmp_path / "job", store, code=MORTAL, GRADWATCH_METRICS_PORT="0")
    wait_until(lambda: stored(store) > 0, job.said)
    ((url,),) = query(store, "SELECT metrics_url FROM runs")
    return job, store, url


def scrape(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def doctor(store):
    """Exit status, and the check of the job's exporter."""
    result = CliRunner().invoke(app, ["doctor", "--json", "--store", str(store)])
    (check,) = [c for c in json.loads(result.stdout) if c["subject"].startswith("metrics of ")]
    return result.exit_code, check


def test_an_exporter_that_dies(factory, tmp_path):
    """The job does not notice; `gradwatch doctor` does."""
    job, store, url = begin(factory, tmp_path)
    assert "gradwatch_steps_total" in scrape(url)
    well = {"status": "ok", "subject": "metrics of python", "detail": url}
    wait_until(lambda: doctor(store) == (0, well))
    (job.folder / "die").touch()
    wait_until(lambda: not (job.folder / "die").exists(), job.said)
    job.go_on(100)
    status, check = doctor(store)
    assert (status, check["status"]) == (1, "problem")
    assert check["detail"].startswith(f"no answer at {url} (")
    job.end()
    assert job.said() == []
    check_stored(store, job)


def connect(url):
    host, port = url.removeprefix("http://").removesuffix("/metrics").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def threads(job):
    return len(list(Path(f"/proc/{job.pid}/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_scrapers_that_never_ask_or_never_read(factory, tmp_path):
    """Others are answered meanwhile; these are let go of, and the job is told nothing."""
    job, store, url = begin(factory, tmp_path)
    scrape(url)
    wait_until(lambda: stored(store) > 20, job.said)
    before = threads(job)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(url)) for _ in range(10)]
        deaf = [stack.enter_context(connect(url)) for _ in range(10)]
        for one in deaf:
            one.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        for _ in range(10):
            with connect(url) as gone:  # closed by a reset, in the middle of the request
                gone.sendall(b"GET")
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert "gradwatch_steps_total" in scrape(url)
        there = job.steps()
        wait_until(lambda: stored(store) > there, job.said)
        assert [one.recv(1) for one in silent] == [b""] * 10
        wait_until(lambda: threads(job) <= before, job.said)
    job.end()
    assert job.said() == []
    check_stored(store, job)
