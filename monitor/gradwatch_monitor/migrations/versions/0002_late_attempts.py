"""Attempts have a place of their own, for those that reach the store after their successors."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Attempts so far took place in the order in which they were stored."""
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
    op.execute(
        """\
CREATE VIEW steps AS
SELECT r.run_id, r.attempt, r.step, r.time, r.loss, r.lr, r.pre_norm, r.post_norm, r.threshold, r.loss_scale, r.clipped, r.nonfinite, r.nonfinite_loss, r.skipped
FROM attempts a CROSS JOIN step_records r
WHERE r.run_id = a.run_id AND r.attempt = a.attempt
  AND r.step < COALESCE(
    (SELECT MIN(b.start_step) FROM attempts b WHERE b.run_id = a.run_id AND b.position > a.position),
    9223372036854775807)"""
    )
