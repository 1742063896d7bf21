"""Which values of a store cannot be right: no number in a column of numbers, no JSON, no text.

The rule is that of `gradwatch.cells`, in SQL: readers take these values as unknown, `store check`
lists them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from gradwatch import schema
from gradwatch.cells import text

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Misfit", "misfits"]

_LISTED = 5  # runs that are named
# SQLite's words for what a column of that type may hold.
_KINDS: tuple[tuple[Any, str], ...] = (
    (sa.Double, "'real', 'integer'"),
    (sa.Boolean, "'integer'"),
    (sa.Integer, "'integer'"),  # BigInteger is one, too
    (sa.LargeBinary, "'blob'"),
    (sa.JSON, "'text'"),
    (sa.String, "'text'"),  # Text is one, too
)
_LARGEST = "1.7976931348623157e308"
_LISTS = {"reasons"}  # columns of JSON that hold a list; the others an object


class Misfit(NamedTuple):
    """A column with values that cannot be right: how many, and of which runs (some of them)."""

    table: str
    column: str
    values: int  # how many
    runs: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What is wrong, in words."""
        values = f"{self.values} value{'s' * (self.values != 1)}"
        shown = ", ".join(self.runs)
        return f"{self.table}.{self.column} holds {values} that cannot be right (of run {shown})"


def misfits(connection: sa.Connection) -> Iterator[Misfit]:
    """Every column of the store with such values; each table is read once."""
    for table in schema.metadata.sorted_tables:
        tests = {column.name: _test(column, connection.dialect.name) for column in table.columns}
        counted = ", ".join(f"sum(CASE WHEN {test} THEN 1 ELSE 0 END)" for test in tests.values())
        row = connection.exec_driver_sql(f"SELECT {counted} FROM {table.name}").one()  # noqa: S608 - names of our own
        for (name, test), count in zip(tests.items(), row, strict=True):
            if count:
                owner = "id" if table is schema.runs else "run_id"
                found = connection.exec_driver_sql(
                    f"SELECT DISTINCT {owner} FROM {table.name} WHERE {test} LIMIT {_LISTED}"  # noqa: S608
                )
                runs = tuple(str(text(run)) for run in found.scalars())
                yield Misfit(table.name, name, int(count), runs)


def _test(column: sa.Column[object], dialect: str) -> str:
    """The condition that a value of the column cannot be right."""
    quoted = f'"{column.name}"'
    test = _sqlite(column, quoted) if dialect == "sqlite" else _postgres(column, quoted)
    return f"({quoted} IS NOT NULL AND ({test}))" if column.nullable else f"({test})"


def _sqlite(column: sa.Column[object], quoted: str) -> str:
    kinds = next(kinds for kind, kinds in _KINDS if isinstance(column.type, kind))
    test = f"typeof({quoted}) NOT IN ({kinds})"
    if isinstance(column.type, sa.Double):
        test += f" OR abs({quoted}) > {_LARGEST}"
    if isinstance(column.type, sa.JSON):
        # json_type() raises where it is no JSON; a CASE looks at its conditions in their order.
        test = (
            f"CASE WHEN {test} THEN 1 WHEN NOT json_valid({quoted}) THEN 1 "
            f"ELSE json_type({quoted}) NOT IN ({_documents(column)}) END"
        )
    return test


def _postgres(column: sa.Column[object], quoted: str) -> str:
    """Its columns are of one type each; what is left are NaN, inf and JSON of another shape."""
    if isinstance(column.type, sa.Double):
        return f"{quoted} IN ('NaN', 'Infinity', '-Infinity')"
    if isinstance(column.type, sa.JSON):
        return f"json_typeof({quoted}) NOT IN ({_documents(column)})"
    return "false"


def _documents(column: sa.Column[object]) -> str:
    shape = "'array'" if column.name in _LISTS else "'object'"
    return f"{shape}, 'null'" if column.nullable else shape
