"""What is told of a reference answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds_service.domain.prompts import Answer, answer_text, text_to_read
from evenodds_service.model.answers import ANSWER_NAMES, MAX_CHARACTERS, answer_features

pytestmark = pytest.mark.numbers

AWKWARD = ("", " ", "$", "\\boxed{", "\ud800", "٣٤", "9" * 5_000, "1e999", "-", ".", "{" * 400, "字", "a" * 100_000)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def told(answer: str) -> set[str]:
    """Which features are not 0, of those that say what kind of thing an answer is."""
    row = dict(zip(ANSWER_NAMES, answer_features([answer])[0].tolist(), strict=True))
    return {name for name, value in row.items() if value} - {"length", "numbers", "commands", "integer_size"}


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        ("7", {"integer", "small_integer"}),
        ("1,200", {"integer", "round_integer"}),
        ("-3.25", {"decimal", "negative"}),
        ("\\boxed{\\frac{3}{7}}", {"fraction"}),
        ("3/7", {"fraction"}),
        ("2\\sqrt{3}\\pi", {"root", "pi"}),
        ("B", {"letter", "choice", "variable"}),
        ("x^2 + 1", {"power", "variable"}),
        ("(1, 2)", {"parentheses", "list", "list_items"}),
        ("\\{1, 2\\}", {"set", "list", "list_items"}),
        ("\\begin{pmatrix}1\\end{pmatrix}", {"matrix", "text"}),
        ("x \\le 3", {"relation", "variable"}),
        ("True", {"text", "yes_no"}),
        ("50\\%", {"unit"}),
    ],
)
def test_a_feature_says_what_kind_of_thing_an_answer_is(answer: str, kinds: set[str]) -> None:
    assert told(answer) == kinds


@given(st.lists(st.one_of(st.text(max_size=60), st.sampled_from(AWKWARD)), max_size=5))
def test_every_answer_has_finite_features_of_its_own(answers: list[str]) -> None:
    table = answer_features(answers)

    assert table.shape == (len(answers), len(ANSWER_NAMES))
    assert len(set(ANSWER_NAMES)) == 25
    assert np.isfinite(table).all()
    assert table.min(initial=0.0) >= 0
    assert table.max(initial=0.0) <= 20
    for row, answer in zip(table, answers, strict=True):
        np.testing.assert_array_equal(answer_features([answer])[0], row)


def test_of_a_long_answer_the_beginning_is_read_and_the_length_is_known() -> None:
    beginning = "12 + " * (MAX_CHARACTERS // 5)
    short, long = answer_features([beginning, beginning + "\\sqrt" * 1_000])

    changed = {name for name, one, other in zip(ANSWER_NAMES, short, long, strict=True) if one != other}
    assert changed == {"length"}


@given(JSON)
def test_any_json_has_a_text_and_equal_numbers_have_one(answer: object) -> None:
    text = answer_text(answer)  # type: ignore[arg-type]

    assert text == " ".join(text.split())
    assert answer_text([answer]) == text  # type: ignore[list-item]
    same: list[Answer] = [42, 42.0, "42", " 42\n", [42]]
    assert set(map(answer_text, same)) == {"42"}


def test_n_grams_read_the_answer_behind_the_text() -> None:
    assert text_to_read("What is 6 * 7?", 42) == "What is 6 * 7?\nAnswer: 42"
    assert text_to_read(None, ["a", 1]) == "\nAnswer: a, 1"
    assert (text_to_read("What?"), text_to_read(None)) == ("What?", "")
