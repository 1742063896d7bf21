"""The Prometheus sink: which runs are exported, and the process's one exporter."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import gzip_accepted

from gradwatch import identity, metrics
from gradwatch.sinks import scrapers
from gradwatch.sinks.exposition import (
    CONTENT_TYPE,
    Numbers,
    active_line,
    families,
    plain_line,
)
from gradwatch.sinks.series import Series, Vitals
from gradwatch.troubles import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from gradwatch.records import Batch, RunInfo, RunStatus

__all__ = ["Exporter", "PrometheusSink"]

_PORTS_TRIED = 100
_KEEP_ENDED_SECONDS = 900.0  # long enough for any scrape interval to see the last values
_FAILED_SECONDS = 600.0  # a process that lives so long after an exception did not die of it


class _Ended(NamedTuple):
    """A run that has ended, of which at most one line is exported."""

    run: RunInfo
    ended_at: float
    failed: bool
    told_active: bool

    def active(self, now: float) -> int | None:
        """What its `gradwatch_run_active` says; None: nothing, so that the last value stands."""
        if not self.told_active or (self.failed and now - self.ended_at < _FAILED_SECONDS):
            return None
        return 0


class PrometheusSink:
    """Keeps every run's counts, and writes those of some of them for a scrape.

    All series are exported of `most` runs: of those that go on, in the order they began, then of
    those that ended, the last first. Of every other run there is only `gradwatch_run_active`,
    which tells a run that ended from one that was killed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = 20) -> None:
        self.most = most
        self._clock = clock
        self._series: dict[str, Series] = {}  # by run name: names are labels, so they must differ
        self._ended: dict[str, _Ended] = {}  # by uid, what is in `_series` no more
        self._vitals: dict[str, Vitals] = {}  # by ring, until the run is opened
        self._left_out = False  # whether it was said that not all is exported
        self._lock = threading.Lock()

    def watch(self, ring: str, vitals: Vitals) -> None:
        """Remember where to read the agent's own state of the run with that ring."""
        self._vitals[ring] = vitals

    def open(self, run: RunInfo) -> RunInfo:
        """The run's counters exist from here on: at 0, or as they were if it goes on."""
        with self._lock:
            name, ordinal = run.name, 1
            while (other := self._series.get(name)) and other.ended_at is None:
                ordinal += 1
                name = f"{run.name}-{ordinal}"
            run = dataclasses.replace(run, name=name)
            vitals = self._vitals.pop(run.ring, None)
            if other is not None and other.run.uid != run.uid:
                self._let_go(other)
            if (series := self._series.get(name)) is None:
                series = self._series[name] = Series(run)
            series.go_on(run, vitals)
            if (before := self._ended.pop(run.uid, None)) is not None:
                series.told_active = before.told_active
            self._forget()
        return run

    def write(self, run: RunInfo, batch: Batch) -> None:
        """Add the batch to the run's counts, all at once as a scrape sees it."""
        with self._lock:
            self._series[run.name].add(batch, self._clock())

    def heartbeat(self, run: RunInfo) -> None:
        """Nothing to do: the exporter being there is the heartbeat."""

    def close(self, run: RunInfo, status: RunStatus | None) -> None:
        """The run's last values stay for a while, so that a scrape still finds them."""
        with self._lock:
            series = self._series[run.name]
            series.ended_at, series.failed = self._clock(), status == "failed"
            self._forget()

    def exposition(self, wanted: Iterable[str] = ()) -> str:
        """All families with their samples as of now; only those of `wanted`, where any are named."""
        with self._lock:
            self._forget()
            now = self._clock()
            live = [s for s in self._series.values() if s.ended_at is None]
            ended = [s for s in self._series.values() if s.ended_at is not None]
            full = [*live[: self.most], *ended]
            lines = [series.lines.filled(_numbers(series, now)) for series in full]
            lines += self._active_alone(live[self.most :], now)
            left_out = len(live[self.most :]) + len(self._ended)
            for series in live:
                series.told_active = True
        lines.append(plain_line(metrics.EXPORTER.name, {"answering": identity.process()}, 1))
        lines.append(plain_line(metrics.RUNS_NOT_EXPORTED.name, {}, left_out))
        return families(lines, wanted)

    def _active_alone(self, live: list[Series], now: float) -> Iterator[dict[str, str]]:
        told = [(series.run, 1) for series in live]
        told += [
            (ended.run, active)
            for ended in self._ended.values()
            if (active := ended.active(now)) is not None
        ]
        for run, active in told:
            yield {"gradwatch_run_active": f"{active_line(run.name, run.rank, run.uid)}{active}\n"}

    def _forget(self) -> None:
        """Let go of what ended long ago, and of what there is no room for: first what ended first."""
        oldest = self._clock() - _KEEP_ENDED_SECONDS
        self._ended = {uid: its for uid, its in self._ended.items() if its.ended_at > oldest}
        ended = sorted(
            (series.ended_at, name)
            for name, series in self._series.items()
            if series.ended_at is not None
        )
        live = len(self._series) - len(ended)
        too_many = max(0, len(self._series) - max(self.most, live))
        for number, (ended_at, name) in enumerate(ended):
            if ended_at <= oldest:
                del self._series[name]
            elif number < too_many:
                self._let_go(self._series[name])
        if (too_many or live > self.most) and not self._left_out:
            self._left_out = True
            logger.warning(
                "gradwatch: more than %d runs are in this process: /metrics has every series of %d "
                "of them, first of those that go on, and gradwatch_run_active alone of the others; "
                "GRADWATCH_METRICS_RUNS sets how many (all of them are in the store)",
                self.most, self.most,
            )  # fmt: skip

    def _let_go(self, series: Series) -> None:
        """Keep of a run that has ended only what says so."""
        run, at = series.run, series.ended_at
        del self._series[run.name]
        if at is not None:
            self._ended[run.uid] = _Ended(run, at, series.failed, series.told_active)


