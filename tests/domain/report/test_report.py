"""What the report says of a run whose truth is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import LOOKED_AT, fold
from evenodds_service.domain.learning.prediction import beliefs_of
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.learning.tallies import MAX_GROUPS, Tallies
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry
from evenodds_service.domain.report.lift import LiftReport
from evenodds_service.domain.report.report import report
from evenodds_service.domain.selection.batch import Candidates, Shares, choose
from evenodds_service.domain.selection.pickers import best

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

EMPTY = Pool(surface_width=0, embedding_width=0)
GROUP_SIZE = 8


def of(tallies: Tallies) -> LiftReport:
    lift = report(State(tallies=tallies), EMPTY).lift
    assert lift is not None
    return lift


class Training:
    """A policy whose scores know a part of the truth, and a control arm beside it."""

    def __init__(self, seed: int, n: int = 300) -> None:
        self.rng = np.random.default_rng(seed)
        self.rates: FloatArray = self.rng.beta(0.5, 0.7, size=n)
        self.chances = 1 - self.rates**GROUP_SIZE - (1 - self.rates) ** GROUP_SIZE
        self.scores: FloatArray = self.chances + self.rng.normal(scale=0.5, size=n)
        self.tallies, self.n = Tallies(), n
        self.policy_chances: list[float] = []
        self.uniform_chances: list[float] = []

    def step(self, step: int, *, batch_size: int = 40, control_share: float = 0.15) -> None:
        eligible = self.rng.random(self.n) < 0.8
        choice = choose(
            self.scores,
            self.chances,
            Candidates(eligible, eligible, np.full(self.n, -1)),
            Shares(control=control_share),
            batch_size=batch_size,
            picker=best,
            generator=self.rng,
        )
        prompts, control = choice.prompts, choice.control
        groups = np.zeros(len(prompts), dtype=np.int64)
        self.tallies.select(
            SelectEntry(1, step, prompts, f"s{step}", control_share, control), np.ones(len(prompts), bool), groups
        )
        k = self.rng.binomial(GROUP_SIZE, self.rates[prompts]).astype(np.float64)
        self.tallies.observe(
            step,
            f"s{step}",
            prompts,
            k,
            np.full(len(prompts), float(GROUP_SIZE)),
            (k > 0) & (k < GROUP_SIZE),
            groups,
            lambda rows: (np.ones(len(rows)), np.ones(len(rows))),
        )
        if control_share:
            self.policy_chances += self.chances[prompts[~control]].tolist()
            self.uniform_chances += [float(self.chances[eligible].mean())] * int((~control).sum())


@pytest.mark.parametrize("changes", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_lift_is_unbiased_and_its_intervals_hold_the_truth_in_19_of_20(changes: bool) -> None:
    """Also where control_share changes, and where the easy prompts come at one of its values."""
    errors, holds, saves = [], [], []
    for seed in range(400):
        training = Training(seed)
        for step in range(8):
            training.rates **= 0.8
            training.chances = 1 - training.rates**GROUP_SIZE - (1 - training.rates) ** GROUP_SIZE
            training.step(step, control_share=(0.4 if step < 4 else 0.1) if changes else 0.15)
        lift = of(training.tallies)
        truth = np.mean(training.policy_chances) - np.mean(training.uniform_chances)
        saved = 1 - np.mean(training.uniform_chances) / np.mean(training.policy_chances)
        errors.append(lift.difference - truth)
        holds.append(lift.difference_interval[0] <= truth <= lift.difference_interval[1])
        low, high = lift.rollouts_saved_share_interval
        assert low is not None
        assert high is not None
        saves.append(low <= saved <= high)

    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(len(errors))
    assert 0.93 <= np.mean(holds) <= 0.995
    assert 0.93 <= np.mean(saves) <= 0.995


def test_selections_without_a_control_share_stay_out_of_the_lift() -> None:
    training = Training(0)
    training.step(0)
    before = of(training.tallies)

    training.step(1, control_share=0.0)

    assert of(training.tallies) == before


def test_rollouts_saved_follow_from_the_shares() -> None:
    tallies = Tallies()
    tallies.lift[0] = (100, 80, 800, 20 * 4.0, 10 * 4.0, 20 * 16.0)  # 80% of 100 against 50% of 20, weight 4
    tallies.n_selections = 1
    tallies.window(0)
    tallies.arms[0] = 1.0

    lift = of(tallies)

    assert (lift.policy_share.value, lift.control_share.value, lift.difference) == pytest.approx((0.8, 0.5, 0.3))
    assert lift.control_share.observations == 20
    assert lift.rollouts_saved_share == pytest.approx(1 - 0.5 / 0.8)
    assert lift.rollouts_saved == pytest.approx(800 * (0.8 / 0.5 - 1))  # uniform needs 160 groups for 80 informative
    share, rollouts = lift.rollouts_saved_share_interval, lift.rollouts_saved_interval
    assert None not in (*share, *rollouts)
    assert rollouts == pytest.approx([800 * (1 / (1 - end) - 1) for end in share if end is not None])


def test_a_control_arm_without_informative_groups_leaves_the_saving_open() -> None:
    tallies = Tallies()
    tallies.lift[0] = (100, 80, 800, 80.0, 0.0, 320.0)
    tallies.n_selections = 1
    tallies.window(0)
    tallies.arms[0] = 1.0

    lift = of(tallies)

    assert lift.rollouts_saved_share is None
    assert lift.rollouts_saved is None
    low, high = lift.rollouts_saved_interval
    assert low is not None
    assert low > 0
    assert high is None


@pytest.mark.parametrize(
    ("control_share", "answered", "reason"),
    [
        (None, False, "no batch has been chosen yet: choose batches with POST /select_batch"),
        (
            0.0,
            True,
            "no outcome of two attempts or more has come from a batch with a control arm: set control_share "
            "with PUT /runs/{run}, and report outcomes with their selection_id",
        ),
        (
            0.4,
            True,
            "no outcome of the control arm was observed yet, of two attempts or more: report its outcomes",
        ),
    ],
)
def test_without_a_control_arm_the_report_says_why_there_is_no_lift(
    control_share: float | None, answered: bool, reason: str
) -> None:
    tallies = Tallies()
    if control_share is not None:
        control = np.arange(4) >= 4 * (1 - control_share)
        entry = SelectEntry(1, 0, np.arange(4), "s", control_share, control)
        tallies.select(entry, np.ones(4, dtype=bool), np.zeros(4, dtype=np.int64))
    if answered:
        tallies.observe(
            0,
            "s",
            np.array([0, 1]),
            np.array([1.0, 0.0]),
            np.full(2, 2.0),
            np.array([True, False]),
            np.zeros(2, dtype=np.int64),
            lambda rows: (np.ones(len(rows)), np.ones(len(rows))),
        )

    found = report(State(tallies=tallies), EMPTY)

    assert (found.lift, found.lift_missing) == (None, reason)


class Told:
    """A log of 40 prompts in two groups, half of them chosen, a quarter observed."""

    def __init__(self, make_block: MakeBlock) -> None:
        self.pool = Pool(surface_width=0, embedding_width=0)
        self.pool.append(make_block(40, groups=tuple("ab"[i % 2] for i in range(40))))
        self.state = fold(State(), PoolEntry(1, 40), self.pool)
        chosen, seen = np.arange(20), np.arange(10)
        a, b = np.full(20, 1.0), np.full(20, 3.0)
        fold(self.state, SelectEntry(2, 5, chosen, "s", 0.1, chosen >= 18, a, b), self.pool)
        k = np.array([0, 0, 4, 4, 8, 8, 2, 2, 0, 0], dtype=np.float64)
        entry = ObserveEntry(3, 5, seen, k, np.full(10, 8.0), (k > 0) & (k < 8), "s")
        fold(self.state, entry, self.pool)


def test_an_empty_run_has_a_report() -> None:
    found = report(State(), EMPTY)

    assert (found.since_step, found.windows, found.rank_correlation, found.groups) == (None, (), None, ())
    assert (found.success_rate.count, found.success_rate.mean_forecast) == (0, None)
    assert found.coverage.tried_share == 0


def test_the_report_counts_what_the_log_says(make_block: MakeBlock) -> None:
    told = Told(make_block)

    found = report(told.state, told.pool)

    assert (found.selections, found.since_step, found.window_steps) == (1, 5, 1)
    assert found.success_rate.count == 10
    assert found.success_rate.mean_forecast == pytest.approx(0.25)
    assert found.success_rate.mean_outcome == pytest.approx(28 / 80)
    assert found.success_rate.calibration_error == pytest.approx(0.1)
    filled = [(b.from_forecast, b.to_forecast, b.count) for b in found.success_rate.reliability if b.count]
    assert filled == [(0.2, 0.3, 10)]
    assert found.informative.mean_outcome == pytest.approx(0.4)
    (window,) = found.windows
    assert (window.first_step, window.last_step, window.chosen, window.fresh) == (5, 5, 20, 20)
    assert window.rank_correlation is None  # all forecasts are equal
    policy, control = found.arms
    assert (policy.arm, policy.selected, policy.observed, policy.attempts) == ("policy", 18, 10, 80)
    assert policy.informative_share is not None
    assert policy.informative_share.value == pytest.approx(0.4)
    assert (control.arm, control.selected, control.observed, control.informative_share) == ("control", 2, 0, None)


def test_coverage_counts_prompts_by_their_visits(make_block: MakeBlock) -> None:
    told = Told(make_block)

    coverage = report(told.state, told.pool).coverage

    assert (coverage.pool_size, coverage.chosen, coverage.observed) == (40, 20, 10)
    assert (coverage.tried_share, coverage.mean_visits) == (0.5, 0.5)
    assert [visit.prompts for visit in coverage.visits] == [20, 20, 0, 0, 0, 0, 0]


def test_every_group_has_a_row(make_block: MakeBlock) -> None:
    told = Told(make_block)

    found = report(told.state, told.pool)

    assert [group.group for group in found.groups] == ["a", "b"]
    assert found.other_groups is None
    for group in found.groups:
        assert (group.prompts, group.tried, group.chosen, group.chosen_control) == (20, 10, 10, 1)
        assert (group.observed, group.attempts) == (5, 40)
        assert group.success_rate == pytest.approx(14 / 40)
        assert group.success_rate_forecast == pytest.approx(0.25)
        assert group.informative_share is not None
        assert group.informative_share.value == pytest.approx(0.4)


def test_groups_beyond_500_are_one_row(make_block: MakeBlock) -> None:
    n = MAX_GROUPS + 30
    pool = Pool(surface_width=0, embedding_width=0)
    pool.append(make_block(n, groups=tuple(f"g{i}" for i in range(n))))
    state = fold(State(), PoolEntry(1, n), pool)

    found = report(state, pool)

    assert len(found.groups) == MAX_GROUPS
    assert found.other_groups is not None
    assert (found.other_groups.group, found.other_groups.prompts) == (None, 30)


def test_since_step_leaves_out_earlier_windows() -> None:
    training = Training(0)
    for step in range(10):
        training.step(step)

    late = report(State(tallies=training.tallies), EMPTY, since_step=7)

    assert [window.first_step for window in late.windows] == [7, 8, 9]
    assert late.since_step == 7
    assert sum(arm.observed for arm in late.arms) == 3 * 40 == late.success_rate.count
    assert report(State(tallies=training.tallies), EMPTY, since_step=10).since_step is None


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(advances=st.lists(st.integers(-3, 12), min_size=1, max_size=60), first=st.integers(0, 100))
def test_a_window_holds_the_beliefs_before_its_first_outcome_however_wide_it_became(
    make_block: MakeBlock, advances: list[int], first: int
) -> None:
    rng = np.random.default_rng(0)
    pool = Pool(surface_width=2, embedding_width=0)
    pool.append(make_block(30, surface=rng.normal(size=(30, 2))))
    state = fold(State(), PoolEntry(1, 30), pool)
    looks: list[tuple[int, tuple[int, ...]]] = []
    for advance in (0, *advances):
        step = max(first, state.head_step + advance)
        a, b = beliefs_of(state, pool)
        if step > state.head_step:
            looks.append((step, tuple(np.histogram(a / (a + b), 20, (0, 1))[0].tolist())))
        k = rng.integers(0, 9, size=5).astype(float)
        prompts = rng.choice(30, size=5, replace=False)
        fold(
            state,
            ObserveEntry(state.position + 1, step, prompts, k, np.full(5, 8.0), (k > 0) & (k < 8)),
            pool,
        )

    told = report(state, pool)

    for window in told.windows:
        inside = [counts for step, counts in looks if window.first_step <= step <= window.last_step]
        assert window.believed_counts == (inside[0] if inside else None)


def test_the_beliefs_about_a_large_pool_are_sampled_evenly(make_block: MakeBlock) -> None:
    n = 3 * LOOKED_AT
    pool = Pool(surface_width=0, embedding_width=0)
    pool.append(make_block(n, prior_rates=np.repeat([0.05, 0.95, 0.95], LOOKED_AT)))
    state = fold(State(), PoolEntry(1, n), pool)
    one = np.ones(1)

    fold(state, ObserveEntry(2, 0, np.zeros(1, np.int64), one, one, np.zeros(1, bool)), pool)

    (window,) = report(state, pool).windows
    assert window.believed_counts is not None
    low, high = sum(window.believed_counts[:10]), sum(window.believed_counts[10:])
    assert low + high == LOOKED_AT
    assert low == pytest.approx(LOOKED_AT / 3, abs=1)
