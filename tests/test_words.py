"""The check of plain words finds long sentences and turns to avoid, and passes over tables and code."""

from __future__ import annotations

from typing import Any

import pytest
from tests.ci_scripts import loaded


@pytest.fixture(scope="module")
def words() -> Any:
    return loaded("words")


def test_a_long_sentence_is_named_by_its_first_line(words: Any) -> None:
    long = "word " * words.LONGEST

    assert list(words.faults_of(f"# Title\n\nA short one.\n{long}\nmore.\n\n- {long}\n")) == [
        (4, f"a sentence of {words.LONGEST + 1} words, {words.LONGEST} are the most: make two of it")
    ]


def test_a_turn_to_avoid_is_named_with_what_to_write(words: Any) -> None:
    assert list(words.faults_of("It waits.\nIt waits For ever.\n")) == [(2, "'for ever': never ... again, or always")]


def test_a_turn_is_found_in_messages_and_comments_of_sources(words: Any) -> None:
    source = ["x = 1  # come what may", 'raise ValueError("lower the one or raise the other")', "done = True"]

    assert [line for line, _ in words.turns_in(source)] == [1, 2]


def test_code_tables_and_pictures_are_not_read(words: Any) -> None:
    page = (
        "| for ever | "
        + "word " * 50
        + "|\n\n```sh\necho for ever\n```\n\n![for ever](picture.svg)\n\nIn plain words.\n"
    )

    assert list(words.faults_of(page)) == []
