"""What several commands begin with: settings, the database, the log; and how a fault is told."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from evenodds_service.settings import Settings
    from evenodds_service.storage.engine import Patience
    from evenodds_service.storage.store import Store

EXIT_FAULT = 1


def set_up_logging(settings: Settings) -> None:
    from evenodds_service.logs import configure_logging

    configure_logging(settings.log_format or ("text" if sys.stderr.isatty() else "json"), settings.log_level.upper())


class Refused(Exception):
    """A setting or the database does not allow a start. The message says why and what to do."""


def opened(patience: Patience | None = None) -> tuple[Settings, Store]:
    """Settings and the store over a database with this release's schema.

    Args:
        patience: Of the store's transactions; what the settings give a request, by default.

    Raises:
        Refused: a bad setting, no database, or another schema on PostgreSQL. (SQLite is migrated here.)
    """
    from pydantic import ValidationError

    from evenodds_service.errors import StoreError
    from evenodds_service.settings import settings_from_environment, unknown_variables
    from evenodds_service.storage.engine import check_file, open_engine
    from evenodds_service.storage.revisions import check_schema, current_revision, head_revision
    from evenodds_service.storage.store import Store

    for sentence in unknown_variables(os.environ):
        print(f"evenodds: {sentence}", file=sys.stderr)
    try:
        settings = settings_from_environment()
        check_file(settings.database_url)
        engine = open_engine(
            settings.database_url,
            pool_size=settings.pool_size,
            timeout_seconds=settings.database_timeout_seconds,
            patience=patience,
        )
        if engine.dialect.name != "sqlite":
            check_schema(engine)
        elif current_revision(engine) != head_revision():
            from evenodds_service.storage.migration import upgrade

            upgrade(engine)
    except (StoreError, ValidationError) as error:
        raise Refused(explained(error)) from error
    return settings, Store(engine, keep_snapshots=settings.snapshots)


def explained(error: Exception) -> str:
    """A faulty setting by the name of its variable; everything else explains itself."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(_sentence(fault) for fault in error.errors())


_SAID = {
    "extra_forbidden": "there is no field of this name",
    "model_type": 'it has to be JSON with fields of evenodds.TextRule, such as {"context_characters": 0}',
}
"""In place of what pydantic says, by its type of the fault."""


def _sentence(fault: ErrorDetails) -> str:
    setting, *fields = map(str, fault["loc"])
    place = f"EVENODDS_{setting.upper()}" + "".join(f", field {name}" for name in fields)
    if fault["type"] == "value_error":  # is of the setting's own check, and says what it got
        return f"{place}: {fault['ctx']['error']}"
    return f"{place}: {_SAID.get(fault['type'], fault['msg'])}, got {fault['input']!r}"


def fault(message: str) -> int:
    from evenodds_service.redaction import without_secrets

    print(f"evenodds: {without_secrets(message)}", file=sys.stderr)
    return EXIT_FAULT
