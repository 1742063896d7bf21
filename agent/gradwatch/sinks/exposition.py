"""Prometheus' text format (version 0.0.4), written from templates: a scrape only puts numbers in.

A scrape holds the interpreter's lock, and with it the training. `prometheus_client` makes an object
of every sample and escapes every label at every scrape; here the text around a run's numbers is
made once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from gradwatch import metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gradwatch.records import RunInfo

__all__ = ["CONTENT_TYPE", "Numbers", "RunLines", "active_line", "families", "plain_line"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BY_REASON = "gradwatch_dropped_records_total"
_INFO = "gradwatch_run_info"
_ACTIVE = "gradwatch_run_active"
_TYPES = {"info": "gauge"}  # what the format calls it


class Numbers(NamedTuple):
    """What a run's lines are filled with at a scrape."""

    values: Mapping[str, float]  # of counters and gauges, by metric; what is absent has no line
    dropped: Mapping[str, int]  # by reason
    buckets: Mapping[str, Sequence[int]]  # cumulated counts of the histograms, by metric
    sums: Mapping[str, float]
    active: int | None


class RunLines:
    """A run's lines by metric, with places for their numbers."""

    def __init__(self, run: RunInfo) -> None:
        self._active = active_line(run.name, run.rank, run.uid)
        labels = {"run": run.name, "rank": str(run.rank)}
        self._plain = {
            m.name: f"{m.name}{_braces(labels)} "
            for m in metrics.AGENT
            if m.type in {"counter", "gauge"} and not m.labels
        }
        self._dropped = {
            reason: f"{_BY_REASON}{_braces({**labels, 'reason': reason})} "
            for reason in metrics.DROP_REASONS
        }
        self._histograms = {
            m.name: _histogram(m.name, labels) for m in metrics.AGENT if m.type == "histogram"
        }
        self._info = f"{_INFO}{_braces({**labels, **_facts(run)})} 1\n"

    def filled(self, numbers: Numbers) -> dict[str, str]:
        """The lines of each metric that has any."""
        plain = self._plain
        texts = {
            name: f"{plain[name]}{value}\n"
            for name, value in numbers.values.items()
            if math.isfinite(value)
        }
        texts[_BY_REASON] = "".join(
            f"{start}{numbers.dropped.get(reason, 0)}\n" for reason, start in self._dropped.items()
        )
        for name, template in self._histograms.items():
            counts = numbers.buckets[name]
            texts[name] = template % (*counts, counts[-1], numbers.sums[name])
        texts[_INFO] = self._info
        if numbers.active is not None:
            texts[_ACTIVE] = f"{self._active}{numbers.active}\n"
        return texts


def active_line(run: str, rank: int, uid: str) -> str:
    """Of the one metric that every run has, whatever else is left out; the number is missing."""
    return f"{_ACTIVE}{_braces({'run': run, 'rank': str(rank), 'uid': uid})} "


def plain_line(name: str, labels: Mapping[str, str], value: float) -> dict[str, str]:
    """The line of a metric that the process has once."""
    return {name: f"{name}{_braces(labels)} {value}\n"}


def families(runs: Iterable[Mapping[str, str]], wanted: Iterable[str] = ()) -> str:
    """Every family with its head and the lines of all `runs`.

    Args:
        runs: lines by metric.
        wanted: names of series; only their families, where any are named.
    """
    runs, only = list(runs), {_family(name) for name in wanted}
    parts = []
    for metric, head in _HEADS.items():
        if only and metric not in only:
            continue
        parts.append(head)
        parts += [lines[metric] for lines in runs if metric in lines]
    return "".join(parts)


def _facts(run: RunInfo) -> dict[str, str]:
    versions = run.settings.get("versions", {})
    return {
        "uid": run.uid,
        "host": run.host,
        "optimizer": str(run.settings.get("optimizer", "")),
        "policy": str(run.settings.get("clip", "")),
        "gradwatch": str(versions.get("gradwatch", "")),
        "torch": str(versions.get("torch", "")),
    }


def _histogram(name: str, labels: Mapping[str, str]) -> str:
    """A template for the counts of all buckets, the count of all, and the sum."""
    bounds = [*map(str, metrics.NORM_BUCKETS), "+Inf"]
    starts = [f"{name}_bucket{_braces({'le': bound, **labels})} " for bound in bounds]
    lines = "".join(f"{start.replace('%', '%%')}%d\n" for start in starts)
    own = _braces(labels).replace("%", "%%")
    return f"{lines}{name}_count{own} %d\n{name}_sum{own} %s\n"


def _braces(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items()))
    return f"{{{inner}}}" if inner else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _family(name: str) -> str:
    return next(
        (
            name.removesuffix(suffix)
            for suffix in ("_bucket", "_count", "_sum")
            if name.removesuffix(suffix) in _HEADS
        ),
        name,
    )


def _head(metric: metrics.Metric) -> str:
    meaning = metric.meaning.replace("\\", r"\\").replace("\n", r"\n")
    kind = _TYPES.get(metric.type, metric.type)
    return f"# HELP {metric.name} {meaning}\n# TYPE {metric.name} {kind}\n"


_HEADS = {m.name: _head(m) for m in (*metrics.AGENT, metrics.EXPORTER, metrics.RUNS_NOT_EXPORTED)}
