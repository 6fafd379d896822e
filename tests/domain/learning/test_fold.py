from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.domain.learning.features import ENOUGH_PROMPTS, Pool
from evenodds_service.domain.learning.fold import fold, unseen_share
from evenodds_service.domain.learning.mixture import AGEING, MEMORIES, PRIORS, Mixture
from evenodds_service.domain.learning.prediction import (
    BLOCK,
    beliefs_of,
    running_mean,
    shared_priors,
)
from evenodds_service.domain.learning.predictors import Gps, Mopps
from evenodds_service.domain.learning.state import State, copied
from evenodds_service.domain.log_entries import EQUAL_WITHIN, ObserveEntry, PoolEntry, SelectEntry, SnapshotEntry
from evenodds_service.domain.prompts import RawBlock

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

SEEDS = range(2)


@contextmanager
def log_likelihoods() -> Iterator[FloatArray]:
    """The log likelihoods under the mixture and under MoPPS of all that is folded meanwhile, before it is folded in."""
    total, update = np.zeros(2), Mixture.update

    def counted(mixture: Mixture, log_likelihoods: FloatArray) -> tuple[float, float]:
        scored = update(mixture, log_likelihoods)
        total[:] += scored
        return scored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixture, "update", counted)
        yield total


class Log:
    """A log as it is written: each call folds the next entry."""

    def __init__(self, block: RawBlock, *, n_prompts: int | None = None) -> None:
        self.pool = Pool(surface_width=block.surface_N_S.shape[1], embedding_width=block.embedding_N_D.shape[1])
        self.pool.append(block)
        self.state = State()
        self.grow(self.pool.n if n_prompts is None else n_prompts)

    def grow(self, n_prompts: int) -> None:
        fold(self.state, PoolEntry(self.state.position + 1, n_prompts), self.pool)

    def select(self, step: int, prompts: Sequence[int]) -> None:
        fold(self.state, SelectEntry(self.state.position + 1, step, np.array(prompts, dtype=np.int64)), self.pool)

    def observe(self, step: int, prompts: Sequence[int], successes: Sequence[float], attempts: Sequence[float]) -> None:
        k, counts = np.array(successes, dtype=np.float64), np.array(attempts, dtype=np.float64)
        informative = (k > EQUAL_WITHIN) & (k < counts - EQUAL_WITHIN)
        entry = ObserveEntry(self.state.position + 1, step, np.array(prompts, dtype=np.int64), k, counts, informative)
        fold(self.state, entry, self.pool)

    def means(self) -> FloatArray:
        a, b = beliefs_of(self.state, self.pool)
        return a / (a + b)


class World:
    """Prompts whose rate depends on their text, in one surface feature and one direction of the embedding."""

    def __init__(self, make_block: MakeBlock, seed: int, n: int) -> None:
        self.rng = np.random.default_rng(seed)
        surface = self.rng.normal(size=(n, 4))
        embedding = self.rng.normal(size=(n, 12))
        self.rates = special.expit(1.5 * surface[:, 0] + embedding[:, 0])
        self.block = make_block(n, surface=surface, embedding=embedding)

    def outcomes(self, prompts: Sequence[int], attempts: int) -> FloatArray:
        return np.asarray(self.rng.binomial(attempts, self.rates[list(prompts)]), dtype=np.float64)

    def visit(self, log: Log, prompts: Sequence[int], *, attempts: int, batch: int = 50, first_step: int = 0) -> None:
        for i, start in enumerate(range(0, len(prompts), batch)):
            some = prompts[start : start + batch]
            log.observe(first_step + i, some, self.outcomes(some, attempts).tolist(), [attempts] * len(some))


def assert_equal(one: object, other: object, name: str = "state") -> None:
    """Bit for bit, through everything that a state is made of."""
    if isinstance(one, np.ndarray):
        assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f"), name  # type: ignore[arg-type]  # np.ndarray
    elif is_dataclass(one):
        for f in fields(one):
            assert_equal(getattr(one, f.name), getattr(other, f.name), f"{name}.{f.name}")
    elif isinstance(one, tuple) and one and isinstance(one[0], np.ndarray):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):  # type: ignore[call-overload]  # a tuple too
            assert_equal(a, b, f"{name}[{i}]")
    else:
        assert one == other, name


