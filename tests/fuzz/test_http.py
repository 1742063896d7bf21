"""The HTTP faces of the monitor and of a job's exporter: every request is answered, by a status."""

import json
import re
import socket
import threading
import time
import urllib.parse
import urllib.request

import fuzzing
import pytest
from fuzzing import TEXTS, mutations
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gradwatch.sinks.prometheus import Exporter, PrometheusSink
from gradwatch.testing import run_info
from gradwatch_monitor.service import Service

METHODS = st.sampled_from(["GET", "HEAD", "POST", "get", "OPTIONS", "PRI", ""])
PATHS = st.sampled_from(
    ["/", "/sd", "/metrics", "/healthz", "//[x", "http://[x/sd", "*", "/%zz", "/%00", "/../sd",
     "/metrics?name[]=x", "/sd?a=%ff#b", "http://a:b/", "/" * 3000, "/" + "a" * 70_000]
) | TEXTS  # fmt: skip
VERSIONS = st.sampled_from(
    [" HTTP/1.1", " HTTP/1.0", "", " HTTP/9.9", " HTTP/x", " XYZ/1.1", " a b"]
)
HEADERS = st.sampled_from(
    ["", "Host: a\r\n", "Accept-Encoding: gzip\r\n", "Accept: text/plain;q=x\r\n", "Content-Length: x\r\n",
     "Content-Length: 9\r\n", "Transfer-Encoding: chunked\r\n", "no colon\r\n", ": \r\n", "A: b\r\n" * 150,
     "Expect: 100-continue\r\n"]
) | TEXTS  # fmt: skip


@st.composite
def requests(draw):
    """The bytes of a request, well formed or not."""
    line = draw(METHODS) + " " + draw(PATHS) + draw(VERSIONS)
    head = f"{line}\r\n{draw(HEADERS)}\r\n\r\n"
    return head.encode("utf-8", "surrogatepass") + draw(st.binary(max_size=20))


def answer(port, request):
    """All that comes back before the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def check_status(request, came):
    """It is an HTTP answer, and none that says that the server has failed."""
    status = re.match(rb"HTTP/1\.[01] (\d{3}) [^\r\n]+\r\n", came)
    assert status, (request, came[:200])
    assert status[1] not in {b"500", b"502"}, (request, came)


def get(url):
    """The body of what is asked for as it should be."""
    with urllib.request.urlopen(url, timeout=20) as found:
        return found.read().decode()


@pytest.fixture
def silent(capfd):
    """Nothing may have been printed."""
    yield
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_the_monitor(copy, whole_store, budget, silent):
    """On stores of which cells were written over: the other runs are found, the metrics are metrics."""

    @given(mutations(whole_store), st.lists(requests(), min_size=1, max_size=10))
    def check(mutations, asked):
        path = copy()
        with fuzzing.connected(path) as connection:  # one more run, which stays as it is
            connection.execute(
                "INSERT INTO runs SELECT 999, 'whole', 'whole', job, started_at, NULL, ?, 'running', host, pid, "
                "world_size, tags, settings, 'http://127.0.0.1:9/metrics' FROM runs WHERE name = 'good'",
                (time.time() + 1e6,),
            )  # fmt: skip
        for mutation in mutations:
            if not getattr(mutation, "every", False):
                mutation.apply(path)
        service = Service(str(path), port=0, interval=3600)
        serving = threading.Thread(target=service.run)
        serving.start()
        try:
            port = urllib.parse.urlsplit(service.url).port
            for request in asked:
                check_status(request, answer(port, request))
            targets = json.loads(get(f"{service.url}sd"))
            assert "127.0.0.1:9" in {target for entry in targets for target in entry["targets"]}
            for entry in targets:
                assert all(isinstance(value, str) for value in entry["labels"].values())
            list(text_string_to_metric_families(get(f"{service.url}metrics")))
            assert json.loads(get(f"{service.url}healthz"))["status"] == "ok"
        finally:
            service.stop()
            serving.join()

    budget.spend(0.1, check)


def test_the_exporter(budget, silent):
    """Runs of any names: each is exported under its own, whatever else is asked."""
    names = st.lists(TEXTS.filter(bool), min_size=1, max_size=3, unique=True)

    @given(names, st.lists(requests(), min_size=1, max_size=10))
    def check(names, asked):
        sink = PrometheusSink()
        for number, name in enumerate(names):
            sink.open(run_info(uid=f"uid{number}", ring=f"ring{number}", name=name))
        exporter = Exporter(sink, addr="127.0.0.1", port=0, advertised=None)
        try:
            for request in asked:
                check_status(request, answer(exporter.port, request))
            families = text_string_to_metric_families(get(exporter.url))
            found = {
                s.labels["run"] for family in families for s in family.samples if "run" in s.labels
            }
            assert found == set(names)
        finally:
            exporter.close()

    budget.spend(0.05, check)
