"""What other models showed on the prompts: believed as far as this run's own outcomes bear it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import OTHERS_LEAST_WEIGHT, fold, misled
from evenodds_service.domain.learning.known_rates import MOST_COLUMNS, RateColumns
from evenodds_service.domain.learning.mixture import FITTED, PRIORS, RUNS, STACKED
from evenodds_service.domain.learning.prediction import beliefs_of, new_prompt_beliefs
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SnapshotEntry
from evenodds_service.domain.prompts import UNNAMED, FittedPrior, KnownRate, NamedRates, SourceColumns
from evenodds_service.domain.ranks import spearman
from evenodds_service.domain.report.findings import alarms
from evenodds_service.domain.settings import RunSettings

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

pytestmark = pytest.mark.numbers

N, ATTEMPTS = 600, 8
Told = Sequence[Mapping[str, KnownRate] | None]


@pytest.fixture(scope="module")
def eases() -> FloatArray:
    """Log-odds of this run's policy."""
    return np.random.default_rng(0).normal(-0.5, 1.8, size=N)


def rates_of(log_odds: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-log_odds))


def shown(eases: FloatArray, *, shift: float = 0.0, slope: float = 1.0, noise: float = 0.5, seed: int = 1) -> list[int]:
    """Successes of 8 attempts of a model that finds the prompts so much easier, or otherwise hard."""
    chance = np.random.default_rng(seed)
    log_odds = slope * eases + shift + noise * chance.normal(size=len(eases))
    return [int(k) for k in chance.binomial(ATTEMPTS, rates_of(log_odds))]


def told_by(others: Mapping[str, Sequence[int]]) -> Told:
    n = len(next(iter(others.values())))
    return [{name: (float(k[i]), ATTEMPTS) for name, k in others.items()} for i in range(n)]


@pytest.fixture
def pool_of(make_block: MakeBlock) -> Callable[[Told], Pool]:
    def make(told: Told) -> Pool:
        pool = Pool(surface_width=2, embedding_width=0)
        pool.append(make_block(len(told), surface=np.ones((len(told), 2)), named_rates=NamedRates.of(told)))
        return pool

    return make


def started(pool: Pool) -> State:
    return fold(State(), PoolEntry(1, pool.n), pool)


def observe(state: State, pool: Pool, rates: FloatArray, prompts: Sequence[int], *, seed: int = 0) -> None:
    rows = np.asarray(prompts)
    k = np.random.default_rng([seed, state.head_step + 1]).binomial(ATTEMPTS, rates[rows]).astype(np.float64)
    counts = np.full(len(rows), float(ATTEMPTS))
    entry = ObserveEntry(state.position + 1, state.head_step + 1, rows, k, counts, (k > 0) & (k < ATTEMPTS))
    fold(state, entry, pool)


def trained(pool: Pool, rates: FloatArray, *, groups: int, batch: int = 16) -> State:
    state = started(pool)
    for first in range(0, groups, batch):
        observe(state, pool, rates, range(first, first + batch))
    return state


def forecast(state: State, pool: Pool) -> FloatArray:
    a, b = beliefs_of(state, pool)
    return np.asarray(a / (a + b))


def log_loss(state: State, pool: Pool, rates: FloatArray, *, after: int) -> float:
    """Expected, on the prompts that were never tried."""
    told, true = forecast(state, pool)[after:], rates[after:]
    return float(-(true * np.log(told) + (1 - true) * np.log(1 - told)).mean())


def test_nothing_is_derived_where_nothing_is_known(pool_of: Callable[[Told], Pool], eases: FloatArray) -> None:
    pool = pool_of([None] * N)

    state = trained(pool, rates_of(eases), groups=64)

    assert (state.columns, state.runs) == (None, None)
    assert not state.mixture.present()[PRIORS.index(RUNS)]


