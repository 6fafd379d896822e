"""Log lines, JSON or readable, of this service and of the libraries under it. Set up once, in `__main__`.

Every line that is written while a request is answered carries the request's id. No line holds a prompt's text, a body
or a key, also where something failed that nobody foresaw: a traceback shows code and never values, of an exception's
message only what does not quote them, and whatever looks like a secret is struck out of every line at its very end.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

from evenodds_service.redaction import safe_traceback, without_secrets

LogFormat = Literal["json", "text"]

_ABOVE: dict[str, int] = {
    "alembic": logging.WARNING,
    "httpx": logging.WARNING,
    "sentence_transformers": logging.WARNING,
}
"""Libraries that say too much, and from which level on they are heard."""


def _explain(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Turn an exception into the text `exception`. What asyncio says beside it holds the exception once more."""
    given = event.pop("exc_info", None)
    error = given[1] if isinstance(given, tuple) else sys.exc_info()[1] if given is True else given
    if isinstance(error, BaseException):
        event["event"] = str(event.get("event", "")).strip().partition("\n")[0]
        event["exception"] = safe_traceback(error)
    return event


def _strike_out(_logger: Any, _method: str, line: Any) -> str:
    return without_secrets(line)


def _is_not_told_by_the_api(record: logging.LogRecord) -> bool:
    """Errors of a request are logged under its id, by `api.problems`."""
    return not str(record.msg).startswith("Exception in ASGI application")


def _log_what_ends_threads() -> None:
    """Let what nobody catches be a line of the log, as everything else."""
    root = logging.getLogger()

    def of_process(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        root.critical("ended by an unexpected error", exc_info=(kind, error, trace))

    def of_thread(ended: threading.ExceptHookArgs) -> None:
        name = ended.thread.name if ended.thread is not None else "?"
        if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
            root.error("thread %s ended by an unexpected error", name, exc_info=ended.exc_value)

    sys.excepthook, threading.excepthook = of_process, of_thread


def configure_logging(log_format: LogFormat, level: str) -> None:
    """Send what `logging` and `structlog` are told to standard error, one line each.

    Args:
        level: Name of a level, as `logging` knows it.
    """
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _explain, renderer, _strike_out],
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name, least in _ABOVE.items():
        logging.getLogger(name).setLevel(max(least, root.level))
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.getLogger("uvicorn.error").addFilter(_is_not_told_by_the_api)
    _log_what_ends_threads()
