"""The store's tables, and the view `steps`: a run's visible timeline.

The agent creates what is missing and never migrates; Alembic (in the monitor) does. A test holds
the two together. Times are Unix seconds; what is absent or non-finite is NULL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    select,
    text,
)

from gradwatch import partitions
from gradwatch.errors import StoreError, StoreRevisionError

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = [
    "REVISION",
    "VERSION_TABLE",
    "attempts",
    "check",
    "create",
    "events",
    "findings",
    "layer_norms",
    "metadata",
    "recommendations",
    "revision",
    "rings",
    "runs",
    "step_records",
    "step_summaries",
    "steps_view",
    "tables",
    "threshold_changes",
]

REVISION = "0004"
VERSION_TABLE = "gradwatch_revision"

# SQLite only counts up by itself on a column declared INTEGER.
_BIG = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

runs = Table(
    "runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("uid", String(255), nullable=False, unique=True),
    Column("name", String(255), nullable=False, index=True),
    Column("job", String(255), nullable=False, index=True),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("heartbeat_at", Double, nullable=False),
    Column("status", String(16), nullable=False, index=True),  # running, finished, failed, crashed
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("world_size", Integer, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("metrics_url", Text),
)

attempts = Table(
    "attempts",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True),  # from 1, in the order they came to the store
    Column("start_step", BigInteger, nullable=False),
    Column("started_at", Double, nullable=False),
    # The order in which they took place; one that is recovered late stands between others.
    Column("position", Double, nullable=False),
    sqlite_with_rowid=False,
)

# One row a flight-recorder file: which attempt it belongs to, and how far it has been stored.
# Records and cursor move in one transaction, so a record is stored exactly once.
rings = Table(
    "rings",
    metadata,
    Column("ring", String(64), primary_key=True),
    Column("run_id", ForeignKey("runs.id"), nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("host", String(255), nullable=False),
    Column("path", Text),
    Column("step_cursor", BigInteger, nullable=False),
    Column("event_cursor", BigInteger, nullable=False),
)

step_records = Table(
    "step_records",
    metadata,
    Column("run_id", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("time", Double, nullable=False),
    Column("loss", Double),
    Column("lr", Double),
    Column("pre_norm", Double),
    Column("post_norm", Double),
    Column("threshold", Double),
    Column("loss_scale", Double),
    Column("clipped", Boolean, nullable=False),
    Column("nonfinite", Boolean, nullable=False),
    Column("nonfinite_loss", Boolean, nullable=False),
    Column("skipped", Boolean, nullable=False),
    sqlite_with_rowid=False,
    postgresql_partition_by="RANGE (time)",
)

# A row for a block of steps (`step // 1000`) of an attempt, made as its last record is stored; see
# `summaries.py`. A block without one is as good: readers look at its records.
step_summaries = Table(
    "step_summaries",
    metadata,
    Column("run_id", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("block", BigInteger, primary_key=True),
    Column("first_step", BigInteger, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("last_time", Double, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("finite", Integer, nullable=False),  # pre_norms; zeros among them
    Column("zeros", Integer, nullable=False),
    Column("clipped", Integer, nullable=False),
    Column("nonfinite", Integer, nullable=False),
    Column("nonfinite_loss", Integer, nullable=False),
    Column("skipped", Integer, nullable=False),
    Column("amp_overflows", Integer, nullable=False),
    Column("no_gradient", Integer),  # steps without any; NULL in rows of before revision 0004
    # The last finite value of each.
    Column("pre_norm", Double),
    Column("post_norm", Double),
    Column("threshold", Double),
    Column("loss", Double),
    Column("lr", Double),
    Column("loss_scale", Double),
    # What is drawn of each: the least and the greatest finite value, the mean between them, and
    # how many values it is the mean of (NULL in rows of before revision 0004). What is drawn on a
    # log axis has a geometric mean; it and the least are of the values above 0. `loss_geomean` is
    # NULL where a loss is not above 0. `finite - zeros` is the count of the pre_norms.
    Column("pre_norm_min", Double),
    Column("pre_norm_geomean", Double),
    Column("pre_norm_max", Double),
    Column("post_norm_min", Double),
    Column("post_norm_geomean", Double),
    Column("post_norm_max", Double),
    Column("post_norm_count", Integer),
    Column("threshold_min", Double),
    Column("threshold_geomean", Double),
    Column("threshold_max", Double),
    Column("threshold_count", Integer),
    Column("loss_min", Double),
    Column("loss_mean", Double),
    Column("loss_geomean", Double),
    Column("loss_max", Double),
    Column("loss_count", Integer),
    Column("lr_min", Double),
    Column("lr_mean", Double),
    Column("lr_max", Double),
    Column("lr_count", Integer),
    Column("loss_scale_min", Double),
    Column("loss_scale_mean", Double),
    Column("loss_scale_max", Double),
    Column("loss_scale_count", Integer),
    Column("spike", Double),  # the greatest norm in units of the median of the 50 before it
    Column("burst", Double),  # the greatest log(q98 / median) within 100 steps
    Column("norms", LargeBinary, nullable=False),  # a histogram
    sqlite_with_rowid=False,
)

events = Table(
    "events",
    metadata,
    Column("id", _BIG, primary_key=True),
    Column("run_id", ForeignKey("runs.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("time", Double, nullable=False),
    Column("rank", Integer),
    Column("kind", String(32), nullable=False),
    Column("severity", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Index(None, "run_id", "kind", "step"),
    Index(None, "run_id", "step"),
)

layer_norms = Table(
    "layer_norms",
    metadata,
    Column("run_id", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("parameter", Text, primary_key=True),
    Column("grad_norm", Double),
    Column("weight_norm", Double),
    sqlite_with_rowid=False,
)

findings = Table(
    "findings",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", ForeignKey("runs.id"), nullable=False),
    Column("finding", String(64), nullable=False),
    Column("severity", String(16), nullable=False),
    Column("first_step", BigInteger, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("found_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("message", Text, nullable=False),
    Column("advice", Text, nullable=False),
    Column("data", JSON, nullable=False),
    UniqueConstraint("run_id", "finding"),
)

threshold_changes = Table(
    "threshold_changes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", ForeignKey("runs.id"), nullable=False, index=True),
    Column("requested_at", Double, nullable=False),
    Column("requested_by", String(255), nullable=False),
    Column("reason", Text),
    Column("threshold", Double),
    Column("policy", JSON),
    Column("applied_at", Double),
    Column("applied_step", BigInteger),
    Column("previous", Double),
    Column("refused", Text),
)

recommendations = Table(
    "recommendations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", ForeignKey("runs.id"), nullable=False, index=True),
    Column("made_at", Double, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("verdict", String(32), nullable=False),
    Column("threshold", Double),
    Column("predicted_clip_ratio", Double),
    Column("interval_low", Double),
    Column("interval_high", Double),
    Column("reasons", JSON, nullable=False),
    Column("policy", JSON),
)

_version = Table(
    VERSION_TABLE,
    MetaData(),
    Column("version_num", String(32)),
    PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),  # as Alembic names it
)

# Attempt j shows only below the start_step of every later attempt. The bound depends on the
# attempt alone, so it becomes a range on step_records' key.
_COLUMNS = ", ".join(f"r.{c.name}" for c in step_records.columns)
_STEPS_VIEW = f"""\
CREATE VIEW steps AS
SELECT {_COLUMNS}
FROM attempts a CROSS JOIN step_records r
WHERE r.run_id = a.run_id AND r.attempt = a.attempt
  AND r.step < COALESCE(
    (SELECT MIN(b.start_step) FROM attempts b WHERE b.run_id = a.run_id AND b.position > a.position),
    9223372036854775807)"""  # noqa: S608 - names of our own
# The same; PostgreSQL would look up the bound once a step, did it not stand in the FROM clause.
_STEPS_VIEW_LATERAL = f"""\
CREATE VIEW steps AS
SELECT {_COLUMNS}
FROM attempts a
CROSS JOIN LATERAL (
  SELECT COALESCE(MIN(b.start_step), 9223372036854775807) AS stop
  FROM attempts b WHERE b.run_id = a.run_id AND b.position > a.position) later
