"""The Prometheus sink: counts in numpy, families made when scraped, one exporter a process."""

from __future__ import annotations

import dataclasses
import errno
import math
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector

from gradwatch import identity, metrics
from gradwatch.recorder import FLAGS
from gradwatch.sinks import scrapers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric as Family

    from gradwatch.records import Batch, RunInfo, RunStatus

__all__ = ["Exporter", "PrometheusSink", "Vitals"]

_PORTS_TRIED = 100
_KEEP_ENDED_SECONDS = 900.0  # long enough for any scrape interval to see the last values
_BOUNDS = np.array(metrics.NORM_BUCKETS)
_FLAG_COUNTERS = {
    "gradwatch_clipped_steps_total": FLAGS.CLIPPED,
    "gradwatch_nonfinite_steps_total": FLAGS.NONFINITE,
    "gradwatch_skipped_steps_total": FLAGS.SKIPPED,
    "gradwatch_amp_overflow_steps_total": FLAGS.AMP_OVERFLOW,
}
_FIELD_GAUGES = {
    "gradwatch_last_grad_norm_pre_clip": "pre_norm",
    "gradwatch_last_grad_norm_post_clip": "post_norm",
    "gradwatch_clip_threshold": "threshold",
    "gradwatch_learning_rate": "lr",
    "gradwatch_loss": "loss",
    "gradwatch_loss_scale": "loss_scale",
    "gradwatch_last_step_timestamp_seconds": "time",
}
_HISTOGRAMS = {
    "gradwatch_grad_norm_pre_clip": "pre_norm",
    "gradwatch_grad_norm_post_clip": "post_norm",
}


class Vitals(Protocol):
    """What the agent knows of itself, read at scrape time."""

    def backlog(self) -> int:
        """Records in the ring, not in the store yet."""
        ...

    def overhead_seconds(self) -> float:
        """Time spent in the hooks on the training thread."""
        ...

    def dropped(self) -> dict[str, int]:
        """Records lost to the store, by reason."""
        ...


class _Series:
    """One run's counts. They start at 0 with the process and never go back."""

    def __init__(self, run: RunInfo) -> None:
        self.run = run
        self.vitals: Vitals | None = None
        self.ended_at: float | None = None
        self.failed = False
        self.counters = dict.fromkeys(("gradwatch_steps_total", *_FLAG_COUNTERS), 0)
        self.gauges: dict[str, float] = {}
        self.buckets = {name: np.zeros(len(_BOUNDS) + 1, dtype=np.int64) for name in _HISTOGRAMS}
        self.sums = dict.fromkeys(_HISTOGRAMS, 0.0)

    def go_on(self, run: RunInfo, vitals: Vitals | None) -> None:
        self.run, self.vitals, self.ended_at, self.failed = run, vitals, None, False

    def add(self, batch: Batch) -> None:
        steps = batch.steps
        if not len(steps):
            return
        self.counters["gradwatch_steps_total"] += len(steps)
        for name, flag in _FLAG_COUNTERS.items():
            self.counters[name] += int(np.count_nonzero(steps["flags"] & flag))
        for name, field in _FIELD_GAUGES.items():
            values = steps[field]
            finite = values[np.isfinite(values)]
            if len(finite):
                self.gauges[name] = float(finite[-1])
        for name, field in _HISTOGRAMS.items():
            values = steps[field]
            finite = values[np.isfinite(values)]
            where = np.searchsorted(_BOUNDS, finite, side="left")
            self.buckets[name] += np.bincount(where, minlength=len(_BOUNDS) + 1)
            total = self.sums[name] + float(finite.sum())
            self.sums[name] = total if math.isfinite(total) else self.sums[name]


class PrometheusSink:
    """Keeps every run's counts, and hands them to the exporter's registry."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._series: dict[str, _Series] = {}  # by run name: names are labels, so they must differ
        self._vitals: dict[str, Vitals] = {}  # by ring, until the run is opened
        self._lock = threading.Lock()

    def watch(self, ring: str, vitals: Vitals) -> None:
        """Remember where to read the agent's own state of the run with that ring."""
        self._vitals[ring] = vitals

    def open(self, run: RunInfo) -> RunInfo:
        """The run's counters exist from here on: at 0, or as they were if it goes on."""
        with self._lock:
            self._forget_ended()
            name, ordinal = run.name, 1
            while (other := self._series.get(name)) and other.ended_at is None:
                ordinal += 1
                name = f"{run.name}-{ordinal}"
            run = dataclasses.replace(run, name=name)
            if other is None or other.run.uid != run.uid:
                other = self._series[name] = _Series(run)
            other.go_on(run, self._vitals.pop(run.ring, None))
        return run

    def write(self, run: RunInfo, batch: Batch) -> None:
        """Add the batch to the run's counts, all at once as a scrape sees it."""
        with self._lock:
            self._series[run.name].add(batch)

    def heartbeat(self, run: RunInfo) -> None:
        """Nothing to do: the exporter being there is the heartbeat."""

    def close(self, run: RunInfo, status: RunStatus | None) -> None:
        """The run's last values stay for a while, so that a scrape still finds them."""
        with self._lock:
            series = self._series[run.name]
            series.ended_at, series.failed = self._clock(), status == "failed"

    def families(self) -> list[Family]:
        """All metric families with their samples, as of now."""
        with self._lock:
            self._forget_ended()
            runs = list(self._series.values())
            return [*(_family(metric, runs) for metric in metrics.AGENT), _exporter()]

    def _forget_ended(self) -> None:
        oldest = self._clock() - _KEEP_ENDED_SECONDS
        self._series = {
            name: series
            for name, series in self._series.items()
            if series.ended_at is None or series.ended_at > oldest
        }


