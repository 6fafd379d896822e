from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning import features, raw_rows
from evenodds_service.domain.learning.checkpoint import block_to_bytes
from evenodds_service.domain.learning.features import (
    COMPONENTS,
    GROUP_SCALE,
    MAX_GROUPS,
    MAX_NUMERIC,
    Basis,
    Pool,
    directions,
)
from evenodds_service.domain.prompts import NO_ANSWERS, RawBlock

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

pytestmark = pytest.mark.numbers

N, SURFACE, EMBEDDING, ANSWER = 1_300, 3, 40, 4


@pytest.fixture(scope="module")
def whole(make_block: MakeBlock) -> RawBlock:
    """A pool with something of everything, and with holes in everything."""
    rng = np.random.default_rng(0)
    surface = rng.normal(size=(N, SURFACE)) * [1, 10, 0.1] + [0, 5, -1]
    embedding = rng.normal(size=(N, EMBEDDING)) * np.linspace(2, 0.1, EMBEDDING)
    surface[::11], embedding[::7] = np.nan, np.nan
    prior_rates = np.where(rng.random(N) < 0.5, rng.random(N), np.nan)
    answers = np.where(rng.random((N, 1)) < 0.7, rng.normal(size=(N, ANSWER)), np.nan)
    return make_block(
        N,
        surface=surface,
        embedding=embedding,
        groups=tuple(("math", "code", None)[i % 3] for i in range(N)),
        numeric=tuple({"length": float(i), "depth": i % 5} if i % 2 else None for i in range(N)),
        prior_rates=prior_rates,
        answers=answers,
    )


def part(block: RawBlock, first: int, last: int) -> RawBlock:
    values = {f.name: getattr(block, f.name) for f in fields(block)[1:]}
    parts = {name: value[first:last] for name, value in values.items() if value is not None}
    return replace(block, first=first, **parts)


def pool_of(block: RawBlock, cuts: Iterable[int] = ()) -> Pool:
    pool = Pool(surface_width=block.surface_N_S.shape[1], embedding_width=block.embedding_N_D.shape[1])
    ends = sorted({0, *cuts, len(block.prompt_ids)})
    for first, last in itertools.pairwise(ends):
        pool.append(part(block, first, last))
    return pool


def filled(block: RawBlock) -> tuple[Basis, FloatArray]:
    basis = Basis.of(block)
    return basis, basis.project(block)


def test_a_basis_and_its_projection_are_deterministic(whole: RawBlock) -> None:
    _, one = filled(whole)
    _, other = filled(whole)

    assert np.array_equal(one, other)
    assert one.dtype == np.float32
    assert np.isfinite(one).all()


@settings(max_examples=8)
@given(st.lists(st.integers(1, N - 1), max_size=5))
def test_blocks_in_any_partition_give_the_same_matrix_to_the_last_bit(whole: RawBlock, cuts: list[int]) -> None:
    at_once = pool_of(whole)
    basis = Basis.of(at_once.raw(0, N))
    expected = at_once.matrix(basis, N)
    grown = Pool(surface_width=SURFACE, embedding_width=EMBEDDING)

    ends = sorted({0, *cuts, N})
    for first, last in itertools.pairwise(ends):
        grown.append(part(whole, first, last))
        matrix = grown.matrix(basis, last)

    assert np.array_equal(matrix, expected)
    assert grown.prompt_ids == at_once.prompt_ids
    assert grown.index == at_once.index == {f"p{i}": i for i in range(N)}


def test_a_prefix_of_the_matrix_and_single_rows_are_those_of_the_whole(whole: RawBlock) -> None:
    pool = pool_of(whole)
    basis = Basis.of(pool.raw(0, N))
    expected = pool_of(whole).matrix(basis, N).copy()

    assert np.array_equal(pool.matrix(basis, 10), expected[:10])
    assert np.array_equal(pool.rows(basis, np.array([1_299, 3, 3])), expected[[1_299, 3, 3]])
    assert np.array_equal(pool.matrix(basis, 700), expected[:700])


