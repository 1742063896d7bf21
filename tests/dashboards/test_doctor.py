"""`gradwatch doctor`: the machine, the settings, the store, and the exporters of live runs."""

import json
import socket
import sqlite3
from pathlib import Path

import pytest
from stores import write_run


def test_doctor(run, monkeypatch):
    """Fine here; a misspelt setting, a store that is none and a taken port are told."""
    write_run(steps=2)
    status, text, _ = run("doctor", "--json")
    checks = {check["subject"]: check for check in json.loads(text)}
    assert status == 0
    assert checks["store"]["detail"].endswith("1 run")
    assert {check["status"] for check in checks.values()} <= {"ok", "note"}

    monkeypatch.setenv("GRADWATCH_METRIC_PORT", "1")
    Path("gradwatch.db").write_text("no database " * 999)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("GRADWATCH_METRICS_PORT", str(taken.getsockname()[1]))
        status, text, _ = run("doctor", "--json")
    checks = {check["subject"]: check for check in json.loads(text)}
    assert status == 1
    assert checks["GRADWATCH_METRIC_PORT"]["status"] == "problem"
    assert checks["store"]["status"] == "problem"
    assert "in use" in checks["metrics"]["detail"]
    assert run("doctor")[0] == 1


def test_doctor_asks_the_exporters_of_this_machines_live_runs(run):
    """One that does not answer is a problem; another machine's is not asked, nor an ended run's."""
    ended = write_run(run="ended", steps=2)
    live = write_run(run="live", steps=2, close=False)
    write_run(run="elsewhere", steps=2, close=False)
    with sqlite3.connect("gradwatch.db") as connection:
        connection.execute(
            "UPDATE runs SET host = 'elsewhere', metrics_url = 'http://192.0.2.1:9/metrics' "
            "WHERE name = 'elsewhere'"
        )

    def exporters():
        status, text, _ = run("doctor", "--json")
        found = [c for c in json.loads(text) if c["subject"].startswith("metrics of ")]
        return status, {check["subject"]: check for check in found}

    url = live.metrics_url
    assert url == ended.metrics_url
    told = {"status": "ok", "subject": "metrics of live", "detail": url}
    assert exporters() == (0, {"metrics of live": told})
    live._recording.pipeline._exporter.close()
    status, checks = exporters()
    assert status == 1
    assert checks["metrics of live"]["status"] == "problem"
    assert "Connection refused" in checks["metrics of live"]["detail"]


@pytest.mark.parametrize(
    "url",
    ["postgresql+psycopg://gw:S3cr3t/train", "postgresql+psycopg://gw:S3cr3t@h:port/train",
     "gw:S3cr3t@host/train"],
)  # fmt: skip
def test_doctor_of_an_url_that_is_none(run, url):
    """It says so, like the other verbs, without the password."""
    for verb in ("doctor", "runs"):
        status, text, errors = run(verb, "--store", url)
        assert status == (1 if verb == "doctor" else 2)
        assert "postgresql+psycopg://user@host/name" in text + errors
        assert "S3cr3t" not in text + errors


def test_doctor_says_that_a_store_is_not_there_yet(run):
    """Nothing is wrong before the first job."""
    status, text, _ = run("doctor", "--json")
    assert status == 0
    assert any("the first job makes it" in check["detail"] for check in json.loads(text))


def test_doctor_tells_of_wrong_settings(run, monkeypatch):
    """A problem among the checks, not the end of them."""
    monkeypatch.setenv("GRADWATCH_METRICS_PORT", "abc")
    status, text, _ = run("doctor", "--json")
    checks = {check["subject"]: check for check in json.loads(text)}
    assert status == 1
    assert checks["settings"]["status"] == "problem"
    assert "GRADWATCH_METRICS_PORT" in checks["settings"]["detail"]
    assert checks["torch"]["status"] == "ok"
