"""What other models showed on a run's prompts, by name."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_prior_rates"
down_revision = "0003_decisions"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("prompts", sa.Column("prior_rates", sa.Text(), nullable=True))
    op.add_column("runs", sa.Column("rate_names", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("runs", "rate_names")
    op.drop_column("prompts", "prior_rates")
