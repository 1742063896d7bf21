"""What the fuzzers share: a budget of time, what may stand in a store, and what an answer is."""

import contextlib
import itertools
import json
import re
import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

import hypothesis
from hypothesis import strategies as st

import gradwatch_dashboards

WEB = Path(gradwatch_dashboards.__file__).parent / "web"
FAULT = "fault of gradwatch itself"
_EXAMPLES = hypothesis.settings(
    deadline=None,
    database=None,
    max_examples=5,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
    print_blob=False,
)


class Budget:
    """Seconds to fuzz for, of which each test asks for a share; the seed to begin with."""

    def __init__(self, seconds, seed):
        self._seconds, self._seed = seconds, seed

    def spend(self, share, test):
        """Call a test of hypothesis's with one seed after another, for a share of the time."""
        deadline = time.monotonic() + share * self._seconds
        test = _EXAMPLES(test)
        for seed in itertools.count(self._seed):
            try:
                hypothesis.seed(seed)(test)()
            except BaseException as error:
                error.add_note(f"Repeat it with --fuzz-seconds 0 --fuzz-seed {seed}")
                raise
            if time.monotonic() >= deadline:
                return


# -- values ----------------------------------------------------------------------------------------

TEXTS = st.sampled_from(
    ["", " ", "x", "NaN", "inf", "1e400", "0x10", "-", "3", "a\0b", "[bold]x[/bold]", "[/]", "\x1b[2J",
     "a\nb", "\N{ROCKET}", "\N{ZERO WIDTH JOINER}" * 9, "\u202eabc", "é" * 300, "'; DROP TABLE runs; --",
     "%s{0}{x}", "../../x", "<script>alert(1)</script>", "http://[x", "//[x", "http://a:b/", "file:///etc/passwd",
     "http://127.0.0.1:1/metrics", "$x$ *y* `z`", "name:3", "-1"]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # fmt: skip
NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63 - 1, -(2**63), 2**53 + 1, 1e308, -1e308, 5e-324, float("inf"),
     -float("inf"), 0.5, 1e300, -0.0, 1e12, 1e-300]
)  # fmt: skip
JSONS = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["policy", "clip", "from", "to", "x", "parameters"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
DEEP = st.sampled_from(['{"a":' * 60 + "1" + "}" * 60, "[" * 3000, "[" * 3000 + "]" * 3000])
NO_JSON = st.sampled_from(["", "{bad", "nul", "{'a': 1}", "\xff", "NaN", "1e999", "9" * 5000])
CELLS = (
    st.none() | TEXTS | NUMBERS | NO_JSON | DEEP | st.binary(max_size=12) | JSONS.map(json.dumps)
)


# -- stores ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(path):
    """A connection that is closed at the end, and has written its WAL back."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.text_factory = lambda value: value.decode("utf-8", "replace")
        yield connection
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()


def columns(path):
    """The (table, column) pairs of a store."""
    with connected(path) as connection:
        return connection.execute(
            "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c "
            "WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite%' ORDER BY 1, c.cid"
        ).fetchall()


def rows(path):
    """Every value of a store, with its type, as a set of rows a table."""
    tables = {table for table, _ in columns(path)}
    with connected(path) as connection:
        return {
            table: {tuple(map(repr, row)) for row in connection.execute(f'SELECT * FROM "{table}"')}
            for table in tables
        }


class Cell(NamedTuple):
    """Writes a value into one cell, or into the whole column."""

    place: tuple[str, str]
    row: int
    value: object
    every: bool

    def apply(self, path):
        table, column = self.place
        if self.value is None:
            allow_null(path)
        with connected(path) as connection:
            found = connection.execute(f'PRAGMA table_info("{table}")').fetchall()
            key = ", ".join(row[1] for row in found if row[5])  # some tables have no rowid
            where = "" if self.every else (
                f'WHERE ({key}) = (SELECT {key} FROM "{table}" ORDER BY {key} LIMIT 1 OFFSET '
                f'{self.row} % max(1, (SELECT count(*) FROM "{table}")))'
            )  # fmt: skip
            with contextlib.suppress(sqlite3.IntegrityError, UnicodeEncodeError):
                connection.execute(f'UPDATE "{table}" SET "{column}" = ? {where}', (self.value,))


class Part(NamedTuple):
    """Writes a value into a part of a cell's JSON."""

    place: tuple[str, str]
    number: int
    value: object

    def apply(self, path):
        table, column = self.place
        with connected(path) as connection:
            parts = connection.execute(
                f'SELECT t.rowid, j.key, cell FROM (SELECT rowid, "{column}" AS cell FROM "{table}" '
                f"WHERE json_valid(cell) AND cell LIKE '{{%') t, json_each(cell) j ORDER BY 1, 2"
            ).fetchall()
            if parts:
                row, key, text = parts[self.number % len(parts)]
                changed = json.dumps({**json.loads(text), key: self.value})
                connection.execute(
                    f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?', (changed, row)
                )


def mutations(path):
    """A strategy of lists of what can be done to a copy of that store."""
    documents = st.sampled_from(
        [("runs", "tags"), ("runs", "settings"), ("events", "data"), ("findings", "data"),
         ("threshold_changes", "policy")]
    )  # fmt: skip
    # A store that says that it is of another revision is not read at all.
    places = [(table, column) for table, column in columns(path) if table != "gradwatch_revision"]
    cell = st.builds(Cell, st.sampled_from(places), st.integers(0, 50), CELLS, st.booleans())
    part = st.builds(Part, documents, st.integers(0, 5000), JSONS)
    return st.lists(cell | part, min_size=1, max_size=3)


def allow_null(path):
    """Let NULL stand where the schema does not allow it, as in a store that something else has made."""
    with connected(path) as connection:
        connection.execute("PRAGMA writable_schema = 1")
        connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '') "
            "WHERE type = 'table' AND sql NOT LIKE '%WITHOUT ROWID%'"
        )


# -- files -----------------------------------------------------------------------------------------

DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "page", "longer"]),
        st.integers(0, 2**31),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)


def damage(path, kind, at, content):
    """Write over bytes of a file, or make it shorter or longer."""
    size = max(1, path.stat().st_size)
    with path.open("r+b") as file:
        if kind == "cut":
            file.truncate(at % size)
        elif kind == "flip":
            file.seek(at % size)
            file.write(content)
        elif kind == "page":
            file.seek(at % size // 4096 * 4096)
            file.write(bytes(4096))
        else:
            file.seek(0, 2)
            file.write(content * 700)


# -- what must hold --------------------------------------------------------------------------------


def check_answer(arguments, status, out, err):
    """A verb ended as a verb does: a known status, text that is safe to show, and no traceback."""
    told = (
        f"gradwatch {' '.join(map(str, arguments))}: status {status}\n{out[-2000:]}\n{err[-3000:]}"
    )
    assert status in {0, 1, 2}, told
    assert "Traceback" not in out + err, told
    assert not re.search(r"\bWarning\b", err), told
    assert "\x1b[2J" not in out + err, told


def shown(page, **query):
    """The page, run as Streamlit would; no exception and no fault of our own may be on it."""
    from streamlit.testing.v1 import AppTest

    app = AppTest.from_file(str(WEB / page), default_timeout=120)
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    said = [str(element.value) for element in (*app.error, *app.warning)]
    assert not app.exception, (page, query, app.exception)
    assert not any(FAULT in one.replace("\\", "") for one in said), (page, query, said)
    return app
