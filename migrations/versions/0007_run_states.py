"""How each run stands: its verdict, its alarms and the figures that lists and dashboards show."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_run_states"
down_revision = "0006_retention"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "run_states",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("log_position", sa.BigInteger(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("head_step", sa.BigInteger(), nullable=True),
        sa.Column("n_alarms", sa.Integer(), nullable=False),
        sa.Column("alarm_codes", sa.Text(), nullable=False),
        sa.Column("alarms", sa.Text(), nullable=False),
        sa.Column("notes", sa.Text(), nullable=False),
        sa.Column("lift", sa.Double(), nullable=True),
        sa.Column("lift_low", sa.Double(), nullable=True),
        sa.Column("lift_high", sa.Double(), nullable=True),
        sa.Column("rollouts_saved", sa.Double(), nullable=True),
        sa.Column("rollouts_saved_low", sa.Double(), nullable=True),
        sa.Column("rollouts_saved_high", sa.Double(), nullable=True),
        sa.Column("informative_share", sa.Double(), nullable=True),
        sa.Column("informative_shares", sa.Text(), nullable=False),
        sa.Column("figures", sa.Text(), nullable=False),
        sa.Column("active_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("saved_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("log_position >= 0 AND n_alarms >= 0", name=op.f("ck_run_states_counts")),
        sa.CheckConstraint(
            "verdict IN ('broken', 'not_helping', 'helping', 'learning', 'no_data')",
            name=op.f("ck_run_states_verdict"),
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_run_states_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_run_states")),
    )


def downgrade() -> None:
    op.drop_table("run_states")
