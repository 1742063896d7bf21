"""Attempts have a place of their own; on PostgreSQL the steps are partitioned by time."""

import numpy as np
import sqlalchemy as sa
from alembic import op

from gradwatch import partitions

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COLUMNS = (
    "r.run_id, r.attempt, r.step, r.time, r.loss, r.lr, r.pre_norm, r.post_norm, r.threshold, "
    "r.loss_scale, r.clipped, r.nonfinite, r.nonfinite_loss, r.skipped"
)


def upgrade() -> None:
    """Attempts so far took place in the order in which they were stored."""
    on_postgres = op.get_context().dialect.name == "postgresql"
    op.execute("DROP VIEW steps")
    kept = {"sqlite_with_rowid": False}
    with op.batch_alter_table("attempts", table_kwargs=kept) as table:
        table.add_column(sa.Column("started_at", sa.Double(), nullable=True))
        table.add_column(sa.Column("position", sa.Double(), nullable=True))
    op.execute(
        "UPDATE attempts SET position = attempt, "
        "started_at = (SELECT started_at FROM runs WHERE runs.id = attempts.run_id)"
    )
    with op.batch_alter_table("attempts", table_kwargs=kept) as table:
        table.alter_column("started_at", existing_type=sa.Double(), nullable=False)
        table.alter_column("position", existing_type=sa.Double(), nullable=False)
    op.create_index("ix_runs_status", "runs", ["status"])
    if on_postgres:
        partition()
        op.execute(
            f"""\
CREATE VIEW steps AS
SELECT {COLUMNS}
FROM attempts a
CROSS JOIN LATERAL (
  SELECT COALESCE(MIN(b.start_step), 9223372036854775807) AS stop
  FROM attempts b WHERE b.run_id = a.run_id AND b.position > a.position) later
JOIN step_records r ON r.run_id = a.run_id AND r.attempt = a.attempt AND r.step < later.stop"""  # noqa: S608
        )
        return
    op.execute(
        f"""\
CREATE VIEW steps AS
SELECT {COLUMNS}
FROM attempts a CROSS JOIN step_records r
WHERE r.run_id = a.run_id AND r.attempt = a.attempt
  AND r.step < COALESCE(
    (SELECT MIN(b.start_step) FROM attempts b WHERE b.run_id = a.run_id AND b.position > a.position),
    9223372036854775807)"""  # noqa: S608
    )


def partition() -> None:
    """Move the steps to a table that is partitioned by `time`, which has to be in its key."""
    connection = op.get_bind()
    op.execute("ALTER TABLE step_records RENAME TO old_records")
    op.execute("ALTER TABLE old_records RENAME CONSTRAINT pk_step_records TO pk_old_records")
    op.execute(
        "CREATE TABLE step_records (LIKE old_records, "
        "CONSTRAINT pk_step_records PRIMARY KEY (run_id, attempt, step, time)) "
        "PARTITION BY RANGE (time)"
    )
    partitions.make_outer(connection)
    days = connection.exec_driver_sql(
        f"SELECT DISTINCT floor(time / {partitions.DAY_SECONDS}) FROM old_records"  # noqa: S608
    ).scalars()
    partitions.make(
        connection, partitions.days_of(np.array([*days], float) * partitions.DAY_SECONDS)
    )
    op.execute("INSERT INTO step_records SELECT * FROM old_records")
    op.execute("DROP TABLE old_records")
