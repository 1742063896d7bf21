"""SQLite as a store that many processes write: WAL, real BEGINs, checkpoints under a lock file.

SQLite before 3.51.3 can corrupt a file in WAL mode when two connections write and checkpoint it.
So no connection checkpoints by itself (`wal_autocheckpoint=0`); whoever wants to takes the
store's lock file first.

A connection does not notice what is done to its file, and its checkpoint, which is also made when
the last one closes, writes pages into whatever lies there by then. So the file is looked at before
it is used, and let go of without a checkpoint where it has changed or something went wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import sqlite3
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from gradwatch import cells
from gradwatch.sinks.rows import strict_json
from gradwatch.troubles import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["check", "check_kind", "checkpoint", "let_go", "look", "weakness", "writing_engine"]

_FIXED = (3, 51, 3)

_SETTINGS = (
    "journal_mode=WAL",
    "synchronous=NORMAL",
    "wal_autocheckpoint=0",
    # Else the WAL stays as long as it ever was, and each batch would make a checkpoint.
    "journal_size_limit=0",
)
_BUSY_SECONDS = 5.0  # how long a statement waits for another writer where nobody trains meanwhile
_CHECKPOINT_BYTES = 4 << 20  # a WAL shorter than this is left alone


def weakness() -> str | None:
    """What this machine's SQLite may do to a store, and what to do about it; None: nothing."""
    if sqlite3.sqlite_version_info >= _FIXED:
        return None
    return (
        f"{sqlite3.sqlite_version} has the WAL-reset bug (fixed in 3.51.3); gradwatch checkpoints "
        "under a lock file, so let no other program write the store"
    )


@functools.cache
def _tell_weakness() -> None:
    # Most systems have such a version, and jobs alone do no harm: no warning in each of them.
    if (told := weakness()) is not None:
        logger.info("gradwatch: SQLite %s", told)


def writing_engine(url: str, path: Path, *, patience: float = _BUSY_SECONDS) -> sa.Engine:
    """An engine for the one connection of this process that writes the file at `path`.

    A statement waits for other writers as many seconds as `patience` says.
    """
    _tell_weakness()
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(
        url,
        json_serializer=strict_json,
        json_deserializer=cells.lenient_json,
        connect_args={"timeout": patience, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is said below, at once and for writing
        connection.text_factory = cells.lenient_text
        try:
            for setting in _SETTINGS:
                connection.execute(f"PRAGMA {setting}").close()
        except sqlite3.Error:
            let_go(connection.close, path)  # the file may be damaged
            raise

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def look(path: Path) -> tuple[int, ...] | None:
    """Which file lies there, and in which state: another when somebody has written to it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check(path: Path) -> None:
    """Raise `sqlite3.DatabaseError` where the file itself, whatever its WAL says, is no database.

    An empty one is, and one that is not there. It is read by SQLite: closing a descriptor of our
    own would let go of the locks that other connections of this process have on it.
    """
    check_kind(path)
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
            raise


def check_kind(path: Path) -> None:
    """Raise `sqlite3.DatabaseError` where a pipe, a socket or a device lies at that path.

    To open one of these may block for ever.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # it is not there, or whoever opens it is told why not
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        msg = "it is not a file but a pipe, a socket or a device, which cannot hold a store"
        raise sqlite3.DatabaseError(msg)


def let_go(close: Callable[[], None], path: Path) -> None:
    """Close connections by `close`, and leave the file as it is: without a last checkpoint.

    Only the last connection makes that; one that only reads, and cannot, is there until then.
    """
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_reader(path)) as other:
        with contextlib.suppress(sqlite3.Error):
            other.execute("SELECT 1 FROM sqlite_master").fetchall()  # holds SQLite's lock from here
        close()
    close()


def _reader(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=0.0, isolation_level=None)


def checkpoint(engine: sa.Engine, path: Path, *, final: bool = False) -> bool:
    """Fold the WAL back into the file when it has grown, or when this is the `final` batch.

    Whether it did. Only space is at stake: where it cannot be done now, a later batch tries again.
    """
    with contextlib.suppress(OSError, sa.exc.SQLAlchemyError, sqlite3.Error):
        if not final and Path(f"{path}-wal").stat().st_size < _CHECKPOINT_BYTES:
            return False
        with _lock_file(Path(f"{path}.lock")) as alone:
            if alone:
                mode = "TRUNCATE" if final else "PASSIVE"
                with contextlib.closing(engine.raw_connection()) as connection:
                    connection.cursor().execute(f"PRAGMA wal_checkpoint({mode})").close()
            if final and alone:
                engine.dispose()  # the last connection to close checkpoints too
            elif final:
                let_go(engine.dispose, path)
            return alone
    return False


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[bool]:
    """Whether we alone hold the store's lock file, for the time of the block."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
