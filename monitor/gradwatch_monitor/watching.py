"""What the monitor knows of the live runs: findings and recommendations, on record and exported."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gradwatch import metrics
from gradwatch.errors import RunNotFoundError
from gradwatch_monitor.diagnose import OF_THE_AGENT, diagnose
from gradwatch_monitor.recommend import recommend
from gradwatch_monitor.stalls import stall_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gradwatch_monitor.recommend import Recommendation
    from gradwatch_monitor.rows import Run
    from gradwatch_monitor.store import Store

__all__ = ["Watch"]

SELDOM = 60.0  # seconds between two recommendations of a run


@dataclasses.dataclass
class _Watched:
    """One live run, as it was at the last look."""

    run: Run
    last_step: int | None = None
    stalled: bool = False
    active: dict[str, bool] = dataclasses.field(default_factory=dict)  # finding → whether it holds
    critical: set[str] = dataclasses.field(default_factory=set)  # findings that are, now
    recommendation: Recommendation | None = None
    recommended_at: float = -math.inf


class Watch(Collector):
    """Looks at the live runs of a store, round by round, and once more at one that has ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._watched: dict[int, _Watched] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def look(self, store: Store) -> None:
        """Diagnose the runs that went on, and keep in the store what is found.

        A run that cannot be looked at keeps nobody from the others; its error is raised after them.
        """
        live = {run.id: run for run in store.runs(status="running") if run.is_live()}
        for run_id, run in live.items():
            self._watched.setdefault(run_id, _Watched(run)).run = run
        failed: list[Exception] = []
        for run_id, watched in list(self._watched.items()):
            try:
                self._look_at(store, watched)
            except RunNotFoundError:  # pruned meanwhile
                pass
            except Exception as error:  # noqa: BLE001 - the other runs are looked at all the same
                failed.append(error)
            if run_id not in live:
                del self._watched[run_id]
        if failed:
            raise failed[0]

    def _look_at(self, store: Store, watched: _Watched) -> None:
        run_id, last_step = watched.run.id, store.last_step(watched.run.id)
        stalled = stall_of(store, store.run(run_id)) is not None
        if last_step is None or (last_step, stalled) == (watched.last_step, watched.stalled):
            return
        new = watched.last_step is None
        found = diagnose(store, run_id)
        if new or found or any(watched.active.values()):
            store.note_findings(run_id, found, keep=OF_THE_AGENT)
        watched.active = dict.fromkeys(watched.active, False) | {f.finding: True for f in found}
        watched.critical = {f.finding for f in found if f.severity == "critical"}
        if self._clock() - watched.recommended_at >= SELDOM:
            watched.recommended_at = self._clock()
            watched.recommendation = recommend(store, run_id)
            store.note_recommendation(run_id, last_step, watched.recommendation)
        watched.last_step, watched.stalled = last_step, stalled

    def exposition(self) -> bytes:
        """The gauges of `gradwatch.metrics.MONITOR`, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family a name, one sample a live run."""
        families = {
            metric.name: GaugeMetricFamily(
                metric.name, metric.meaning, labels=("run", "uid", *metric.labels)
            )
            for metric in metrics.MONITOR
        }
        for watched in list(self._watched.values()):
            who = [watched.run.name, watched.run.uid]  # several may have the name
            made = watched.recommendation
            if made is not None and made.verdict not in {"change", "use_policy"}:
                made = None  # the constant that it names is not recommended
            if made is not None and made.threshold is not None and math.isfinite(made.threshold):
                families["gradwatch_recommended_threshold"].add_metric(who, made.threshold)
            if made is not None and made.predicted_clip_ratio is not None:
                families["gradwatch_predicted_clip_ratio"].add_metric(
                    who, made.predicted_clip_ratio
                )
            for finding, active in sorted(watched.active.items()):
                families["gradwatch_finding_active"].add_metric([*who, finding], float(active))
                families["gradwatch_finding_critical"].add_metric(
                    [*who, finding], float(finding in watched.critical)
                )
        yield from families.values()
