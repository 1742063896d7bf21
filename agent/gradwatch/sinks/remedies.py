"""What to do about a database that cannot be written: a few words for the warning."""

from __future__ import annotations

import errno
import sqlite3

__all__ = ["is_refused", "may_pass", "remedy"]

_SPACE = "free some space on its disk"
_ACCESS = "this user has to be able to write the file and its folder"
_REPLACE = (
    "move the file away: a new one is then made, with what the flight recorder holds of this run"
)
_SERVER = "is the server up, and the URL right?"
_SERVER_STATES = ("08", "28", "3D", "57P")  # connection, login, database name, shutdown
_NOT_NULL = "23502"
_SQLITE_REFUSES = {
    sqlite3.SQLITE_CONSTRAINT_NOTNULL,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_MISMATCH,
}
_SQLITE = {
    sqlite3.SQLITE_BUSY: "another program is writing to it, and has to let go",
    sqlite3.SQLITE_FULL: _SPACE,
    sqlite3.SQLITE_CORRUPT: _REPLACE,
    sqlite3.SQLITE_NOTADB: _REPLACE,
    sqlite3.SQLITE_READONLY: _ACCESS,
    sqlite3.SQLITE_PERM: _ACCESS,
    sqlite3.SQLITE_CANTOPEN: _ACCESS,
    sqlite3.SQLITE_IOERR: "is its disk full, or gone?",
}
_MAY_PASS = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
_SYSTEM = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EROFS: _ACCESS,
    errno.ENOTDIR: "a file lies where its folder should be: move it away",
    errno.EEXIST: "a file lies where its folder should be: move it away",
}


def remedy(error: BaseException) -> str | None:
    """What to do about it; None where nobody knows."""
    if isinstance(error, OSError):
        return _SYSTEM.get(error.errno or 0)
    if any(kind.__name__ == "OperationalError" for kind in type(error).__mro__):
        state = getattr(error, "sqlstate", "-")  # SQLite's has none, nor a server that is not there
        if not state or state.startswith(_SERVER_STATES):
            return _SERVER
    return _SQLITE.get(_primary_code(error))


def may_pass(error: BaseException) -> bool:
    """Whether all that is wrong may be another connection: one that writes, or one of root's.

    Where root reads a store first, SQLite makes the file for its shared memory as root, and gives
    it to the store's owner a moment later.
    """
    return _primary_code(error) in _MAY_PASS


def is_refused(error: BaseException) -> bool:
    """Whether it is what was to be stored that is wrong, however well the database is."""
    return (
        any(kind.__name__ == "DataError" for kind in type(error).__mro__)
        or getattr(error, "sqlstate", None) == _NOT_NULL
        or getattr(error, "sqlite_errorcode", None) in _SQLITE_REFUSES
    )


def _primary_code(error: BaseException) -> int:
    """SQLite's code without the part that says more of the same; 0 of an error that is not its."""
    return int(getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
