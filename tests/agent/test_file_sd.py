"""The file by which Prometheus finds a job: there while it runs, gone when it ended well."""

import json
import os
import socket
import subprocess
import sys
import urllib.parse

import pytest
import torch
from jobs import wait_until
from loops import mlp, set_gradients

import gradwatch
from gradwatch.sinks.file_sd import TargetFile
from gradwatch.testing import MemorySink
from gradwatch.troubles import Troubles

JOB = """
import os, signal, sys, time, torch, gradwatch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
agent = gradwatch.Agent(optimizer, model=model, run="job", store="gradwatch.db", metrics_port=0)
optimizer.step()
while not os.listdir("targets"):
    time.sleep(0.01)
print(agent.metrics_url, flush=True)
"""

ENDINGS = {
    "": False,
    "agent.close()": False,
    "signal.raise_signal(signal.SIGINT)": False,
    "raise RuntimeError('a bug')": True,
    "signal.raise_signal(signal.SIGTERM)": True,
    "os.kill(os.getpid(), signal.SIGKILL)": True,
}


@pytest.mark.parametrize(("ending", "missed"), ENDINGS.items(), ids=lambda e: str(e) or "end")
def test_the_file_stays_where_the_job_is_to_be_missed(tmp_path, monkeypatch, ending, missed):
    """It ends well or by Ctrl-C: no file. It is killed, or fails: the file stays."""
    folder = tmp_path / "targets"
    folder.mkdir()
    monkeypatch.setenv("GRADWATCH_SD_DIR", "targets")
    job = subprocess.run(
        [sys.executable, "-c", JOB + ending], capture_output=True, text=True, check=False
    )
    assert job.stdout, job.stderr
    netloc = urllib.parse.urlsplit(job.stdout.strip()).netloc
    left = [json.loads(path.read_text()) for path in folder.iterdir()]
    assert [entry[0]["targets"] for entry in left] == [[netloc]] * missed


def step(run, **arguments):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.Agent(optimizer, run=run, store=MemorySink(), **arguments)
    set_gradients(0, model)
    optimizer.step()
    assert agent.flush()
    return agent


def test_one_file_an_exporter(tmp_path, monkeypatch):
    """With the advertised address, readable by others, and nothing half-written beside it."""
    monkeypatch.setenv("GRADWATCH_SD_DIR", str(tmp_path / "new" / "folder"))
    monkeypatch.setenv("GRADWATCH_ADVERTISED_ADDR", "node7.cluster")
    agent = step("first")
    step("second")
    wait_until((tmp_path / "new" / "folder").exists)
    wait_until(lambda: list((tmp_path / "new" / "folder").glob("*.json")))
    (path,) = (tmp_path / "new" / "folder").iterdir()
    port = urllib.parse.urlsplit(agent.metrics_url).port
    assert path.name == f"gradwatch-{socket.gethostname()}-{port}.json"
    assert path.stat().st_mode & 0o444 == 0o444
    ((entry),) = json.loads(path.read_text())
    assert entry == {
        "targets": [f"node7.cluster:{port}"],
        "labels": {"process": f"{socket.gethostname()}:{os.getpid()}"},
    }


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, caplog):
    """Training and its records go on."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRADWATCH_SD_DIR", str(tmp_path / "file" / "folder"))
    agent = step("job")
    wait_until(lambda: caplog.messages)
    agent.close()
    (message,) = caplog.messages
    assert "cannot write" in message
    assert "GRADWATCH_SD_DIR" in message
    assert agent.metrics_url is not None


def test_what_is_cleaned_away_is_written_again(tmp_path, caplog):
    """And a fault that is over is told to be; looks are half a minute apart."""
    target = TargetFile(tmp_path / "t", "http://127.0.0.1:9495/metrics", Troubles())
    target.keep(0.0)
    target.path.unlink()
    target.keep(29.0)
    assert not target.path.exists()
    target.keep(31.0)
    assert target.path.exists()
    assert caplog.messages == []
    target.remove()
    target.path.parent.rmdir()
    target.path.parent.touch()
    target.keep(62.0)
    target.keep(93.0)
    target.path.parent.unlink()
    target.keep(124.0)
    assert [m.split()[-1] for m in caplog.messages] == ["written", "written"]
    assert target.path.exists()


def test_without_the_setting_there_is_none(tmp_path):
    """No file is left anywhere."""
    before = set(tmp_path.rglob("*.json"))
    step("job").close()
    assert set(tmp_path.rglob("*.json")) == before
