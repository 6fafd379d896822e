"""The check of plain words finds long sentences and turns to avoid, and passes over tables and code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def words() -> Any:
    spec = importlib.util.spec_from_file_location("words", Path(__file__).parents[1] / ".ci" / "words.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_long_sentence_is_named_by_its_first_line(words: Any) -> None:
    long = "word " * words.LONGEST

    assert list(words.faults_of(f"# Title\n\nA short one.\n{long}\nmore.\n\n- {long}\n")) == [
        (4, f"a sentence of {words.LONGEST + 1} words, {words.LONGEST} are the most: make two of it")
    ]


def test_a_turn_to_avoid_is_named_with_what_to_write(words: Any) -> None:
    assert list(words.faults_of("It waits.\nIt waits For ever.\n")) == [(2, "'for ever': never ... again, or always")]


def test_code_tables_and_pictures_are_not_read(words: Any) -> None:
    page = (
        "| for ever | "
        + "word " * 50
        + "|\n\n```sh\necho for ever\n```\n\n![for ever](picture.svg)\n\nIn plain words.\n"
    )

    assert list(words.faults_of(page)) == []
