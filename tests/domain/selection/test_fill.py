from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.selection.batch import Choice
from evenodds_service.domain.selection.fill import Calibration, Fill, filled, outlook, relative_cost
from evenodds_service.errors import NotEnoughPrompts

NEW = Calibration(0.0, 0.0)


class Pool:
    """Gives batches of any size, whose groups are informative with these probabilities."""

    def __init__(self, probability: float = 0.5, *, limit: int = 10_000) -> None:
        self.probability, self.limit = probability, limit
        self.sizes: list[int] = []

    def __call__(self, n: int) -> Choice:
        self.sizes.append(n)
        if n > self.limit:
            raise NotEnoughPrompts(asked=n, eligible=self.limit)
        return Choice(np.arange(n), np.full(n, self.probability), None, np.zeros(n, dtype=bool))


def size(pool: Pool, n_wanted: int = 8, *, calibration: Calibration = NEW, eligible: int = 9_000, **fill: float) -> int:
    most = int(fill.pop("most", 48))
    return len(filled(n_wanted, Fill(most, **fill), calibration, pool, n_eligible=eligible).prompts)


@pytest.mark.parametrize(("probability", "n"), [(1.0, 8), (0.8, 10), (0.5, 16), (0.3, 27), (0.1, 48), (0.001, 48)])
def test_as_many_prompts_are_chosen_as_it_takes_and_six_for_a_group_at_most(probability: float, n: int) -> None:
    assert size(Pool(probability)) == n


def test_what_past_batches_found_corrects_the_forecast() -> None:
    assert size(Pool(0.8), calibration=Calibration(18.0, 38.0)) == 20
    assert size(Pool(0.4), calibration=Calibration(38.0, 18.0)) == 10


def test_factor_and_most_are_heeded() -> None:
    assert size(Pool(0.5), factor=0.75) == 12
    assert size(Pool(0.5), most=13) == 13


def test_a_small_pool_does_not_stop_a_trainer() -> None:
    assert size(Pool(0.5), eligible=11) == 11
    assert size(Pool(0.5, limit=9)) == 9
    with pytest.raises(NotEnoughPrompts, match=r"^informative_groups asks for 8 prompts, 0 may be selected$"):
        size(Pool(0.5), eligible=0)


def test_without_a_need_nothing_is_chosen_twice() -> None:
    pool = Pool(0.5)

    size(pool)

    assert pool.sizes == [16]


@given(st.floats(0.02, 1.0), st.integers(1, 200), st.floats(0.2, 3.0))
def test_as_many_are_expected_as_were_asked_for_unless_there_is_a_limit(
    probability: float, n_wanted: int, factor: float
) -> None:
    most = 6 * n_wanted
    choice = filled(n_wanted, Fill(most, factor), NEW, Pool(probability), n_eligible=9_000)

    expected = outlook(choice.informative_probabilities, lambda: np.ones(n_wanted), n_wanted, None, NEW).expected

    if len(choice.prompts) < most and probability >= 0.1:
        assert factor * n_wanted - 1e-6 <= expected <= factor * n_wanted + 1.0


@pytest.mark.parametrize("bias", [0.6, 1.0])
def test_nineteen_of_twenty_intervals_hold_what_was_found(bias: float) -> None:
    """Also where forecasts are too high, once that was seen."""
    rng = np.random.default_rng(0)
    held, n_trials = 0, 600
    for _ in range(n_trials):
        past = rng.uniform(0.2, 0.9, size=160)
        calibration = Calibration(float((rng.random(160) < bias * past).sum()), float(past.sum()))
        chosen: FloatArray = rng.uniform(0.2, 0.9, size=24)
        seen = outlook(chosen, chosen[:8].copy, 8, None, calibration)
        held += seen.low <= (rng.random(24) < bias * chosen).sum() <= seen.high

    assert 0.93 <= held / n_trials <= 0.995


@given(st.floats(0.05, 1.0), st.integers(1, 60), st.floats(0.0, 50.0), st.floats(0.0, 50.0))
def test_an_interval_lies_within_the_batch_and_holds_its_middle(
    probability: float, n: int, found: float, foreseen: float
) -> None:
    seen = outlook(np.full(n, probability), lambda: np.full(4, probability), 4, 1.0, Calibration(found, foreseen))

    assert 0.0 <= seen.low <= seen.expected <= seen.high <= n
    assert seen.relative_cost is not None
    assert seen.relative_cost > 0.0


def test_filling_pays_where_updates_are_dear() -> None:
    costs = [relative_cost(8, 16, expected=8.0, plain=4.2, update_cost=cost) for cost in (0.25, 0.5, 1.0, 2.0)]

    assert costs == sorted(costs, reverse=True)
    assert costs[1] > 1.0 > costs[2]


def test_filling_pays_less_where_batches_are_large() -> None:
    small, large = (relative_cost(b, 2 * b, expected=b, plain=b / 2, update_cost=1.0) for b in (8, 32))

    assert small < large


def test_a_batch_that_is_full_anyway_costs_what_it_costs() -> None:
    assert relative_cost(8, 8, expected=8.0, plain=8.0, update_cost=1.0) == pytest.approx(1.0)
