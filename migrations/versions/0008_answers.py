"""Reference answers of prompts, and their features."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008_answers"
down_revision = "0007_run_states"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("prompts", sa.Column("answer", sa.Text(), nullable=True))
    op.add_column("prompts", sa.Column("answer_features", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("prompts", "answer_features")
    op.drop_column("prompts", "answer")
