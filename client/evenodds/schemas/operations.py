"""The state of the service, and its errors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evenodds.schemas.base import Reply


class Health(Reply):
    status: Literal["ok", "unavailable"]
    reasons: tuple[str, ...] = ()


class Problem(Reply):
    """RFC 9457 problem+json. `code` is stable; `detail` is for people."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
    errors: tuple[str, ...] = Field(default=(), description="one line per fault, where there are several")
