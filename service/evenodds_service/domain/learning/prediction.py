"""What a run's state says of prompts: shared priors, own evidence as it counts now, and the beliefs that follow.

Reads a state and never changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning import mixture
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.mixture import AGEING, FITTED, MATCHED, MEMORIES, PRIORS, RUNS, STACKED, Experts
from evenodds_service.domain.learning.regression import OnlineLogistic
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.prompts import FittedPrior, NamedRates

BLOCK = 16_384
"""Prompts whose beliefs are computed together: their arrays stay in the processor's cache."""

_AGEING_L = np.asarray(AGEING)
_LOG_AGEING_L = exact.log(_AGEING_L).astype(np.float32)
_AGED = np.flatnonzero(_AGEING_L < 1.0)
_FEW = 1_024


def shared_priors(
    state: State,
    x_n_d: FloatArray | None,
    prior_rates_n: FloatArray,
    fitted: Mapping[str, FittedPrior],
    wanted: BoolArray,
    rows: IntArray | slice | None = None,
    known_n_c: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """What each shared prior says about n prompts. Longer than other functions: a third is about what goes in.

    Here alone is decided which of the snapshot's priors are read: those asked for, and all that the stack reads where
    it is asked for, though alone they may have lost their weight.

    Args:
        x_n_d: Projected features under the state's basis; None where it has none yet.
        prior_rates_n: The caller's rates, NaN where there is none (the running mean stands in).
        fitted: The snapshot's priors; NaN means where a prompt is newer than the snapshot (the online regression
            stands in).
        wanted: Which priors are asked for, bool [C]; the means of others may be left at the running mean.
        rows: Which of the prompts that `fitted` speaks of these n are; without it they are the same ones.
        known_n_c: What others showed, as inputs of `runs`; rows of NaN where nothing is known (the online regression
            stands in). None: nothing of any.

    Returns:
        Mean success rates [C, n] in (0, 1); what each prior's strengths are multiplied with, [C, n]; and the stack's
        inputs (`_log_odds`), None where it has no say.
    """
    n = len(prior_rates_n)
    means_C_n = np.full((len(PRIORS), n), running_mean(state), dtype=np.float32)
    scales_C_n = np.ones((len(PRIORS), n), dtype=np.float32)
    means_C_n[PRIORS.index("flat")] = 0.5
    known = np.isfinite(prior_rates_n)
    means_C_n[PRIORS.index("caller"), known] = prior_rates_n[known]
    if x_n_d is None or state.basis is None or state.surface is None:
        return means_C_n, scales_C_n, None
    stack = state.stack if wanted[PRIORS.index(STACKED)] and _stackable(fitted) else None
    read = [name for name in FITTED if name in fitted and (wanted[PRIORS.index(name)] or stack is not None)]
    priors = {name: rows_of(fitted[name], slice(0, n) if rows is None else rows) for name in read}
    newer = any(np.isnan(prior.means_N).any() for prior in priors.values())
    runs = state.runs if wanted[PRIORS.index(RUNS)] or stack is not None else None
    told = np.zeros(n, dtype=np.bool_) if runs is None or known_n_c is None else np.isfinite(known_n_c[:, 0])
    newer |= bool(wanted[PRIORS.index(RUNS)] or runs is not None) and not told.all()
    stand_in = PRIORS.index("embedding" if state.embedding is not None else "surface")
    if wanted[PRIORS.index("surface")] or (newer and state.embedding is None):
        means_C_n[PRIORS.index("surface")] = state.surface.predict(x_n_d[:, : state.basis.n_surface])
    if state.quick is not None and wanted[PRIORS.index("quick")]:
        means_C_n[PRIORS.index("quick")] = state.quick.predict(x_n_d[:, : state.basis.n_surface])
    if state.embedding is not None and (wanted[PRIORS.index("embedding")] or newer):
        means_C_n[PRIORS.index("embedding")] = state.embedding.predict(x_n_d)
    if wanted[PRIORS.index(RUNS)] or runs is not None:
        means_C_n[PRIORS.index(RUNS)] = means_C_n[stand_in]
    if runs is not None and known_n_c is not None and told.any():
        means_C_n[PRIORS.index(RUNS), told] = runs.predict(known_n_c[told])
    for name, prior in priors.items():
        c, known = PRIORS.index(name), np.isfinite(prior.means_N)
        means_C_n[c] = np.where(known, prior.means_N, means_C_n[stand_in])
        scales_C_n[c] = np.where(known, prior.concentrations_N / MATCHED, 1.0)
    if stack is None:
        return means_C_n, scales_C_n, None
    inputs = _log_odds(state, stack, x_n_d, priors, known_n_c)
    c, stacked = PRIORS.index(STACKED), stack.mode(inputs)
    known = np.isfinite(stacked)
    means_C_n[c] = np.where(known, stacked, means_C_n[stand_in])
    one, other = (priors[name].concentrations_N for name in FITTED)
    scales_C_n[c] = np.where(known, np.sqrt(one * other) / MATCHED, 1.0)
    return means_C_n, scales_C_n, inputs


def _stackable(fitted: Mapping[str, FittedPrior]) -> bool:
    return all(name in fitted for name in FITTED)


def _log_odds(
    state: State,
    stack: OnlineLogistic,
    x_n_d: FloatArray,
    fitted: Mapping[str, FittedPrior],
    known_n_c: FloatArray | None,
) -> FloatArray:
    """Inputs of the stack, float32: 1, log-odds of the online regression, of the fitted priors and, if read, of `runs`.

    NaN for prompts that are newer than the snapshot. Where others have shown nothing, `runs` says what the rest says on
    average.
    """
    online = state.embedding or state.surface
    assert online is not None  # there are features, so there are regressions
    means = np.clip(np.stack([fitted[name].means_N for name in FITTED], axis=1), 1e-3, 1.0 - 1e-3)
    inputs = np.ones((len(means), len(stack.weights)), dtype=np.float32)
    inputs[:, 1] = online.log_odds(x_n_d[:, : len(online.weights)])
    inputs[:, 2 : 2 + len(FITTED)] = exact.log_odds(means)
    if len(stack.weights) > 2 + len(FITTED):
        inputs[:, -1] = inputs[:, 1:-1].sum(axis=1) / np.float32(1 + len(FITTED))
        if state.runs is not None and known_n_c is not None:
            told = np.isfinite(known_n_c[:, 0])
            inputs[told, -1] = state.runs.log_odds(known_n_c[told])
    return inputs


def running_mean(state: State) -> float:
    """Mean rate of all observed prompts, older ones counting less; .5 before the first."""
    return (state.running_successes + 1.0) / (state.running_counts + 2.0)


EachBlock = Callable[[Callable[[slice], None], Iterable[slice]], Iterable[None]]
"""Calls a function for each of some blocks, as `map` does; an executor's map spreads them over threads."""


def in_blocks(n: int) -> list[slice]:
    """The blocks of n prompts."""
    return [slice(first, min(first + BLOCK, n)) for first in range(0, n, BLOCK)]


def beliefs_of(
    state: State,
    pool: Pool,
    indices: IntArray | None = None,
    *,
    steps_n: IntArray | None = None,
    each_block: EachBlock = map,
) -> tuple[FloatArray, FloatArray]:
    """Parameters (a, b) of the `gps` belief about these prompts, or about all, float64 [n].

    Args:
        steps_n: The policy's step that each belief is for, the head step without it: a prompt's own evidence has aged
            by then. At a step before its newest outcome it counts in full: what came later is not taken out again, and
            the shared priors are those of the head in any case.
    """
    n = state.n_prompts if indices is None else len(indices)
    weights = state.mixture.kept()
    wanted = np.asarray(weights.any(axis=(1, 2)))
    a_n, b_n = np.empty(n), np.empty(n)

    def compute(block: slice) -> None:
        rows = block if indices is None else indices[block]
        inputs = _inputs(state, pool, rows, state.head_step if steps_n is None else steps_n[block], wanted)
        a_n[block], b_n[block] = mixture.predict(weights, *inputs)

    for _ in each_block(compute, in_blocks(n)):
        pass
    return a_n, b_n


def mixed_beliefs_of(
    state: State, pool: Pool, indices: IntArray, *, steps_n: IntArray | None = None
) -> tuple[FloatArray, FloatArray, Callable[[], Experts]]:
    """As `beliefs_of`, and a call that tells the experts whose mixture (a, b) sum up: few ask for them."""
    weights = state.mixture.kept()
    inputs = _inputs(
        state, pool, indices, state.head_step if steps_n is None else steps_n, np.asarray(weights.any(axis=(1, 2)))
    )
    return *mixture.predict(weights, *inputs), partial(mixture.experts, weights, *inputs)


def _inputs(
    state: State, pool: Pool, rows: IntArray | slice, steps: int | IntArray, wanted: BoolArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray | None]:
    """What `mixture.predict` asks for about these prompts of the pool."""
    x = pool.rows(state.basis, rows) if state.basis is not None else None
    means_C_n, scales_C_n, _ = _priors_of(state, pool, rows, x, wanted)
    return (means_C_n, *_own(state, rows, steps), scales_C_n)


def new_prompt_beliefs(
    state: State,
    x_n_d: FloatArray | None,
    told: NamedRates,
    fitted: Mapping[str, FittedPrior],
    shown_n_S: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray, Callable[[], Experts]]:
    """The `gps` belief about prompts outside the pool, as `mixed_beliefs_of`.

    Args:
        x_n_d: As in `shared_priors`.
        told: What others showed, the one behind `prior_rate` first.
        fitted: What the state's snapshot says about them.
        shown_n_S: What it says that the runs would show that are learned from, where there are any.
    """
    weights = state.mixture.kept()
    wanted = np.asarray(weights.any(axis=(1, 2)))
    known = state.columns.project(told, shown_n_S) if state.columns is not None else None
    means_C_n, scales_C_n, _ = shared_priors(state, x_n_d, told.rates_N_R[:, 0], fitted, wanted, known_n_c=known)
    none = np.zeros((len(MEMORIES), len(told.rates_N_R)), dtype=np.float32)
    inputs = (means_C_n, none, none, scales_C_n)
    return *mixture.predict(weights, *inputs), partial(mixture.experts, weights, *inputs)


def _priors_of(
    state: State, pool: Pool, rows: IntArray | slice, x_n_d: FloatArray | None, wanted: BoolArray
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """`shared_priors` of these prompts of the pool, whose features are x, under the state's snapshot."""
    known = pool.known(state.columns, rows) if state.columns is not None else None
    rates_n = pool.prior_rates(state.n_prompts)[rows]
    return shared_priors(state, x_n_d, rates_n, _mixed(state, pool), wanted, rows, known)


def _mixed(state: State, pool: Pool) -> Mapping[str, FittedPrior]:
    """The snapshot's priors that take part in the mixture."""
    return {name: prior for name, prior in pool.fitted(state.model_version).items() if name in FITTED}


def rows_of(prior: FittedPrior, rows: IntArray | slice) -> FittedPrior:
    """The prior of these prompts, NaN for those that are newer than it."""
    known = len(prior.means_N)
    indices = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    newer = indices >= known
    if not newer.any():
        return FittedPrior(prior.means_N[rows], prior.concentrations_N[rows])
    means_n = np.full(len(indices), np.nan, dtype=np.float32)
    concentrations_n = np.ones(len(indices), dtype=np.float32)
    means_n[~newer] = prior.means_N[indices[~newer]]
    concentrations_n[~newer] = prior.concentrations_N[indices[~newer]]
    return FittedPrior(means_n, concentrations_n)


def _own(state: State, rows: IntArray | slice, step: int | IntArray) -> tuple[FloatArray, FloatArray]:
    """Own evidence as it counts at this step, or at these [n], float32 [L, n] each."""
    last_n = state.last_step_N[rows]
    seen = np.flatnonzero(last_n >= 0) if len(last_n) > _FEW else np.arange(len(last_n))
    if 2 * len(seen) < len(last_n):  # most of a large pool is as it came: no evidence that could age
        own, lost = (np.zeros((len(MEMORIES), len(last_n)), dtype=np.float32) for _ in range(2))
        places = seen + rows.start if isinstance(rows, slice) else rows[seen]
        own[:, seen], lost[:, seen] = _own(state, places, step if isinstance(step, int) else step[seen])
        return own, lost
    own, lost = state.successes_L_N[:, rows].copy(), state.failures_L_N[:, rows].copy()
    keep = _aged(state, np.maximum(step - last_n, 0))[_AGED]
    own[_AGED] *= keep
    lost[_AGED] *= keep
    return own, lost


def _aged(state: State, steps_n: IntArray) -> FloatArray:
    """What evidence is multiplied with that many steps later under each memory, float32 [L, n]."""
    advances_n = (steps_n / state.advance_steps).astype(np.float32)
    keep_L_n = np.ones((len(AGEING), len(steps_n)), dtype=np.float32)
    keep_L_n[_AGED] = exact.exp(_LOG_AGEING_L[_AGED, None] * advances_n)
    return keep_L_n
