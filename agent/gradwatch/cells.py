"""Cells of a store, read as far as they can be: what is no number, text or JSON there is unknown.

SQLite keeps a value of any type in a column of any type, a file may be damaged, and other programs
can write a store. One such cell must not keep anybody from the other rows, nor from the rest of its
own: it reads as unknown (NaN, None or no text) and is noted, so that it can be told once.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import sqlalchemy as sa

__all__ = [
    "LARGEST",
    "LEAST",
    "MOST",
    "UNKNOWN",
    "Cells",
    "Malformed",
    "document",
    "flags",
    "lenient_json",
    "lenient_text",
    "malformed_in",
    "noting",
    "numbers",
    "real",
    "text",
    "whole",
    "whole_numbers",
]

UNKNOWN = "unknown"  # stands for a text that has to be shown and is not there
LEAST, MOST = -(2**63), 2**63 - 1  # what a store's integers hold
LARGEST = float(np.finfo(np.float64).max)
_OPTION = "gradwatch_malformed"
_DEEPEST = 40  # levels of a JSON document: whoever reads or prints one goes level by level
_SHOWN = 5

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


class Malformed:
    """The cells of a store that were met and cannot be right, by column and by whose they are."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}  # in the order in which they were met

    def note(self, column: str, owner: str) -> None:
        """Some of them: as in `runs.heartbeat_at` of `run 3`."""
        self._found[f"{column} of {owner}"] = None

    def __bool__(self) -> bool:
        """Whether there were any."""
        return bool(self._found)

    @property
    def sentence(self) -> str:
        """Where they are, and what to do about it."""
        places, more = list(self._found)[:_SHOWN], len(self._found) - _SHOWN
        shown = ", ".join(places) + (f" and {more} more" if more > 0 else "")
        return (
            f"the store holds values that cannot be right and are taken as unknown: {shown}; "
            "`gradwatch store check` lists them all"
        )


def noting(engine: sa.Engine, malformed: Malformed) -> sa.Engine:
    """The engine, whose connections note such cells there."""
    return engine.execution_options(**{_OPTION: malformed})


def malformed_in(connection: sa.Connection) -> Malformed:
    """Where what is read by this connection notes such cells; nowhere, where nobody asked for it."""
    found = connection.get_execution_options().get(_OPTION)
    return found if isinstance(found, Malformed) else Malformed()


class Cells:
    """One row: each cell by what its column is for.

    Args:
        table: whose row it is; it says which cells may be NULL.
        row: the cells by their column's name.
        owner: whose they are, in words, as in "run 3".
        malformed: where cells are noted that cannot be right.
    """

    def __init__(
        self, table: sa.Table, row: Mapping[str, Any], owner: str, malformed: Malformed
    ) -> None:
        self._table, self._row = table, row
        self._owner, self._malformed = owner, malformed

    def real(self, name: str) -> float | None:
        """A finite number; None of NULL; NaN of anything else."""
        found: float | None = self._read(name, real, math.nan)
        return found

    def whole(self, name: str) -> int | None:
        """An integer; None of NULL and of anything else."""
        found: int | None = self._read(name, whole, None)
        return found

    def text(self, name: str) -> str | None:
        """Text; None of NULL, where that may be; else "unknown"."""
        found: str | None = self._read(name, text, UNKNOWN)
        return found

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None of NULL, where that may be; else an empty one."""
        found: dict[str, Any] | None = self._read(name, document, {})
        return found

    def _read(self, name: str, convert: Callable[[Any], Any], unknown: Any) -> Any:
        value = self._row[name]
        if value is None and self._table.c[name].nullable:
            return None
        found = convert(value)
        if found is None:
            self.bad(name)
            return unknown
        return found

    def bad(self, name: str) -> None:
        """Note that a cell cannot be right."""
        self._malformed.note(f"{self._table.name}.{name}", self._owner)


# -- one value -------------------------------------------------------------------------------------


def real(value: Any) -> float | None:
    """A finite number as a float; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """An integer that a database can hold; None of anything else."""
    good = isinstance(value, int) and not isinstance(value, bool) and LEAST <= value <= MOST
    return value if good else None


def text(value: Any) -> str | None:
    """Text, or what it says of a number or of bytes; None of NULL and of what is no single value."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return lenient_text(bytes(value))
    return str(value) if isinstance(value, (int, float)) else None


def document(value: Any) -> dict[str, Any] | None:
    """A JSON object of a depth that can be worked with; None of anything else."""
    return value if isinstance(value, dict) and _is_shallow(value) else None


def lenient_text(value: bytes) -> str:
    """UTF-8, with U+FFFD for what is none."""
    return value.decode("utf-8", "replace")


def lenient_json(value: Any) -> Any:
    """What a JSON text says; None of what is none."""
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):  # the second of its own errors, and of UTF-8's
        return None


def _is_shallow(value: Any) -> bool:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            return False
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return True


# -- whole columns ---------------------------------------------------------------------------------


def numbers(values: Sequence[Any], note: Callable[[], None] = lambda: None) -> Floats:
    """Numbers as an array, NaN for NULL; NaN also, and noted, for what is no finite number."""
    if {*map(type, values)} <= {float, int, type(None)}:
        found = np.array(values, dtype=np.float64)
        infinite = np.isinf(found)
        if infinite.any():
            note()
            found[infinite] = np.nan
        return found
    if any(value is not None and real(value) is None and value == value for value in values):  # noqa: PLR0124 - PostgreSQL's NaN
        note()
    return np.array([np.nan if (one := real(v)) is None else one for v in values], np.float64)


def whole_numbers(values: Sequence[Any]) -> tuple[Integers, Flags | None]:
    """Integers as an array, 0 for what is none; and which are some, None where all are."""
    if {*map(type, values)} <= {int}:
        return np.array(values, dtype=np.int64), None
    read = [whole(value) for value in values]
    good = np.array([one is not None for one in read], dtype=np.bool_)
    return np.array([one or 0 for one in read], dtype=np.int64), good


def flags(values: Sequence[Any], note: Callable[[], None] = lambda: None) -> Flags:
    """Truth values as an array; False, and noted, for what is none."""
    if {*map(type, values)} <= {int, bool}:
        return np.array(values, dtype=np.bool_)
    note()
    return np.array([isinstance(value, (int, bool)) and bool(value) for value in values], np.bool_)