def _numbers(series: Series, now: float) -> Numbers:
    vitals = series.vitals
    values: dict[str, float] = {
        **series.counters,
        **series.gauges(now),
        "gradwatch_overhead_seconds_total": vitals.overhead_seconds() if vitals else 0.0,
        "gradwatch_recorder_backlog_records": vitals.backlog() if vitals else 0,
    }
    if series.ended_at is None:
        active: int | None = 1
    else:
        active = _Ended(series.run, series.ended_at, series.failed, told_active=True).active(now)
    return Numbers(
        values,
        vitals.dropped() if vitals else {},
        {name: np.cumsum(counts).tolist() for name, counts in series.buckets.items()},
        series.sums,
        active,
    )


class _App:
    """Answers a scrape; whatever else is asked, as `prometheus_client` does."""

    def __init__(self, sink: PrometheusSink) -> None:
        self._sink = sink
        self._others: Any = make_wsgi_app(CollectorRegistry())

    def __call__(self, environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        """The metrics, where that is what was asked for."""
        if environ["REQUEST_METHOD"] != "GET" or environ["PATH_INFO"] == "/favicon.ico":
            answer: Iterable[bytes] = self._others(environ, respond)
            return answer
        asked = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""))
        body = self._sink.exposition(asked.get("name[]", ())).encode("utf-8", "replace")
        headers = [("Content-Type", CONTENT_TYPE)]
        if gzip_accepted(environ.get("HTTP_ACCEPT_ENCODING", "")):
            body = gzip.compress(body, compresslevel=1)  # without the interpreter's lock
            headers.append(("Content-Encoding", "gzip"))
        respond("200 OK", headers)
        return [body]


class Exporter:
    """The process's one HTTP server for Prometheus."""

    def __init__(
        self, sink: PrometheusSink, *, addr: str, port: int, advertised: str | None
    ) -> None:
        """Bind the port, or the next free one of the hundred after it; 0: any.

        Raises `OSError` where none can be bound.
        """
        self.requested = port
        self._server = _bind(_App(sink), addr, port)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.port: int = self._server.server_port
        host = advertised or ("127.0.0.1" if addr in {"0.0.0.0", "::", ""} else addr)  # noqa: S104
        self.url = (
            f"http://[{host}]:{self.port}/metrics"
            if ":" in host
            else (f"http://{host}:{self.port}/metrics")
        )

    def forked(self) -> None:
        """In a forked child: let go of the parent's socket, so that the port dies with it."""
        self._server.socket.close()

    def close(self, *, wait: bool = True) -> None:
        """Stop serving and give the port back; without `wait`, as the process ends."""
        if not wait:  # the server looks only twice a second whether it shall stop
            self._server.server_close()
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=1.0)


def _bind(app: WSGIApplication, addr: str, port: int) -> scrapers.Server:
    last = port if port == 0 else min(port + _PORTS_TRIED, 65535)
    for candidate in range(port, last + 1):
        try:
            return scrapers.Server((addr, candidate), app)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or candidate == last:
                raise
    raise AssertionError
