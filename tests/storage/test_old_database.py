"""A database of an older release answers as it did, also where its checkpoints are gone.

What is counted, chosen, reported and versioned is equal. So are numbers within a millionth, with one exception. The
code of 1fef846 projected the features of texts with whatever linear algebra the machine had; since then they are
computed in exact sums, on a basis that is found another way. Beliefs about a small pool of texts moved by up to .02
with that. The rule of choice is another since, too: the batches that are chosen next are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from tests.storage.old_database import FOLDER, answers, differences, files, restore
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.storage.engine import open_engine

if TYPE_CHECKING:
    from tests.conftest import Service

CHOOSING = ("math", "branch", "vectors")
"""Runs whose next batches follow the default rule of choice, from the default beliefs."""
MOVED = {"1fef846": 0.05}
"""By how much beliefs of `CHOOSING` may have moved since a revision."""
REVISIONS = sorted({path.name.partition(".")[0] for path in FOLDER.iterdir()})


@pytest.mark.parametrize(
    ("new_database_url", "checkpoints"),
    [
        ("sqlite", "kept"),
        ("postgresql", "gone"),
        pytest.param("sqlite", "gone", marks=pytest.mark.slow),
        pytest.param("postgresql", "kept", marks=pytest.mark.slow),
    ],
    indirect=["new_database_url"],
)
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_database_of_an_older_release_answers_as_it_did(
    revision: str, checkpoints: str, new_database_url: str, start_service: Callable[[str], Service]
) -> None:
    content, told = files(revision, "sqlite" if new_database_url.startswith("sqlite") else "postgresql")
    restore(content.read_bytes(), new_database_url)
    if checkpoints == "gone":
        engine = open_engine(new_database_url, timeout_seconds=PATIENCE_SECONDS)
        with engine.begin() as connection:
            assert connection.execute(text("DELETE FROM checkpoints")).rowcount > 1
        engine.dispose()

    old, new = without_intervals(json.loads(told.read_text())), answers(start_service(new_database_url).http)

    moved: dict[str, Any] = {}
    if revision in MOVED:
        for run in CHOOSING:
            moved |= {key: old.pop(key) for key in (f"{run}: predictions", f"{run}: prompts")}
            del old[f"{run}: next steps"], old[f"{run}: predictions then"]
    assert len(old) >= 20
    assert differences(old, new) == []
    assert differences(moved, new, tolerance=MOVED.get(revision, 0.0)) == []


def without_intervals(told: Any) -> Any:
    """Those of that release were of one Beta, and wrong near 0 and 1; they are the mixture's now."""
    if isinstance(told, dict):
        return {name: without_intervals(value) for name, value in told.items() if name != "interval"}
    return [without_intervals(value) for value in told] if isinstance(told, list) else told


def test_differences_are_found() -> None:
    old = {"n": 3, "rate": 0.25, "ids": ["a", "b"], "far": 1e9}

    assert differences(old, {**old, "more": 1, "rate": 0.25 + 1e-8, "far": 1e9 + 1}) == []
    assert differences(old, {**old, "rate": 0.2501}) == [".rate: was 0.25, is 0.2501"]
    assert differences(old, {**old, "n": 4}) == [".n: was 3, is 4"]
    assert differences(old, {**old, "ids": ["a"]}) == [".ids: was ['a', 'b'], is ['a']"]
    assert differences(old, {**old, "ids": ["b", "a"]}) == [".ids[0]: was 'a', is 'b'", ".ids[1]: was 'b', is 'a'"]
    assert differences(old, {"n": 3, "rate": 0.25, "ids": ["a", "b"]}) == [".far is missing"]
