"""What a process remembers of texts outside of pools: rows, and nothing of the requests that brought them."""

from __future__ import annotations

import tracemalloc
from datetime import datetime, timezone
from pathlib import Path

import pytest

from evenodds import PromptRef
from evenodds_service.domain.settings import RunSettings
from evenodds_service.runtime import featurizer as module
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store


def test_the_cache_of_texts_keeps_no_request_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text of each request is asked for again and so stays, when the others have long been forgotten."""
    monkeypatch.setattr(module, "CACHED_TEXTS", 1_024)
    engine = open_engine(f"sqlite:///{tmp_path}/evenodds.db")
    upgrade(engine)
    store = Store(engine)
    run, _ = store.put_run("r", RunSettings(), now=datetime.now(timezone.utc))
    featurizer = Featurizer(store)
    kept = [PromptRef(text=f"kept {i}") for i in range(12)]

    def ask(request: int) -> None:
        items = [*kept[: request + 1], *(PromptRef(text=f"{request} {i}") for i in range(250))]
        featurizer.block(run, items, names=[str(i) for i in range(len(items))])

    ask(0)
    tracemalloc.start()
    for request in range(1, 12):
        ask(request)
        if request == 5:
            full, _ = tracemalloc.get_traced_memory()
    grown = tracemalloc.get_traced_memory()[0] - full
    tracemalloc.stop()
    store.close()

    assert all(row.base is None for rows in featurizer._rows.values() for row in rows)
    assert grown < 250_000, "six more requests, of 0.3 MB of vectors each, take the place of those before them"