def _exporter() -> Family:
    metric = metrics.EXPORTER
    family = InfoMetricFamily(metric.name.removesuffix("_info"), metric.meaning)
    family.add_metric((), {"answering": identity.process()})
    return family


def _family(metric: metrics.Metric, runs: list[_Series]) -> Family:
    family: Family = _FAMILIES[metric.type](metric)
    for series in runs:
        labels = [series.run.name, str(series.run.rank)]
        _ADDERS[metric.type](family, metric.name, labels, series)
    return family


def _add_counter(family: Any, name: str, labels: list[str], series: _Series) -> None:
    vitals = series.vitals
    if name == "gradwatch_dropped_records_total":
        dropped = vitals.dropped() if vitals else {}
        for reason in metrics.DROP_REASONS:
            family.add_metric([*labels, reason], dropped.get(reason, 0))
    elif name == "gradwatch_overhead_seconds_total":
        family.add_metric(labels, vitals.overhead_seconds() if vitals else 0.0)
    else:
        family.add_metric(labels, series.counters[name])


def _add_gauge(family: Any, name: str, labels: list[str], series: _Series) -> None:
    if name == "gradwatch_recorder_backlog_records":
        family.add_metric(labels, series.vitals.backlog() if series.vitals else 0)
    elif name == "gradwatch_run_active":
        if not series.failed:  # the last that Prometheus knows is that it went on
            family.add_metric(labels, series.ended_at is None)
    elif name in series.gauges:
        family.add_metric(labels, series.gauges[name])


def _add_histogram(family: Any, name: str, labels: list[str], series: _Series) -> None:
    counts = np.cumsum(series.buckets[name]).tolist()
    bounds = [*map(str, metrics.NORM_BUCKETS), "+Inf"]
    family.add_metric(labels, list(zip(bounds, counts, strict=True)), series.sums[name])


def _add_info(family: Any, name: str, labels: list[str], series: _Series) -> None:  # noqa: ARG001
    run = series.run
    versions = run.settings.get("versions", {})
    values = {
        "uid": run.uid,
        "host": run.host,
        "optimizer": str(run.settings.get("optimizer", "")),
        "policy": str(run.settings.get("clip", "")),
        "gradwatch": str(versions.get("gradwatch", "")),
        "torch": str(versions.get("torch", "")),
    }
    family.add_metric(labels, values)


_FAMILIES: dict[str, Callable[[metrics.Metric], Any]] = {
    "counter": lambda m: CounterMetricFamily(
        m.name.removesuffix("_total"), m.meaning, labels=(*metrics.LABELS, *m.labels)
    ),
    "gauge": lambda m: GaugeMetricFamily(m.name, m.meaning, labels=(*metrics.LABELS, *m.labels)),
    "histogram": lambda m: HistogramMetricFamily(m.name, m.meaning, labels=metrics.LABELS),
    "info": lambda m: InfoMetricFamily(
        m.name.removesuffix("_info"), m.meaning, labels=metrics.LABELS
    ),
}
_ADDERS: dict[str, Callable[[Any, str, list[str], _Series], None]] = {
    "counter": _add_counter,
    "gauge": _add_gauge,
    "histogram": _add_histogram,
    "info": _add_info,
}


class _Collector(Collector):
    def __init__(self, sink: PrometheusSink) -> None:
        self._sink = sink

    def collect(self) -> Iterator[Family]:
        return iter(self._sink.families())

    def describe(self) -> list[Family]:
        return []


class Exporter:
    """The process's one HTTP server for Prometheus, with a registry of its own."""

    def __init__(
        self, sink: PrometheusSink, *, addr: str, port: int, advertised: str | None
    ) -> None:
        """Bind the port, or the next free one of the hundred after it; 0: any.

        Raises `OSError` where none can be bound.
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(sink))
        self.requested = port
        self._server, self._thread = _serve(registry, addr, port)
        scrapers.limit(self._server)
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


def _serve(registry: CollectorRegistry, addr: str, port: int) -> tuple[Any, threading.Thread]:
    last = port if port == 0 else min(port + _PORTS_TRIED, 65535)
    for candidate in range(port, last + 1):
        try:
            return start_http_server(candidate, addr, registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or candidate == last:
                raise
    raise AssertionError