@settings(max_examples=10)
@given(
    st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=3), max_size=5),
    st.lists(st.integers(1, N), max_size=3),
)
def test_rows_are_those_of_the_whole_matrix_in_whatever_order_they_are_asked_for(
    whole: RawBlock, asked: list[list[int]], sizes: list[int]
) -> None:
    """Also while the pool grows in between: only what is asked for is projected, and to the last bit alike."""
    basis = Basis.of(whole)
    expected = pool_of(whole).matrix(basis, N).copy()
    pool = Pool(surface_width=SURFACE, embedding_width=EMBEDDING)

    for last in (*sorted(set(sizes)), N):
        pool.append(part(whole, pool.n, last)) if last > pool.n else None
        for rows in asked:
            present = np.array([row for row in rows if row < pool.n], dtype=np.int64)
            assert np.array_equal(pool.rows(basis, present), expected[present])
        assert np.array_equal(pool.rows(basis, slice(pool.n // 3, pool.n // 2)), expected[pool.n // 3 : pool.n // 2])

    assert np.array_equal(pool.matrix(basis, N), expected)


def test_room_for_later_prompts_changes_nothing(whole: RawBlock) -> None:
    pool = Pool(surface_width=SURFACE, embedding_width=0)  # as long as no block has come
    pool.reserve(2 * N)
    pool.append(part(whole, 0, 700))
    pool.reserve(3)
    pool.append(part(whole, 700, N))

    for name in ("prior_rates_N", "surface_N_S", "embedding_N_D"):
        ours, expected = (getattr(each.raw(0, N), name) for each in (pool, pool_of(whole)))
        np.testing.assert_array_equal(ours, expected)


def test_another_basis_gives_another_matrix(whole: RawBlock) -> None:
    pool = pool_of(whole)
    early, late = Basis.of(pool.raw(0, 50)), Basis.of(pool.raw(0, N))

    assert pool.matrix(early, N).shape == (N, early.width)
    assert np.array_equal(pool.matrix(late, N), pool_of(whole).matrix(late, N))


def test_a_block_that_does_not_follow_is_refused(make_block: MakeBlock) -> None:
    pool = pool_of(make_block(4))

    with pytest.raises(ValueError, match=r"^block starts at prompt 6, the pool ends at 4$"):
        pool.append(make_block(2, first=6))


@pytest.mark.parametrize("width", [1, 5, 7])
def test_the_width_of_vectors_cannot_change(make_block: MakeBlock, width: int) -> None:
    pool = pool_of(make_block(4, surface=np.ones((4, 6)), embedding=np.ones((4, 6))))

    message = f"of width {width}, the pool holds width 6: send vectors of one model only$"
    with pytest.raises(ValueError, match="^embeddings " + message):
        pool.append(make_block(2, first=4, surface=np.ones((2, 6)), embedding=np.ones((2, width))))
    with pytest.raises(ValueError, match="^surface features " + message):
        pool.append(make_block(2, first=4, surface=np.ones((2, width)), embedding=np.ones((2, 6))))
    assert pool.n == 4


def test_a_block_without_any_vector_is_a_block_of_average_prompts(make_block: MakeBlock) -> None:
    rng = np.random.default_rng(0)
    pool = pool_of(make_block(50, surface=rng.normal(size=(50, 3)), embedding=rng.normal(size=(50, 4))))
    basis = Basis.of(pool.raw(0, 50))

    pool.append(make_block(2, first=50))

    assert pool.rows(basis, np.array([50, 51])).tolist() == [[1.0] + [0.0] * (basis.width - 1)] * 2


def test_vectors_may_appear_after_prompts_without(make_block: MakeBlock) -> None:
    rng = np.random.default_rng(0)
    pool = pool_of(make_block(5))
    pool.append(make_block(40, first=5, embedding=rng.normal(size=(40, 8))))

    basis = Basis.of(pool.raw(0, 45))

    matrix = pool.matrix(basis, 45)
    assert basis.width - basis.n_surface == 8
    assert (matrix[:5, 1:] == 0).all()
    assert matrix[5:, basis.n_surface :].any(axis=1).all()


def test_standardised_columns_have_mean_nought_and_spread_one(whole: RawBlock) -> None:
    _, x = filled(whole)

    texts = np.isfinite(whole.surface_N_S).all(axis=1)
    assert (x[:, 0] == 1).all()
    assert x[texts, 1 : 1 + SURFACE].mean(axis=0) == pytest.approx(0, abs=0.01)
    assert x[texts, 1 : 1 + SURFACE].std(axis=0) == pytest.approx(1, abs=0.05)


def test_prompts_without_text_or_vector_count_as_average(whole: RawBlock) -> None:
    basis, x = filled(whole)

    assert (x[::11, 1 : 1 + SURFACE] == 0).all()
    assert (x[::7, basis.n_surface :] == 0).all()
    assert (x[1::77, basis.n_surface :] != 0).any(axis=1).all()


def test_components_are_the_leading_ones_and_have_squared_length_one_on_average(whole: RawBlock) -> None:
    basis, x = filled(whole)
    present = np.isfinite(whole.embedding_N_D).all(axis=1)
    components = x[present, basis.n_surface :]

    assert components.shape[1] == COMPONENTS
    assert (components**2).sum(axis=1).mean() == pytest.approx(COMPONENTS, rel=0.01)
    covariance = np.cov(components.T)
    assert (np.diff(np.diag(covariance)) <= 1e-3).all()
    assert covariance - np.diag(np.diag(covariance)) == pytest.approx(0, abs=1e-2)


def test_vectors_longer_than_an_eigendecomposition_allows_keep_their_geometry(make_block: MakeBlock) -> None:
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(200, 2))
    block = make_block(200, embedding=latent @ rng.normal(size=(2, 700)))
    basis, x = filled(block)

    # Float32 noise of a two-dimensional cloud may add directions of no weight.
    loadings = np.linalg.lstsq(x[:, basis.n_surface :], latent - latent.mean(axis=0), rcond=None)[1]
    assert loadings == pytest.approx(0, abs=1e-2)


@settings(max_examples=20)
@given(st.integers(1, 60), st.sampled_from([0.0, -3.0, 1e4, 1e-4]))
def test_constant_columns_are_harmless(make_block: MakeBlock, n: int, value: float) -> None:
    block = make_block(
        n,
        surface=np.full((n, 2), value),
        embedding=np.full((n, 4), value),
        numeric=({"constant": value},) * n,
        prior_rates=np.full(n, 0.5),
    )
    basis, x = filled(block)
    other = basis.project(make_block(1, surface=np.full((1, 2), value + 1), embedding=np.full((1, 4), value)))

    assert x[:, 1:] == pytest.approx(0, abs=1e-3)
    assert np.isfinite(other).all()
    assert np.abs(other).max() <= 4


@pytest.mark.parametrize("extreme", [1e6, -1e30, 1e307, -1.7e308])
def test_extreme_raw_values_are_clipped(make_block: MakeBlock, extreme: float) -> None:
    rng = np.random.default_rng(0)
    numeric = tuple({"size": float(v)} for v in rng.normal(size=50))
    basis = Basis.of(make_block(50, surface=rng.normal(size=(50, 1)), numeric=numeric))
    surface = np.full((1, 1), np.clip(extreme, -6e4, 6e4))

    x = basis.project(make_block(1, surface=surface, numeric=({"size": extreme},), prior_rates=np.ones(1)))

    assert x[0, 1:3].tolist() == [4 * np.sign(extreme)] * 2
    assert np.abs(x).max() <= 4


@pytest.mark.parametrize("extreme", [1e30, 1.7e308])
def test_extreme_values_in_the_pool_that_a_basis_is_derived_from_do_no_harm(
    make_block: MakeBlock, extreme: float
) -> None:
    numeric = tuple({"size": extreme if i % 10 == 0 else -extreme if i % 10 == 1 else float(i)} for i in range(50))

    _, x = filled(make_block(50, numeric=numeric))

    assert np.isfinite(x).all()
    assert x[0, 1] > x[2, 1] > x[1, 1]


def test_numeric_features_and_prior_rates_of_the_caller_get_columns(make_block: MakeBlock) -> None:
    numeric = ({"b": 1.0, "a": 5.0}, {"b": 2.0}, None, {"b": 3.0, "a": 6.0})
    rates = np.array([0.1, 0.9, np.nan, 0.5])
    basis, x = filled(make_block(4, numeric=numeric, prior_rates=rates))

    a, b, rate = x[:, 1], x[:, 2], x[:, 3]

    assert basis.numeric_names == ("a", "b")
    assert basis.n_surface == basis.width == 4
    assert b[0] < b[1] < b[3]
    assert b[2] == 0
    assert a[0] < 0 < a[3]
    assert a[1] == a[2] == 0
    assert rate[0] < rate[3] < rate[1]
    assert rate[2] == 0


def test_sure_prior_rates_stay_finite(make_block: MakeBlock) -> None:
    _, x = filled(make_block(3, prior_rates=np.array([0.0, 1.0, 0.5])))

    assert np.isfinite(x).all()
    assert x[0, 1] < x[2, 1] < x[1, 1]


def test_each_group_gets_a_column_and_a_later_group_none(make_block: MakeBlock) -> None:
    basis, x = filled(make_block(4, groups=("math", "code", None, "math")))

    later = basis.project(make_block(2, groups=("code", "poetry")))

    assert basis.group_names == ("code", "math")
    assert x[:, 2:].tolist() == [[0, GROUP_SCALE], [GROUP_SCALE, 0], [0, 0], [0, GROUP_SCALE]]
    assert later[:, 2:].tolist() == [[GROUP_SCALE, 0], [0, 0]]


def test_only_the_commonest_groups_and_numeric_features_get_columns(make_block: MakeBlock) -> None:
    names = [f"name{i:03}" for i in range(100)]
    common = names[40:]
    basis = Basis.of(
        make_block(
            len(names) + len(common),
            groups=(*names, *common),
            numeric=tuple({name: 1.0} for name in (*names, *common)),
        )
    )

    assert len(basis.group_names) == MAX_GROUPS
    assert len(basis.numeric_names) == MAX_NUMERIC
    assert set(common) <= set(basis.group_names)
    assert set(common) <= set(basis.numeric_names)


def test_a_single_prompt_is_enough_for_a_basis(make_block: MakeBlock) -> None:
    basis, x = filled(make_block(1, surface=np.ones((1, 3)), embedding=np.ones((1, 5)), groups=("math",)))

    assert basis.width == basis.n_surface == x.shape[1] == 1 + 3 + 1 + 1
    assert np.isfinite(x).all()


def test_raw_gives_back_what_was_appended_in_half_precision(whole: RawBlock) -> None:
    pool = pool_of(whole, cuts=(10, 500))

    block = pool.raw(5, 505)

    assert block.first == 5
    assert block.prompt_ids == whole.prompt_ids[5:505]
    assert block.groups == whole.groups[5:505]
    assert block.numeric == whole.numeric[5:505]
    assert np.array_equal(block.prior_rates_N, whole.prior_rates_N[5:505], equal_nan=True)
    assert np.array_equal(pool.prior_rates(7), whole.prior_rates_N[:7], equal_nan=True)
    assert block.surface_N_S == pytest.approx(whole.surface_N_S[5:505], rel=1e-3, nan_ok=True)
    assert block.embedding_N_D == pytest.approx(whole.embedding_N_D[5:505], rel=1e-3, abs=1e-6, nan_ok=True)


def test_directions_are_unit_vectors_without_the_constant(whole: RawBlock) -> None:
    basis, x = filled(whole)

    unit = directions(x)

    known = (x[:, 1:] != 0).any(axis=1)
    assert unit.shape == (N, basis.width - 1)
    assert np.linalg.norm(unit[known], axis=1) == pytest.approx(1, abs=1e-5)


def test_a_prompt_without_features_has_no_direction() -> None:
    assert directions(np.array([[1.0, 0.0, 0.0], [1.0, 3.0, 4.0]])).tolist() == [[0, 0], [0.6, 0.8]]


def test_a_view_stays_as_it_is_while_the_pool_grows_and_takes_other_priors(whole: RawBlock) -> None:
    pool = pool_of(part(whole, 0, 700))
    basis = Basis.of(pool.raw(0, 700))
    pool.attach(1, {})
    view = pool.view(basis)
    before = view.rows(basis, slice(0, 700)).copy()

    pool.append(part(whole, 700, N))
    pool.attach(2, {})
    pool.matrix(basis, N)

    assert (view.n, view.fitted(1)) == (700, {})
    np.testing.assert_array_equal(view.rows(basis, slice(0, 700)), before)
    np.testing.assert_array_equal(pool.matrix(basis, N)[:700], before)


def test_members_of_a_group_are_found_in_any_part_of_the_pool(whole: RawBlock) -> None:
    pool = pool_of(whole, cuts=[10, 600])

    for group in ("math", "code"):
        assert pool.members(group, 1_000).tolist() == [name == group for name in whole.groups[:1_000]]
    assert not pool.members("unknown", N).any()


def test_a_prompt_outside_of_the_pool_has_the_same_features_alone_and_among_others(whole: RawBlock) -> None:
    basis, inside = filled(whole)

    among = basis.project(part(whole, 0, 40))
    alone = np.concatenate([basis.project(part(whole, i, i + 1)) for i in range(40)])

    assert alone.tobytes() == among.tobytes()
    assert among.tobytes() == inside[:40].tobytes()


def test_a_pool_without_answers_is_as_it_was_before_there_were_any(whole: RawBlock) -> None:
    before = replace(whole, answers_N_A=NO_ANSWERS)
    unanswered = replace(whole, answers_N_A=np.full_like(whole.answers_N_A, np.nan))

    for block in (before, unanswered):
        basis = Basis.of(block)
        assert basis.width == Basis.of(whole).width - ANSWER
        assert "n_answer" not in basis.to_arrays()[0]
        assert basis.equals(Basis.of(before))
        np.testing.assert_array_equal(basis.project(block), Basis.of(before).project(before))
    assert "answers_N_A" not in np.load(io.BytesIO(block_to_bytes(before)))


def test_a_prompt_without_an_answer_is_average_among_others_with_one(whole: RawBlock) -> None:
    basis = Basis.of(whole)
    first = 1 + SURFACE + 2 + 1  # behind the constant, two numeric features and the rate
    missing = np.isnan(whole.answers_N_A[:, 0])

    x_N_d = basis.project(whole)

    assert (x_N_d[missing, first : first + ANSWER] == 0).all()
    assert (x_N_d[~missing, first : first + ANSWER] != 0).any(axis=1).all()
    np.testing.assert_array_equal(basis.project(replace(whole, answers_N_A=NO_ANSWERS))[missing], x_N_d[missing])


def test_answers_may_begin_late_and_be_missing_again(whole: RawBlock) -> None:
    bare = replace(whole, answers_N_A=NO_ANSWERS)
    pool = Pool(surface_width=SURFACE, embedding_width=EMBEDDING)
    pool.reserve(N)
    for block, first, last in ((bare, 0, 400), (whole, 400, 900), (bare, 900, N)):
        pool.append(part(block, first, last))

    kept = pool.raw(0, N).answers_N_A

    np.testing.assert_array_equal(kept[400:900], whole.answers_N_A[400:900].astype(np.float16))
    assert np.isnan(kept[:400]).all()
    assert np.isnan(kept[900:]).all()


def test_what_was_let_go_leaves_the_same_features(whole: RawBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where prompts come later, and where some are retired."""
    monkeypatch.setattr(raw_rows, "PIECE", 64)
    monkeypatch.setattr(features, "ENOUGH_PROMPTS", 600)
    basis, chance = Basis.of(part(whole, 0, 600)), np.random.default_rng(0)
    keeping, letting_go = (Pool(surface_width=SURFACE, embedding_width=0, lets_go=lets_go) for lets_go in (False, True))
    for first, last in ((0, 600), (600, 610), (610, 1_200), (1_200, N)):
        kept_N = chance.random(keeping.n + last - first) < 0.9
        for pool in (keeping, letting_go):
            pool.append(replace(part(whole, first, last), first=pool.n))
            pool.matrix(basis, pool.n)
            if last > 610:
                pool.retire(kept_N)
        expected = keeping.matrix(basis, keeping.n)

        assert np.array_equal(letting_go.matrix(basis, letting_go.n), expected)
        assert keeping.n - 600 < letting_go.n_let_go <= letting_go.n
        assert letting_go.prompt_ids == keeping.prompt_ids

    n = letting_go.n
    rest, same = (pool.raw(letting_go.n_let_go, n) for pool in (letting_go, keeping))
    for name in ("surface_N_S", "embedding_N_D", "answers_N_A"):
        np.testing.assert_array_equal(getattr(rest, name), getattr(same, name))
    assert rest.numeric == same.numeric
    assert keeping.n_let_go == 0
    with pytest.raises(ValueError, match=r"^raw features of prompt 0 were let go, as of all before \d+$"):
        letting_go.raw(0, n)


def test_who_let_go_serves_an_equal_basis_and_no_other(whole: RawBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_rows, "PIECE", 64)
    monkeypatch.setattr(features, "ENOUGH_PROMPTS", 600)
    pool = Pool(surface_width=SURFACE, embedding_width=EMBEDDING, lets_go=True)
    pool.append(whole)
    early, final, other = Basis.of(part(whole, 0, 50)), Basis.of(part(whole, 0, 600)), Basis.of(whole)
    pool.matrix(early, N)
    assert pool.n_let_go == 0  # another basis may follow
    assert pool.serves(None)
    expected = pool.matrix(final, N).copy()
    stored = Basis.from_arrays(*final.to_arrays())

    assert np.array_equal(pool.rows(stored, slice(0, N)), expected)
    assert pool.serves(stored)
    assert not pool.serves(other)
    assert not pool.serves(None)
    with pytest.raises(ValueError, match=r"^raw features of 1024 prompts were let go, and another basis needs them$"):
        pool.matrix(other, N)