def test_one_model_ranks_prompts_before_the_first_outcome(pool_of: Callable[[Told], Pool], eases: FloatArray) -> None:
    pool = pool_of(told_by({"sibling": shown(eases)}))

    assert spearman(forecast(started(pool), pool), eases) > 0.8


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_an_optimist_or_an_easy_verifier_does_no_harm(
    pool_of: Callable[[Told], Pool], eases: FloatArray, shift: float
) -> None:
    """The offset is learned from the first hundred groups."""
    rates = rates_of(eases)
    alike, apart = (pool_of(told_by({"other": shown(eases, shift=by)})) for by in (0.0, shift))

    losses = [log_loss(trained(pool, rates, groups=112), pool, rates, after=112) for pool in (alike, apart)]

    mean = forecast(trained(apart, rates, groups=112), apart)[112:].mean()
    assert mean == pytest.approx(rates[112:].mean(), abs=0.05)
    assert losses[1] < losses[0] + 0.06


def test_rates_that_mislead_are_seen_through(pool_of: Callable[[Told], Pool], eases: FloatArray) -> None:
    rates = rates_of(eases)
    at_random = [int(k) for k in np.random.default_rng(5).integers(0, 9, size=N)]
    pools = {
        "none": pool_of([None] * N),
        "random": pool_of(told_by({"noise": at_random})),
        "inverted": pool_of(told_by({"liar": shown(eases, slope=-1.0)})),
    }

    loss = {name: log_loss(trained(pool, rates, groups=160), pool, rates, after=160) for name, pool in pools.items()}

    assert loss["random"] < loss["none"] + 0.01
    assert loss["inverted"] < loss["none"] + 0.01


def test_of_many_the_nearest_are_read_one_by_one(pool_of: Callable[[Told], Pool], eases: FloatArray) -> None:
    """Two families of models, which find other prompts hard; this policy is of the smaller one."""
    others = np.random.default_rng(3).normal(-0.5, 1.8, size=N)
    family = {f"near {i}": shown(eases, seed=10 + i) for i in range(4)}
    far = {f"far {i}": shown(others, seed=20 + i) for i in range(12)}
    pool = pool_of(told_by(far | family))
    rates = rates_of(eases)

    early, late = (trained(pool, rates, groups=groups) for groups in (48, 208))

    assert early.columns is not None
    assert early.columns.nearest == ()
    assert late.columns is not None
    assert len(late.columns.nearest) == MOST_COLUMNS
    read = {late.columns.names[i] for i in late.columns.nearest}
    assert read > set(family)
    assert spearman(forecast(late, pool)[208:], eases[208:]) > spearman(forecast(early, pool)[208:], eases[208:]) + 0.1
    assert spearman(forecast(late, pool)[208:], eases[208:]) > 0.85


def test_where_a_model_has_not_tried_a_prompt_the_others_speak_for_it(
    pool_of: Callable[[Told], Pool], eases: FloatArray
) -> None:
    """A weak model tried the first half, a strong one the second, and both a few: their levels are told apart."""
    weak, strong = shown(eases, shift=-1.5, noise=0.0), shown(eases, shift=1.5, noise=0.0)
    told: list[dict[str, KnownRate]] = [{} for _ in range(N)]
    for i in range(N):
        if i % 2 or i % 10 == 0:
            told[i]["weak"] = (weak[i], ATTEMPTS)
        if i % 2 == 0:
            told[i]["strong"] = (strong[i], ATTEMPTS)

    pool = pool_of(told)

    at_face_value = [np.mean([told[i][name][0] for name in told[i]]) for i in range(N)]  # type: ignore[index]
    assert spearman(forecast(started(pool), pool), eases) > spearman(at_face_value, eases) + 0.1


