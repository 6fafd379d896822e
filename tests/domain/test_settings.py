from __future__ import annotations

import math
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenodds_service.domain.learning.predictors import acquisition_of
from evenodds_service.domain.log_entries import NewObservation, ObserveEntry
from evenodds_service.domain.prompts import text_key
from evenodds_service.domain.settings import RunSettings

quick = settings(max_examples=40)
REWARD = st.floats(0, 1)


def observe(prompts: list[int], successes: list[float], attempts: list[float]) -> ObserveEntry:
    return ObserveEntry(
        position=7,
        step=1,
        prompts=np.array(prompts, dtype=np.int64),
        successes=np.array(successes, dtype=np.float64),
        attempts=np.array(attempts, dtype=np.float64),
        informative=np.zeros(len(prompts), dtype=bool),
    )


def test_an_entry_keeps_whole_and_fractional_outcomes_within_their_attempts() -> None:
    entry = observe([0, 1, 1], [0, 2.5, 1], [1, 8, 1])

    assert entry.successes.tolist() == [0, 2.5, 1]


@pytest.mark.parametrize(
    ("successes", "attempts"),
    [(9.0, 8.0), (-0.1, 8.0), (0.0, 0.0), (0.0, 0.5), (0.0, -1.0)],
)
def test_an_entry_with_impossible_counts_is_refused(successes: float, attempts: float) -> None:
    with pytest.raises(ValueError, match=r"^log entry 7: successes must lie in \[0, attempts\], attempts >= 1$"):
        observe([0], [successes], [attempts])


@pytest.mark.parametrize(("successes", "attempts"), [(math.nan, 8.0), (1.0, math.nan), (1.0, math.inf)])
def test_an_entry_with_counts_that_are_not_finite_is_refused(successes: float, attempts: float) -> None:
    with pytest.raises(ValueError, match=r"^log entry 7: successes and attempts must be finite$"):
        observe([0], [successes], [attempts])


def test_an_entry_with_arrays_of_different_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^log entry 7: arrays of different lengths \[1, 2\]$"):
        observe([0, 1], [1], [8, 8])


@quick
@given(st.lists(st.text(min_size=1), min_size=1), st.sampled_from([" ", "\n", "\t\t", "\u00a0", " \r\n "]))
def test_a_text_key_ignores_how_much_and_which_white_space_stands_between_words(words: list[str], gap: str) -> None:
    assert text_key(gap + gap.join(words) + gap) == text_key(" ".join(words))


@quick
@given(st.text())
def test_a_text_key_ignores_the_unicode_normal_form(text: str) -> None:
    assert text_key(unicodedata.normalize("NFD", text)) == text_key(unicodedata.normalize("NFC", text))


def test_composed_and_decomposed_accents_have_one_key() -> None:
    assert text_key("caf\u00e9 au lait") == text_key("cafe\u0301  au\nlait")


@pytest.mark.parametrize(("one", "other"), [("2 + 2", "2 + 3"), ("A", "a"), ("ab", "a b"), ("x\u00b2", "x2")])
def test_texts_that_differ_in_more_than_form_have_different_keys(one: str, other: str) -> None:
    assert text_key(one) != text_key(other)


def test_a_text_key_is_32_hexadecimal_digits() -> None:
    assert len(text_key("")) == 32
    assert set(text_key("What is 1 + 1?")) <= set("0123456789abcdef")


@quick
@given(st.lists(REWARD, min_size=1, max_size=20))
def test_rewards_sum_to_successes_within_the_attempts(rewards: list[float]) -> None:
    observation = NewObservation.of_rewards("p", rewards)

    assert observation.attempts == len(rewards)
    assert 0 <= observation.successes <= observation.attempts
    assert observation.successes == pytest.approx(sum(rewards))


@quick
@given(st.lists(st.integers(0, 1_000), min_size=1, max_size=20))
def test_rewards_are_informative_exactly_when_they_differ(thousandths: list[int]) -> None:
    rewards = [reward / 1_000 for reward in thousandths]

    assert NewObservation.of_rewards(0, rewards).informative == (len(set(thousandths)) > 1)


def test_equal_fractional_rewards_are_not_informative() -> None:
    assert not NewObservation.of_rewards(0, [0.5] * 8).informative


@pytest.mark.parametrize(("difference", "informative"), [(1e-7, False), (1e-5, True)])
def test_the_noise_of_floats_makes_no_difference(difference: float, informative: bool) -> None:
    assert NewObservation.of_rewards(0, [0.5, 0.5 + difference]).informative is informative


@pytest.mark.parametrize(
    ("successes", "attempts", "informative"),
    [(0, 8, False), (8, 8, False), (1, 8, True), (7.5, 8, True), (0, 1, False), (1, 1, False), (0.5, 1, False)],
)
def test_counts_are_informative_when_some_but_not_all_of_several_attempts_succeeded(
    successes: float, attempts: int, informative: bool
) -> None:
    assert NewObservation.of_counts(0, successes, attempts).informative is informative


def test_the_acquisition_follows_the_predictor_unless_it_is_set() -> None:
    assert acquisition_of(RunSettings()) == "yield"
    assert acquisition_of(RunSettings(predictor="mopps")) == "thompson"
    assert acquisition_of(RunSettings(predictor="uniform")) == "uniform"
    assert acquisition_of(RunSettings(predictor="mopps", acquisition="yield")) == "yield"
