from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from evenodds_service.domain.ranks import mean_ranks, spearman, spearman_of_table

# Few distinct values, so that ties are common.
values = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30)


@given(values)
def test_spearman_agrees_with_scipy_and_is_0_where_undefined(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)

    if len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(x, y) == 0.0
    else:
        assert spearman(x, y) == pytest.approx(float(spearmanr(x, y).statistic), abs=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_mean_ranks_agree_with_scipy(numbers: list[float]) -> None:
    assert mean_ranks(numbers).tolist() == rankdata(numbers).tolist()


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=60, unique=True))
def test_spearman_is_1_under_any_increasing_map_and_minus_1_reversed(numbers: list[float]) -> None:
    ranks = np.argsort(np.argsort(numbers))

    assert spearman(numbers, np.exp(ranks / 10)) == pytest.approx(1)
    assert spearman(numbers, -ranks) == pytest.approx(-1)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 400))
def test_the_rank_correlation_of_a_table_is_that_of_its_rows(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, size=n), rng.integers(0, 4, size=n)
    counts = np.zeros((6, 4))
    np.add.at(counts, (x, y), 1)

    found = spearman_of_table(counts)

    if len(set(x.tolist())) == 1 or len(set(y.tolist())) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(x, y).statistic)