def test_the_stack_reads_what_others_showed(pool_of: Callable[[Told], Pool], eases: FloatArray) -> None:
    """Also where they came first and the snapshot later, and the other way round."""
    pool = pool_of(told_by({"sibling": shown(eases)}))
    rates = rates_of(eases)
    blurred = rates_of(0.3 * eases).astype(np.float32)
    state = trained(pool, rates, groups=64)
    fitted = dict.fromkeys(FITTED, FittedPrior(blurred, np.full(N, 2.0, dtype=np.float32)))
    pool.attach(1, fitted)

    fold(state, SnapshotEntry(state.position + 1, 1), pool)

    assert state.stack is not None
    assert state.runs is not None
    np.testing.assert_allclose(state.stack.weights, [0, 0.1, 0.1, 0.1, 0.7])
    c = PRIORS.index(STACKED)
    state.mixture.log_weights[:] = -np.inf
    state.mixture.log_weights[c] = -np.log(state.mixture.log_weights[c].size)
    state.mixture.log_guard = -50.0
    assert spearman(forecast(state, pool)[64:], eases[64:]) > 0.8


def test_rates_that_come_after_the_snapshot_join_the_stack(make_block: MakeBlock, eases: FloatArray) -> None:
    pool = Pool(surface_width=0, embedding_width=0)
    pool.append(make_block(100))
    state = trained(pool, rates_of(eases), groups=32)
    flat = FittedPrior(np.full(100, 0.5, dtype=np.float32), np.full(100, 2.0, dtype=np.float32))
    pool.attach(1, dict.fromkeys(FITTED, flat))
    fold(state, SnapshotEntry(state.position + 1, 1), pool)
    assert state.stack is not None
    assert len(state.stack.weights) == 4
    told = told_by({"sibling": shown(eases[100:])})
    pool.append(make_block(N - 100, first=100, named_rates=NamedRates.of(told)))

    fold(state, PoolEntry(state.position + 1, N), pool)
    observe(state, pool, rates_of(eases), range(90, 110))

    assert len(state.stack.weights) == 5
    assert spearman(forecast(state, pool)[110:], eases[110:]) > 0.7


def test_a_new_prompt_may_bring_what_others_showed(
    pool_of: Callable[[Told], Pool], make_block: MakeBlock, eases: FloatArray
) -> None:
    pool = pool_of(told_by({"sibling": shown(eases)}))
    state = trained(pool, rates_of(eases), groups=64)
    outside = Pool(surface_width=2, embedding_width=0)
    told: Told = [{"sibling": (0, 8)}, {"sibling": 1.0}, {"stranger": 0.9}, None]
    outside.append(make_block(4, surface=np.ones((4, 2)), named_rates=NamedRates.of(told)))

    assert state.basis is not None
    block = outside.raw(0, 4)
    a, b, _ = new_prompt_beliefs(state, state.basis.project(block), block.told, {})

    hard, easy, stranger, nothing = a / (a + b)
    assert hard < nothing < easy
    assert stranger == nothing


def test_columns_depend_on_the_prompts_and_not_on_the_blocks_they_came_in(
    make_block: MakeBlock, eases: FloatArray
) -> None:
    rng = np.random.default_rng(2)
    told = [{f"m{j}": float(rng.random()) for j in rng.permutation(12)[: i % 12]} or None for i in range(N)]
    prior_rates = np.where(rng.random(N) < 0.2, rng.random(N), np.nan)
    states = []
    for cuts in ((N,), (5, 7, 300, N), tuple(range(1, N + 1))):
        pool, first = Pool(surface_width=0, embedding_width=0), 0
        for last in cuts:
            here = slice(first, last)
            named = NamedRates.of(told[here])
            pool.append(make_block(last - first, first=first, prior_rates=prior_rates[here], named_rates=named))
            first = last
        states.append((trained(pool, rates_of(eases), groups=160), pool))

    names = pool.tellers(N)
    assert len(names) == 13
    assert UNNAMED in names
    for state, pool in states:
        assert state.columns is not None
        assert state.columns.names == names
        assert forecast(state, pool).tobytes() == forecast(*states[0]).tobytes()


