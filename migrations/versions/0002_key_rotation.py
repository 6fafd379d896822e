"""Keys may have two secrets and an end, and runs that keep no texts have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_key_rotation"
down_revision = "0001_initial"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("api_keys") as batch_op:
        batch_op.add_column(sa.Column("second_hash", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.create_unique_constraint(batch_op.f("uq_api_keys_second_hash"), ["second_hash"])
    # Forks with this setting took the texts along. The settings are JSON in one form.
    without_texts = sa.text("SELECT id FROM runs WHERE settings LIKE :setting").bindparams(
        setting='%"keep_text": false%'
    )
    ids = [row[0] for row in op.get_bind().execute(without_texts)]
    for run_id in ids:
        erased = sa.text("UPDATE prompts SET text = NULL WHERE run_id = :run_id AND text IS NOT NULL")
        op.get_bind().execute(erased.bindparams(run_id=run_id))


def downgrade() -> None:
    with op.batch_alter_table("api_keys") as batch_op:
        batch_op.drop_constraint(batch_op.f("uq_api_keys_second_hash"), type_="unique")
        batch_op.drop_column("last_used_at")
        batch_op.drop_column("expires_at")
        batch_op.drop_column("second_hash")
