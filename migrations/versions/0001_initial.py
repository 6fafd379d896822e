"""The first tables: runs, pools, the log, selections, refits, snapshots, checkpoints and API keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001_initial"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "embeddings",
        sa.Column("embedder", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("width >= 1 AND length(vector) = 2 * width", name=op.f("ck_embeddings_width")),
        sa.PrimaryKeyConstraint("embedder", "key", name=op.f("pk_embeddings")),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("embedding_width", sa.Integer(), nullable=True),
        sa.Column("n_prompts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("log_position", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("head_step", sa.BigInteger(), nullable=True),
        sa.Column("n_observations", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("model_version", sa.Integer(), server_default="0", nullable=False),
        sa.Column("void_position", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("fork_of", sa.Text(), nullable=True),
        sa.Column("fork_step", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("embedding_width > 0", name=op.f("ck_runs_embedding_width")),
        sa.CheckConstraint("head_step >= 0", name=op.f("ck_runs_head_step")),
        sa.CheckConstraint(
            "n_prompts >= 0 AND log_position >= 0 AND n_observations >= 0 AND model_version >= 0",
            name=op.f("ck_runs_counts"),
        ),
        sa.CheckConstraint("void_position >= 0 AND void_position <= log_position", name=op.f("ck_runs_void_position")),
        sa.CheckConstraint(
            "fork_step IS NULL OR (fork_step >= 0 AND fork_of IS NOT NULL)", name=op.f("ck_runs_fork_step")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("name", name=op.f("uq_runs_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "api_keys",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_hash", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("runs", sa.Text(), nullable=False),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True),
        sa.Column("max_body_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("length(secret_hash) = 64", name=op.f("ck_api_keys_secret_hash")),
        sa.CheckConstraint("requests_per_minute >= 1 AND max_body_bytes >= 1", name=op.f("ck_api_keys_limits")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("secret_hash", name=op.f("uq_api_keys_secret_hash")),
    )
    op.create_table(
        "checkpoints",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("position >= 0", name=op.f("ck_checkpoints_position")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_checkpoints_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "position", name=op.f("pk_checkpoints")),
    )
    op.create_table(
        "log",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("request_hash", sa.Text(), nullable=True),
        sa.Column("selection_id", sa.Text(), nullable=True),
        sa.Column("n_observations", sa.Integer(), server_default="0", nullable=False),
        sa.Column("voided_at", sa.BigInteger(), nullable=True),
        sa.Column("voided_rows", sa.Text(), nullable=True),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "(step IS NOT NULL AND step >= 0) = (kind IN ('observe', 'select'))", name=op.f("ck_log_step")
        ),
        sa.CheckConstraint(
            "kind IN ('pool', 'observe', 'select', 'snapshot', 'rewind', 'retract')", name=op.f("ck_log_kind")
        ),
        sa.CheckConstraint("(request_id IS NULL) = (request_hash IS NULL)", name=op.f("ck_log_request")),
        sa.CheckConstraint("position >= 1", name=op.f("ck_log_position")),
        sa.CheckConstraint(
            "n_observations >= 0 AND (n_observations = 0 OR kind = 'observe')", name=op.f("ck_log_n_observations")
        ),
        sa.CheckConstraint(
            "voided_at IS NULL OR (voided_at > position AND kind IN ('observe', 'select', 'snapshot'))",
            name=op.f("ck_log_voided_at"),
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_log_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "position", name=op.f("pk_log")),
    )
    op.create_index(
        "uq_log_request_id",
        "log",
        ["run_id", "request_id"],
        unique=True,
        sqlite_where=sa.text("request_id IS NOT NULL AND voided_at IS NULL"),
        postgresql_where=sa.text("request_id IS NOT NULL AND voided_at IS NULL"),
    )
    op.create_table(
        "pool_blocks",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("first", sa.Integer(), nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.Column("features", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("first >= 0 AND last > first", name=op.f("ck_pool_blocks_range")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_pool_blocks_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "first", name=op.f("pk_pool_blocks")),
    )
    op.create_table(
        "prompts",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("text_key", sa.Text(), nullable=True),
        sa.Column("group", sa.Text(), nullable=True),
        sa.Column("features", sa.Text(), nullable=True),
        sa.Column("prior_rate", sa.Double(), nullable=True),
        sa.Column("vector_key", sa.Text(), nullable=True),
        sa.CheckConstraint('"index" >= 0', name=op.f("ck_prompts_index")),
        sa.CheckConstraint("text IS NULL OR text_key IS NOT NULL", name=op.f("ck_prompts_text_key")),
        sa.CheckConstraint("prior_rate >= 0 AND prior_rate <= 1", name=op.f("ck_prompts_prior_rate")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_prompts_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "index", name=op.f("pk_prompts")),
        sa.UniqueConstraint("run_id", "prompt_id", name=op.f("uq_prompts_run_id_prompt_id")),
    )
    op.create_table(
        "refits",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("requested_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("model_version", sa.Integer(), nullable=True),
        sa.Column("report", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "(finished_at IS NOT NULL) = (status IN ('done', 'failed'))", name=op.f("ck_refits_finished")
        ),
        sa.CheckConstraint("(model_version IS NOT NULL) = (status = 'done')", name=op.f("ck_refits_done")),
        sa.CheckConstraint(
            "status <> 'running' OR (worker IS NOT NULL AND lease_until IS NOT NULL AND attempts >= 1)",
            name=op.f("ck_refits_running"),
        ),
        sa.CheckConstraint("status IN ('pending', 'running', 'done', 'failed')", name=op.f("ck_refits_status")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_refits_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_refits")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_refits_run_id", "refits", ["run_id"])
    op.create_index(
        "uq_refits_open",
        "refits",
        ["run_id"],
        unique=True,
        sqlite_where=sa.text("status IN ('pending', 'running')"),
        postgresql_where=sa.text("status IN ('pending', 'running')"),
    )
    op.create_table(
        "selections",
        sa.Column("selection_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("arguments_hash", sa.Text(), nullable=False),
        sa.Column("reply", sa.Text(), nullable=False),
        sa.Column("log_position", sa.BigInteger(), nullable=False),
        sa.Column("voided_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("voided_at > log_position", name=op.f("ck_selections_voided_at")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_selections_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "selection_id", name=op.f("pk_selections")),
    )
    op.create_index(
        "uq_selections_step",
        "selections",
        ["run_id", "step"],
        unique=True,
        sqlite_where=sa.text("voided_at IS NULL"),
        postgresql_where=sa.text("voided_at IS NULL"),
    )
    op.create_table(
        "snapshots",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("embedder", sa.Text(), nullable=False),
        sa.Column("weights", sa.LargeBinary(), nullable=False),
        sa.Column("fitted_position", sa.BigInteger(), nullable=False),
        sa.Column("log_position", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "fitted_position >= 0 AND fitted_position < log_position", name=op.f("ck_snapshots_positions")
        ),
        sa.CheckConstraint("version >= 1", name=op.f("ck_snapshots_version")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_snapshots_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "version", name=op.f("pk_snapshots")),
    )


def downgrade() -> None:
    op.drop_table("snapshots")
    op.drop_table("selections")
    op.drop_table("refits")
    op.drop_table("prompts")
    op.drop_table("pool_blocks")
    op.drop_table("log")
    op.drop_table("checkpoints")
    op.drop_table("runs")
    op.drop_table("embeddings")
    op.drop_table("api_keys")
