"""What a run has learned by streaming, as a fold over its log: `state = fold(state, entry, pool)`.

The fold is a deterministic function of the entries and the pool's features. It updates the state in place, because a
state of a million prompts is too large to copy per call; the owner of a state serialises access. Time runs in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain.learning import mixture
from evenodds_service.domain.learning.features import Basis, Pool, ScalarT
from evenodds_service.domain.learning.guardrails import Rails
from evenodds_service.domain.learning.mixture import AGEING, FITTED, MATCHED, MEMORIES, PRIORS, STACKED, Mixture
from evenodds_service.domain.learning.regression import OnlineLogistic, effective_count, further_count
from evenodds_service.domain.learning.tallies import Record
from evenodds_service.domain.settings import (
    BoolArray,
    Entry,
    FittedPrior,
    FloatArray,
    IntArray,
    ObserveEntry,
    PoolEntry,
    SelectEntry,
    SnapshotEntry,
)

REGRESSION_KEEP = 0.98
RECENT_BATCHES = 2
BASIS_GROWTH, BASIS_ENOUGH = 4, 4_096
BLOCK = 16_384
"""Prompts whose beliefs are computed together: their arrays stay in the processor's cache."""

LOOKED_AT = 2_048
"""Prompts, spread evenly over the pool, from whose beliefs the record keeps how those moved."""

_FEW = 64
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
        selected_N, last_selected_N: How often and at which step a prompt was last chosen (-1: never). A choice whose
            outcome never came counts no more once the prompt is chosen again.
        outstanding_step_N: The newest step for which a prompt was chosen without an outcome yet (-1: none).
        running_successes, running_counts: The discounted outcomes of all prompts.
        gap_steps, n_gaps: Mean number of steps between two visits of one prompt, over n_gaps visits.
        advance_steps, n_advances: Mean advance of the head step, over n_advances: the unit of ageing.
        log_likelihood, mopps_log_likelihood: Of all observations, before each was folded in.
        record, rails: What the report is made of, and what alarms and the fallback are read from.
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
    outstanding_step_N: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    running_successes: float = 0.0
    running_counts: float = 0.0
    gap_steps: float = 1.0
    n_gaps: int = 0
    advance_steps: float = 1.0
    n_advances: int = 0
    recent_batches: tuple[IntArray, ...] = ()
    log_likelihood: float = 0.0
    mopps_log_likelihood: float = 0.0
    record: Record = field(default_factory=Record)
    rails: Rails = field(default_factory=Rails)


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
        _select(state, entry, pool)
    elif isinstance(entry, SnapshotEntry):
        state.model_version = entry.version
        if state.stack is None and _stackable(_mixed(state, pool)):
            state.stack = OnlineLogistic.averaging(1 + len(FITTED))
        _admit(state, pool)
    state.position = entry.position
    return state


def copied(state: State) -> State:
    """A state of one's own for reading at length, while the other is folded on.

    What is learned (arrays, the mixture, the regressions) is copied, values that are not updated in place are shared.
    """
    values = {each.name: getattr(state, each.name) for each in fields(state)}
    return State(**{name: _copied(value) for name, value in values.items()})


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray | OnlineLogistic):
        return value.copy()
    return Mixture(value.log_weights.copy(), value.log_guard) if isinstance(value, Mixture) else value


