"""The monitor beside the jobs: a loop over one store, and its HTTP face.

Each round stores what killed jobs of this machine left in their flight recorders, and looks at what
is wrong with the live runs. Over HTTP, `/healthz` tells whether rounds succeed, `/metrics` what was
found and is recommended, and `/sd` where Prometheus finds the live runs' exporters (the format of
its `http_sd_configs`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.parse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

from prometheus_client import CONTENT_TYPE_LATEST

from gradwatch.config import redact, resolve_store
from gradwatch.errors import ConfigurationError, GradwatchError, StoreNotFoundError
from gradwatch.recovery import recover
from gradwatch.sinks.file_sd import TargetFile
from gradwatch.troubles import Troubles
from gradwatch_monitor.store import Store
from gradwatch_monitor.watching import Watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gradwatch.recovery import Recovered
    from gradwatch_monitor.rows import Run

__all__ = ["Service", "targets"]

_LATE = 4  # rounds without success, after which the monitor is not healthy


class Service:
    """The monitor of one store.

    Args:
        store: the store's SQLAlchemy URL, or an SQLite file's path.
        address: where its HTTP face is bound.
        port: TCP port; 0: any.
        interval: seconds between two rounds.
        report: is told of each flight recorder that was stored.
        sd_dir: where a file tells Prometheus of it, for as long as it runs (`file_sd_configs`).
        advertised: under which name or address Prometheus reaches it; default: `address`.

    Raises `ConfigurationError` where the port is taken.
    """

    def __init__(
        self,
        store: str,
        *,
        address: str = "127.0.0.1",
        port: int = 9496,
        interval: float = 15.0,
        report: Callable[[Recovered], None] = lambda _: None,
        sd_dir: Path | None = None,
        advertised: str | None = None,
    ) -> None:
        self.store = resolve_store(store)
        self.interval = interval
        self._report = report
        self.watch = Watch()
        self._troubles = Troubles()
        self._told: set[tuple[str, str | None]] = set()
        self._stop = threading.Event()
        self._good_at = time.monotonic()
        self._failures = 0  # in a row
        self._problem: str | None = None
        try:
            self._server = _Server((address, port), _Handler)
        except OSError as error:
            msg = f"the monitor cannot bind {address}:{port} ({error.strerror}): try --port"
            raise ConfigurationError(msg) from None
        self._server.daemon_threads = True
        self._server.service = self  # type: ignore[attr-defined]
        self.url = self._url_at(address)
        self._target: TargetFile | None = None
        if sd_dir is not None:
            here = "127.0.0.1" if address in {"0.0.0.0", "::", ""} else address  # noqa: S104
            self._target = TargetFile(sd_dir, self._url_at(advertised or here), self._troubles)

    def _url_at(self, host: str) -> str:
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self._server.server_port}/"

    def run(self) -> None:
        """Make rounds until `stop` is called; nothing that goes wrong in one ends it."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            while not self._stop.is_set():
                if self._target is not None:
                    self._target.keep(time.monotonic())
                self.round()
                self._stop.wait(self.interval)
        finally:
            if self._target is not None:
                self._target.remove()
            self._server.shutdown()
            self._server.server_close()

    def stop(self) -> None:
        """End `run` after the round that is under way."""
        self._stop.set()

    def round(self) -> None:
        """One look at the store and at what lies beside it."""
        try:
            for ring in recover(self.store):
                if (ring.path.name, ring.problem) not in self._told:
                    self._report(ring)
                if ring.problem is not None:  # it stays, and would be told in every round
                    self._told.add((ring.path.name, ring.problem))
            with contextlib.suppress(StoreNotFoundError), Store(self.store) as store:
                self.watch.look(store)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next round may succeed
            self._failures += 1
            if self._failures == 1:
                return  # a store that is being made just now is not one yet
            known = isinstance(error, GradwatchError)
            self._problem = str(error) if known else f"{type(error).__name__}: {error}"
            self._troubles.report("round", self._problem)
        else:
            self._failures, self._problem, self._good_at = 0, None, time.monotonic()
            self._troubles.clear("round", f"{redact(self.store)} is well again")

    def health(self) -> tuple[HTTPStatus, dict[str, Any]]:
        """Whether rounds succeed, and why not."""
        age = time.monotonic() - self._good_at
        told = {"store": redact(self.store), "seconds_since_good_round": round(age, 1)}
        if self._problem is None and age < _LATE * self.interval + 60.0:
            return HTTPStatus.OK, {"status": "ok", **told}
        problem = self._problem or "a round hangs"
        return HTTPStatus.SERVICE_UNAVAILABLE, {"status": "failing", "problem": problem, **told}


def targets(runs: list[Run]) -> list[dict[str, Any]]:
    """What `http_sd_configs` wants: an entry for each exporter of live runs.

    Runs of one job share theirs. The labels are for relabelling; Prometheus drops them otherwise.
    """
    found = {}
    for run in runs:
        if run.metrics_url is None or not run.is_live():
            continue
        url = urllib.parse.urlsplit(run.metrics_url)
        labels = {
            "__scheme__": url.scheme,
            "__metrics_path__": url.path,
            "__meta_gradwatch_job": run.job,
            "__meta_gradwatch_host": run.host,
        }
        found[run.metrics_url] = {"targets": [url.netloc], "labels": labels}
    return list(found.values())


class _Server(ThreadingHTTPServer):
    """Of the address family that the address is of."""

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET; whoever never asks, or never reads, is let go of."""

    timeout = 10.0
    server_version = "gradwatch"
    sys_version = ""
    pages: ClassVar = ("/healthz", "/metrics", "/sd")

    def do_GET(self) -> None:
        """One of the pages; a 404 names them."""
        service: Service = self.server.service  # type: ignore[attr-defined]
        path = urllib.parse.urlsplit(self.path).path
        if path == "/healthz":
            self._answer(*service.health())
        elif path == "/metrics":
            self._send(HTTPStatus.OK, service.watch.exposition(), CONTENT_TYPE_LATEST)
        elif path == "/sd":
            try:
                with Store(service.store) as store:
                    self._answer(HTTPStatus.OK, targets(store.runs(status="running")))
            except StoreNotFoundError:
                self._answer(HTTPStatus.OK, [])
            except GradwatchError as error:  # Prometheus keeps what it had
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"problem": str(error)})
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"pages": self.pages})

    def handle(self) -> None:
        """One connection; what it does wrong is not ours to print."""
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _answer(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
