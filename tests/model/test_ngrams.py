from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds_service.model.ngrams import MIN_LABELS, FittedNgrams, NgramPrior, fit, ngram_matrix

pytestmark = pytest.mark.numbers

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=100)  # lone surrogates and controls too
COLOURS = ("red", "green", "blue", "white", "black")
HARD, EASY, EVEN = "circumscribed tetrahedron", "add small numbers", r"evaluate \frac{x}{y} now"
N, N_LABELS = 900, 600


def world(seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts of three kinds: never solved, always solved, and half of the time. With successes of 8."""
    generator = np.random.default_rng(seed)
    kinds = generator.integers(0, 3, N)
    words = generator.choice(COLOURS, (N, 6))
    texts = [f"{' '.join(words[i])} {i} {(HARD, EASY, EVEN)[kind]}" for i, kind in enumerate(kinds)]
    rates = np.array([0.02, 0.98, 0.5])[kinds]
    return texts, rates, generator.binomial(8, rates).astype(float)


def fit_world(texts: list[str], successes: np.ndarray, *, group_size: int = 8, seed: int = 0) -> FittedNgrams:
    labelled = np.arange(N_LABELS)
    known = successes[labelled]
    return fit(
        ngram_matrix(texts),
        np.zeros((len(texts), 2), dtype=np.float32),
        labelled=labelled,
        successes=known,
        attempts=np.full(N_LABELS, 8.0),
        informative_share=((known > 0) & (known < 8)).astype(float),
        group_size=group_size,
        seed=seed,
    )


@cache
def fitted_world() -> FittedNgrams:
    texts, _, successes = world()
    return fit_world(texts, successes)


@given(st.lists(ANY_TEXT, max_size=5))
def test_a_row_depends_on_its_own_text_alone(texts: list[str]) -> None:
    together = ngram_matrix(texts)

    assert together.shape == (len(texts), 2**19)
    for i, text in enumerate(texts):
        alone = ngram_matrix([text])
        assert (together[i].indices == alone.indices).all()
        assert (np.diff(alone.indices) > 0).all()


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_white_space_has_no_ngrams(text: str) -> None:
    assert ngram_matrix([text]).nnz == 0


def test_a_long_list_has_the_same_rows_as_its_parts() -> None:
    texts = [f"case {i} of $x^{i}$" for i in range(600)]

    whole = ngram_matrix(texts)

    assert (whole[:300] != ngram_matrix(texts[:300])).nnz == 0
    assert (whole[300:] != ngram_matrix(texts[300:])).nnz == 0


def test_words_are_compared_without_case_and_long_numbers_by_their_length() -> None:
    first, second, third = (set(ngram_matrix([text]).indices[:6]) for text in ("Find 12345", "find 98765", "find 98"))
    words_of = [
        {column for column in ngram_matrix([t]).indices if column < 2**18} for t in ("Find 12345", "find 98765")
    ]

    assert words_of[0] == words_of[1]
    assert first & second
    assert {column for column in third if column < 2**18} != words_of[1]


def test_a_command_is_one_token_and_an_identifier_falls_apart() -> None:
    def words(text: str) -> set[int]:
        return {column for column in ngram_matrix([text]).indices if column < 2**18}

    assert len(words(r"\frac")) == 1
    assert words(r"\frac") != words("frac")
    assert words("parse") < words("parseJSON")
    assert words("parse") < words("parse_json")


def test_only_the_beginning_of_a_text_is_read() -> None:
    assert (ngram_matrix(["ab " * 10_000]) != ngram_matrix(["ab " * 9_000 + "  "])).nnz == 0


def test_prompts_never_seen_are_told_apart() -> None:
    _, rates, _ = world()
    result = fitted_world()
    unseen = np.arange(N_LABELS, N)

    assert np.abs(result.mean_N[unseen] - rates[unseen]).max() < 0.2
    assert (result.informative_N[unseen][rates[unseen] == 0.5] > 0.8).all()
    assert (result.informative_N[unseen][rates[unseen] != 0.5] < 0.5).all()


def test_forecasts_are_calibrated_on_prompts_never_seen() -> None:
    _, rates, successes = world()
    result = fitted_world()
    unseen = np.arange(N_LABELS, N)
    informative = (successes > 0) & (successes < 8)

    assert result.mean_N[unseen].mean() == pytest.approx(rates[unseen].mean(), abs=0.03)
    assert result.informative_N[unseen].mean() == pytest.approx(informative[unseen].mean(), abs=0.05)


def test_a_text_that_the_fit_knew_unlabelled_and_a_new_one_are_predicted_alike() -> None:
    texts, _, _ = world()
    result = fitted_world()
    unseen = slice(N_LABELS, N)
    dense = np.zeros((N - N_LABELS, 2), dtype=np.float32)

    mean, informative = NgramPrior(result.weights).predict(texts[unseen], dense)
    from_matrix, _ = NgramPrior(result.weights).predict(ngram_matrix(texts[unseen]), dense)

    assert mean == pytest.approx(result.mean_N[unseen], abs=2e-3)  # half precision of the weights
    assert informative == pytest.approx(result.informative_N[unseen], abs=2e-3)
    assert (from_matrix == mean).all()


def test_one_by_one_is_as_all_together() -> None:
    texts, _, _ = world()
    weights = fitted_world().weights
    dense = np.zeros((5, 2), dtype=np.float32)

    together = np.stack(NgramPrior(weights).predict(texts[-5:], dense))
    alone = [np.stack(NgramPrior(weights).predict([text], dense[:1])) for text in texts[-5:]]

    assert np.concatenate(alone, axis=1) == pytest.approx(together, abs=1e-6)


def test_a_prompt_does_not_hear_its_own_label() -> None:
    """In pure noise, predictions of the labelled prompts do not follow their labels, also not through a copy."""
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{j}" for j in generator.integers(0, 9_999, 12)) for _ in range(N // 2)] * 2
    outcomes = np.tile(generator.choice([0.0, 8.0], N // 2), 2)

    result = fit(
        ngram_matrix(texts),
        np.zeros((N, 0), dtype=np.float32),
        labelled=np.arange(N),
        successes=outcomes,
        attempts=np.full(N, 8.0),
        informative_share=np.full(N, np.nan),
        group_size=8,
        seed=0,
    )

    assert abs(np.corrcoef(result.mean_N, outcomes)[0, 1]) < 0.2
    assert abs(result.report["spearman"]) < 0.2


@pytest.mark.parametrize("text", ["", "the same text"])
def test_dense_inputs_are_learned_from_where_texts_say_nothing(text: str) -> None:
    generator = np.random.default_rng(0)
    dense = generator.standard_normal((N, 3)).astype(np.float32)
    rates = 1 / (1 + np.exp(-2 * dense[:, 1]))

    result = fit(
        ngram_matrix([text] * N),
        dense,
        labelled=np.arange(N_LABELS),
        successes=generator.binomial(8, rates[:N_LABELS]).astype(float),
        attempts=np.full(N_LABELS, 8.0),
        informative_share=np.full(N_LABELS, np.nan),
        group_size=8,
        seed=0,
    )

    assert np.corrcoef(result.mean_N[N_LABELS:], rates[N_LABELS:])[0, 1] > 0.95


def test_the_same_arguments_give_the_same_fit() -> None:
    texts, _, successes = world()

    again = fit_world(texts, successes)

    assert (again.mean_N == fitted_world().mean_N).all()
    assert all((again.weights[name] == array).all() for name, array in fitted_world().weights.items())
    assert again.report == fitted_world().report


def test_weights_are_small_plain_arrays_and_the_report_plain_numbers() -> None:
    result = fitted_world()

    assert all(
        type(array) is np.ndarray and array.dtype in (np.float16, np.float32) for array in result.weights.values()
    )
    assert all(array.flags.c_contiguous for array in result.weights.values())
    assert sum(array.nbytes for array in result.weights.values()) < 5_000_000
    assert all(type(number) is float for number in result.report.values())
    assert result.report["log_loss"] < result.report["base_log_loss"]


@pytest.mark.parametrize("group_size", [1, 2, 64])
@pytest.mark.parametrize("successes", [0.0, 8.0, 2.5])
def test_labels_that_are_all_alike_give_finite_predictions(group_size: int, successes: float) -> None:
    texts, _, _ = world()

    result = fit_world(texts, np.full(N, successes), group_size=group_size)

    assert result.mean_N == pytest.approx(successes / 8, abs=0.02)
    assert np.isfinite(result.informative_N).all()
    assert ((result.informative_N > 0) & (result.informative_N < 1)).all()


def test_single_attempts_are_learned_from() -> None:
    texts, rates, _ = world()
    outcomes = np.random.default_rng(1).binomial(1, rates).astype(float)

    result = fit(
        ngram_matrix(texts),
        np.zeros((N, 0), dtype=np.float32),
        labelled=np.arange(N_LABELS),
        successes=outcomes[:N_LABELS],
        attempts=np.ones(N_LABELS),
        informative_share=np.full(N_LABELS, np.nan),
        group_size=1,
        seed=0,
    )

    assert np.corrcoef(result.mean_N[N_LABELS:], rates[N_LABELS:])[0, 1] > 0.9


def test_too_few_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=f"at least {MIN_LABELS} labelled prompts, there are 3"):
        fit(
            ngram_matrix(["a", "b", "c"]),
            np.zeros((3, 0), dtype=np.float32),
            labelled=np.arange(3),
            successes=np.zeros(3),
            attempts=np.ones(3),
            informative_share=np.zeros(3),
            group_size=8,
            seed=0,
        )


def test_dense_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="dense inputs have 3 columns, the fitted n-gram prior takes 2"):
        NgramPrior(fitted_world().weights).predict(["a"], np.zeros((1, 3), dtype=np.float32))
