"""Recovery: what processes that are gone left in their flight recorders is brought to the store.

Exactly once, however many look at the same time: a ring is claimed under its lock, and the store
takes a batch only where its own cursor of that ring stands (see `sinks.database`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from gradwatch import rings, salvage
from gradwatch.channel import Channel
from gradwatch.clock import SystemClock
from gradwatch.config import Settings, resolve_store
from gradwatch.delivery import Delivery
from gradwatch.errors import RingError
from gradwatch.records import RunInfo
from gradwatch.sinks import NullSink
from gradwatch.sinks.database import DatabaseSink
from gradwatch.troubles import Troubles

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from gradwatch.clock import Clock
    from gradwatch.recorder import Ring
    from gradwatch.records import RunStatus
    from gradwatch.sinks import Sink

__all__ = ["Patrol", "Recovered", "left_behind", "recover"]

_LOOK_SECONDS = 60.0
_TRY_SECONDS = 20.0
_OTHERS_SECONDS = 60.0  # how long a run waits for another process to store what precedes it
_PAUSE_SECONDS = 0.05  # between two tries of a store that somebody else has just now
_FIELDS = {field.name for field in dataclasses.fields(RunInfo)}


class Recovered(NamedTuple):
    """What became of one flight-recorder file that a dead process left."""

    path: Path
    run: str | None = None  # its name; None where the file does not tell
    uid: str | None = None
    rank: int | None = None
    status: RunStatus | None = None
    last_step: int | None = None
    steps: int = 0  # step records that were stored now; the steps of a run are those of rank 0
    lost: int = 0  # step records that were overwritten or torn before anyone stored them
    problem: str | None = None  # why it is still there; None: all of it is stored


def recover(
    store: str,
    folders: Sequence[Path] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Recovered]:
    """Store what dead processes left for this store, and say what it was.

    Args:
        store: the store's SQLAlchemy URL, or an SQLite file's path.
        folders: where to look; default: where a job on this machine with these settings writes.
        progress: called with how many files are done, of how many at most.

    The files of processes that live are left alone. So are those that cannot be stored, and in
    folders that were named those of another store: they say why. Raises `ConfigurationError` where `store` is no store's URL.
    """
    store = resolve_store(store)
    named = folders is not None
    folders = rings.folders(Settings.load(store=store)) if folders is None else folders
    sink = DatabaseSink(store)
    told: dict[Path, Recovered] = {}

    def damaged(path: Path, why: str) -> None:
        told[path] = Recovered(path, problem=why)

    foreign = damaged if named else _ignore
    delivery = Delivery(SystemClock(), _Silent())  # why it failed is returned
    total = sum(len(list(folder.glob("*.ring"))) for folder in folders)
    for path, channel in left_behind(folders, store, sink, damaged, foreign):
        told[path] = _store(path, channel, delivery)
        progress(len(told), total)
    # Once more: a rank may have come before the rank 0 whose run it belongs to.
    if any(found.problem for found in told.values()):
        for path, channel in left_behind(folders, store, sink, damaged, foreign):
            told[path] = _store(path, channel, delivery)
    progress(total, total)
    return list(told.values())


def left_behind(
    folders: Iterable[Path],
    store: str,
    sink: Sink,
    report: Callable[[Path, str], None],
    foreign: Callable[[Path, str], None],
    first: Collection[str] = (),
) -> Iterator[tuple[Path, Channel]]:
    """One after the other, a channel to the sink for each ring that a dead process left for it.

    It is to be served until it is closed before the next is asked for. `report` is told of files
    that nobody can store, `foreign` of those that belong in another store. Rings come in the order
    in which they were begun, since attempts at one run go on from each other; those of the uids
    `first` before all others.
    """

    def order(place: tuple[Path, Path]) -> tuple[bool, float, str]:
        seen = salvage.look(place[1])
        about = {} if seen is None else seen.about
        began = about.get("started_at")
        at = float(began) if isinstance(began, (int, float)) else math.inf
        return about.get("uid") not in first, at, place[1].name

    places = [(folder, path) for folder in folders for path in _files(folder, report)]
    for folder, path in sorted(places, key=order):
        # The folder beside an SQLite file goes where the file goes.
        near = folder == rings.beside(store)

        def wanted(about: Mapping[str, Any], *, near: bool = near, path: Path = path) -> bool:
            if near or _place(str(about.get("store", ""))) == _place(store):
                return True
            if not salvage.lives(about):
                recorded = about.get("store", "")
                foreign(path, f"was recorded for {recorded}: name that store with --store")
            return False

        try:
            ring = salvage.claim(path, wanted)
            if ring is None:
                continue
            if ring.heads == (0, 0) and not _leads(ring):
                ring.close(remove=True)  # nothing to tell; rank 0's tells how the run ended
            else:
                yield path, _channel(ring, sink)
        except RingError as error:
            report(path, str(error))


def _precede(folders: Iterable[Path], store: str, run: RunInfo) -> bool:
    """Whether a dead process has left steps of this run, on whose number its next one depends."""
    for folder in folders:
        try:
            paths = list(folder.glob(f"{rings.prefix(run.uid)}-*.ring"))
        except OSError:
            continue
        for path in paths:
            seen = salvage.look(path)
            if seen is None or not seen.gone:
                continue
            about = seen.about
            near = folder == rings.beside(store)
            if (
                (about.get("uid"), about.get("rank")) == (run.uid, 0)
                and float(about["started_at"]) < run.started_at
                and (near or _place(str(about.get("store"))) == _place(store))
            ):
                return True
    return False


def _files(folder: Path, report: Callable[[Path, str], None]) -> list[Path]:
    """The rings in a folder; none where it is not to be trusted, or cannot be read."""
    problem = rings.intruded(folder)
    if problem is None:
        try:
            salvage.sweep(folder, time.time())
            return sorted(folder.glob("*.ring"))
        except OSError as error:
            problem = f"cannot look into {folder}: {error.strerror or error}"
    report(folder, problem)
    return []


class Patrol:
    """The worker's look, once a minute, for what dead processes have left for its stores."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._beats: dict[str, tuple[list[Path], Sink]] = {}  # by store
        self._found: Iterator[tuple[Path, Channel]] = iter(())
        self._current: Channel | None = None
        self._look_at = -math.inf

    def add(self, settings: Settings, sink: Sink) -> None:
        """Look for rings of this store too."""
        if settings.store not in self._beats:
            self._beats[settings.store] = rings.folders(settings), sink
            self._look_at = -math.inf

    def owes(self, store: str, run: RunInfo, since: float) -> bool:
        """Whether what a dead process has left of this run is still to be stored, before it goes on.

        What others have taken to store is waited for a minute `since` then.
        """
        if self._is_of(run):
            return True
        if self._clock.monotonic() - since > _OTHERS_SECONDS:
            return False
        return _precede(self._beats[store][0], store, run)

    def problem(self, run: RunInfo) -> Exception | None:
        """What keeps that from the store; None: nothing, or it has not been tried."""
        return self._current.store.error if self._current and self._is_of(run) else None

    def _is_of(self, run: RunInfo) -> bool:
        """Whether what is being stored now is of this run."""
        current = self._current
        if current is None or current.closed.is_set():
            return False
        return (current.run.uid, current.run.rank) == (run.uid, 0)

    def next(self, awaited: Collection[str] = ()) -> Channel | None:
        """A channel that the worker is to serve as well: one at a time, `awaited` uids first."""
        if self._current is not None and not self._current.closed.is_set():
            return None
        if awaited:
            self._found = self._look(awaited)
        self._current = next(self._found, (None, None))[1]
        if self._current is None and self._clock.monotonic() >= self._look_at:
            self._look_at = self._clock.monotonic() + _LOOK_SECONDS
            self._found = self._look()
            self._current = next(self._found, (None, None))[1]
        if self._current is not None:
            # A store that is down, or a rank without its run: left for the next look.
            self._current.deadline = self._clock.monotonic() + _TRY_SECONDS
        return self._current

    def _look(self, first: Collection[str] = ()) -> Iterator[tuple[Path, Channel]]:
        return itertools.chain.from_iterable(
            left_behind(folders, store, sink, _ignore, _ignore, first)
            for store, (folders, sink) in self._beats.items()
        )


