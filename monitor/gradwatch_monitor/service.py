"""The monitor beside the jobs: a loop over one store, and its HTTP face.

Each round stores what killed jobs of this machine left in their flight recorders, and looks at what
is wrong with the live runs. Over HTTP, `/healthz` tells whether rounds succeed, `/metrics` what was
found and is recommended, and `/sd` where Prometheus finds the live runs' exporters (the format of
its `http_sd_configs`).
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST

from gradwatch.addresses import scrapable
from gradwatch.config import redact, resolve_store
from gradwatch.errors import ConfigurationError, GradwatchError, StoreNotFoundError
from gradwatch.recovery import recover
from gradwatch.sinks.file_sd import TargetFile
from gradwatch.sinks.scrapers import Server
from gradwatch.troubles import Troubles
from gradwatch_monitor.store import Store
from gradwatch_monitor.watching import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from wsgiref.types import StartResponse, WSGIEnvironment

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
            self._server = Server((address, port), _Face(self))
        except OSError as error:
            msg = f"the monitor cannot bind {address}:{port} ({error.strerror}): try --port"
            raise ConfigurationError(msg) from None
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
        """One look at the store and at what lies beside it; what fails in one keeps nobody from the other."""
        failed: list[Exception] = []
        for act in (self._recover, self._look):
            try:
                act()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next round may succeed
                failed.append(error)
        if failed:
            self._failures += 1
            if self._failures == 1:
                return  # a store that is being made just now is not one yet
            known = isinstance(failed[0], GradwatchError)
            self._problem = f"{'' if known else type(failed[0]).__name__ + ': '}{failed[0]}"
            self._troubles.report("round", self._problem)
        else:
            self._failures, self._problem, self._good_at = 0, None, time.monotonic()
            self._troubles.clear("round", f"{redact(self.store)} is well again")

    def _recover(self) -> None:
        for ring in recover(self.store):
            if (ring.path.name, ring.problem) not in self._told:
                self._report(ring)
            if ring.problem is not None:  # it stays, and would be told in every round
                self._told.add((ring.path.name, ring.problem))

    def _look(self) -> None:
        with contextlib.suppress(StoreNotFoundError), Store(self.store) as store:
            self.watch.look(store)
            self._tell_malformed(store)

    def _tell_malformed(self, store: Store) -> None:
        if store.malformed:
            self.report(store.malformed.sentence, store.malformed.sentence)

    def report(self, fault: str, message: str) -> None:
        """Say that something is wrong, once."""
        self._troubles.report(fault, message)

    def targets(self) -> list[dict[str, Any]]:
        """Where Prometheus finds the exporters of live runs. Raises `StoreError`."""
        with contextlib.suppress(StoreNotFoundError), Store(self.store) as store:
            found = targets(store.runs(status="running"), self._tell_unreachable)
            self._tell_malformed(store)
            return found
        return []

    def _tell_unreachable(self, run: Run) -> None:
        self.report(
            f"metrics_url of run {run.id}",
            f"run {run.name!r} (id {run.id}) says that its metrics are at {run.metrics_url!r}, which "
            "is no address that Prometheus could scrape: /sd leaves it out",
        )

    def health(self) -> tuple[HTTPStatus, dict[str, Any]]:
        """Whether rounds succeed, and why not."""
        age = time.monotonic() - self._good_at
        told = {"store": redact(self.store), "seconds_since_good_round": round(age, 1)}
        if self._problem is None and age < _LATE * self.interval + 60.0:
            return HTTPStatus.OK, {"status": "ok", **told}
        problem = self._problem or "a round hangs"
        return HTTPStatus.SERVICE_UNAVAILABLE, {"status": "failing", "problem": problem, **told}


def targets(
    runs: list[Run], unreachable: Callable[[Run], None] = lambda _: None
) -> list[dict[str, Any]]:
    """What `http_sd_configs` wants: an entry for each exporter of live runs.

    Runs of one job share theirs. The labels are for relabelling; Prometheus drops them otherwise.
    `unreachable` is told of each run whose URL is none that can be scraped: it is left out, since
    Prometheus takes all entries or none.
    """
    found = {}
    for run in runs:
        if run.metrics_url is None or not run.is_live():
            continue
        url = scrapable(run.metrics_url)
        if url is None:
            unreachable(run)
            continue
        labels = {
            "__scheme__": url.scheme,
            "__metrics_path__": url.path,
            "__meta_gradwatch_job": run.job,
            "__meta_gradwatch_host": run.host,
        }
        found[run.metrics_url] = {"targets": [url.netloc], "labels": labels}
    return list(found.values())


class _Face:
    """The monitor's HTTP face, a WSGI application: one of its pages for each GET."""

    pages = ("/healthz", "/metrics", "/sd")

    def __init__(self, service: Service) -> None:
        self._service = service

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request; what is not GET or HEAD is told so."""
        method, path = environ["REQUEST_METHOD"], _path(environ.get("PATH_INFO", ""))
        headers = []
        if method in {"GET", "HEAD"}:
            status, kind, body = self._page(path)
        else:
            headers = [("Allow", "GET, HEAD")]
            status, kind, body = _json(
                HTTPStatus.METHOD_NOT_ALLOWED, {"problem": "only GET and HEAD are answered"}
            )
        headers += [("Content-Type", kind), ("Content-Length", str(len(body)))]
        start_response(f"{status.value} {status.phrase}", headers)
        return [b"" if method == "HEAD" else body]

    def _page(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """One of the pages; a 404 names them."""
        try:
            if path == "/healthz":
                return _json(*self._service.health())
            if path == "/metrics":
                return HTTPStatus.OK, CONTENT_TYPE_LATEST, self._service.watch.exposition()
            if path == "/sd":
                return _json(HTTPStatus.OK, self._service.targets())
        except GradwatchError as error:  # Prometheus keeps what it had
            return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"problem": str(error)})
        except Exception as error:  # noqa: BLE001 - whoever asks is answered, whatever it is
            problem = f"{type(error).__name__}: {error}"
            self._service.report(path, f"{path} could not be answered ({problem})")
            return _json(HTTPStatus.INTERNAL_SERVER_ERROR, {"problem": problem})
        return _json(HTTPStatus.NOT_FOUND, {"pages": self.pages})


def _path(asked: str) -> str:
    """The path of a request's target, which may also be a whole URL (RFC 9112, 3.2.2)."""
    return re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://[^/]*", "", asked) or "/"


def _json(status: HTTPStatus, value: Any) -> tuple[HTTPStatus, str, bytes]:
    return status, "application/json", json.dumps(value).encode()
