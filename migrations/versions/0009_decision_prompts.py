"""Which prompt a decision is about, so that it is found where the prompt is erased."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009_decision_prompts"
down_revision = "0008_answers"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("decisions", sa.Column("prompt_id", sa.Text(), nullable=True))
    op.add_column("decisions", sa.Column("text_key", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("decisions", "text_key")
    op.drop_column("decisions", "prompt_id")
