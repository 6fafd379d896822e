"""Where the time of a request goes: named phases, collected across the layers that a request passes through.

Costs two clock readings a phase, nothing where nobody collects. Knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_collecting: ContextVar[dict[str, float] | None] = ContextVar("evenodds_phases", default=None)


@contextmanager
def collected_phases() -> Iterator[dict[str, float]]:
    """Seconds by phase of what runs inside, also in threads that carry its context; filled as phases end."""
    phases: dict[str, float] = {}
    token = _collecting.set(phases)
    try:
        yield phases
    finally:
        _collecting.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Add the time of the body to the phase of this name, but for what phases inside it take: together they add up."""
    phases = _collecting.get()
    if phases is None:
        yield
        return
    started, before = time.perf_counter(), sum(phases.values())
    try:
        yield
    finally:
        inside = sum(phases.values()) - before
        phases[name] = phases.get(name, 0.0) + time.perf_counter() - started - inside
