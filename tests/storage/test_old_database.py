"""A database of an older release answers as it did, also where its checkpoints are gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from tests.storage.old_database import FOLDER, answers, differences, files, restore

from evenodds_service.storage.engine import open_engine

if TYPE_CHECKING:
    from tests.conftest import Service

REVISIONS = sorted({path.name.partition(".")[0] for path in FOLDER.iterdir()})


@pytest.mark.parametrize("checkpoints", ["kept", "gone"])
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_database_of_an_older_release_answers_as_it_did(
    revision: str, checkpoints: str, database_url: str, start_service: Callable[[str], Service]
) -> None:
    """Counts, batches, versions and log positions are equal, numbers within a millionth."""
    content, told = files(revision, "sqlite" if database_url.startswith("sqlite") else "postgresql")
    restore(content.read_bytes(), database_url)
    if checkpoints == "gone":
        engine = open_engine(database_url)
        with engine.begin() as connection:
            assert connection.execute(text("DELETE FROM checkpoints")).rowcount > 1
        engine.dispose()

    found = differences(json.loads(told.read_text()), answers(start_service(database_url).http))

    assert found == []


def test_differences_are_found() -> None:
    old = {"n": 3, "rate": 0.25, "ids": ["a", "b"], "far": 1e9}

    assert differences(old, {**old, "more": 1, "rate": 0.25 + 1e-8, "far": 1e9 + 1}) == []
    assert differences(old, {**old, "rate": 0.2501}) == [".rate: was 0.25, is 0.2501"]
    assert differences(old, {**old, "n": 4}) == [".n: was 3, is 4"]
    assert differences(old, {**old, "ids": ["a"]}) == [".ids: was ['a', 'b'], is ['a']"]
    assert differences(old, {**old, "ids": ["b", "a"]}) == [".ids[0]: was 'a', is 'b'", ".ids[1]: was 'b', is 'a'"]
    assert differences(old, {"n": 3, "rate": 0.25, "ids": ["a", "b"]}) == [".far is missing"]
