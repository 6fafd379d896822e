"""A choice that looks at a part of a large pool chooses as one that looks at all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry
from evenodds_service.domain.selection import part
from evenodds_service.domain.selection.batch import drawn_by
from evenodds_service.domain.selection.fill import Fill
from evenodds_service.domain.selection.part import PartTooSmall, stratified
from evenodds_service.domain.selection.selection import Chosen, Forecasts, SelectionRequest, looked_at, select
from evenodds_service.domain.settings import RunSettings

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

N, LOOKED_AT, BATCH, SEEDS = 4_000, 500, 20, range(60)
SEEN, RESTING, RARE = np.arange(0, 200), np.arange(200, 260), np.arange(100, N, 200)
STEP = 50
PLAIN = RunSettings()


class Run:
    """A large pool, of which some were seen long ago and some rest. Beliefs are what the test says they are."""

    def __init__(self, make_block: MakeBlock) -> None:
        chance = np.random.default_rng(0)
        groups = tuple("rare" if i in set(RARE.tolist()) else "other" for i in range(N))
        self.pool = Pool(surface_width=4, embedding_width=0)
        self.pool.append(make_block(N, surface=chance.normal(size=(N, 4)), groups=groups))
        self.state = fold(State(), PoolEntry(1, N), self.pool)
        for step, prompts in ((1, SEEN), (STEP - 3, RESTING)):
            fold(self.state, SelectEntry(self.state.position + 1, step, prompts), self.pool)
            outcomes = (np.full(len(prompts), 4.0), np.full(len(prompts), 8.0), np.ones(len(prompts), dtype=bool))
            fold(self.state, ObserveEntry(self.state.position + 1, step, prompts, *outcomes), self.pool)
        self.rates_N, self.firmness_N = chance.uniform(0.02, 0.98, N), np.full(N, 20.0)

    def forecasts(self, rows: IntArray | None) -> Forecasts:
        here = slice(None) if rows is None else rows
        rates, firmness = self.rates_N[here], self.firmness_N[here]
        return Forecasts.of(rates * firmness, (1.0 - rates) * firmness, 8)

    def of_part(self, request: SelectionRequest, settings: RunSettings = PLAIN) -> Chosen:
        looked = looked_at(self.state, self.pool, settings, request)
        return select(self.state, self.pool, settings, request, self.forecasts(looked.rows), looked)

    def of_all(self, request: SelectionRequest, settings: RunSettings = PLAIN) -> Chosen:
        return select(self.state, self.pool, settings, request, self.forecasts(None))


@pytest.fixture
def run(make_block: MakeBlock, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(part, "LOOKED_AT", LOOKED_AT)
    monkeypatch.setattr(part, "FOR_EACH", 4)
    return Run(make_block)


def request(seed: int = 0, **more: object) -> SelectionRequest:
    return replace(SelectionRequest(step=STEP, batch_size=BATCH, seed=seed), **more)  # type: ignore[arg-type]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_strata_get_equal_numbers_and_small_ones_are_there_whole(counts: list[int], n: int, seed: int) -> None:
    strata_N = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(strata_N)
    n = min(n, len(strata_N))
    if not n:
        return

    places, weights = stratified(strata_N, n, np.random.default_rng(seed))

    assert len(places) == len(weights) == n
    assert (np.diff(places) > 0).all()
    taken = np.bincount(strata_N[places], minlength=len(counts))
    for stratum, count in enumerate(counts):
        here = weights[strata_N[places] == stratum]
        if taken[stratum]:
            np.testing.assert_allclose(here, count / taken[stratum])
            assert here.sum() == pytest.approx(count)
        assert taken[stratum] == count or taken[stratum] >= taken.max() - 1  # who is thinned out has as many as any


def test_keys_draw_in_proportion_to_the_weights() -> None:
    weights = np.array([1.0, 2.0, 5.0])
    chance = np.random.default_rng(0)

    first = [int(np.argmax(drawn_by(chance.random(3), weights))) for _ in range(4_000)]

    assert stats.chisquare(np.bincount(first), 4_000 * weights / weights.sum()).pvalue > 0.001


def test_a_part_expects_as_many_informative_groups_as_the_whole_pool(run: Run) -> None:
    chosen: Mapping[str, list[Chosen]] = {
        "part": [run.of_part(request(seed)) for seed in SEEDS],
        "all": [run.of_all(request(seed)) for seed in SEEDS],
    }

    shares = {name: np.array([c.choice.informative_share for c in some]) for name, some in chosen.items()}
    assert looked_at(run.state, run.pool, PLAIN, request()).weights is not None
    assert shares["part"].mean() == pytest.approx(shares["all"].mean(), abs=0.01)
    assert shares["part"].min() > shares["all"].min() - 0.02


def test_what_was_tried_is_chosen_no_more_often_than_of_the_whole_pool(run: Run) -> None:
    """All that was seen is looked at, and a fraction of what was not."""
    among = [
        np.concatenate([np.isin(choose(request(seed)).choice.prompts, SEEN) for seed in SEEDS])
        for choose in (run.of_part, run.of_all)
    ]

    in_part, in_all = (int(seen.sum()) for seen in among)
    assert stats.fisher_exact([[in_part, len(among[0]) - in_part], [in_all, len(among[1]) - in_all]]).pvalue > 0.01


@pytest.mark.parametrize("settings", [RunSettings(control_share=1.0), RunSettings(acquisition="uniform")])
def test_by_chance_all_prompts_are_as_likely_as_in_the_whole_pool(run: Run, settings: RunSettings) -> None:
    """A control arm that met what was tried more often would compare with something else than chance. It draws from
    resting prompts too; a uniform choice has no rest.
    """
    chosen = np.concatenate([run.of_part(request(seed), settings).choice.prompts for seed in range(200)])

    counts = [np.isin(chosen, some).sum() for some in (SEEN, RESTING)]
    expected = [len(chosen) * len(some) / N for some in (SEEN, RESTING)]
    rest_of_them = (len(chosen) - sum(counts), len(chosen) - sum(expected))
    assert stats.chisquare([*counts, rest_of_them[0]], [*expected, rest_of_them[1]]).pvalue > 0.001


def test_no_prompt_rests_or_is_excluded_or_waited_for(run: Run) -> None:
    run.rates_N[RESTING] = 0.5
    excluded, waited_for = np.arange(1_000, 2_000), np.arange(2_000, 2_500)
    fold(run.state, SelectEntry(run.state.position + 1, STEP - 1, waited_for), run.pool)

    for seed in range(10):
        prompts = run.of_part(request(seed, exclude=excluded)).choice.prompts
        assert not np.isin(prompts, np.concatenate((RESTING, excluded, waited_for))).any()


def test_the_same_question_has_the_same_answer(run: Run) -> None:
    first, second = (run.of_part(request(3)) for _ in range(2))

    assert first.prompt_ids == second.prompt_ids
    assert first.prompt_ids != run.of_part(request(4)).prompt_ids
    assert first.prompt_ids == tuple(run.pool.prompt_ids[i] for i in first.prompts)
    np.testing.assert_allclose(first.a / (first.a + first.b), run.rates_N[first.prompts])


def test_good_prompts_that_are_few_are_found_where_they_were_tried(run: Run) -> None:
    """What own outcomes have shown is looked at in any case."""
    run.rates_N[:], run.rates_N[SEEN[:60]] = 0.02, 0.5

    assert np.isin(run.of_part(request()).choice.prompts, SEEN[:60]).sum() >= BATCH - 2  # but the least recently seen


def test_where_good_prompts_are_too_few_for_a_sample_all_are_to_be_looked_at(run: Run) -> None:
    run.rates_N[:], run.rates_N[3_000:3_040] = 0.02, 0.5

    with pytest.raises(PartTooSmall):
        run.of_part(request())


def test_where_all_are_alike_a_sample_will_do(run: Run) -> None:
    """Too few are good because one is outstanding; the rest is no better in the whole pool."""
    run.rates_N[:], run.rates_N[SEEN[0]] = 0.1, 0.5

    assert len(run.of_part(request()).choice.prompts) == BATCH


@pytest.mark.parametrize("settings", [RunSettings(groups={"rare": 0.5}), RunSettings(groups_at_most={"other": 0.5})])
def test_a_rare_category_has_its_share(run: Run, settings: RunSettings) -> None:
    looked = looked_at(run.state, run.pool, settings, request())
    chosen = run.of_part(request(), settings)

    assert looked.weights is not None
    assert looked.rows is not None
    assert np.isin(RARE, looked.rows).sum() == len(RARE)
    assert chosen.groups.count("rare") == BATCH // 2


def test_of_few_candidates_all_are_looked_at(run: Run) -> None:
    candidates = np.arange(3_000, 3_300)
    looked = looked_at(run.state, run.pool, RunSettings(acquisition="paper"), request(candidates=candidates))

    assert looked.rows is not None
    assert looked.rows.tolist() == candidates.tolist()
    assert looked.weights is None
    assert np.isin(run.of_part(request(candidates=candidates)).choice.prompts, candidates).all()


def test_who_was_visited_too_often_comes_back_in_the_order_of_the_whole_pool(run: Run) -> None:
    settings = RunSettings(max_visits=1)
    for _ in range(2):
        everyone = SelectEntry(run.state.position + 1, 2, np.arange(300, N))
        fold(run.state, everyone, run.pool)
        outcomes = (np.full(N - 300, 4.0), np.full(N - 300, 8.0), np.ones(N - 300, dtype=bool))
        fold(run.state, ObserveEntry(run.state.position + 1, 2, np.arange(300, N), *outcomes), run.pool)

    assert looked_at(run.state, run.pool, settings, request()).rows is None


@pytest.mark.parametrize(
    "settings", [RunSettings(acquisition="paper"), RunSettings(acquisition="thompson"), RunSettings(diversity=0.0)]
)
def test_published_acquisitions_and_the_plain_best_look_at_all(run: Run, settings: RunSettings) -> None:
    assert looked_at(run.state, run.pool, settings, request()).rows is None


def test_a_batch_is_filled_from_a_part(run: Run) -> None:
    filling = request(fill=Fill(most=60, update_cost=1.0))

    some, everyone = run.of_part(filling), run.of_all(filling)

    assert some.outlook is not None
    assert everyone.outlook is not None
    assert some.outlook.expected == pytest.approx(everyone.outlook.expected, rel=0.05)
    assert len(some.prompts) == pytest.approx(len(everyone.prompts), abs=2)
    assert looked_at(run.state, run.pool, PLAIN, filling).weights is not None


def test_a_batch_that_wants_a_large_part_of_the_pool_looks_at_all(run: Run) -> None:
    assert looked_at(run.state, run.pool, PLAIN, request(batch_size=N // 4)).rows is None


def test_limits_that_a_part_does_not_meet_are_met_of_the_whole_pool(run: Run) -> None:
    settings = RunSettings(groups_at_most={"rare": 0.0, "other": 0.1})
    with pytest.raises(PartTooSmall):
        run.of_part(request(), settings)


def test_the_floor_takes_those_not_seen_for_longest(run: Run) -> None:
    settings = RunSettings(reprobe_share=1.0)
    prompts = np.concatenate([run.of_part(request(seed), settings).choice.prompts for seed in range(10)])

    assert 0.1 < np.isin(prompts, SEEN).mean() < 0.4  # a quarter of the floor is theirs
    never: FloatArray = run.state.last_step_N[prompts] < 0
    assert never.mean() > 0.5