def _leads(ring: Ring) -> bool:
    return bool(ring.metadata.get("rank") == 0)


def _channel(ring: Ring, sink: Sink) -> Channel:
    about = ring.metadata
    try:
        known = {name: about[name] for name in _FIELDS & about.keys()}
        run = RunInfo(**{**known, "leader": ring.leader, "recovered": True})
        names = [str(name) for name in about.get("parameters", ())]
    except TypeError as error:
        ring.close()
        msg = f"{ring.path} does not say whose run it is: {error}"
        raise RingError(msg) from error
    channel = Channel(run, ring, sink, NullSink(), parameters=lambda: names)
    channel.end(ring.ending or "crashed", math.inf)
    return channel


def _place(url: str) -> Any:
    """Which database a URL is of: its file, or server and name as its driver would be told them.

    A parameter of the URL comes before its other parts. Users and options may differ.
    """
    try:
        parsed = make_url(url)
        _, told = parsed.get_dialect()().create_connect_args(parsed)
    except (ArgumentError, ValueError):
        return url
    if parsed.get_backend_name() == "sqlite":
        return parsed.database
    host = str(told.get("hostaddr") or told.get("host") or "").lower()
    ports = {port or "5432" for port in str(told.get("port") or "").split(",")}
    port = ports.pop() if len(ports) == 1 else told["port"]
    return host, port, told.get("dbname") or told.get("user")


def _ignore(path: Path, why: str) -> None:
    """Tell nobody."""


def _store(path: Path, channel: Channel, delivery: Delivery) -> Recovered:
    """Bring one ring to the store, here and now."""
    run, head = channel.run, channel.ring.heads[0]
    last = channel.ring.read_steps(max(0, head - 1)).records["step"]
    waited = False
    while not channel.closed.is_set() and (not channel.store.failures or channel.store.passing):
        channel.urgent = True
        delivery.serve(channel)
        if channel.store.passing:
            waited = True
            time.sleep(_PAUSE_SECONDS)
    problem = None
    if not channel.complete:
        if waited:
            delivery.patience = 0.0  # the next would wait as long in vain
        channel.ring.close()
        problem = channel.store.problem
    elif path.exists():
        problem = f"all of it is stored, but {path} cannot be removed: remove it yourself"
    return Recovered(
        path,
        channel.run.name,
        channel.run.uid,
        run.rank,
        channel.status,
        int(last[-1]) if len(last) else None,
        channel.store.stored if run.rank == 0 else 0,
        channel.dropped().get("ring_full", 0) + channel.dropped().get("torn", 0),
        problem,
    )


class _Silent(Troubles):
    """Whoever asked is told by what is returned."""

    def report(self, fault: str, message: str) -> None:
        """Do nothing."""
