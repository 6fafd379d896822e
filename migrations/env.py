"""Runs migrations on the connection that `storage.migration` passes; imports no live code."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context


def render_item(kind: str, item: object, _autogenerate: object) -> str | bool:
    """A column type of our own is written as the plain type beneath it; False leaves the rest to Alembic."""
    return f"sa.{item.impl!r}" if kind == "type" and isinstance(item, sa.TypeDecorator) else False


attributes = context.config.attributes
context.configure(
    connection=attributes["connection"],
    target_metadata=attributes["metadata"],
    render_item=render_item,
    render_as_batch=True,  # SQLite changes a table by building it anew
)
with context.begin_transaction():
    context.run_migrations()
