"""What a run has learned by streaming, as a fold over its log: `state = fold(state, entry, pool)`.

The fold is a deterministic function of the entries and the pool's features. It updates the state in place, because a
state of a million prompts is too large to copy per call; the owner of a state serialises access. Time runs in steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from evenodds_service.domain import beliefs
from evenodds_service.domain.beliefs import AGEING, FITTED, MATCHED, MEMORIES, PRIORS, STACKED, Mixture
from evenodds_service.domain.pool import Basis, Pool
from evenodds_service.domain.regression import OnlineLogistic, effective_count, further_count
from evenodds_service.domain.types import (
    BoolArray,
    Entry,
    FittedPrior,
    FloatArray,
    IntArray,
    ObserveEntry,
    PoolEntry,
    SelectEntry,
)

REGRESSION_KEEP = 0.98
RECENT_BATCHES = 2
BASIS_GROWTH, BASIS_ENOUGH = 4, 4_096
_MEMORIES_L = np.asarray(MEMORIES)
_AGEING_L = np.asarray(AGEING)
_SHORTEST = MEMORIES.index(min(MEMORIES))
_AGED = np.flatnonzero(_AGEING_L < 1.0)


@dataclass(slots=True)
class State:
    """The fold of a run's log up to `position`.

    Attributes:
        stack: Weighs the log-odds of the online regression and of the fitted priors; None before the first snapshot.
        successes_L_N, failures_L_N: float32 own evidence under each memory, as of the prompt's last step.
        attempts_N, visits_N, last_step_N: Of observations: attempts, distinct steps, newest step (-1: never).
        selected_N, last_selected_N: How often and at which step a prompt was last chosen (-1: never).
        running_successes, running_counts: The discounted outcomes of all prompts.
        gap_steps, n_gaps: Mean number of steps between two visits of one prompt, over n_gaps visits.
        advance_steps, n_advances: Mean advance of the head step, over n_advances: the unit of ageing.
        log_likelihood, mopps_log_likelihood: Of all observations, before each was folded in.
    """

    position: int = 0
    n_prompts: int = 0
    head_step: int = -1
    n_observations: int = 0
    model_version: int = 0
    basis: Basis | None = None
    mixture: Mixture = field(default_factory=lambda: Mixture.new(present("embedding", "caller", *FITTED, STACKED)))
    surface: OnlineLogistic | None = None
    embedding: OnlineLogistic | None = None
    stack: OnlineLogistic | None = None
    successes_L_N: FloatArray = field(default_factory=lambda: np.zeros((len(MEMORIES), 0), np.float32))
    failures_L_N: FloatArray = field(default_factory=lambda: np.zeros((len(MEMORIES), 0), np.float32))
    attempts_N: FloatArray = field(default_factory=lambda: np.zeros(0))
    visits_N: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    last_step_N: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    selected_N: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    last_selected_N: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    running_successes: float = 0.0
    running_counts: float = 0.0
    gap_steps: float = 1.0
    n_gaps: int = 0
    advance_steps: float = 1.0
    n_advances: int = 0
    recent_batches: tuple[IntArray, ...] = ()
    log_likelihood: float = 0.0
    mopps_log_likelihood: float = 0.0


def fold(state: State, entry: Entry, pool: Pool) -> State:
    """Fold the next log entry into the state, in place, and return it.

    Args:
        pool: Holds at least the prompts that the entry speaks of.

    Raises:
        ValueError: the entry is not the next one, or names a prompt that the pool does not have at this position.
    """
    if entry.position != state.position + 1:
        raise ValueError(f"log entry {entry.position} does not follow position {state.position}")
    if isinstance(entry, PoolEntry):
        _grow(state, entry.n_prompts)
        _ensure_basis(state, pool)
        _admit(state, pool)
    elif isinstance(entry, ObserveEntry):
        _known(state, entry.prompts)
        _observe(state, entry, pool)
    elif isinstance(entry, SelectEntry):
        _known(state, entry.prompts)
        _select(state, entry)
    else:
        state.model_version = entry.version
        if state.stack is None and _stackable(_mixed(state, pool)):
            state.stack = OnlineLogistic.averaging(1 + len(FITTED))
        _admit(state, pool)
    state.position = entry.position
    return state


def shared_priors(
    state: State,
    x_n_d: FloatArray | None,
    prior_rates_n: FloatArray,
    fitted: Mapping[str, FittedPrior],
    wanted: BoolArray,
) -> tuple[FloatArray, FloatArray]:
    """What each shared prior says about n prompts.

    Args:
        x_n_d: Projected features under the state's basis; None where it has none yet.
        prior_rates_n: The caller's rates, NaN where there is none (the running mean stands in).
        fitted: The snapshot's priors of these prompts; NaN means where a prompt is newer than the snapshot (the
            online regression stands in).
        wanted: Which priors are asked for, bool [C]; the others' means are left at the running mean.

    Returns:
        Mean success rates [C, n] in (0, 1), and what each prior's strengths are multiplied with, [C, n].
    """
    n = len(prior_rates_n)
    means_C_n = np.full((len(PRIORS), n), running_mean(state), dtype=np.float32)
    scales_C_n = np.ones((len(PRIORS), n), dtype=np.float32)
    means_C_n[PRIORS.index("flat")] = 0.5
    known = np.isfinite(prior_rates_n)
    means_C_n[PRIORS.index("caller"), known] = prior_rates_n[known]
    if x_n_d is None or state.basis is None or state.surface is None:
        return means_C_n, scales_C_n
    priors = {name: prior for name, prior in fitted.items() if name in FITTED and wanted[PRIORS.index(name)]}
    newer = any(np.isnan(prior.means_N).any() for prior in fitted.values())
    stand_in = PRIORS.index("embedding" if state.embedding is not None else "surface")
    if wanted[PRIORS.index("surface")] or (newer and state.embedding is None):
        means_C_n[PRIORS.index("surface")] = state.surface.predict(x_n_d[:, : state.basis.n_surface])
    if state.embedding is not None and (wanted[PRIORS.index("embedding")] or newer):
        means_C_n[PRIORS.index("embedding")] = state.embedding.predict(x_n_d)
    for name, prior in priors.items():
        c, known = PRIORS.index(name), np.isfinite(prior.means_N)
        means_C_n[c] = np.where(known, prior.means_N, means_C_n[stand_in])
        scales_C_n[c] = np.where(known, prior.concentrations_N / MATCHED, 1.0)
    if state.stack is not None and wanted[PRIORS.index(STACKED)] and _stackable(fitted):
        c, stacked = PRIORS.index(STACKED), state.stack.mode(_log_odds(state, x_n_d, fitted))
        known = np.isfinite(stacked)
        means_C_n[c] = np.where(known, stacked, means_C_n[stand_in])
        product = np.multiply.reduce([fitted[name].concentrations_N for name in FITTED])
        scales_C_n[c] = np.where(known, product ** (1 / len(FITTED)) / MATCHED, 1.0)
    return means_C_n, scales_C_n


def _stackable(fitted: Mapping[str, FittedPrior]) -> bool:
    return all(name in fitted for name in FITTED)


def _log_odds(state: State, x_n_d: FloatArray, fitted: Mapping[str, FittedPrior]) -> FloatArray:
    """Inputs of the stack, float32 [n, 2 + fitted priors]: 1, the online regression's and the fitted priors' log-odds.

    NaN for prompts that are newer than the snapshot.
    """
    online = state.embedding or state.surface
    assert online is not None  # there are features, so there are regressions
    means = np.clip(np.stack([fitted[name].means_N for name in FITTED], axis=1), 1e-3, 1.0 - 1e-3)
    inputs = np.ones((len(means), 2 + len(FITTED)), dtype=np.float32)
    inputs[:, 1] = online.log_odds(x_n_d[:, : len(online.weights)])
    inputs[:, 2:] = np.log(means) - np.log1p(-means)
    return inputs


def running_mean(state: State) -> float:
    """Mean rate of all observed prompts, older ones counting less; .5 before the first."""
    return (state.running_successes + 1.0) / (state.running_counts + 2.0)


def beliefs_of(state: State, pool: Pool, indices: IntArray | None = None) -> tuple[FloatArray, FloatArray]:
    """Parameters (a, b) of the `gps` belief about these prompts, or about all, float64 [n]."""
    rows = slice(0, state.n_prompts) if indices is None else indices
    x = pool.rows(state.basis, rows) if state.basis is not None else None
    weights = state.mixture.kept()
    means_C_n, scales_C_n = _priors_of(state, pool, rows, x, np.asarray(weights.any(axis=(1, 2))))
    return beliefs.predict(
        weights,
        means_C_n,
        *_own(state, rows),
        scales_C_n,
    )


def new_prompt_beliefs(state: State, outside: Pool, fitted: Mapping[str, FittedPrior]) -> tuple[FloatArray, FloatArray]:
    """Parameters (a, b) of the `gps` belief about prompts outside the pool, given as a pool of their own, [n].

    Args:
        fitted: What the state's snapshot says about them.
    """
    x = outside.matrix(state.basis, outside.n) if state.basis is not None else None
    weights = state.mixture.kept()
    wanted = np.asarray(weights.any(axis=(1, 2)))
    means_C_n, scales_C_n = shared_priors(state, x, outside.prior_rates(outside.n), fitted, wanted)
    none = np.zeros((len(MEMORIES), outside.n), dtype=np.float32)
    return beliefs.predict(weights, means_C_n, none, none, scales_C_n)


def mopps_beliefs(state: State, indices: IntArray | None = None) -> tuple[FloatArray, FloatArray]:
    """Parameters of the MoPPS belief Beta(1 + S, 1 + F), nothing shared, nothing discounted (arXiv 2507.04632), [n]."""
    rows = slice(0, state.n_prompts) if indices is None else indices
    memory = MEMORIES.index(1.0)
    return 1.0 + state.successes_L_N[memory, rows].astype(float), 1.0 + state.failures_L_N[memory, rows].astype(float)


PAPER = "paper"
"""Name of the published model's predictions among a snapshot's."""


def paper_beliefs(state: State, pool: Pool, indices: IntArray | None = None) -> tuple[FloatArray, FloatArray]:
    """Parameters of the published model's belief, [n]; flat before its first fit. Own evidence has no part in it."""
    rows = slice(0, state.n_prompts) if indices is None else indices
    n = state.n_prompts if indices is None else len(indices)
    prior = pool.fitted(state.model_version).get(PAPER)
    return new_paper_beliefs(n, {PAPER: _rows(prior, state.n_prompts, rows)} if prior is not None else {})