def test_a_row_is_told_alone_as_in_company(pool_of: Callable[[Told], Pool], eases: FloatArray) -> None:
    others = {f"m{j}": shown(eases, seed=j) for j in range(12)}
    told = told_by(others)
    pool = pool_of(told)
    columns = RateColumns.of(pool.told(pool.tellers(N), slice(0, N))).reading(np.arange(12.0), 64)

    everyone = columns.project(NamedRates.of(told))

    for i in (0, 17, N - 1):
        assert columns.project(NamedRates.of(told[i : i + 1])).tobytes() == everyone[i].tobytes()


def columns_of(log_odds: FloatArray, *names: str) -> SourceColumns:
    """What a refit made of other runs that showed so much, each noisier than the one before."""
    chance = np.random.default_rng(4)
    shown = np.stack([log_odds + (0.5 + i) * chance.normal(size=N) for i in range(len(names))], axis=1)
    return SourceColumns(names, shown.astype(np.float16), shown.mean(axis=0))


def with_snapshot(state: State, pool: Pool, sources: SourceColumns | None) -> None:
    version = state.model_version + 1
    pool.attach(version, {}, sources)
    fold(state, SnapshotEntry(state.position + 1, version), pool)


def test_columns_of_other_runs_come_and_go_with_snapshots(pool_of: Callable[[Told], Pool], eases: FloatArray) -> None:
    rates = rates_of(eases)
    pool = pool_of([None] * N)
    state = started(pool)

    with_snapshot(state, pool, columns_of(eases, "a", "b"))
    first = spearman(forecast(state, pool), eases)
    for _ in range(4):
        observe(state, pool, rates, range(32 * (state.head_step + 1), 32 * (state.head_step + 2)))
    assert state.runs is not None
    learned = state.runs.weights.copy()
    with_snapshot(state, pool, columns_of(eases, "a", "b"))
    np.testing.assert_allclose(state.runs.weights, learned, atol=0.02)  # the same columns: nothing is forgotten
    before = forecast(state, pool)
    with_snapshot(state, pool, columns_of(eases, "a"))
    assert np.abs(forecast(state, pool) - before)[128:].mean() < 0.1
    with_snapshot(state, pool, None)

    assert first > 0.85
    assert state.columns is None
    observe(state, pool, rates, range(200, 232))
    assert np.isfinite(forecast(state, pool)).all()


def test_named_rates_and_other_runs_are_read_together(pool_of: Callable[[Told], Pool], eases: FloatArray) -> None:
    """Each speaks for the other where it knows nothing, at its own level."""
    told = told_by({"sibling": shown(eases, shift=2.0)})
    pool = pool_of([None if i < N // 2 else told[i] for i in range(N)])
    state = started(pool)

    with_snapshot(state, pool, columns_of(eases, "a"))

    assert state.columns is not None
    assert state.columns.read == ("sibling", "a")
    assert spearman(forecast(state, pool), eases) > 0.85


def test_what_others_were_worth_is_told_and_those_that_mislead_raise_an_alarm(
    pool_of: Callable[[Told], Pool], eases: FloatArray
) -> None:
    rates, noise = rates_of(eases), np.random.default_rng(8).normal(size=N)
    states = {}
    for name, shown_by in {"good": eases, "noise": noise, "nobody": None}.items():
        pool = pool_of([None] * N)
        state = started(pool)
        if shown_by is not None:
            with_snapshot(state, pool, columns_of(shown_by, "a"))
        for first in range(0, 384, 32):
            observe(state, pool, rates, range(first, first + 32))
        states[name] = (state, log_loss(state, pool, rates, after=384), misled(state))

    good, noisy, nobody = states["good"], states["noise"], states["nobody"]
    assert good[0].others_nats / good[0].others_counts > 0.2
    assert abs(noisy[0].others_nats / noisy[0].others_counts) < 0.05
    assert noisy[1] < nobody[1] + 0.005
    assert good[1] < nobody[1] - 0.1
    assert (good[2], nobody[2]) == (None, None)
    assert noisy[2] is not None
    assert "sources_mislead" in {alarm.code for alarm in alarms(noisy[0], pool_of([None] * N), RunSettings())}
    assert abs(noisy[2].weight) < noisy[2].limit == OTHERS_LEAST_WEIGHT
