"""When a run's first batch was chosen, by which its savings a day are told."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010_began_at"
down_revision = "0009_decision_prompts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("run_states", sa.Column("began_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("run_states", "began_at")
