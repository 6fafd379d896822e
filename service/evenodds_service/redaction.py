"""What may be shown of errors and lines to whoever reads logs: no values of variables, no secrets, no texts of prompts.

Standard library only: the command line needs it where nothing else is installed.
"""

from __future__ import annotations

import re
import traceback

from evenodds_service.errors import ServiceError

_SECRETS = (
    (re.compile(r"eo_[A-Za-z0-9_-]{8,}"), "eo_***"),  # keys of this service
    (re.compile(r"(?i)\b(bearer|basic) +[^\s,;\"']+"), r"\1 ***"),
    (re.compile(r"(\w://[^\s:/@\"']*):[^\s@\"']+@"), r"\1:***@"),  # user:password@host
)
_QUOTED = re.compile(r"""(?P<mark>['"])(?P<content>(?:\\.|(?!(?P=mark)).)*)((?P=mark)|$)""")
_NAME = re.compile(r"[A-Za-z_][\w.]{0,63}")
_MOST_SAID = 1_000


def without_secrets(line: str) -> str:
    """The line with API keys, other credentials of a header, and passwords in URLs struck out."""
    for pattern, shown in _SECRETS:
        line = pattern.sub(shown, line)
    return line


def described(error: BaseException) -> str:
    """Type and message of an exception, without the values that the message quotes.

    What a database or a validator adds on further lines holds rows and inputs: only the first line is shown. What the
    service raises on purpose is meant to be read, and an error of the system names files.
    """

    def shown(quoted: re.Match[str]) -> str:
        # Errors about a value or a key quote it; other errors quote names, of columns, say.
        is_name = _NAME.fullmatch(quoted["content"]) and not isinstance(error, (ValueError, LookupError))
        return quoted[0] if is_name or isinstance(error, (ServiceError, OSError)) else "'...'"

    said = _QUOTED.sub(shown, without_secrets(str(error)).partition("\n")[0])
    name = type(error).__qualname__
    return f"{name}: {said[:_MOST_SAID]}" if said else name


def safe_traceback(error: BaseException) -> str:
    """Where the error and those that led to it were raised, without values of variables."""
    parts: list[str] = []
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        frames = "".join(traceback.format_tb(following.__traceback__))
        inner = "".join(
            f"\n\nof which one is:\n\n{safe_traceback(one)}" for one in getattr(following, "exceptions", ())
        )
        parts.append(f"Traceback (most recent call last):\n{frames}{described(following)}{inner}")
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return "\n\nwhich led to:\n\n".join(reversed(parts))
