"""On which databases a test runs by default."""

from __future__ import annotations

from typing import Literal

import pytest


def _mainly_sqlite(fixture: str, scope: Literal["function", "session"]) -> pytest.MarkDecorator:
    backends = ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)]
    return pytest.mark.parametrize(fixture, backends, indirect=True, scope=scope)


mainly_sqlite = _mainly_sqlite("database_url", "function")
"""For what is the same whatever the database: on PostgreSQL too, but only by `make test-all`."""

mainly_sqlite_store = _mainly_sqlite("shared_database_url", "session")
"""The same for the store of `tests/storage`."""