def shared_priors(
    state: State,
    x_n_d: FloatArray | None,
    prior_rates_n: FloatArray,
    fitted: Mapping[str, FittedPrior],
    wanted: BoolArray,
    rows: IntArray | slice | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """What each shared prior says about n prompts.

    Here alone is decided which of the snapshot's priors are read: those asked for, and all that the stack reads where
    it is asked for, though alone they may have lost their weight.

    Args:
        x_n_d: Projected features under the state's basis; None where it has none yet.
        prior_rates_n: The caller's rates, NaN where there is none (the running mean stands in).
        fitted: The snapshot's priors; NaN means where a prompt is newer than the snapshot (the online regression
            stands in).
        wanted: Which priors are asked for, bool [C]; the means of others may be left at the running mean.
        rows: Which of the prompts that `fitted` speaks of these n are; without it they are the same ones.

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
    priors = {name: _rows(fitted[name], slice(0, n) if rows is None else rows) for name in read}
    newer = any(np.isnan(prior.means_N).any() for prior in priors.values())
    stand_in = PRIORS.index("embedding" if state.embedding is not None else "surface")
    if wanted[PRIORS.index("surface")] or (newer and state.embedding is None):
        means_C_n[PRIORS.index("surface")] = state.surface.predict(x_n_d[:, : state.basis.n_surface])
    if state.embedding is not None and (wanted[PRIORS.index("embedding")] or newer):
        means_C_n[PRIORS.index("embedding")] = state.embedding.predict(x_n_d)
    for name, prior in priors.items():
        c, known = PRIORS.index(name), np.isfinite(prior.means_N)
        means_C_n[c] = np.where(known, prior.means_N, means_C_n[stand_in])
        scales_C_n[c] = np.where(known, prior.concentrations_N / MATCHED, 1.0)
    if stack is None:
        return means_C_n, scales_C_n, None
    inputs = _log_odds(state, x_n_d, priors)
    c, stacked = PRIORS.index(STACKED), stack.mode(inputs)
    known = np.isfinite(stacked)
    means_C_n[c] = np.where(known, stacked, means_C_n[stand_in])
    product = np.multiply.reduce([priors[name].concentrations_N for name in FITTED])
    scales_C_n[c] = np.where(known, product ** (1 / len(FITTED)) / MATCHED, 1.0)
    return means_C_n, scales_C_n, inputs


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


EachBlock = Callable[[Callable[[slice], None], Iterable[slice]], Iterable[None]]
"""Calls a function for each of some blocks, as `map` does; an executor's map spreads them over threads."""


def in_blocks(n: int) -> list[slice]:
    """The blocks of n prompts, always the same ones: rounding may depend on them."""
    return [slice(first, min(first + BLOCK, n)) for first in range(0, n, BLOCK)]


def beliefs_of(
    state: State, pool: Pool, indices: IntArray | None = None, *, each_block: EachBlock = map
) -> tuple[FloatArray, FloatArray]:
    """Parameters (a, b) of the `gps` belief about these prompts, or about all, float64 [n]."""
    n = state.n_prompts if indices is None else len(indices)
    weights = state.mixture.kept()
    wanted = np.asarray(weights.any(axis=(1, 2)))
    a_n, b_n = np.empty(n), np.empty(n)

    def compute(block: slice) -> None:
        rows = block if indices is None else indices[block]
        x = pool.rows(state.basis, rows) if state.basis is not None else None
        means_C_n, scales_C_n, _ = _priors_of(state, pool, rows, x, wanted)
        own, lost = _own(state, rows)
        predict = mixture.predict if n > _FEW else mixture.predict_rows
        a_n[block], b_n[block] = predict(weights, means_C_n, own, lost, scales_C_n)

    for _ in each_block(compute, in_blocks(n)):
        pass
    return a_n, b_n


def new_prompt_beliefs(state: State, outside: Pool, fitted: Mapping[str, FittedPrior]) -> tuple[FloatArray, FloatArray]:
    """Parameters (a, b) of the `gps` belief about prompts outside the pool, given as a pool of their own, [n].

    Args:
        fitted: What the state's snapshot says about them.
    """
    x = state.basis.project_apart(outside.raw(0, outside.n)) if state.basis is not None else None
    weights = state.mixture.kept()
    wanted = np.asarray(weights.any(axis=(1, 2)))
    means_C_n, scales_C_n, _ = shared_priors(state, x, outside.prior_rates(outside.n), fitted, wanted)
    none = np.zeros((len(MEMORIES), outside.n), dtype=np.float32)
    return mixture.predict(weights, means_C_n, none, none, scales_C_n)


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
    return new_paper_beliefs(n, {PAPER: _rows(prior, rows)} if prior is not None else {})


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
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """`shared_priors` of these prompts of the pool, whose features are x, under the state's snapshot."""
    return shared_priors(state, x_n_d, pool.prior_rates(state.n_prompts)[rows], _mixed(state, pool), wanted, rows)


def _mixed(state: State, pool: Pool) -> Mapping[str, FittedPrior]:
    """The snapshot's priors that take part in the mixture."""
    return {name: prior for name, prior in pool.fitted(state.model_version).items() if name in FITTED}


def _rows(prior: FittedPrior, rows: IntArray | slice) -> FittedPrior:
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
    for name in ("successes_L_N", "failures_L_N", "attempts_N", "visits_N", "selected_N"):
        setattr(state, name, _grown(getattr(state, name), n_prompts, fill=0))
    for name in ("last_step_N", "last_selected_N", "outstanding_step_N"):
        setattr(state, name, _grown(getattr(state, name), n_prompts, fill=-1))
    state.n_prompts = n_prompts


def _grown(array: NDArray[ScalarT], n: int, *, fill: int) -> NDArray[ScalarT]:
    """The array with n columns, new ones filled: in the room that was left the last time, else with some to spare.

    A million prompts come in hundreds of entries, and not each of them should copy all that came before.
    """
    old, room = array.shape[-1], array.base
    if room is None or not _has_room(room, array, n, fill):
        room = np.full((*array.shape[:-1], n + n // 4), fill, dtype=array.dtype)
        room[..., :old] = array
    grown: NDArray[ScalarT] = room[..., :n]
    return grown


def _has_room(room: NDArray[Any], array: NDArray[Any], n: int, fill: int) -> bool:
    """Whether the array is the first part of this one, which has n columns at least, unused ones behind it."""
    return (
        (room.dtype, room.shape[:-1]) == (array.dtype, array.shape[:-1])
        and room.ctypes.data == array.ctypes.data
        and room.shape[-1] >= n
        and bool((room[..., array.shape[-1] : n] == fill).all())
    )


def _select(state: State, entry: SelectEntry, pool: Pool) -> None:
    fresh_B, groups_B = ~_is_tried(state, entry.prompts), pool.group_codes(entry.prompts)
    state.record.select(entry, fresh_B, groups_B)
    state.rails.select(entry.step, fresh_B, groups_B)
    outstanding = state.outstanding_step_N[entry.prompts]
    state.selected_N[entry.prompts] += outstanding < 0
    state.outstanding_step_N[entry.prompts] = np.maximum(outstanding, entry.step)
    state.last_selected_N[entry.prompts] = np.maximum(state.last_selected_N[entry.prompts], entry.step)
    state.recent_batches = (*state.recent_batches, entry.prompts)[-RECENT_BATCHES:]


def unseen_share(state: State) -> float:
    """Share of the pool that was never chosen or observed; 0 for an empty one."""
    return float((~_is_tried(state, slice(0, state.n_prompts))).mean()) if state.n_prompts else 0.0


def _is_tried(state: State, rows: IntArray | slice) -> BoolArray:
    """Which of these prompts were chosen or observed before."""
    return np.asarray((state.selected_N[rows] > 0) | (state.visits_N[rows] > 0))


def _observe(state: State, entry: ObserveEntry, pool: Pool) -> None:
    prompts, position = np.unique(entry.prompts, return_inverse=True)
    k, counts = np.zeros(len(prompts)), np.zeros(len(prompts))
    np.add.at(k, position, entry.successes)
    np.add.at(counts, position, entry.attempts)
    informative = _is_informative(entry, position, len(prompts))
    if entry.step > state.head_step:
        state.record.look(entry.step, lambda: _sampled_rates(state, pool))
        if state.head_step >= 0:
            _forget(state)
            state.n_advances += 1
            state.advance_steps += (entry.step - state.head_step - state.advance_steps) / state.n_advances
        state.head_step = entry.step

    x = pool.rows(state.basis, prompts) if state.basis is not None else None
    here = state.mixture.present()
    means_C_n, scales_C_n, stack_inputs = _priors_of(state, pool, prompts, x, here)
    own, lost = _own(state, prompts)

    def forecast_of(rows: IntArray) -> tuple[FloatArray, FloatArray]:
        believe = mixture.predict_rows if len(rows) <= mixture.FEW else mixture.predict
        weights = state.mixture.kept()
        return believe(weights, means_C_n[:, rows], own[:, rows], lost[:, rows], scales_C_n[:, rows])

    groups = pool.group_codes(prompts)
    informative = state.record.observe(
        entry.step, entry.selection_id, prompts, k, counts, informative, groups, forecast_of
    )
    state.rails.observe(entry.step, counts, informative, groups)

    likelihoods = np.zeros(state.mixture.log_weights.shape)
    likelihoods[here] = mixture.batch_log_likelihoods(means_C_n[here], own, lost, k, counts, scales_C_n[here])
    log_guard = state.mixture.log_guard
    ours, mopps = state.mixture.update(likelihoods)
    skill = log_guard - state.mixture.log_guard  # of the mixture without its guard
    state.record.compare(entry.step, skill, len(prompts))
    state.rails.compare(entry.step, skill, len(prompts))
    state.log_likelihood += ours
    state.mopps_log_likelihood += mopps

    before = _MEMORIES_L[_SHORTEST] * (own[_SHORTEST] + lost[_SHORTEST])
    arrived = _arrive(state, entry.selection_step, prompts)
    _remember(state, entry.step, prompts, k, counts, arrived)
    worth = effective_count(counts)
    state.running_successes += float(worth @ (k / counts))
    state.running_counts += float(worth.sum())
    if state.stack is not None and stack_inputs is not None:
        known = np.isfinite(stack_inputs).all(axis=1)
        if known.any():
            # A prompt is chosen again for what its own outcomes showed: repeats must not stand for all prompts.
            state.stack.update(stack_inputs[known], k[known], counts[known], further_count(counts, before)[known])
    if x is not None and state.basis is not None and state.surface is not None:
        state.surface.update(x[:, : state.basis.n_surface], k, counts)
        if state.embedding is not None:
            state.embedding.update(x, k, counts)
    state.n_observations += len(entry.prompts)


def _sampled_rates(state: State, pool: Pool) -> FloatArray:
    """Mean of the `gps` belief about each of at most `LOOKED_AT` prompts."""
    sample = np.unique(np.linspace(0, state.n_prompts - 1, min(state.n_prompts, LOOKED_AT)).astype(np.int64))
    a, b = beliefs_of(state, pool, sample)
    return np.asarray(a / (a + b))


def _is_informative(entry: ObserveEntry, position: IntArray, n: int) -> BoolArray:
    """Whether the attempts on each of the n distinct prompts were not all equal; `position` is each row's prompt."""
    informative = np.zeros(n, dtype=np.bool_)
    np.logical_or.at(informative, position, entry.informative)
    if len(position) > n:
        rates = entry.successes / entry.attempts
        least, most = np.full(n, np.inf), np.full(n, -np.inf)
        np.minimum.at(least, position, rates)
        np.maximum.at(most, position, rates)
        informative |= most - least > 1e-9
    return informative


def _forget(state: State) -> None:
    """A new policy: what older ones showed counts a little less. Once per advance of the head step."""
    state.mixture.forget()
    state.running_successes *= REGRESSION_KEEP
    state.running_counts *= REGRESSION_KEEP
    for regression in (state.surface, state.embedding, state.stack):
        if regression is not None:
            regression.forget(REGRESSION_KEEP)


def _arrive(state: State, selection_step: int | None, prompts: IntArray) -> BoolArray:
    """Wait no more for these prompts, unless they were chosen again after the selection reported on.

    Returns:
        Those that were waited for and are not any more.
    """
    outstanding = state.outstanding_step_N[prompts]
    arrived = outstanding >= 0
    if selection_step is not None:
        arrived &= outstanding <= selection_step
    state.outstanding_step_N[prompts] = np.where(arrived, -1, outstanding)
    return arrived


def _remember(
    state: State, step: int, prompts: IntArray, k: FloatArray, counts: FloatArray, arrived: BoolArray
) -> None:
    """Own evidence, discounted per visit and by age. Reports of one step are one visit; a late one enters discounted.

    S <- l r^age S + k for a newer step, S <- S + k for the same step, S <- S + l^(age / mean gap) r^age k for an older
    one, with l of `MEMORIES`, r of `AGEING` and r's ages in mean advances of the head step.

    Args:
        arrived: Which prompts were waited for. An older step is a visit where it was, else a part of one.
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
    state.visits_N[prompts] += newer | (arrived & (step < last))
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