JOIN step_records r ON r.run_id = a.run_id AND r.attempt = a.attempt AND r.step < later.stop"""  # noqa: S608


def steps_view(dialect: str) -> str:
    """The statement that makes the view `steps` in this kind of database."""
    return _STEPS_VIEW_LATERAL if dialect == "postgresql" else _STEPS_VIEW


def tables(dialect: str) -> MetaData:
    """The tables as they are made: on PostgreSQL the partitioned one has `time` in its key."""
    if dialect != "postgresql":
        return metadata
    made = MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        table.to_metadata(made)
    records = made.tables["step_records"]
    records.c.time.primary_key = True
    records.append_constraint(
        PrimaryKeyConstraint(*(records.c[c] for c in ("run_id", "attempt", "step", "time")))
    )
    return made


def revision(connection: Connection) -> str | None:
    """The revision the store is stamped with; None where it holds nothing of gradwatch.

    Raises `StoreError` where it holds tables of those names that are not gradwatch's.
    """
    found = set(inspect(connection).get_table_names())
    if VERSION_TABLE in found:
        return connection.execute(select(_version.c.version_num)).scalar() or ""
    clash = sorted(found & set(metadata.tables))
    if clash:
        msg = f"it is not a gradwatch store, but has tables of the same names: {', '.join(clash)}"
        raise StoreError(msg)
    return None


def check(found: str | None) -> None:
    """Raise `StoreRevisionError` unless this version of gradwatch works with that revision."""
    if found == REVISION:
        return
    advice = (
        "run `gradwatch store migrate`"
        if found is not None and found < REVISION
        else "upgrade gradwatch"
    )
    msg = f"its schema revision is {found!r}, this gradwatch works with {REVISION!r}: {advice}"
    raise StoreRevisionError(msg)


def create(connection: Connection) -> None:
    """Create the schema in an empty database and stamp it, or check the stamp of the one there.

    Call it inside a transaction that excludes other writers: two processes may come at once.
    """
    found = revision(connection)
    if found is not None:
        check(found)
        return
    dialect = connection.dialect.name
    tables(dialect).create_all(connection)
    if dialect == "postgresql":
        partitions.make_outer(connection)
    connection.execute(text(steps_view(dialect)))
    _version.create(connection)
    connection.execute(_version.insert().values(version_num=REVISION))