def new_paper_beliefs(n: int, fitted: Mapping[str, FittedPrior]) -> tuple[FloatArray, FloatArray]:
    """The same about n prompts whose predictions are given."""
    if PAPER not in fitted:
        return np.ones(n), np.ones(n)
    prior = fitted[PAPER]
    # A rate that was rounded to 0 or 1 would leave no Beta.
    means_n = np.clip(np.nan_to_num(prior.means_N.astype(np.float64), nan=0.5), 1e-3, 1.0 - 1e-3)
    return means_n * prior.concentrations_N, (1.0 - means_n) * prior.concentrations_N


def _priors_of(
    state: State, pool: Pool, rows: IntArray | slice, x_n_d: FloatArray | None, wanted: BoolArray
) -> tuple[FloatArray, FloatArray]:
    """Of these prompts of the pool, whose features are x, under the state's snapshot."""
    fitted = {name: _rows(prior, state.n_prompts, rows) for name, prior in _mixed(state, pool).items()}
    return shared_priors(state, x_n_d, pool.prior_rates(state.n_prompts)[rows], fitted, wanted)


def _mixed(state: State, pool: Pool) -> Mapping[str, FittedPrior]:
    """The snapshot's priors that take part in the mixture."""
    return {name: prior for name, prior in pool.fitted(state.model_version).items() if name in FITTED}


