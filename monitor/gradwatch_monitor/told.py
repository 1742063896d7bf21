"""What goes wrong with a store becomes one `StoreError`, with its name and what to do."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from gradwatch.config import redact
from gradwatch.errors import StoreError
from gradwatch.secrets import scrub
from gradwatch.sinks.remedies import remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["telling"]


@contextlib.contextmanager
def telling(url: str, problem: str) -> Iterator[None]:
    """`problem`: what could not be done, as in "cannot read the store"; no secret is told."""
    name = redact(url)
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, ImportError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        told = remedy(cause)
        if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
            told = f"is that the store? If it was, it has been written over: {told}"
        advice = f" ({told})" if told else ""
        msg = f"{problem} {name}: {scrub(reason[0], url)}{advice}"
        raise StoreError(msg) from error
    except StoreError as error:
        if name in str(error):
            raise
        msg = f"{problem} {name}: {error}"
        raise type(error)(msg) from None
