from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds_service.model.surface import MAX_CHARACTERS, SURFACE_NAMES, surface_features

pytestmark = pytest.mark.numbers

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=200)  # lone surrogates and controls too
MARKED_TEXT = st.text("\\{}$^_=<>?!.,:;'\"`()[]| \n\t0123456789eE-+*/aAbBIf÷½٣𝟙字", max_size=200)
AWKWARD = (
    "",
    " ",
    "\n\n\n",
    "\x00",
    "\ud800",
    "٣٤ ½",
    "9" * 5_000,
    "1e999",
    "{" * 400,
    "字" * 100,
    "a" * 200_000,
)


def features_of(text: str) -> dict[str, float]:
    return dict(zip(SURFACE_NAMES, surface_features([text])[0].tolist(), strict=True))


def test_each_feature_has_its_own_name_and_column() -> None:
    table = surface_features(["What is $1+1$?", "Prove it."])

    assert table.shape == (2, len(SURFACE_NAMES))
    assert table.dtype == np.float32
    assert len(set(SURFACE_NAMES)) == len(SURFACE_NAMES)


def test_no_texts_give_no_rows() -> None:
    assert surface_features([]).shape == (0, len(SURFACE_NAMES))


@given(st.one_of(ANY_TEXT, MARKED_TEXT, st.sampled_from(AWKWARD)))
def test_every_text_has_finite_features_of_the_order_of_one(text: str) -> None:
    table = surface_features([text])

    assert np.isfinite(table).all()
    assert table.min() >= 0
    assert table.max() <= 15


@given(st.lists(st.one_of(ANY_TEXT, MARKED_TEXT), min_size=1, max_size=5))
def test_a_row_depends_on_its_own_text_alone(texts: list[str]) -> None:
    alone = [surface_features([text])[0] for text in texts]

    np.testing.assert_array_equal(surface_features(texts), np.array(alone))


def test_the_whole_length_counts_although_only_the_head_is_read() -> None:
    head, whole = features_of("x" * MAX_CHARACTERS), features_of("x" * MAX_CHARACTERS + "7 + 7 = ?")

    assert whole["characters"] > head["characters"]
    assert whole["numbers"] == head["numbers"] == 0
    assert whole["questions"] == 0


def test_an_olympiad_problem_shows_its_numbers_formulas_and_topics() -> None:
    problem = features_of(r"If $\angle ABC = 60^\circ$ and $AB \le 1,500.5$, how many circles have prime radius?")

    assert problem["opens_with_if"] == 1
    assert problem["ends_in_question"] == 1
    assert problem["numbers"] == np.float32(np.log1p(2))
    assert problem["decimals"] == np.float32(np.log1p(1))
    assert np.isclose(problem["largest_number"], np.log10(1501.5) / 3)
    assert problem["inline_formulas"] == np.float32(np.log1p(4))
    assert problem["commands"] == np.float32(np.log1p(3))
    assert problem["abbreviations"] == np.float32(np.log1p(2))
    assert problem["geometry"] == np.float32(np.log1p(4))
    assert problem["number_theory"] == np.float32(np.log1p(1))
    assert problem["code"] == problem["grid_lines"] == problem["non_ascii_share"] == 0


def test_a_code_task_shows_its_marks_and_a_puzzle_its_board() -> None:
    task = features_of("Return a list.\n```\nimport json\ndef task_func(path):\n    return None\n```")
    puzzle = features_of("Solve this:\n_ 2 3 _\n4 _ _ 1\n_ 4 1 _\nDone.")

    assert task["code_marks"] == np.float32(np.log1p(5))
    assert task["code"] > 0
    assert task["aligned_spaces"] > 0
    assert task["grid_lines"] == 0
    assert puzzle["grid_lines"] == np.float32(np.log1p(3))


def test_words_of_any_script_are_counted() -> None:
    assert features_of("сколько будет два плюс два")["distinct_words"] == np.float32(np.log1p(4))
    assert features_of("sieben Äpfel")["non_ascii_share"] > 0
