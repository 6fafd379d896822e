"""Requests made of arguments, and what pydantic finds wrong with them, one readable line a fault.

Client and service say it alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from evenodds.errors import InvalidRequest
from evenodds.schemas.base import OLDER_NAMES, Request

RequestT = TypeVar("RequestT", bound=Request)
Fault: TypeAlias = ErrorDetails | Mapping[str, Any]


def request_of(call: str, model: type[RequestT], given: Mapping[str, Any], *, stacklevel: int) -> RequestT:
    """The request of these arguments by name. Those that are None, and those that it has no field for, are left out.

    Args:
        call: Name of the method that was called.
        stacklevel: Whose line a warning names, counted as `warnings.warn` does from here.

    Raises:
        InvalidRequest: They do not keep to the contract.
    """
    fields = {name: value for name, value in given.items() if name in model.model_fields and value is not None}
    warn_of_older_names(call, fields, stacklevel=stacklevel + 1)
    with kept_to(call):
        return model.model_validate(fields)


def warn_of_older_names(call: str, names: Iterable[str], *, stacklevel: int) -> None:
    """DeprecationWarning for each argument that goes by the name it had before."""
    for old in names:
        if old in OLDER_NAMES:
            message = f"{call}: {old} is now {OLDER_NAMES[old]}; the older name goes with release 1.0"
            warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


@contextmanager
def kept_to(call: str, prefix: str = "") -> Iterator[None]:
    """What does not keep to the contract raises InvalidRequest, with the faults at `prefix`."""
    try:
        yield
    except ValidationError as error:
        raise InvalidRequest(call, fault_lines(error.errors(include_url=False), prefix=prefix)) from error


_IN_WORDS = {"extra_forbidden": "there is no field of this name"}
"""Instead of pydantic's words, by type."""


def fault_lines(faults: Sequence[Fault], *, prefix: str = "") -> tuple[str, ...]:
    """One line per fault: where it is, what it is, and the value if that is short.

    Args:
        faults: What `ValidationError.errors()` gives, or the like.
        prefix: Path of the value that was checked, such as `prompts[3]`.
    """
    lines = []
    for fault in faults:
        place = fault["loc"]
        if fault["type"] == "too_short" and any(_is_inside(other["loc"], place) for other in faults):
            continue  # only sound items are counted: the list seems short because an item is faulty
        where = prefix + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        what = _IN_WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
        value = fault.get("input")
        got = f", got {value!r:.80}" if isinstance(value, (bool, int, float, str)) else ""
        lines.append(f"{where.removeprefix('.')}: {what}{got}" if where else f"{what}{got}")
    return tuple(lines)


def _is_inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer
