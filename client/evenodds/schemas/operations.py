"""The state of the service, and its errors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evenodds.schemas.base import Reply, example


class Health(Reply):
    model_config = example(status="ok", reasons=[])

    status: Literal["ok", "unavailable"]
    reasons: tuple[str, ...] = ()


class Problem(Reply):
    """RFC 9457 problem+json. `code` is stable; `detail` is for people."""

    model_config = example(
        type="about:blank",
        title="Not Found",
        status=404,
        detail="run 'math-7b' does not exist: create it first",
        code="run_unknown",
        request_id="0f9d3a5c8a7e4a5e9d6b1c2f3a4b5c6d",
        errors=[],
    )

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
    errors: tuple[str, ...] = Field(default=(), description="one line per fault, where there are several")
