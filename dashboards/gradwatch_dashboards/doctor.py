"""Is this machine fit to record and to look? One check a line."""

from __future__ import annotations

import platform
import shutil
import sqlite3
import urllib.request
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal, NamedTuple

from gradwatch.addresses import scrapable, why_not_bound
from gradwatch.config import Settings, redact, sqlite_path, unknown_variables
from gradwatch.errors import GradwatchError, StoreNotFoundError
from gradwatch.filesystems import advice, network_kind
from gradwatch.identity import host, is_alive
from gradwatch.rings import folders, intruded
from gradwatch.sinks import sqlite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["Check", "examine"]

_RING_BYTES = 20 << 20
_ANSWER_SECONDS = 5.0  # of a job that may be busy
_EXTRAS = {"monitor": ("streamlit", "pandas", "alembic"), "postgres": ("psycopg",)}


class Check(NamedTuple):
    """One thing looked at: fine, worth knowing, or wrong."""

    status: Literal["ok", "note", "problem"]
    subject: str
    detail: str


def examine(store: str, environ: Mapping[str, str]) -> list[Check]:
    """All checks, for this store."""
    try:
        Settings.load(store=store)
        Settings.load()
    except GradwatchError as error:
        checks = [*_versions(), _sqlite(), *_store(store)]
        if not any(str(error) in check.detail for check in checks):
            checks.append(Check("problem", "settings", str(error)))
        return [*checks, *_variables(environ)]
    return [
        *_versions(),
        _sqlite(),
        *_store(store),
        *_rings(store),
        _port(),
        *_exporters(store),
        *_variables(environ),
    ]


def _versions() -> Iterator[Check]:
    yield Check("ok", "python", platform.python_version())
    for package in ("gradwatch", "torch"):
        yield Check("ok", package, version(package))
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if not _installed(package)]
        if missing:
            detail = f"without {', '.join(missing)}: pip install 'gradwatch[{extra}]'"
            yield Check("note", f"gradwatch[{extra}]", detail)
        else:
            yield Check("ok", f"gradwatch[{extra}]", "installed")


def _sqlite() -> Check:
    weakness = sqlite.weakness()
    if weakness is not None:
        return Check("note", "sqlite", weakness)
    return Check("ok", "sqlite", sqlite3.sqlite_version)


def _store(url: str) -> Iterator[Check]:
    from gradwatch_monitor.store import Store  # noqa: PLC0415 - a check like any other

    try:
        path = sqlite_path(url)
        with Store(url) as store:
            runs = len(store.runs())
            yield Check("ok", "store", f"{store.name}, {runs} run{'s' * (runs != 1)}")
    except StoreNotFoundError:
        yield Check("ok", "store", f"{redact(url)} is not there yet: the first job makes it")
    except GradwatchError as error:
        yield Check("problem", "store", str(error))
        return
    if path is not None and (kind := network_kind(path.parent)):
        yield Check("problem", "store", advice(redact(url), kind))
    if path is not None and (problem := _unwritable(path.parent)):
        yield Check("problem", "store", f"no job can write {path.parent}: {problem}")
    elif path is not None and (problem := _full(path.parent)):
        yield Check("problem", "store", problem)


def _rings(store: str) -> Iterator[Check]:
    for folder in folders(Settings.load(store=store))[:1]:
        if problem := intruded(folder):
            yield Check("problem", "flight recorder", problem)
        elif problem := _unwritable(folder):
            yield Check("problem", "flight recorder", f"cannot be kept in {folder}: {problem}")
        elif problem := _full(folder):
            yield Check("problem", "flight recorder", problem)
        else:
            left = len(list(folder.glob("*.ring"))) if folder.is_dir() else 0
            detail = f"{folder}" + (f", {left} of runs that run or were killed" if left else "")
            yield Check("ok", "flight recorder", detail)


def _port() -> Check:
    settings = Settings.load()
    port = settings.metrics_port
    if not isinstance(port, int):
        return Check("note", "metrics", "no exporter (GRADWATCH_METRICS_PORT)")
    if (problem := why_not_bound(settings.metrics_addr, port)) is not None:
        detail = f"{settings.metrics_addr}:{port}: {problem}; the next free one is taken"
        return Check("note", "metrics", detail)
    return Check("ok", "metrics", f"{settings.metrics_addr}:{port} is free")


def _exporters(url: str) -> Iterator[Check]:
    """Whether the live runs of this machine answer where they say that they are scraped."""
    from gradwatch_monitor.store import Store  # noqa: PLC0415

    try:
        with Store(url) as store:
            runs = store.runs(status="running")
    except GradwatchError:  # told above
        return
    mine = [run for run in runs if run.host == host() and run.is_live()]
    here = [run for run in mine if run.pid is not None and is_alive(run.pid)]
    for metrics_url, run in {run.metrics_url: run for run in here}.items():
        if metrics_url is None:
            continue
        if problem := _silent(metrics_url):
            detail = f"no answer at {metrics_url} ({problem}): Prometheus does not see this run"
            yield Check("problem", f"metrics of {run.name}", detail)
        else:
            yield Check("ok", f"metrics of {run.name}", metrics_url)


def _silent(url: str) -> str | None:
    """Why nothing comes from there within a second; None: it does."""
    if scrapable(url) is None:  # an opener would read a file, too
        return "it is no address of an exporter"
    # Past any proxy, which would not know this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ANSWER_SECONDS) as answer:
            answer.read(1)
    except (OSError, HTTPException, ValueError) as error:
        return str(getattr(error, "reason", None) or error)
    return None


def _variables(environ: Mapping[str, str]) -> Iterator[Check]:
    known = ", ".join(sorted(f"GRADWATCH_{name.upper()}" for name in Settings.model_fields))
    for name in unknown_variables(environ):
        yield Check("problem", name, f"no such setting; there are {known}")


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _full(folder: Path) -> str | None:
    """That there is no space for a flight recorder, or as much of a store, in a folder."""
    free = shutil.disk_usage(_existing(folder)).free
    if free >= _RING_BYTES:
        return None
    return f"the disk of {folder} is full ({free / 2**20:.1f} MiB free): make some space on it"


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be written below a folder that may not be there yet."""
    import tempfile  # noqa: PLC0415

    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return None
    except OSError as error:
        return error.strerror or str(error)
