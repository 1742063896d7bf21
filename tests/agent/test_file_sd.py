"""The file by which Prometheus finds a job: there while it runs, gone when it ended well."""

import json
import os
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
import torch
from jobs import wait_until
from loops import mlp, set_gradients

import gradwatch
from gradwatch.sinks.file_sd import TargetFile
from gradwatch.testing import MemorySink
from gradwatch.troubles import Troubles

JOB = """
import glob, os, signal, sys, time, torch, gradwatch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
agent = gradwatch.Agent(optimizer, model=model, run="job", store="gradwatch.db", metrics_port=0)
optimizer.step()
while not glob.glob("targets/*.json"):
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
    left = [json.loads(path.read_text()) for path in folder.glob("*.json")]
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
    agent, second = step("first"), step("second")
    folder = tmp_path / "new" / "folder"
    wait_until(lambda: any(second.run_id in path.read_text() for path in folder.glob("*.json")))
    (path,) = folder.iterdir()
    port = urllib.parse.urlsplit(agent.metrics_url).port
    assert path.name == f"gradwatch-node7.cluster-{port}.json"
    assert path.stat().st_mode & 0o444 == 0o444
    ((entry),) = json.loads(path.read_text())
    runs = entry["labels"].pop("__gradwatch_runs")
    assert agent.run_id in runs.split(",")
    assert entry == {
        "targets": [f"node7.cluster:{port}"],
        "labels": {"process": f"{socket.gethostname()}:{os.getpid()}"},
    }


def test_what_an_earlier_attempt_left_goes_when_the_run_goes_on(tmp_path):
    """At another port; files of other runs, and of others, stay as they are."""
    (tmp_path / "node.json").write_text("[]")
    (tmp_path / "gradwatch-other-1.json").write_text("not ours")
    for port, runs in ((9501, {"a", "b"}), (9502, {"c"}), (9503, {"b", "d"})):
        TargetFile(tmp_path, f"http://127.0.0.1:{port}/metrics", Troubles()).keep(0.0, runs)
    host = socket.gethostname()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "node.json", "gradwatch-other-1.json", f"gradwatch-{host}-9502.json",
        f"gradwatch-{host}-9503.json",
    }  # fmt: skip
    grown = TargetFile(tmp_path, "http://127.0.0.1:9504/metrics", Troubles())
    grown.keep(0.0, {"e"})
    grown.keep(1.0, {"e", "c"})
    assert not (tmp_path / f"gradwatch-{host}-9502.json").exists()
    assert json.loads(grown.path.read_text())[0]["labels"]["__gradwatch_runs"] == "c,e"


def test_another_users_file_at_the_address_is_left_alone(tmp_path, monkeypatch, caplog):
    """As in a folder like /tmp: there is one beside it, and no draft is left."""
    target = TargetFile(tmp_path, "http://127.0.0.1:9505/metrics", Troubles())
    theirs, replace = target.path, Path.replace

    def refuse(self, to):
        if to == theirs:
            raise PermissionError(1, "Operation not permitted")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", refuse)
    theirs.write_text("theirs")
    target.keep(0.0)
    assert theirs.read_text() == "theirs"
    assert target.path.name == f"{theirs.stem}-uid{os.getuid()}.json"
    assert {path.name for path in tmp_path.iterdir()} == {theirs.name, target.path.name}
    assert caplog.messages == []
    target.remove()
    assert [path.name for path in tmp_path.iterdir()] == [theirs.name]


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
