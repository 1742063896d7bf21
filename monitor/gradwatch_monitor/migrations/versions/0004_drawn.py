"""Summaries have what a chart draws of a block: the learning rate, the loss scale, means, counts.

`migrate` fills the columns in from the records afterwards; see `filling.py`.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

VALUES = (
    "post_norm", "lr", "loss_scale", "pre_norm_geomean", "post_norm_geomean", "threshold_geomean",
    "loss_geomean", "lr_min", "lr_mean", "lr_max", "loss_scale_min", "loss_scale_mean",
    "loss_scale_max",
)  # fmt: skip
COUNTS = ("post_norm_count", "threshold_count", "loss_count", "lr_count", "loss_scale_count",
          "no_gradient")  # fmt: skip


def upgrade() -> None:
    """Columns without a default, which neither database has to rewrite the table for."""
    for name in VALUES:
        op.add_column("step_summaries", sa.Column(name, sa.Double(), nullable=True))
    for name in COUNTS:
        op.add_column("step_summaries", sa.Column(name, sa.Integer(), nullable=True))
