from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray

pytestmark = pytest.mark.numbers

quick = settings(deadline=None, max_examples=25)
SEED = st.integers(0, 2**32 - 1)


def matrix(rng: np.random.Generator, *shape: int) -> FloatArray:
    """Entries of very unlike sizes, some of them 0."""
    return np.asarray(rng.normal(size=shape) * np.exp(rng.normal(scale=3, size=shape)) * (rng.random(shape) < 0.8))


def definite(rng: np.random.Generator, d: int) -> FloatArray:
    x = matrix(rng, 3 * d, d)
    return np.asarray(x.T @ x + np.eye(d))


@quick
@given(SEED, st.integers(1, 40), st.integers(1, 300), st.integers(1, 40))
def test_a_product_is_the_same_to_the_last_bit_in_any_order_and_row_by_row(seed: int, n: int, k: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = matrix(rng, n, k), matrix(rng, k, m)
    order = rng.permutation(k)

    whole = exact.product(x, y)

    np.testing.assert_array_equal(exact.product(x[:, order], y[order]), whole)
    np.testing.assert_array_equal(np.concatenate([exact.product(row[None], y) for row in x]), whole)
    np.testing.assert_array_equal(exact.product(np.asfortranarray(x), y), whole)
    largest = np.abs(x).max(axis=1, keepdims=True) * np.abs(y).max(axis=0)
    assert (np.abs(whole - x @ y) <= 2.0**-36 * k * largest).all()


@quick
@given(SEED, st.integers(1, 300), st.integers(1, 40), st.booleans())
def test_a_gram_matrix_is_the_same_in_any_order_and_symmetric(seed: int, n: int, k: int, is_rough: bool) -> None:
    rng = np.random.default_rng(seed)
    x = matrix(rng, n, k)

    found = exact.gram(x, is_rough=is_rough)

    np.testing.assert_array_equal(exact.gram(x[rng.permutation(n)], is_rough=is_rough), found)
    np.testing.assert_array_equal(found.T, found)
    largest = np.abs(x).max(axis=0)
    assert (np.abs(found - x.T @ x) <= 2.0 ** (-16 if is_rough else -32) * n * np.outer(largest, largest)).all()


@quick
@given(SEED, st.integers(1, 300), st.integers(1, 20))
def test_columns_multiply_whole_numbers_without_rounding(seed: int, k: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.rint(rng.uniform(-(2**20), 2**20, size=(5, k)))
    columns = exact.Columns.of(matrix(rng, k, m), x_bits=20)

    found = columns.times(x)

    slow = [
        [sum(int(a) * int(b) for a, b in zip(row, column, strict=True)) for column in columns.whole_k_m.T] for row in x
    ]
    assert found.astype(object).tolist() == slow


def test_a_product_of_nothing_is_nought() -> None:
    assert exact.product(np.zeros((3, 2)), np.zeros((2, 4))).tolist() == [[0.0] * 4] * 3
    assert exact.product(np.zeros((0, 2)), np.ones((2, 4))).shape == (0, 4)


@quick
@given(SEED, st.integers(1, 70), st.integers(1, 4))
def test_a_definite_system_is_solved(seed: int, d: int, e: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = definite(rng, d), rng.normal(size=(d, e))

    found, first = exact.solve(a, b), exact.solve(a, b[:, 0])

    assert a @ found == pytest.approx(b, abs=1e-8 * np.abs(a).max() * np.abs(found).max() + 1e-12)
    np.testing.assert_array_equal(first, found[:, 0])


@quick
@given(SEED, st.integers(1, 70))
def test_an_inverse_factor_is_triangular_and_gives_the_inverse(seed: int, d: int) -> None:
    a = definite(np.random.default_rng(seed), d)

    factor = exact.inverse_factor(a)

    np.testing.assert_array_equal(np.triu(factor, 1), 0)
    assert factor @ a @ factor.T == pytest.approx(np.eye(d), abs=1e-8)


def test_what_is_not_definite_is_refused_and_named() -> None:
    a = np.array([[1.0, 2.0], [2.0, 1.0]])

    with pytest.raises(ValueError, match="not positive definite: pivot 1 of 2 is -3"):
        exact.solve(a, np.ones(2))
    with pytest.raises(ValueError, match="not positive definite: pivot 1 of 2 is -3"):
        exact.inverse_factor(a)


def test_a_row_that_others_explain_is_left_out_within_the_tolerance() -> None:
    x = np.random.default_rng(0).normal(size=(9, 3))
    twice = np.column_stack([x, x[:, 0] + x[:, 1]])

    factor = exact.inverse_factor(exact.gram(twice), tolerance=1e-9)

    assert not factor[3].any()
    assert factor[:3, :3].T @ factor[:3, :3] == pytest.approx(np.linalg.inv(x.T @ x))


@quick
@given(SEED, st.integers(1, 50))
def test_eigenvectors_take_a_symmetric_matrix_apart(seed: int, d: int) -> None:
    a = definite(np.random.default_rng(seed), d)

    values, vectors = exact.eigen(a)

    assert (np.diff(values) <= 0).all()
    assert vectors.T @ vectors == pytest.approx(np.eye(d), abs=1e-10)
    assert vectors * values @ vectors.T == pytest.approx(a, abs=1e-10 * values[0])


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_exponentials_and_logarithms_are_within_three_units_in_the_last_place(precision: type[np.floating]) -> None:
    rng = np.random.default_rng(0)
    most = 85.0 if precision is np.float32 else 700.0
    x = np.concatenate([rng.uniform(-most, most, 20_000), rng.uniform(-1, 1, 20_000)]).astype(precision)
    y = np.concatenate([np.exp(rng.uniform(-most, most, 20_000)), rng.uniform(0.5, 2, 20_000)]).astype(precision)

    powers, logs = exact.exp(x), exact.log(y)

    assert powers.dtype == logs.dtype == precision
    for found, wide in ((powers, np.exp(x.astype(np.longdouble))), (logs, np.log(y.astype(np.longdouble)))):
        assert (np.abs(found - wide) <= 3 * np.spacing(np.abs(wide.astype(precision)))).all()


def test_exponentials_and_logarithms_at_the_ends_of_their_range() -> None:
    assert exact.exp(np.array([-np.inf, -1e9, 0.0])).tolist() == [0.0, 0.0, 1.0]
    assert np.isnan(exact.exp(np.array([np.nan]))).all()
    assert exact.log(np.array([1.0])).tolist() == [0.0]
    assert np.isnan(exact.log(np.array([np.nan]))).all()
    assert float(exact.log(2.0)) == math.log(2.0)
    assert exact.exp(np.zeros((0, 3))).shape == exact.log(np.ones((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_few_exponentials_and_logarithms_have_the_bits_of_many(precision: type[np.floating], at_once: int) -> None:
    """Few are computed as numbers, many as arrays; prompts may not tell which."""
    rng = np.random.default_rng(1)
    limits = np.finfo(precision)
    ends = [0.0, -0.0, np.nan, np.inf, -np.inf, *(s * e for e in (87, 87.5, 708, 708.5) for s in (1, -1))]
    x = np.concatenate([rng.normal(size=4_000) * 10.0 ** rng.uniform(-8, 3, 4_000), ends]).astype(precision)
    spread = [np.exp(rng.uniform(-85, 85, 4_000)), rng.uniform(0.5, 2, 4_000)]
    roots = [math.sqrt(0.5), math.sqrt(2.0)]
    y = np.concatenate([*spread, roots, [1.0, np.nan, limits.tiny, limits.max]]).astype(precision)

    for function, values in ((exact.exp, x), (exact.log, y)):
        many = function(values)
        few = [function(values[i : i + at_once]) for i in range(0, len(values), at_once)]
        assert all(part.dtype == precision for part in few)
        np.testing.assert_array_equal(np.concatenate(few), many)


@given(st.lists(st.floats(-700, 700), min_size=1, max_size=30))
@quick
def test_the_log_of_a_sum_of_powers(values: list[float]) -> None:
    assert exact.log_sum(np.array([*values, -np.inf])) == pytest.approx(
        float(np.logaddexp.reduce(values)), rel=1e-12, abs=1e-12
    )


@quick
@given(SEED, st.integers(1, 40))
def test_a_sum_in_order_is_the_same_alone_and_beside_others(seed: int, n: int) -> None:
    terms = matrix(np.random.default_rng(seed), 25, n)

    sums = exact.in_order(terms)

    np.testing.assert_array_equal([exact.in_order(terms[:, i : i + 1])[0] for i in range(n)], sums)
    assert sums == pytest.approx(terms.sum(axis=0))
