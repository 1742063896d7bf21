"""The process's one worker: it looks at every ring a few times a second and delivers.

The training thread writes rings and never waits for anything here.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol

from gradwatch import identity
from gradwatch.clock import Clock, SystemClock
from gradwatch.config import redact, sqlite_path
from gradwatch.delivery import Delivery
from gradwatch.filesystems import advice, network_kind
from gradwatch.recovery import Patrol
from gradwatch.sinks.database import DatabaseSink
from gradwatch.sinks.file_sd import TargetFile
from gradwatch.sinks.prometheus import Exporter, PrometheusSink
from gradwatch.troubles import Troubles

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.channel import Channel
    from gradwatch.config import Settings
    from gradwatch.records import RunStatus

__all__ = ["Awaited", "Pipeline"]

EXIT_SECONDS = 2.0  # how long the interpreter's exit waits for the worker at most
_SQLITE_FORK_SECONDS = 2.0  # how long a fork waits at most while a file is written
_LAST_TRY = 0.9  # of the time that a run's end may take: then the worker begins nothing more


class Awaited(Protocol):
    """A watch that may not have seen a step yet."""

    @property
    def waits(self) -> bool:
        """Whether it has seen none."""
        ...

    def end(self) -> None:
        """Say so, and look no further."""
        ...


class Pipeline:
    """The worker thread with its channels, sinks and exporter. Started by the first channel."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.troubles = Troubles()
        self.metrics = PrometheusSink(self.clock.monotonic)
        self.job = identity.launcher(os.environ)
        self.ids = identity.Ids()
        self._delivery = Delivery(self.clock, self.troubles)
        self._patrol = Patrol(self.clock)
        self._exporter: Exporter | None = None
        self._target: TargetFile | None = None
        self._runs = itertools.count(1)
        self._stores: dict[str, DatabaseSink] = {}
        self._channels: list[Channel] = []
        self._interval = 60.0
        self._fork_timeout = 0.0
        self._lock = threading.Lock()
        self._delivering = threading.Lock()  # held by the worker while it uses a sink
        self._fork = threading.local()  # .holds: whether this thread has `_delivering`
        self._hangs = False  # a fork gave up waiting for the delivery that is still under way
        self._progress = threading.Condition()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._ended_well = False
        self._in_child: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._awaited: list[Awaited] = []  # watches that may not have seen a step

    # -- called by agents ----------------------------------------------------------------------

    def next_run(self) -> int:
        """The number of a run that begins, counted from 1 in this process."""
        return next(self._runs)

    def export(self, settings: Settings) -> str | None:
        """Start the process's exporter if there is none; where Prometheus finds it, or None."""
        port = settings.metrics_port
        if port is None or port == "off":
            return None
        asked_for = "metrics_port" in settings.model_fields_set
        with self._lock:
            if self._exporter is None or "metrics_runs" in settings.model_fields_set:
                self.metrics.most = settings.metrics_runs
            if self._exporter is None:
                self._exporter = self._start_exporter(settings, port)
                if self._exporter is None:
                    return None
            if self._target is None and settings.sd_dir is not None:
                self._target = TargetFile(settings.sd_dir, self._exporter.url, self.troubles)
            if asked_for and port not in {0, self._exporter.port}:
                self.troubles.report(
                    f"port {port}",
                    f"metrics are at {self._exporter.url}, not on port {port}: "
                    + (
                        "that port is in use"
                        if port == self._exporter.requested
                        else "a process has one exporter"
                    ),
                )
            return self._exporter.url

    def store_sink(self, url: str) -> DatabaseSink:
        """The process's one sink for that store."""
        with self._lock:
            if url not in self._stores:
                path = sqlite_path(url)
                if path is not None and (kind := network_kind(path.parent)):
                    self.troubles.report(f"network {url}", advice(redact(url), kind))
                self._stores[url] = DatabaseSink(url, self.clock.time)
            return self._stores[url]

    def attach(self, channel: Channel, settings: Settings) -> None:
        """Serve this channel from now on."""
        with self._lock:
            self._interval = min(self._interval, settings.drain_interval)
            self._fork_timeout = max(self._fork_timeout, _fork_timeout(settings))
            self._delivery.heartbeat = min(self._delivery.heartbeat, settings.heartbeat_interval)
            self._delivery.retry = self._interval
            self._channels.append(channel)
            if channel.store.sink in self._stores.values():
                self._patrol.add(settings, channel.store.sink)
                if channel.run.rank == 0 and channel.origin(0.0) is None:
                    since = self.clock.monotonic()
                    channel.held_back = lambda: self._is_preceded(channel, settings.store, since)
                    channel.held_by = lambda: self._patrol.problem(channel.run)
            if channel.metrics.sink is self.metrics:
                self.metrics.watch(channel.run.ring, channel)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="gradwatch-worker", daemon=True
                )
                self._thread.start()
        self._wake.set()

    def await_step(self, watch: Awaited) -> None:
        """End this watch with the process, so that it says where it has seen no step."""
        self._awaited = [other for other in self._awaited if other.waits]
        self._awaited.append(watch)

    def in_child(self, method: Callable[[], None]) -> None:
        """Call this bound method in a forked child; it is held weakly."""
        self._in_child = [m for m in self._in_child if m() is not None]
        self._in_child.append(weakref.WeakMethod(method))

    def flush(self, channel: Channel, timeout: float) -> bool:
        """Whether all that the ring holds now was stored within `timeout` seconds."""
        if channel.closed.is_set():
            return channel.complete
        target = channel.ring.heads
        channel.urgent = True
        self._wake.set()
        with self._progress:
            return self._progress.wait_for(lambda: channel.store.reached(target), timeout)

    def close(self, channel: Channel, status: RunStatus | None, timeout: float) -> None:
        """Store what is left of this channel, end its run, and let go of its ring.

        Waits `timeout` seconds at most. One that ends already keeps its status.
        """
        if not channel.closing:
            channel.end(status, self.clock.monotonic() + timeout * _LAST_TRY)
        self._wake.set()
        if not channel.closed.wait(timeout):
            channel.tell_incomplete()

    def let_end(self, channel: Channel) -> None:
        """The same as finished, when the worker next looks: takes no lock and does not wait."""
        channel.end("finished", self.clock.monotonic() + EXIT_SECONDS)

    # -- the worker ----------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            self._wake.wait(self._interval)
            self._wake.clear()
            with self._lock:
                awaited = self._look_for_the_dead()
                channels = list(self._channels)
            for channel in channels:
                with self._delivering:
                    self._delivery.serve(channel)
                    # One batch at a time; all of them where a run of this process waits for it.
                    while channel is awaited and not (
                        channel.closed.is_set() or channel.store.failures
                    ):
                        self._delivery.serve(channel)
                self._hangs = False
                if channel.closed.is_set():
                    with self._lock:
                        self._channels.remove(channel)
            with self._progress:
                self._progress.notify_all()
            ended = self._stopping and not self._channels
            if self._target is not None:
                if not ended:
                    runs = {c.run.uid for c in channels if not c.run.recovered}
                    self._target.keep(self.clock.monotonic(), runs)
                elif self._ended_well:
                    self._target.remove()
            if ended:
                return

    def _look_for_the_dead(self) -> Channel | None:
        """Serve what they left too, after the process's own; not once it ends itself.

        What a run of this process waits for comes first, and is returned.
        """
        held_back = [c for c in self._channels if c.store.run is None and c.held_back()]
        waiting = {c.run.uid for c in held_back}
        if self._stopping:
            self._channels = [
                c for c in self._channels if not c.run.recovered or c.run.uid in waiting
            ]
        try:
            channel = self._patrol.next(waiting) if waiting or not self._stopping else None
        except Exception as error:  # noqa: BLE001 - a bug here must not end the worker
            problem = f"{type(error).__name__}: {error}"
            self.troubles.report("patrol", f"no look for what killed jobs have left ({problem})")
            return None
        if channel is not None:
            self._channels.insert(0 if channel.run.uid in waiting else len(self._channels), channel)
        awaited = next(
            (c for c in self._channels if c.run.recovered and c.run.uid in waiting), None
        )
        if awaited is not None and any(c.urgent for c in held_back):
            awaited.urgent = True
        return awaited

    def _is_preceded(self, channel: Channel, store: str, since: float) -> bool:
        """Whether steps of the channel's run are still to be stored that come before its own."""
        ending = any(
            c is not channel and c.closing and c.run.uid == channel.run.uid and not c.run.recovered
            for c in self._channels
        )
        return ending or self._patrol.owes(store, channel.run, since)

    # -- the end of the process, and a forked child --------------------------------------------

    def shutdown(
        self,
        status: RunStatus,
        timeout: float = EXIT_SECONDS,
        *,
        exiting: bool = False,
        died: bool = False,
    ) -> None:
        """End every run that is left, within `timeout` seconds; `exiting`: as the process ends.

        Where it `died`, Prometheus goes on looking for it, so that it is missed.
        """
        deadline = time.monotonic() + timeout
        for watch in self._awaited:
            if status != "failed":
                watch.end()
        with self._lock:
            channels = list(self._channels)
        for channel in channels:
            if not channel.closing:
                channel.settle()
                channel.end(status, self.clock.monotonic() + timeout * 0.6)
        self._ended_well = not died
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            for channel in channels:
                if not channel.closed.is_set():
                    channel.tell_incomplete()
        if self._exporter is not None:
            self._exporter.close(wait=not exiting)

    def before_fork(self) -> None:
        """Close every connection: an SQLite one that is carried into a child corrupts the file.

        Waits until the worker is between two deliveries, as long as the settings say, and not again
        for a delivery that one fork has waited for in vain.
        """
        timeout = 0.0 if self._hangs else self._fork_timeout
        self._fork.holds = self._delivering.acquire(timeout=timeout)
        self._hangs = not self._fork.holds
        if self._fork.holds:
            for sink in self._stores.values():
                sink.dispose()

    def after_fork(self) -> None:
        """In the parent: the worker goes on, and connects again when it has something to store."""
        if getattr(self._fork, "holds", False):
            self._fork.holds = False
            self._delivering.release()

    def forked(self) -> None:
        """In the child: let go of what belongs to the parent, without touching it."""
        for method in self._in_child:
            if (call := method()) is not None:
                call()
        self._delivery.turns.restore()
        if self._exporter is not None:
            self._exporter.forked()

    def _start_exporter(self, settings: Settings, port: int) -> Exporter | None:
        try:
            return Exporter(
                self.metrics,
                addr=settings.metrics_addr,
                port=port,
                advertised=settings.advertised_addr,
            )
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            self.troubles.report(
                "exporter",
                f"no metrics are exported: cannot bind {settings.metrics_addr}:{port} ({why}); "
                "set GRADWATCH_METRICS_ADDR or GRADWATCH_METRICS_PORT",
            )
            return None


def _fork_timeout(settings: Settings) -> float:
    """How long a fork waits at most for the store of a run with these settings."""
    in_file = sqlite_path(settings.store) is not None
    return _SQLITE_FORK_SECONDS if in_file else settings.fork_timeout
