"""What pydantic finds wrong with a request or a reply, one readable line a fault; client and service say it alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic_core import ErrorDetails

Fault: TypeAlias = ErrorDetails | Mapping[str, Any]


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
        what = fault["msg"].removeprefix("Value error, ")
        value = fault.get("input")
        got = f", got {value!r:.80}" if isinstance(value, (bool, int, float, str)) else ""
        lines.append(f"{where.removeprefix('.')}: {what}{got}" if where else f"{what}{got}")
    return tuple(lines)


def _is_inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer
