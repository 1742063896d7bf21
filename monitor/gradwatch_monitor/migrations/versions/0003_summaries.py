"""Blocks of a thousand steps have a summary; `migrate` makes those of the steps that are there."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One table."""
    op.create_table(
        "step_summaries",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("last_time", sa.Double(), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("finite", sa.Integer(), nullable=False),
        sa.Column("zeros", sa.Integer(), nullable=False),
        sa.Column("clipped", sa.Integer(), nullable=False),
        sa.Column("nonfinite", sa.Integer(), nullable=False),
        sa.Column("nonfinite_loss", sa.Integer(), nullable=False),
        sa.Column("skipped", sa.Integer(), nullable=False),
        sa.Column("amp_overflows", sa.Integer(), nullable=False),
        sa.Column("pre_norm", sa.Double(), nullable=True),
        sa.Column("threshold", sa.Double(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("pre_norm_min", sa.Double(), nullable=True),
        sa.Column("post_norm_min", sa.Double(), nullable=True),
        sa.Column("pre_norm_max", sa.Double(), nullable=True),
        sa.Column("post_norm_max", sa.Double(), nullable=True),
        sa.Column("threshold_min", sa.Double(), nullable=True),
        sa.Column("threshold_max", sa.Double(), nullable=True),
        sa.Column("loss_min", sa.Double(), nullable=True),
        sa.Column("loss_mean", sa.Double(), nullable=True),
        sa.Column("loss_max", sa.Double(), nullable=True),
        sa.Column("spike", sa.Double(), nullable=True),
        sa.Column("burst", sa.Double(), nullable=True),
        sa.Column("norms", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "attempt", "block", name=op.f("pk_step_summaries")),
        sqlite_with_rowid=False,
    )
