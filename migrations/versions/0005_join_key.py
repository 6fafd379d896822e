"""By which runs know that a prompt of one is a prompt of another."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_join_key"
down_revision = "0004_prior_rates"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("prompts", sa.Column("join_key", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("prompts", "join_key")