def _rows(prior: FittedPrior, n_prompts: int, rows: IntArray | slice) -> FittedPrior:
    """The prior of these prompts, NaN for those that are newer than it."""
    newer = n_prompts - len(prior.means_N)
    if newer > 0:
        prior = FittedPrior(
            np.pad(prior.means_N, (0, newer), constant_values=np.nan),
            np.pad(prior.concentrations_N, (0, newer), constant_values=1.0),
        )
    return FittedPrior(prior.means_N[rows], prior.concentrations_N[rows])


def _own(state: State, rows: IntArray | slice) -> tuple[FloatArray, FloatArray]:
    """Own evidence as it counts at the head step, float32 [L, n] each."""
    own, lost = state.successes_L_N[:, rows].copy(), state.failures_L_N[:, rows].copy()
    keep = _aged(state, np.maximum(state.head_step - state.last_step_N[rows], 0))[_AGED]
    own[_AGED] *= keep
    lost[_AGED] *= keep
    return own, lost


def _aged(state: State, steps_n: IntArray) -> FloatArray:
    """What evidence is multiplied with that many steps later under each memory, float32 [L, n]."""
    advances_n = (steps_n / state.advance_steps).astype(np.float32)
    keep_L_n = np.ones((len(AGEING), len(steps_n)), dtype=np.float32)
    keep_L_n[_AGED] = np.exp(np.log(_AGEING_L[_AGED, None]).astype(np.float32) * advances_n)
    return keep_L_n


