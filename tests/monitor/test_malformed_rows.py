"""Rows that cannot be right: the other rows are served, and the monitor says which these are."""

import contextlib
import json
import socket
import sqlite3
import threading
import time
import urllib.request

import pytest
from stores import write_run

from gradwatch_monitor import Store
from gradwatch_monitor.service import Service

BAD = [
    ("metrics_url", "//[x"), ("metrics_url", "http://[x"), ("metrics_url", "http://a:b/"),
    ("metrics_url", b"\xff"), ("heartbeat_at", "soon"), ("heartbeat_at", b"\x00"), ("started_at", "x"),
    ("ended_at", "x"), ("pid", "x"), ("settings", "{bad"), ("settings", "[1]"), ("tags", "nul"),
    ("status", 3), ("name", b"\xff\xfe"), ("job", 2.5),
]  # fmt: skip


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The file of a store with two runs that live, and its bytes."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GRADWATCH_METRICS_PORT", "off")
        for name in ("bad", "whole"):
            write_run(run=name, steps=20)
    path = folder / "gradwatch.db"
    change(
        path,
        "UPDATE runs SET status = 'running', ended_at = NULL, heartbeat_at = ?, "
        "metrics_url = 'http://127.0.0.1:' || id || '/metrics'",
        time.time() + 3600,
    )
    return path, path.read_bytes()


@pytest.fixture
def store(two_runs):
    """The file, as it was."""
    path, content = two_runs
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def service(two_runs):
    """A monitor of it, asked over HTTP."""
    service = Service(str(two_runs[0]), port=0, interval=3600)
    thread = threading.Thread(target=service.run)
    thread.start()
    yield service
    service.stop()
    thread.join()


def change(path, sql, *values):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(sql, values)


def get(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.parametrize(("column", "value"), BAD)
def test_one_row_keeps_no_other_from_being_served(store, service, capfd, column, value):
    """A round succeeds, `/sd` has the other run's exporter, and both runs are listed."""
    change(store, f"UPDATE runs SET {column} = ? WHERE name = 'bad'", value)
    service.round()
    assert service._failures == 0
    assert "127.0.0.1:2" in [t for entry in get(f"{service.url}sd") for t in entry["targets"]]
    assert get(f"{service.url}healthz")["status"] == "ok"
    with Store(str(store)) as opened:
        assert [run.id for run in opened.runs()] == [2, 1]
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET //[x HTTP/1.1", b"404"), (b"GET http://[x/sd HTTP/1.1", b"200"), (b"GET /\xff HTTP/1.1", b"404"),
        (b"POST /sd HTTP/1.1", b"405"), (b"GET /sd", b"200"), (b"\xff\xff", b"400"), (b"GET / HTTP/x", b"400"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1", b"414"),
    ],
)  # fmt: skip
def test_every_request_is_answered(store, service, capfd, request_line, status):
    """By the status that HTTP has for it, and nothing is printed."""
    with socket.create_connection(("127.0.0.1", service._server.server_port), timeout=20) as to:
        to.sendall(request_line + b"\r\n\r\n")
        to.shutdown(socket.SHUT_WR)
        came = b"".join(iter(lambda: to.recv(1 << 16), b""))
    assert came.split(b" ", 2)[1] == status, came
    assert capfd.readouterr() == ("", "")


def test_store_check_names_the_column_and_the_runs(run, store):
    """Of each column once, with how many values."""
    assert run("store", "check", "--store", str(store))[0] == 0
    change(store, "UPDATE runs SET heartbeat_at = 'soon', settings = '{bad' WHERE id = 1")
    change(store, "UPDATE step_records SET loss = 'x' WHERE step < 3 AND run_id = 2")
    status, text, _ = run("store", "check", "--store", str(store))
    assert status == 1
    assert "runs.heartbeat_at holds 1 value that cannot be right (of run 1)" in text
    assert "runs.settings holds 1 value that cannot be right (of run 1)" in text
    assert "step_records.loss holds 3 values that cannot be right (of run 2)" in text
