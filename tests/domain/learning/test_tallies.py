"""The sums of forecasts and outcomes against a slow and obvious count of the same events."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.learning.tallies import MAX_GROUPS, MAX_OPEN, MAX_OPEN_ROWS, MIN_OPEN, N_WINDOWS, Tallies
from evenodds_service.domain.log_entries import SelectEntry
from evenodds_service.domain.report.report import rank_correlation

N_PROMPTS, N_GROUPS = 40, 3


@dataclass
class Told:
    """What was reported of one prompt under one selection, or in one call outside of selections."""

    step: int
    prompt: int
    a: float
    b: float
    arm: int | None
    share: float
    rewards: list[float] = field(default_factory=list)

    @property
    def is_informative(self) -> bool:
        return max(self.rewards) > min(self.rewards)


class Both:
    """Feeds tallies, and remembers every event."""

    def __init__(self) -> None:
        self.tallies = Tallies()
        self.told: dict[object, Told] = {}
        self.selections: list[tuple[SelectEntry, IntArray]] = []
        self.first_step, self.top_step = -1, 0
        self.chosen: set[int] = set()
        self.calls = 0

    def select(self, step: int, prompts: IntArray, control: Any, share: float, rng: np.random.Generator) -> None:
        a, b = rng.uniform(0.2, 5.0, size=(2, len(prompts)))
        entry = SelectEntry(1, step, prompts, f"s{len(self.selections)}", share, control, a, b)
        fresh = np.array([prompt not in self.chosen for prompt in prompts.tolist()])
        self.tallies.select(entry, fresh, prompts % N_GROUPS)
        self.selections.append((entry, fresh))
        self.chosen |= set(prompts.tolist())
        self._saw(step)

    def observe(self, step: int, selection: int | None, rewards: dict[int, list[float]], beta: FloatArray) -> None:
        """`beta` holds the present belief about each prompt, [N, 2]; a selection of -1 is one that nobody knows."""
        prompts = np.array(sorted(rewards))
        found = self._belongs_to(step, selection)
        self.tallies.observe(
            step,
            None if selection is None else f"s{selection}",
            prompts,
            np.array([sum(rewards[p]) for p in prompts.tolist()]),
            np.array([float(len(rewards[p])) for p in prompts.tolist()]),
            np.array([max(rewards[p]) > min(rewards[p]) for p in prompts.tolist()]),
            prompts % N_GROUPS,
            lambda rows: (beta[prompts[rows], 0], beta[prompts[rows], 1]),
        )
        self.calls += 1
        for prompt in prompts.tolist():
            if found is not None and prompt in found.prompts.tolist():
                place = found.prompts.tolist().index(prompt)
                assert found.a is not None
                assert found.b is not None
                assert found.control is not None
                told = self.told.setdefault(
                    (found.selection_id, prompt),
                    Told(
                        found.step,
                        prompt,
                        float(found.a[place]),
                        float(found.b[place]),
                        int(found.control[place]),
                        found.control_share,
                    ),
                )
            else:
                told = Told(step, prompt, float(beta[prompt, 0]), float(beta[prompt, 1]), None, 0.0)
                self.told[(self.calls, prompt)] = told
            told.rewards += rewards[prompt]
            self._saw(told.step)

    def _belongs_to(self, step: int, selection: int | None) -> SelectEntry | None:
        if selection is not None:
            return self.selections[selection][0] if 0 <= selection < len(self.selections) else None
        return next((entry for entry, _ in reversed(self.selections) if entry.step == step), None)

    def _saw(self, step: int) -> None:
        self.first_step = step if self.first_step < 0 else self.first_step
        self.top_step = max(self.top_step, step)

    def window(self, step: int) -> int:
        width = 1
        while (self.top_step - self.first_step) // width >= N_WINDOWS:
            width *= 2
        assert self.tallies.width == width
        return max(0, (step - self.first_step) // width)

    def counted(self) -> dict[str, dict[Any, FloatArray]]:
        """Every sum by its place, one event at a time."""
        sums: dict[str, dict[Any, FloatArray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(10)))

        def add(which: str, place: Any, *values: float) -> None:
            sums[which][place][: len(values)] += values

        for entry, fresh in self.selections:
            assert entry.control is not None
            for prompt, arm, is_fresh in zip(
                entry.prompts.tolist(), entry.control.astype(int).tolist(), fresh.tolist(), strict=True
            ):
                add("arms", (self.window(entry.step), arm), 1, is_fresh)
                add("groups", prompt % N_GROUPS, 1 - arm, arm)
        for told in self.told.values():
            w, k, n = self.window(told.step), sum(told.rewards), len(told.rewards)
            mean, rate = told.a / (told.a + told.b), k / n
            add("rate_bins", (w, int(mean * 10)), 1, mean, rate, (mean - rate) ** 2)
            cell = 0 if rate == 0 else 16 if rate == 1 else min(max(round(rate * 16), 1), 15)
            add("ranks", (w, int(mean * 50), cell), 1)
            chance = float(informative_moments(np.array(told.a), np.array(told.b), n)[0]) if n > 1 else 0.0
            y = float(told.is_informative)
            add("groups", told.prompt % N_GROUPS, 0, 0, 1, n, k, mean, rate, n > 1, chance, y)
            if n == 1:
                continue
            add("informative_bins", (w, min(int(chance * 10), 9)), 1, chance, y, (chance - y) ** 2)
            if told.arm is not None:
                add("arms", (w, told.arm), 0, 0, 1, n, chance, y)
            if told.arm == 0 and told.share:
                add("lift", w, 1, y, n)
            elif told.share:
                weight = (1 - told.share) / told.share
                add("lift", w, 0, 0, 0, weight, weight * y, weight * weight)
        return sums


def random_events(seed: int, *, jump: int = 1) -> Both:
    """Selections and reports in any order: late, split, repeated, of strangers, of prompts that nobody chose."""
    rng = np.random.default_rng(seed)
    both = Both()
    step = int(rng.integers(0, 50))
    for _ in range(30):
        step += int(rng.integers(0, 3)) * jump
        if rng.random() < 0.4:
            prompts = rng.choice(N_PROMPTS, size=int(rng.integers(1, 12)), replace=False)
            share = float(rng.choice([0.0, 0.1, 0.5]))
            control = rng.random(len(prompts)) < share
            both.select(step, prompts, control, share, rng)
            continue
        named = int(rng.integers(-1, len(both.selections))) if rng.random() < 0.6 else None
        of = both.selections[named][0].prompts if named is not None and named >= 0 else np.arange(N_PROMPTS)
        prompts = rng.choice(of, size=int(rng.integers(1, len(of) + 1)), replace=False)
        if rng.random() < 0.2:
            prompts = np.union1d(prompts, rng.integers(0, N_PROMPTS, size=3))
        rewards = {
            prompt: rng.choice([0.0, 0.5, 1.0], p=(0.45, 0.1, 0.45), size=int(rng.integers(1, 5))).tolist()
            for prompt in prompts.tolist()
        }
        late = max(0, step - int(rng.integers(0, 4)) * jump)
        both.observe(late, named, rewards, rng.uniform(0.2, 5.0, size=(N_PROMPTS, 2)))
    return both


@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 40]))
def test_the_sums_are_those_of_a_slow_count(seed: int, jump: int) -> None:
    both = random_events(seed, jump=jump)

    counted = both.counted()

    for which in ("rate_bins", "informative_bins", "ranks", "arms", "lift", "groups"):
        expected = np.zeros_like(getattr(both.tallies, which))
        if which == "ranks":
            expected = expected[..., None]
        for place, values in counted[which].items():
            expected[place] = values[: expected.shape[-1]]
        actual = getattr(both.tallies, which).reshape(expected.shape)
        assert actual == pytest.approx(expected, abs=1e-9), which


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_a_group_of_attempts_reported_in_parts_counts_as_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rewards = {prompt: rng.integers(0, 2, size=8).astype(float).tolist() for prompt in range(20)}
    beta = np.ones((N_PROMPTS, 2))
    whole, parts = Both(), Both()
    for both in (whole, parts):
        both.select(3, np.arange(20), np.arange(20) < 4, 0.2, np.random.default_rng(seed))

    whole.observe(3, 0, rewards, beta)
    for first, last in ((0, 1), (1, 5), (5, 8)):
        parts.observe(4, 0, {prompt: values[first:last] for prompt, values in rewards.items()}, beta)

    for which in ("rate_bins", "informative_bins", "ranks", "arms", "lift", "groups"):
        assert getattr(parts.tallies, which) == pytest.approx(getattr(whole.tallies, which), abs=1e-9), which


@pytest.mark.parametrize(("first", "second", "informative"), [(1.0, 0.0, 1), (0.3, float(np.float32(0.3)), 0)])
def test_parts_that_are_each_all_equal_may_be_informative_together(
    first: float, second: float, informative: int
) -> None:
    both = Both()
    both.select(0, np.array([7]), np.array([False]), 0.0, np.random.default_rng(0))

    both.observe(0, 0, {7: [first, first]}, np.ones((N_PROMPTS, 2)))
    before = both.tallies.arms[0, 0, -1]
    both.observe(0, 0, {7: [second, second]}, np.ones((N_PROMPTS, 2)))

    assert (before, both.tallies.arms[0, 0, -1]) == (0, informative)


def test_windows_double_in_width_and_lose_nothing() -> None:
    tallies = Tallies()
    for step in range(5, 5 + 200):
        tallies.compare(step, float(step), 1)

    assert tallies.width == 8
    assert tallies.skill[:25, 1] == pytest.approx(8)
    assert tallies.skill[0] == pytest.approx((sum(range(5, 13)), 8))
    assert tallies.skill[25:].sum() == 0


def test_a_step_far_ahead_costs_windows_and_not_memory() -> None:
    tallies = Tallies()
    tallies.compare(0, 1.0, 1)

    tallies.compare(2**62, 2.0, 1)

    assert tallies.skill.sum(axis=0) == pytest.approx((3.0, 2.0))
    assert tallies.skill.shape == (N_WINDOWS, 2)


def test_a_step_before_the_first_counts_in_the_first_window() -> None:
    tallies = Tallies()
    tallies.compare(10, 1.0, 1)

    tallies.compare(4, 1.0, 1)

    assert tallies.skill[0].tolist() == [2.0, 2.0]


def test_the_oldest_selections_close_when_there_are_too_many() -> None:
    rng = np.random.default_rng(0)
    both = Both()
    for step in range(MAX_OPEN + 3):
        both.select(step, np.array([step % N_PROMPTS]), np.array([False]), 0.0, rng)

    both.tallies.observe(
        99,
        "s2",
        np.array([2]),
        np.array([1.0]),
        np.array([2.0]),
        np.array([True]),
        np.array([0]),
        lambda rows: (np.ones(len(rows)), np.ones(len(rows))),
    )

    assert len(both.tallies.open_ids) == len(both.tallies.open_prompts) == MAX_OPEN
    assert both.tallies.open_ids[0] == "s3"
    assert both.tallies.arms[:, :, 2].sum() == 0
    assert both.tallies.rate_bins[:, :, 0].sum() == 1


def test_large_selections_close_sooner_but_eight_stay_open() -> None:
    tallies, n = Tallies(), MAX_OPEN_ROWS // 6
    for step in range(MIN_OPEN + 4):
        tallies.select(
            SelectEntry(1, step, np.arange(n), f"s{step}"), np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64)
        )

    assert tallies.open_ids == tuple(f"s{step}" for step in range(4, MIN_OPEN + 4))
    assert len(tallies.open_prompts) == len(tallies.open_beta) == MIN_OPEN * n


def test_a_selection_without_recorded_forecasts_takes_the_present_belief() -> None:
    tallies = Tallies()
    tallies.select(SelectEntry(1, 0, np.array([3, 5]), "s"), np.ones(2, dtype=bool), np.zeros(2, dtype=np.int64))

    for k in (1.0, 0.0):  # the second part changes the outcome, not the forecast
        tallies.observe(
            0,
            "s",
            np.array([5]),
            np.array([k]),
            np.array([1.0]),
            np.array([False]),
            np.array([0]),
            lambda rows: (np.full(len(rows), 3.0), np.ones(len(rows))),
        )

    assert tallies.rate_bins[0, 7] == pytest.approx((1, 0.75, 0.5, 0.0625))
    assert tallies.arms[0, 0] == pytest.approx((2, 2, 1, 2, 1 - 3 * 4 / (4 * 5) - 1 * 2 / (4 * 5), 1))


def test_groups_beyond_the_limit_share_one_row() -> None:
    tallies = Tallies()
    codes = np.array([0, MAX_GROUPS - 1, MAX_GROUPS, MAX_GROUPS + 7])

    tallies.select(SelectEntry(1, 0, np.arange(4), "s"), np.ones(4, dtype=bool), codes)

    assert len(tallies.groups) == MAX_GROUPS + 1
    assert tallies.groups[[0, MAX_GROUPS - 1, MAX_GROUPS], 0].tolist() == [1, 1, 2]


def test_there_is_no_rank_correlation_of_seven() -> None:
    assert rank_correlation(np.eye(7)) is None
    assert rank_correlation(np.eye(8)) == pytest.approx(1)


@pytest.mark.parametrize("width", [1.0, 0.3])
def test_bins_hardly_change_the_rank_correlation(width: float) -> None:
    """Of forecasts over the whole range, or only near one half, as a selection's are."""
    rng = np.random.default_rng(0)
    forecast = 0.5 + width * (rng.random(4_000) - 0.5)
    rate = rng.binomial(8, np.clip(forecast + rng.normal(scale=0.15, size=4_000), 0, 1)) / 8
    tallies = Tallies()
    tallies.observe(
        0,
        None,
        np.arange(4_000),
        rate * 8,
        np.full(4_000, 8.0),
        np.ones(4_000, dtype=bool),
        np.zeros(4_000, dtype=np.int64),
        lambda rows: (4 * forecast[rows], 4 * (1 - forecast[rows])),
    )

    assert rank_correlation(tallies.ranks[0]) == pytest.approx(stats.spearmanr(forecast, rate).statistic, abs=0.005)