def _known(state: State, prompts: IntArray) -> None:
    unknown = prompts[(prompts < 0) | (prompts >= state.n_prompts)]
    if len(unknown):
        raise ValueError(f"a log entry names prompt {int(unknown[0])}, the pool has {state.n_prompts}")


def _grow(state: State, n_prompts: int) -> None:
    more = n_prompts - state.n_prompts
    state.successes_L_N = np.pad(state.successes_L_N, ((0, 0), (0, more)))
    state.failures_L_N = np.pad(state.failures_L_N, ((0, 0), (0, more)))
    state.attempts_N = np.pad(state.attempts_N, (0, more))
    state.visits_N = np.pad(state.visits_N, (0, more))
    state.selected_N = np.pad(state.selected_N, (0, more))
    state.last_step_N = np.pad(state.last_step_N, (0, more), constant_values=-1)
    state.last_selected_N = np.pad(state.last_selected_N, (0, more), constant_values=-1)
    state.n_prompts = n_prompts


def _select(state: State, entry: SelectEntry) -> None:
    state.selected_N[entry.prompts] += 1
    state.last_selected_N[entry.prompts] = np.maximum(state.last_selected_N[entry.prompts], entry.step)
    state.recent_batches = (*state.recent_batches, entry.prompts)[-RECENT_BATCHES:]


def _observe(state: State, entry: ObserveEntry, pool: Pool) -> None:
    prompts, position = np.unique(entry.prompts, return_inverse=True)
    k, counts = np.zeros(len(prompts)), np.zeros(len(prompts))
    np.add.at(k, position, entry.successes)
    np.add.at(counts, position, entry.attempts)
    if entry.step > state.head_step:
        if state.head_step >= 0:
            _forget(state)
            state.n_advances += 1
            state.advance_steps += (entry.step - state.head_step - state.advance_steps) / state.n_advances
        state.head_step = entry.step

    x = pool.rows(state.basis, prompts) if state.basis is not None else None
    here = state.mixture.present()
    means_C_n, scales_C_n = _priors_of(state, pool, prompts, x, here)
    own, lost = _own(state, prompts)
    likelihoods = np.zeros(state.mixture.log_weights.shape)
    likelihoods[here] = beliefs.batch_log_likelihoods(means_C_n[here], own, lost, k, counts, scales_C_n[here])
    ours, mopps = state.mixture.update(likelihoods)
    state.log_likelihood += ours
    state.mopps_log_likelihood += mopps

    before = _MEMORIES_L[_SHORTEST] * (own[_SHORTEST] + lost[_SHORTEST])
    _remember(state, entry.step, prompts, k, counts)
    worth = effective_count(counts)
    state.running_successes += float(worth @ (k / counts))
    state.running_counts += float(worth.sum())
    snapshot = {name: _rows(prior, state.n_prompts, prompts) for name, prior in _mixed(state, pool).items()}
    if x is not None and state.stack is not None and _stackable(snapshot):
        inputs = _log_odds(state, x, snapshot)
        known = np.isfinite(inputs).all(axis=1)
        if known.any():
            # A prompt is chosen again for what its own outcomes showed: repeats must not stand for all prompts.
            state.stack.update(inputs[known], k[known], counts[known], further_count(counts, before)[known])
    if x is not None and state.basis is not None and state.surface is not None:
        state.surface.update(x[:, : state.basis.n_surface], k, counts)
        if state.embedding is not None:
            state.embedding.update(x, k, counts)
    state.n_observations += len(entry.prompts)


