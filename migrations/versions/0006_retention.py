"""Prompts that left a pool, and the base below which a run's log is compacted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_retention"
down_revision = "0005_join_key"
branch_labels = None
depends_on = None

_KINDS = "kind IN ('pool', 'observe', 'select', 'snapshot', 'rewind', 'retract')"
_KINDS_NOW = "kind IN ('pool', 'observe', 'select', 'snapshot', 'retire', 'rewind', 'retract')"


def upgrade() -> None:
    with op.batch_alter_table("runs") as batch_op:
        batch_op.add_column(sa.Column("n_retired", sa.Integer(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("retired_position", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("base_position", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("base_step", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("base_observations", sa.BigInteger(), server_default="0", nullable=False))
    with op.batch_alter_table("prompts") as batch_op:
        batch_op.add_column(sa.Column("retired_at", sa.BigInteger(), nullable=True))
        batch_op.drop_constraint(batch_op.f("uq_prompts_run_id_prompt_id"), type_="unique")
    with op.batch_alter_table("log") as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_log_kind"), type_="check")
        batch_op.create_check_constraint(batch_op.f("ck_log_kind"), _KINDS_NOW)
    op.create_index(
        "uq_prompts_prompt_id",
        "prompts",
        ["run_id", "prompt_id"],
        unique=True,
        sqlite_where=sa.text("retired_at IS NULL"),
        postgresql_where=sa.text("retired_at IS NULL"),
    )
    op.create_index(
        "ix_prompts_retired_at",
        "prompts",
        ["run_id", "retired_at"],
        unique=False,
        sqlite_where=sa.text("retired_at IS NOT NULL"),
        postgresql_where=sa.text("retired_at IS NOT NULL"),
    )
    op.create_index("ix_prompts_text_key", "prompts", ["text_key"], unique=False)
    op.create_table(
        "bases",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("history", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_bases_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_bases")),
    )


def downgrade() -> None:
    """Only of a database in which no prompt was retired: an older release could not fold its log."""
    op.drop_table("bases")
    op.drop_index("ix_prompts_text_key", table_name="prompts")
    op.drop_index("ix_prompts_retired_at", table_name="prompts")
    op.drop_index("uq_prompts_prompt_id", table_name="prompts")
    with op.batch_alter_table("log") as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_log_kind"), type_="check")
        batch_op.create_check_constraint(batch_op.f("ck_log_kind"), _KINDS)
    with op.batch_alter_table("prompts") as batch_op:
        batch_op.drop_column("retired_at")
        batch_op.create_unique_constraint(batch_op.f("uq_prompts_run_id_prompt_id"), ["run_id", "prompt_id"])
    with op.batch_alter_table("runs") as batch_op:
        batch_op.drop_column("base_observations")
        batch_op.drop_column("base_step")
        batch_op.drop_column("base_position")
        batch_op.drop_column("retired_position")
        batch_op.drop_column("n_retired")