def random_log(world: World, seed: int, *, permute: bool = False) -> Log:
    """A log with growth, selections, repeats, late reports, single attempts and fractional rewards."""
    rng, order_rng = np.random.default_rng(seed), np.random.default_rng(99)
    n = len(world.rates)
    log = Log(world.block, n_prompts=n // 8)
    for step in range(12):
        if step in (3, 7):
            log.grow(n // 2 if step == 3 else n)
        prompts = rng.choice(log.state.n_prompts, size=min(30, log.state.n_prompts), replace=False)
        attempts = rng.choice([1, 4, 8], size=len(prompts))
        successes = rng.binomial(attempts * 4, world.rates[prompts]) / 4
        order = order_rng.permutation(len(prompts)) if permute else np.arange(len(prompts))
        log.select(step, prompts.tolist())
        log.observe(
            max(0, step - int(rng.integers(0, 3))),
            prompts[order].tolist(),
            successes[order].tolist(),
            attempts[order].tolist(),
        )
    return log


def test_a_new_state_knows_nothing() -> None:
    state = State()

    assert running_mean(state) == 0.5
    assert state.head_step == -1
    assert beliefs_of(state, Pool(surface_width=0, embedding_width=0))[0].shape == (0,)


def test_without_outcomes_every_belief_has_mean_one_half(make_block: MakeBlock) -> None:
    log = Log(World(make_block, 0, 50).block)

    assert log.means() == pytest.approx(0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_folding_the_same_log_twice_gives_the_same_bits(make_block: MakeBlock, seed: int) -> None:
    one = random_log(World(make_block, seed, 240), seed)
    other = random_log(World(make_block, seed, 240), seed)

    assert_equal(one.state, other.state)
    for a, b in zip(beliefs_of(one.state, one.pool), beliefs_of(other.state, other.pool), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replica_whose_pool_arrived_in_pieces_folds_to_the_same_bits(make_block: MakeBlock, seed: int) -> None:
    world = World(make_block, seed, 700)
    whole = Log(world.block)
    pieces = Log(world.block, n_prompts=700)
    pieces.pool = Pool(surface_width=4, embedding_width=12)
    for first, last in ((0, 1), (1, 512), (512, 699), (699, 700)):
        pieces.pool.append(whole.pool.raw(first, last))
        assert pieces.state.basis is not None
        pieces.pool.matrix(pieces.state.basis, last)

    for log in (whole, pieces):
        world.rng = np.random.default_rng(seed)
        world.visit(log, range(700), attempts=8, batch=70)

    assert_equal(whole.state, pieces.state)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_the_prompts_in_a_batch_does_not_matter(make_block: MakeBlock, seed: int) -> None:
    plain = random_log(World(make_block, seed, 240), seed)
    permuted = random_log(World(make_block, seed, 240), seed, permute=True)

    assert_equal(plain.state, permuted.state)


def test_several_rows_of_one_prompt_are_one_row(make_block: MakeBlock) -> None:
    block = World(make_block, 0, 20).block
    rows, row = Log(block), Log(block)

    rows.observe(0, [3, 5, 3, 3], [1, 0, 2, 0.5], [2, 4, 4, 2])
    row.observe(0, [3, 5], [3.5, 0], [8, 4])

    assert rows.state.n_observations == 4
    assert row.state.n_observations == 2
    rows.state.n_observations = 2
    assert_equal(rows.state, row.state)


def test_one_step_reported_in_several_calls_is_one_visit(make_block: MakeBlock) -> None:
    block = World(make_block, 0, 20).block
    calls, call = Log(block), Log(block)
    for log in (calls, call):
        log.observe(2, [3], [5], [8])

    for successes in (1, 0, 2):
        calls.observe(5, [3], [successes], [2])
    call.observe(5, [3], [3], [6])

    for name in ("successes_L_N", "failures_L_N", "attempts_N", "visits_N", "last_step_N", "gap_steps", "n_gaps"):
        assert_equal(getattr(calls.state, name), getattr(call.state, name), name)
    assert calls.state.visits_N[3] == 2


def test_own_evidence_is_discounted_once_per_visit(make_block: MakeBlock) -> None:
    log = Log(make_block(2))

    log.observe(1, [0], [8], [8])
    log.observe(9, [0], [2], [8])
    log.observe(10, [1], [1], [1])

    memory = np.asarray(MEMORIES) * np.asarray(AGEING)  # 8 steps are one advance of the head
    assert log.state.successes_L_N[:, 0] == pytest.approx(memory * 8 + 2)
    assert log.state.failures_L_N[:, 0] == pytest.approx(np.full_like(memory, 6))


@pytest.mark.parametrize("stride", [1, 25])
def test_under_an_ageing_memory_old_evidence_fades_in_policy_versions_whatever_their_numbers(
    make_block: MakeBlock, stride: int
) -> None:
    """All prompts had 8 of 8 at some time; under ageing experts alone the longer ago, the nearer to the prior."""
    log = Log(make_block(21))
    for step in range(20):
        log.observe(step * stride, [step, 20], [8, 4], [8, 8])
    weights = np.full(log.state.mixture.log_weights.shape, -np.inf)
    weights[PRIORS.index("flat")][:, np.asarray(AGEING) < 1] = 0.0
    log.state.mixture = Mixture(weights - np.log(np.exp(weights).sum()), -700.0)

    a, b = beliefs_of(log.state, log.pool)

    means = a / (a + b)
    assert (np.diff(means[:20]) > 0).all()
    assert means[0] < 0.75
    assert means[19] > 0.8


def test_a_late_report_counts_as_much_as_its_age_in_mean_gaps_leaves(make_block: MakeBlock) -> None:
    log = Log(make_block(3))
    log.observe(0, [0, 1], [4, 4], [8, 8])
    log.observe(10, [0], [4], [8])
    log.observe(20, [0, 1], [4, 4], [8, 8])
    before = log.state.successes_L_N[:, 0].copy()

    log.observe(5, [0, 2], [3, 3], [8, 8])

    # Gaps so far: 10 and 10 of prompt 0, 20 of prompt 1. Prompt 0 was last seen 15 steps after the late step.
    memory = np.asarray(MEMORIES) ** (15 / (40 / 3)) * np.asarray(AGEING) ** (15 / 10)
    assert log.state.gap_steps == pytest.approx(40 / 3)
    assert log.state.advance_steps == 10
    assert log.state.successes_L_N[:, 0] == pytest.approx(before + memory * 3)
    assert log.state.successes_L_N[:, 2] == pytest.approx(3)
    assert log.state.last_step_N.tolist() == [20, 20, 5]
    assert log.state.head_step == 20


def test_a_very_late_report_is_worth_nothing_to_a_short_memory_and_all_to_the_lasting_one(
    make_block: MakeBlock,
) -> None:
    log = Log(make_block(1))
    log.observe(100_000, [0], [4], [8])

    log.observe(0, [0], [8], [8])

    assert log.state.successes_L_N[MEMORIES.index(1.0), 0] == 12
    assert log.state.successes_L_N[MEMORIES.index(0.5), 0] == 4


def test_visits_attempts_and_steps_are_counted(make_block: MakeBlock) -> None:
    log = Log(make_block(4))

    log.observe(2, [0, 1], [1, 0], [8, 4])
    log.observe(2, [1, 2], [1, 1], [1, 1])
    log.observe(6, [1], [0.5], [2])

    state = log.state
    assert state.attempts_N.tolist() == [8, 7, 1, 0]
    assert state.visits_N.tolist() == [1, 2, 1, 0]
    assert state.last_step_N.tolist() == [2, 6, 2, -1]
    assert state.n_observations == 5
    assert state.head_step == 6
    assert (state.gap_steps, state.n_gaps) == (4, 1)


def test_selections_are_counted_and_the_last_two_are_kept(make_block: MakeBlock) -> None:
    log = Log(make_block(4))

    log.select(3, [0, 1])
    log.observe(3, [1], [1], [2])
    log.select(5, [1, 2])
    log.observe(5, [1], [1], [2])
    log.select(4, [1])

    state = log.state
    assert state.selected_N.tolist() == [1, 3, 1, 0]
    assert state.last_selected_N.tolist() == [3, 5, 5, -1]
    assert [batch.tolist() for batch in state.recent_batches] == [[1, 2], [1]]
    assert state.visits_N.tolist() == [0, 2, 0, 0]


def test_a_snapshot_entry_switches_the_model_version(make_block: MakeBlock) -> None:
    log = Log(make_block(1))

    log.pool.attach(7, {})
    fold(log.state, SnapshotEntry(2, 7), log.pool)

    assert (log.state.position, log.state.model_version) == (2, 7)


@pytest.mark.parametrize("position", [0, 1, 3])
def test_an_entry_out_of_sequence_is_refused(make_block: MakeBlock, position: int) -> None:
    log = Log(make_block(2))

    with pytest.raises(ValueError, match=f"^log entry {position} does not follow position 1$"):
        fold(log.state, SelectEntry(position, 0, np.array([0])), log.pool)

    assert log.state.position == 1
    assert log.state.selected_N.tolist() == [0, 0]


@pytest.mark.parametrize("unknown", [-1, 2, 99])
def test_an_entry_that_names_an_unknown_prompt_is_refused_whole(make_block: MakeBlock, unknown: int) -> None:
    log, untouched = Log(make_block(2)), Log(make_block(2))

    with pytest.raises(ValueError, match=f"^a log entry names prompt {unknown}, the pool has 2$"):
        log.observe(0, [0, unknown], [1, 1], [8, 8])
    with pytest.raises(ValueError, match=f"^a log entry names prompt {unknown}, the pool has 2$"):
        log.select(0, [1, unknown])

    assert_equal(log.state, untouched.state)


def test_prompts_that_the_log_has_not_reached_are_unknown_though_the_pool_holds_them(make_block: MakeBlock) -> None:
    log = Log(make_block(10), n_prompts=4)

    with pytest.raises(ValueError, match=r"^a log entry names prompt 4, the pool has 4$"):
        log.select(0, [4])


def test_mopps_beliefs_are_one_plus_everything_that_was_counted(make_block: MakeBlock) -> None:
    log = Log(make_block(3))
    log.observe(0, [0, 1], [3, 0.5], [8, 1])
    log.observe(4, [0], [8], [8])

    a, b = Mopps().beliefs(log.state, log.pool)

    assert a.tolist() == [12, 1.5, 1]
    assert b.tolist() == [6, 1.5, 1]
    assert [x.tolist() for x in Mopps().beliefs(log.state, log.pool, np.array([2, 0]))] == [[1, 12], [1, 6]]


@pytest.mark.parametrize("seed", SEEDS)
def test_beliefs_about_some_prompts_are_those_of_the_whole_pool(make_block: MakeBlock, seed: int) -> None:
    log = random_log(World(make_block, seed, 240), seed)
    some = np.array([200, 3, 17])

    a, b = beliefs_of(log.state, log.pool)

    assert [len(a), len(b)] == [240, 240]
    some_a, some_b = beliefs_of(log.state, log.pool, some)
    assert some_a == pytest.approx(a[some], rel=1e-4)
    assert some_b == pytest.approx(b[some], rel=1e-4)


def test_prompts_outside_the_pool_are_believed_like_unseen_ones_inside(make_block: MakeBlock) -> None:
    world = World(make_block, 0, 200)
    log = Log(world.block)
    world.visit(log, range(150), attempts=8)
    outside = make_block(50, surface=world.block.surface_N_S[150:], embedding=world.block.embedding_N_D[150:])

    a, b, _ = Gps().new_beliefs(log.state, outside, lambda _: {})

    inside_a, inside_b = beliefs_of(log.state, log.pool, np.arange(150, 200))
    assert a == pytest.approx(inside_a, rel=1e-4)
    assert b == pytest.approx(inside_b, rel=1e-4)


@settings(max_examples=6)
@given(st.integers(0, 2**32 - 1))
def test_total_loss_over_a_log_never_exceeds_that_of_mopps_by_more_than_log_k(make_block: MakeBlock, seed: int) -> None:
    """The outcomes have nothing to do with the features, and keep changing sides."""
    rng = np.random.default_rng(seed)
    log = Log(World(make_block, seed, 40).block)

    with log_likelihoods() as scored:
        for step in range(25):
            prompts = rng.choice(40, size=15, replace=False)
            k = rng.choice([0, 8] if rng.random() < 0.5 else [8 * (step % 2), 4], size=15)
            log.observe(step, prompts.tolist(), k.tolist(), [8] * 15)

            # The state starts with three priors of 25 experts each.
            ours, mopps = scored
            assert ours >= mopps - math.log(75) - 1e-6


def test_a_single_batch_is_scored_before_it_is_learned_from(make_block: MakeBlock) -> None:
    log = Log(make_block(1))

    with log_likelihoods() as scored:
        log.observe(0, [0], [3], [4])

    assert scored[1] == pytest.approx(math.log(special.beta(4, 2)))


@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_never_seen_are_ranked_by_what_their_texts_share_with_the_seen(
    make_block: MakeBlock, seed: int
) -> None:
    world = World(make_block, seed, 600)
    log = Log(world.block)

    world.visit(log, range(400), attempts=8)

    assert stats.spearmanr(log.means()[400:], world.rates[400:]).statistic > 0.7
    mopps_a, mopps_b = Mopps().beliefs(log.state, log.pool)
    assert np.ptp(mopps_a[400:]) == np.ptp(mopps_b[400:]) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_after_one_visit_a_prompt_the_belief_is_closer_to_the_truth_than_that_of_mopps(
    make_block: MakeBlock, seed: int
) -> None:
    world = World(make_block, seed, 500)
    log = Log(world.block)

    world.visit(log, range(500), attempts=8)

    a, b = Mopps().beliefs(log.state, log.pool)
    assert np.abs(log.means() - world.rates).mean() < 0.9 * np.abs(a / (a + b) - world.rates).mean()
    assert log.state.guardrails.skill()[0] > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_single_attempts_are_learned_from(make_block: MakeBlock, seed: int) -> None:
    world = World(make_block, seed, 800)
    log = Log(world.block)

    world.visit(log, range(600), attempts=1)

    assert stats.spearmanr(log.means()[600:], world.rates[600:]).statistic > 0.5
    assert log.state.guardrails.skill()[0] > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_fractional_rewards_are_learned_from(make_block: MakeBlock, seed: int) -> None:
    world = World(make_block, seed, 600)
    log = Log(world.block)
    rewards = np.clip(world.rates + world.rng.normal(scale=0.2, size=600), 0, 1)

    for step in range(8):
        prompts = np.arange(50 * step, 50 * step + 50)
        log.observe(step, prompts.tolist(), rewards[prompts].tolist(), [1] * 50)

    assert stats.spearmanr(log.means()[400:], world.rates[400:]).statistic > 0.7


@pytest.mark.parametrize("seed", SEEDS)
def test_much_own_evidence_outweighs_the_text(make_block: MakeBlock, seed: int) -> None:
    world = World(make_block, seed, 100)
    world.rates = world.rng.random(100)  # the texts say nothing
    log = Log(world.block)

    for step in range(40):
        world.visit(log, range(100), attempts=8, batch=100, first_step=step)

    assert np.abs(log.means() - world.rates).mean() < 0.05


def test_a_policy_that_improves_is_followed(make_block: MakeBlock) -> None:
    """MoPPS averages over the whole past; the mixture moves its weight to shorter memories."""
    rng = np.random.default_rng(0)
    log = Log(World(make_block, 0, 100).block)
    for step in range(30):
        k = rng.binomial(8, 0.1 if step < 15 else 0.9, size=100)
        log.observe(step, list(range(100)), k.tolist(), [8] * 100)

    a, b = Mopps().beliefs(log.state, log.pool)
    assert (a / (a + b)).mean() == pytest.approx(0.5, abs=0.05)
    assert log.means().mean() > 0.8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("solved", [True, False])
def test_the_later_the_step_the_nearer_a_belief_is_to_the_shared_priors(
    make_block: MakeBlock, seed: int, solved: bool
) -> None:
    world = World(make_block, seed, 80)
    log = random_log(world, seed)
    log.observe(20, [7], [8 if solved else 0], [8])
    log.observe(30, [8], [4], [8])
    unseen = copied(log.state)
    unseen.successes_L_N[:, 7] = unseen.failures_L_N[:, 7] = 0
    log.state.successes_L_N[:, 7] *= solved  # all of its outcomes are on one side of every prior
    log.state.failures_L_N[:, 7] *= not solved

    steps = np.arange(20, 400)
    a, b = beliefs_of(log.state, log.pool, np.full(len(steps), 7), steps_n=steps)

    a0, b0 = beliefs_of(unseen, log.pool, np.array([7]))
    away = (a / (a + b) - a0 / (a0 + b0)) * (1 if solved else -1)
    assert (np.diff(away) < 1e-9).all()
    assert away[0] > away[10] + 1e-6
    assert away[10] > away[100] + 1e-6
    assert (away > -1e-9).all()


def test_a_belief_without_a_step_is_that_of_the_head(make_block: MakeBlock) -> None:
    log = random_log(World(make_block, 0, 80), 0)
    rows = np.arange(80)

    asked = beliefs_of(log.state, log.pool, rows, steps_n=np.full(80, log.state.head_step))

    assert_equal(asked, beliefs_of(log.state, log.pool, rows))


def test_at_a_step_before_its_newest_outcome_evidence_counts_in_full_and_not_more(make_block: MakeBlock) -> None:
    log = Log(World(make_block, 0, 20).block)
    log.observe(4, [1], [8], [8])
    log.observe(9, [2], [4], [8])

    a, b = beliefs_of(log.state, log.pool, np.ones(4, np.int64), steps_n=np.array([0, 4, 5, 9]))

    means = a / (a + b)
    assert means[0] == means[1] > means[2] > means[3]


@pytest.mark.parametrize("seed", SEEDS)
def test_good_prior_rates_of_the_caller_come_to_be_trusted(make_block: MakeBlock, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates = rng.beta(0.5, 0.5, size=300)
    log = Log(make_block(300, prior_rates=np.where(np.arange(300) % 3 == 0, np.nan, rates)))
    for step in range(5):
        prompts = np.arange(40 * step, 40 * step + 40)
        log.observe(step, prompts.tolist(), rng.binomial(8, rates[prompts]).tolist(), [8] * 40)

    weights = log.state.mixture.weights().sum(axis=(1, 2))

    assert weights[PRIORS.index("flat")] < 0.01
    told = np.arange(200, 300)[np.arange(200, 300) % 3 != 0]
    assert np.abs(log.means()[told] - rates[told]).mean() < 0.1


def test_prior_means_stand_in_one_row_for_each_prior(make_block: MakeBlock) -> None:
    log = Log(make_block(2, prior_rates=np.array([0.8, np.nan])))
    log.observe(0, [0, 1], [8, 6], [8, 8])
    assert log.state.basis is not None

    x = log.pool.matrix(log.state.basis, 2)
    means, *_ = shared_priors(log.state, x, log.pool.prior_rates(2), {}, np.ones(len(PRIORS), bool))

    running = running_mean(log.state)
    assert means.shape == (len(PRIORS), 2)
    assert ((means > 0) & (means < 1)).all()
    assert means[PRIORS.index("flat")].tolist() == [0.5, 0.5]
    assert means[PRIORS.index("running mean")] == pytest.approx(running)
    assert means[PRIORS.index("caller")] == pytest.approx([0.8, running])
    assert running > 0.5


@pytest.mark.parametrize("with_rows", [False, True])
def test_prompts_without_texts_or_vectors_are_learned_by_their_own_evidence(
    make_block: MakeBlock, with_rows: bool
) -> None:
    absent = np.full((20, 3), np.nan) if with_rows else None
    log = Log(make_block(20, surface=absent, embedding=absent))

    for step in range(6):
        log.observe(step, list(range(10)), [8, 0] * 5, [8] * 10)

    means = log.means()
    assert means[:10:2].min() > 0.9
    assert means[1:10:2].max() < 0.1
    assert means[10:] == pytest.approx(running_mean(log.state), abs=0.1)
    assert np.ptp(means[10:]) < 1e-6


def test_groups_alone_are_learned(make_block: MakeBlock) -> None:
    rng = np.random.default_rng(0)
    groups = tuple("easy" if i % 2 else "hard" for i in range(200))
    log = Log(make_block(200, groups=groups))

    for step in range(5):
        prompts = range(30 * step, 30 * step + 30)
        log.observe(step, prompts, [float(rng.binomial(8, 0.8 if i % 2 else 0.2)) for i in prompts], [8] * 30)

    means = log.means()
    assert means[151::2] == pytest.approx(0.8, abs=0.12)
    assert means[150::2] == pytest.approx(0.2, abs=0.12)


def test_the_basis_is_derived_anew_whenever_the_pool_has_grown_fourfold(make_block: MakeBlock) -> None:
    log = Log(World(make_block, 0, 200).block, n_prompts=10)
    sizes = []

    for n_prompts in (11, 39, 40, 159, 160, 200):
        log.grow(n_prompts)
        assert log.state.basis is not None
        sizes.append(log.state.basis.n_prompts)

    assert sizes == [10, 10, 40, 40, 160, 160]
    assert log.state.successes_L_N.shape == (len(MEMORIES), 200)
    assert log.state.last_step_N.tolist() == [-1] * 200


def test_a_basis_of_enough_prompts_is_kept(make_block: MakeBlock) -> None:
    rng = np.random.default_rng(0)
    n = 5 * ENOUGH_PROMPTS
    log = Log(make_block(n, surface=rng.normal(size=(n, 2))), n_prompts=ENOUGH_PROMPTS)

    log.grow(n)

    assert log.state.basis is not None
    assert log.state.basis.n_prompts == ENOUGH_PROMPTS


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_learned_survives_a_new_basis(make_block: MakeBlock, seed: int) -> None:
    world = World(make_block, seed, 800)
    log = Log(world.block, n_prompts=150)
    world.visit(log, range(150), attempts=8, batch=30)
    own = log.state.successes_L_N.copy()
    before = log.means()
    assert log.state.basis is not None

    log.grow(800)

    assert log.state.basis.n_prompts == 800
    assert np.array_equal(log.state.successes_L_N[:, :150], own)
    assert log.means()[:150] == pytest.approx(before, abs=0.05)
    assert stats.spearmanr(log.means()[150:], world.rates[150:]).statistic > 0.5


def test_vectors_that_appear_with_a_new_basis_are_learned_from(make_block: MakeBlock) -> None:
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(400, 6))
    rates = special.expit(2 * embedding[:, 0])
    embedding[:50] = np.nan
    log = Log(make_block(400, embedding=embedding), n_prompts=50)
    log.observe(0, list(range(50)), rng.binomial(8, rates[:50]).tolist(), [8] * 50)
    assert log.state.embedding is None

    log.grow(400)
    for step in range(1, 6):
        prompts = np.arange(50 * step, 50 * step + 50)
        log.observe(step, prompts.tolist(), rng.binomial(8, rates[prompts]).tolist(), [8] * 50)

    weights = log.state.mixture.weights().sum(axis=(1, 2))
    assert weights.sum() == pytest.approx(1)
    assert weights[PRIORS.index("embedding")] > 0.9
    assert stats.spearmanr(log.means()[300:], rates[300:]).statistic > 0.7


def test_vectors_that_had_a_regression_keep_it_when_the_basis_is_derived_anew(make_block: MakeBlock) -> None:
    world = World(make_block, 0, 400)
    log = Log(world.block, n_prompts=100)
    world.visit(log, range(100), attempts=8, batch=25)
    assert log.state.basis is not None
    assert log.state.embedding is not None
    before = log.state.embedding.predict(log.pool.matrix(log.state.basis, 100))

    log.grow(400)

    after = log.state.embedding.predict(log.pool.matrix(log.state.basis, 100))
    assert after == pytest.approx(before, abs=0.06)
    assert np.std(before) > 0.1


def test_growth_leaves_the_weights_of_the_priors_that_were_present(make_block: MakeBlock) -> None:
    world = World(make_block, 0, 400)
    log = Log(world.block, n_prompts=100)
    world.visit(log, range(100), attempts=8, batch=25)
    before = log.state.mixture.weights()

    log.grow(400)

    assert np.array_equal(log.state.mixture.weights(), before)


def test_an_empty_pool_entry_may_come_first(make_block: MakeBlock) -> None:
    rng = np.random.default_rng(0)
    log = Log(make_block(10, surface=rng.normal(size=(10, 2))), n_prompts=0)

    log.grow(10)
    log.observe(0, [0, 1], [1, 8], [8, 8])

    assert log.state.basis is not None
    assert log.state.basis.n_prompts == 10
    assert log.means()[0] < log.means()[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_outcomes_outside_of_selections_are_held_against_the_belief_just_before(
    make_block: MakeBlock, seed: int
) -> None:
    world = World(make_block, seed, 120)
    log = Log(world.block)
    forecasts, rates = [], []
    for step in range(6):
        prompts = world.rng.choice(120, size=30, replace=False)
        k = world.outcomes(prompts.tolist(), 4)
        forecasts += log.means()[prompts].tolist()
        rates += (k / 4).tolist()
        log.observe(step, prompts.tolist(), k.tolist(), [4.0] * 30)

    sums = log.state.tallies.rate_bins.sum(axis=(0, 1))

    errors = (np.array(forecasts) - rates) ** 2
    # Not to the last digit: with a new step older ones are forgotten a little before its outcomes come.
    assert sums == pytest.approx((180, sum(forecasts), sum(rates), errors.sum()), rel=3e-3)
    assert log.state.tallies.ranks.sum() == 180


def test_outcomes_of_a_selection_are_held_against_what_it_forecast(make_block: MakeBlock) -> None:
    log = Log(make_block(4))
    chosen = SelectEntry(2, 0, np.array([0, 1]), "s", a=np.array([1.0, 3.0]), b=np.array([3.0, 1.0]))
    fold(log.state, chosen, log.pool)

    log.observe(0, [0, 1], [8, 8], [8, 8])

    assert log.state.tallies.rate_bins[0, [2, 7], 1].tolist() == [0.25, 0.75]


@pytest.mark.parametrize(("second", "informative"), [(8.0, 0), (8 - 1e-7, 0), (0.0, 1)])
def test_rows_of_one_prompt_are_one_group_of_attempts(make_block: MakeBlock, second: float, informative: int) -> None:
    log = Log(make_block(4))

    log.observe(0, [2, 2], [8.0, second], [8.0, 8.0])

    assert log.state.tallies.informative_bins[0, :, [0, 2]].sum(axis=1).tolist() == [1, informative]


def test_the_share_of_the_pool_that_nobody_tried(make_block: MakeBlock) -> None:
    assert unseen_share(State()) == 0
    log = Log(make_block(8))
    log.select(0, [0, 1])

    log.observe(0, [1, 2], [1, 1], [2, 2])

    assert unseen_share(log.state) == 5 / 8


def test_the_skill_of_a_window_is_what_the_guard_gained(make_block: MakeBlock) -> None:
    world = World(make_block, 0, 200)
    log = Log(world.block)
    before = log.state.mixture.log_guard

    world.visit(log, range(200), attempts=8, batch=50)

    assert log.state.tallies.skill.sum(axis=0) == pytest.approx((before - log.state.mixture.log_guard, 200))
    assert log.state.guardrails.skill() == pytest.approx((before - log.state.mixture.log_guard, 200))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_stays_as_it_is_while_the_state_is_folded_on(make_block: MakeBlock, seed: int) -> None:
    world = World(make_block, seed, 400)
    log = random_log(world, seed)
    copy, before = copied(log.state), to_bytes(log.state)
    means = beliefs_of(copy, log.pool)

    world.visit(log, range(200), attempts=8, first_step=50)
    log.select(99, [1, 2, 3])

    assert to_bytes(copy) == before != to_bytes(log.state)
    for now, then in zip(beliefs_of(copy, log.pool), means, strict=True):
        np.testing.assert_array_equal(now, then)


def test_threads_give_the_same_bits(make_block: MakeBlock) -> None:
    world = World(make_block, 0, 3 * BLOCK + 100)
    log = Log(world.block)
    world.visit(log, range(0, 3 * BLOCK, 40), attempts=8)

    alone = beliefs_of(log.state, log.pool)
    with ThreadPoolExecutor(3) as executor:
        spread = beliefs_of(log.state, log.pool, each_block=executor.map)
    some = beliefs_of(log.state, log.pool, np.arange(BLOCK - 500, BLOCK + 500))

    for ours, theirs, part in zip(alone, spread, some, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(ours[BLOCK - 500 : BLOCK + 500], part, rtol=1e-9)


def test_a_pool_that_grows_by_little_is_copied_seldom_and_keeps_what_was_learned(make_block: MakeBlock) -> None:
    world = World(make_block, 0, 300)
    log = Log(world.block, n_prompts=100)
    log.observe(0, [3], [2.0], [8.0])
    homes = set()

    for n in range(101, 300):
        log.grow(n)
        log.observe(n, [n - 1], [1.0], [1.0])
        homes.add(log.state.visits_N.ctypes.data)

    assert len(homes) < 10
    assert (log.state.successes_L_N[0, 3], log.state.last_step_N[3]) == (2, 0)
    assert log.state.visits_N[100:].tolist() == [1] * 199
    assert log.state.last_step_N[:100].tolist() == [-1] * 3 + [0] + [-1] * 96