def _forget(state: State) -> None:
    """A new policy: what older ones showed counts a little less. Once per advance of the head step."""
    state.mixture.forget()
    state.running_successes *= REGRESSION_KEEP
    state.running_counts *= REGRESSION_KEEP
    for regression in (state.surface, state.embedding, state.stack):
        if regression is not None:
            regression.forget(REGRESSION_KEEP)


def _remember(state: State, step: int, prompts: IntArray, k: FloatArray, counts: FloatArray) -> None:
    """Own evidence, discounted per visit and by age. Reports of one step are one visit; a late one enters discounted.

    S <- l r^age S + k for a newer step, S <- S + k for the same step, S <- S + l^(age / mean gap) r^age k for an older
    one, with l of `MEMORIES`, r of `AGEING` and r's ages in mean advances of the head step.
    """
    last = state.last_step_N[prompts]
    newer, seen = step > last, last >= 0
    gaps = (step - last)[newer & seen]
    if len(gaps):
        state.n_gaps += len(gaps)
        state.gap_steps += float((gaps - state.gap_steps).sum()) / state.n_gaps
    ages = np.where(newer, 0.0, (last - step) / max(state.gap_steps, 1.0))
    aged_L_n = _aged(state, np.abs(step - last))
    old_L_n = np.where(newer & seen, _MEMORIES_L[:, None] * aged_L_n, 1.0)
    new_L_n = _MEMORIES_L[:, None] ** ages * np.where(newer, 1.0, aged_L_n)
    state.successes_L_N[:, prompts] = old_L_n * state.successes_L_N[:, prompts] + new_L_n * k
    state.failures_L_N[:, prompts] = old_L_n * state.failures_L_N[:, prompts] + new_L_n * (counts - k)
    state.attempts_N[prompts] += counts
    state.visits_N[prompts] += newer
    state.last_step_N[prompts] = np.maximum(last, step)


def _ensure_basis(state: State, pool: Pool) -> None:
    """Derive the basis from the first prompts, and again while a small pool keeps growing.

    What the regressions have learned is carried over to the new features.
    """
    basis = state.basis
    if basis is not None and (basis.n_prompts >= BASIS_ENOUGH or state.n_prompts < BASIS_GROWTH * basis.n_prompts):
        return
    fresh = Basis.of(pool.raw(0, state.n_prompts))
    surface = OnlineLogistic.new(fresh.n_surface)
    embedding = OnlineLogistic.new(fresh.width) if fresh.width > fresh.n_surface else None
    if basis is not None and state.surface is not None:
        block = pool.raw(0, min(state.n_prompts, BASIS_ENOUGH))
        old_x, new_x = basis.project(block), fresh.project(block)
        surface.adopt(state.surface, old_x[:, : basis.n_surface], new_x[:, : fresh.n_surface])
        if embedding is not None and state.embedding is not None:
            embedding.adopt(state.embedding, old_x, new_x)
    state.basis, state.surface, state.embedding = fresh, surface, embedding


def _admit(state: State, pool: Pool) -> None:
    """Let the priors that have something to say since take part in the mixture."""
    absent = set(FITTED) - set(_mixed(state, pool))
    if state.stack is None:
        absent.add(STACKED)
    if state.embedding is None:
        absent.add("embedding")
    if not np.isfinite(pool.prior_rates(state.n_prompts)).any():
        absent.add("caller")
    state.mixture.admit(present(*absent))


def present(*absent: str) -> BoolArray:
    """Which of `PRIORS` take part, bool [C]: all but these."""
    return np.array([prior not in absent for prior in PRIORS])
