"""What a run has learned by streaming, as a fold over its log: `state = fold(state, entry, pool)`.

The fold is a deterministic function of the entries and the pool's features. It updates the state in place, because a
state of a million prompts is too large to copy per call; the owner of a state serialises access. Time runs in steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning import mixture
from evenodds_service.domain.learning.features import ENOUGH_PROMPTS, Basis, Pool
from evenodds_service.domain.learning.guardrails import Constant, Guardrails, Misled, Repeats
from evenodds_service.domain.learning.known_rates import (
    FIRST_COMPARISON,
    MOST_COLUMNS,
    RateColumns,
)
from evenodds_service.domain.learning.mixture import FITTED, MEMORIES, PRIORS, RUNS, STACKED
from evenodds_service.domain.learning.prediction import (
    _aged,
    _mixed,
    _own,
    _priors_of,
    _stackable,
    beliefs_of,
    running_mean,
)
from evenodds_service.domain.learning.regression import (
    SLOPE_VARIANCE,
    OnlineLogistic,
    effective_count,
    further_count,
)
from evenodds_service.domain.learning.sequential import Watch
from evenodds_service.domain.learning.state import State, grow, present, rows_of_serials, without
from evenodds_service.domain.learning.tallies import Tallies
from evenodds_service.domain.log_entries import (
    EQUAL_WITHIN,
    Entry,
    ObserveEntry,
    PoolEntry,
    RetireEntry,
    SelectEntry,
    SnapshotEntry,
)

REGRESSION_KEEP = 0.98
QUICK_KEEP = 0.85
"""Of the regression that follows a fast policy: what is older than seven steps counts less than a third."""
CALIBRATION_KEEP = 0.95
RECENT_BATCHES = 2
BASIS_GROWTH = 4
RUNS_SHARE = 0.7
"""Of the stack's weights at its start, where others have shown something."""

OTHERS_JUDGED, OTHERS_LEAST_WEIGHT = 256, 0.2
"""After so many prompts others are said to mislead if they are believed less than this."""

LOOKED_AT = 2_048
"""Prompts, spread evenly over the pool, from whose beliefs the tallies keep how those moved."""

_MEMORIES_L = np.asarray(MEMORIES)
_LOG_MEMORIES_L = exact.log(_MEMORIES_L)
_SHORTEST = MEMORIES.index(min(MEMORIES))


def fold(state: State, entry: Entry, pool: Pool) -> State:
    """Fold the next log entry into the state, in place, and return it.

    Args:
        pool: Holds at least the prompts that the entry speaks of. Those that it retires leave the pool too.

    Raises:
        ValueError: the entry is not the next one, or names a prompt that the pool does not have at this position.
    """
    if entry.position != state.position + 1:
        raise ValueError(f"log entry {entry.position} does not follow position {state.position}")
    if isinstance(entry, PoolEntry):
        grow(state, entry.n_prompts, at=entry.at)
        _look_at_pool(state, pool)
    elif isinstance(entry, ObserveEntry):
        _observe(state, replace(entry, prompts=_rows(state, entry.prompts)), pool)
    elif isinstance(entry, SelectEntry):
        _select(state, replace(entry, prompts=_rows(state, entry.prompts)), pool)
    elif isinstance(entry, RetireEntry):
        kept_N = np.ones(state.n_prompts, dtype=np.bool_)
        kept_N[_rows(state, entry.prompts)] = False
        pool.retire(kept_N)
        state.group_names, state.tellers = pool.group_names, pool.all_tellers
        without(state, kept_N)
    elif isinstance(entry, SnapshotEntry):
        use_snapshot(state, entry.version, pool)
    state.position = entry.position
    return state


def use_snapshot(state: State, version: int, pool: Pool) -> None:
    """Believe from here on what this snapshot says, which the pool has."""
    state.model_version = version
    _take_sources(state, pool)
    if state.stack is None and _stackable(_mixed(state, pool)):
        state.stack = _new_stack(state)
    _admit(state, pool)


def learn_anew(state: State, outcomes: Iterable[ObserveEntry], pool: Pool) -> None:
    """Teach a state that has learned nothing of its pool what is left of its outcomes, in place.

    Report and alarms begin at the state's position.

    Args:
        outcomes: One entry per step, rising. Their positions are not read.
    """
    head_step, n_observations = state.head_step, state.n_observations
    state.head_step = -1
    _look_at_pool(state, pool)
    for entry in outcomes:
        _observe(state, replace(entry, prompts=_rows(state, entry.prompts)), pool)
    state.head_step, state.n_observations = max(state.head_step, head_step), n_observations
    state.tallies, state.guardrails, state.watch = Tallies(), Guardrails(), Watch()
    state.constant, state.repeats = Constant(), Repeats()


def _look_at_pool(state: State, pool: Pool) -> None:
    """Derive what follows from the prompts that are there: features, columns of known rates, priors that take part."""
    _ensure_basis(state, pool)
    _ensure_columns(state, pool)
    _admit(state, pool)


def _rows(state: State, prompts: IntArray) -> IntArray:
    """Where the prompts that an entry names stand in the pool."""
    rows = rows_of_serials(state, prompts)
    if (rows < 0).any():
        had = f" and had {state.n_retired} more" if state.n_retired else ""
        raise ValueError(f"a log entry names prompt {int(prompts[rows < 0][0])}, the pool has {state.n_prompts}{had}")
    return rows


def _select(state: State, entry: SelectEntry, pool: Pool) -> None:
    fresh_B, groups_B = ~_is_tried(state, entry.prompts), pool.group_codes(entry.prompts)
    state.tallies.select(entry, fresh_B, groups_B)
    state.guardrails.select(entry.step, fresh_B, groups_B, entry.unseen_share)
    outstanding = state.outstanding_step_N[entry.prompts]
    state.selected_N[entry.prompts] += outstanding < 0
    state.outstanding_step_N[entry.prompts] = np.maximum(outstanding, entry.step)
    state.last_selected_N[entry.prompts] = np.maximum(state.last_selected_N[entry.prompts], entry.step)
    state.recent_batches = (*state.recent_batches, entry.prompts)[-RECENT_BATCHES:]


def tried_share(state: State) -> float:
    """Share of the pool that was ever chosen or observed; 0 for an empty one."""
    return float(_is_tried(state, slice(0, state.n_prompts)).mean()) if state.n_prompts else 0.0


def unseen_share(state: State, rows: BoolArray | None = None) -> float:
    """Share of these prompts, bool [N], or of the pool, that was never chosen or observed; 0 where there is none."""
    tried = _is_tried(state, slice(0, state.n_prompts) if rows is None else rows)
    return float((~tried).mean()) if len(tried) else 0.0


def _is_tried(state: State, rows: IntArray | BoolArray | slice) -> BoolArray:
    """Which of these prompts were chosen or observed before."""
    return np.asarray((state.selected_N[rows] > 0) | (state.visits_N[rows] > 0))


def _observe(state: State, entry: ObserveEntry, pool: Pool) -> None:
    prompts, position = np.unique(entry.prompts, return_inverse=True)
    k, counts = np.zeros(len(prompts)), np.zeros(len(prompts))
    np.add.at(k, position, entry.successes)
    np.add.at(counts, position, entry.attempts)
    informative = _is_informative(entry, position, len(prompts))
    state.repeats.observe(entry.step, state.head_step, state.last_step_N[prompts] >= entry.step)
    if entry.step > state.head_step:
        state.tallies.look(entry.step, lambda: _sampled_rates(state, pool))
        if state.head_step >= 0:
            _forget(state)
            state.n_advances += 1
            state.advance_steps += (entry.step - state.head_step - state.advance_steps) / state.n_advances
        state.head_step = entry.step

    x = pool.rows(state.basis, prompts) if state.basis is not None else None
    here = state.mixture.present()
    means_C_n, scales_C_n, stack_inputs = _priors_of(state, pool, prompts, x, here)
    own, lost = _own(state, prompts, state.head_step)

    def forecast_of(rows: IntArray) -> tuple[FloatArray, FloatArray]:
        weights = state.mixture.kept()
        return mixture.predict(weights, means_C_n[:, rows], own[:, rows], lost[:, rows], scales_C_n[:, rows])

    groups = pool.group_codes(prompts)
    met = state.tallies.observe(entry.step, entry.selection_id, prompts, k, counts, informative, groups, forecast_of)
    state.found_informative += met.found
    state.foreseen_informative += met.foreseen
    state.guardrails.observe(entry.step, met, groups)
    state.watch.observe(entry.step, met, groups)
    state.constant.observe(entry.step, counts, met)

    likelihoods = np.zeros(state.mixture.log_weights.shape)
    likelihoods[here] = mixture.batch_log_likelihoods(means_C_n[here], own, lost, k, counts, scales_C_n[here])
    if state.runs is not None:
        state.others_nats += state.mixture.gain(likelihoods, _reads_others(state))
        state.others_counts += len(prompts)
    log_guard = state.mixture.log_guard
    state.mixture.update(likelihoods)
    skill = log_guard - state.mixture.log_guard  # of the mixture without its guard
    state.tallies.compare(entry.step, skill, len(prompts))
    state.guardrails.compare(entry.step, skill, len(prompts))

    before = _MEMORIES_L[_SHORTEST] * (own[_SHORTEST] + lost[_SHORTEST])
    arrived = _arrive(state, entry.selection_step, prompts)
    _remember(state, entry.step, prompts, k, counts, arrived)
    state.touched_N[prompts] = np.maximum(state.touched_N[prompts], entry.at)
    worth = effective_count(counts)
    state.running_successes += float((worth * (k / counts)).sum())
    state.running_counts += float(worth.sum())
    if state.stack is not None and stack_inputs is not None:
        known = np.isfinite(stack_inputs).all(axis=1)
        if known.any():
            # A prompt is chosen again for what its own outcomes showed: repeats must not stand for all prompts.
            state.stack.update(stack_inputs[known], k[known], counts[known], further_count(counts, before)[known])
    _update_regressions(state, entry.step, pool, prompts, x, k, counts)
    state.n_observations += len(entry.prompts)


def _update_regressions(
    state: State, step: int, pool: Pool, prompts: IntArray, x: FloatArray | None, k: FloatArray, counts: FloatArray
) -> None:
    """Teach what others showed, and the features, the outcomes of these prompts."""
    if state.columns is not None and state.runs is not None:
        _learn_from_others(state, state.columns, state.runs, pool, prompts, k, counts)
        misleads = state.others_counts >= OTHERS_JUDGED and others_weight(state) < OTHERS_LEAST_WEIGHT
        state.misled_since = (step if state.misled_since < 0 else state.misled_since) if misleads else -1
    if x is not None and state.basis is not None and state.surface is not None:
        state.surface.update(x[:, : state.basis.n_surface], k, counts)
        if state.quick is not None:
            state.quick.update(x[:, : state.basis.n_surface], k, counts)
        if state.embedding is not None:
            state.embedding.update(x, k, counts)


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
        informative |= most - least > EQUAL_WITHIN
    return informative


def _forget(state: State) -> None:
    """A new policy: what older ones showed counts a little less. Once per advance of the head step."""
    state.mixture.forget()
    state.running_successes *= REGRESSION_KEEP
    state.running_counts *= REGRESSION_KEEP
    state.found_informative *= CALIBRATION_KEEP
    state.foreseen_informative *= CALIBRATION_KEEP
    state.closeness_R *= REGRESSION_KEEP
    for regression in (state.surface, state.embedding, state.stack, state.runs):
        if regression is not None:
            regression.forget(REGRESSION_KEEP)
    if state.quick is not None:
        state.quick.forget(QUICK_KEEP)


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
    new_L_n = exact.exp(_LOG_MEMORIES_L[:, None] * ages) * np.where(newer, 1.0, aged_L_n)
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
    if basis is not None and (basis.is_final or state.n_prompts < BASIS_GROWTH * basis.n_prompts):
        return
    fresh = Basis.of(pool.raw(0, state.n_prompts))
    surface, quick = (OnlineLogistic.new(fresh.n_surface) for _ in range(2))
    embedding = OnlineLogistic.new(fresh.width) if fresh.width > fresh.n_surface else None
    if basis is not None and state.surface is not None:
        block = pool.raw(0, min(state.n_prompts, ENOUGH_PROMPTS))
        old_x, new_x = basis.project(block), fresh.project(block)
        surface.adopt(state.surface, old_x[:, : basis.n_surface], new_x[:, : fresh.n_surface])
        if state.quick is not None:
            quick.adopt(state.quick, old_x[:, : basis.n_surface], new_x[:, : fresh.n_surface])
        if embedding is not None and state.embedding is not None:
            embedding.adopt(state.embedding, old_x, new_x)
    state.basis, state.surface, state.quick, state.embedding = fresh, surface, quick, embedding


def _ensure_columns(state: State, pool: Pool) -> None:
    """Derive the columns of the rates that came with the prompts, and again when there are other names or the pool has
    doubled.

    Costs nothing in a pool of which nothing is known.
    """
    columns = state.columns
    names = pool.tellers(state.n_prompts, also_alone=columns is not None and bool(columns.sources))
    if not names or (columns is not None and columns.names == names and state.n_prompts < 2 * columns.n_prompts):
        return
    fresh = RateColumns.of(pool.told(names, slice(0, state.n_prompts)))
    if columns is not None:
        fresh = fresh.keeping(columns).beside(columns.version, pool.sources(columns.version))
    _take(state, pool, fresh)


def _take_sources(state: State, pool: Pool) -> None:
    """Read the columns of other runs that the snapshot has just brought, in place of those of the one before."""
    sources, columns = pool.sources(state.model_version), state.columns
    if sources is None and (columns is None or not columns.sources):
        return
    names = pool.tellers(state.n_prompts, also_alone=sources is not None)
    if sources is None and not names:  # the runs that were learned from are gone, and with them what they showed
        state.columns, state.runs, state.closeness_R, state.n_compared = None, None, np.zeros(0), 0
        state.misled_since = -1
        return
    fresh = columns
    if columns is None or columns.names != names:
        fresh = RateColumns.of(pool.told(names, slice(0, state.n_prompts)))
        fresh = fresh.keeping(columns) if columns is not None else fresh
    assert fresh is not None  # there were columns, or there are now
    _take(state, pool, fresh.beside(state.model_version, sources))


def _take(state: State, pool: Pool, fresh: RateColumns) -> None:
    """Read these columns from here on; of those before them is kept what was learned."""
    columns, names = state.columns, fresh.names
    if columns is None:
        state.columns, state.runs = fresh, fresh.regression()
        state.closeness_R = np.zeros(len(names))
        if state.stack is not None and len(state.stack.weights) < 2 + len(FITTED) + 1:
            state.stack = state.stack.widened()
        return
    if columns.names != names or columns.n_prompts != fresh.n_prompts:
        closeness = dict(zip(columns.names, state.closeness_R.tolist(), strict=True))
        usual = state.closeness_R.sum() / max(len(state.closeness_R), 1)
        state.closeness_R = np.array([closeness.get(name, usual) for name in names])
    _read(state, pool, fresh)


def _read(state: State, pool: Pool, columns: RateColumns) -> None:
    """Read these columns from here on; what was learned on the present ones is carried over."""
    before, runs = state.columns, state.runs
    assert before is not None  # there are columns from the first known rate on, and their regression
    assert runs is not None
    known = pool.known_to(before, state.n_prompts) & pool.known_to(columns, state.n_prompts)
    some = np.flatnonzero(known)[:ENOUGH_PROMPTS]
    state.columns, state.runs = columns, columns.regression()
    has_learned = state.n_observations > 0 or not columns.sources
    if has_learned and len(some):
        state.runs.adopt(runs, pool.inputs(before, some), pool.known(columns, some))


def _learn_from_others(
    state: State,
    columns: RateColumns,
    runs: OnlineLogistic,
    pool: Pool,
    prompts: IntArray,
    k: FloatArray,
    counts: FloatArray,
) -> None:
    """Learn from these outcomes how far this policy is like the others, and, if they are many, like which of them."""
    x = pool.known(columns, prompts)
    told = np.isfinite(x[:, 0])
    if not told.any():
        return
    runs.update(x[told], k[told], counts[told])
    if len(columns.names) <= MOST_COLUMNS:
        return
    log_odds = columns.log_odds(pool.told(columns.names, prompts))
    told = np.asarray(np.isfinite(log_odds).all(axis=1))
    if not told.any():
        return
    closeness_R = columns.foreseen(log_odds[told], k[told], counts[told], running_mean(state))
    state.closeness_R = state.closeness_R + closeness_R
    state.n_compared += int(told.sum())
    if state.n_compared >= max(FIRST_COMPARISON, 2 * columns.n_compared):
        _read(state, pool, columns.reading(state.closeness_R, state.n_compared))


def _reads_others(state: State) -> BoolArray:
    """Which priors read what others showed, bool [C]."""
    is_read = state.stack is not None and len(state.stack.weights) > 2 + len(FITTED)
    return np.array([prior == RUNS or (prior == STACKED and is_read) for prior in PRIORS])


def others_weight(state: State) -> float:
    """How far what others showed is believed: the slopes of the columns together. 1 is as it stands, 0 not at all, and
    less than 0 the contrary.
    """
    return float(state.runs.weights[1:].sum()) if state.runs is not None else 0.0


def misled(state: State) -> Misled | None:
    """That what others showed is of no use, if it is."""
    if state.misled_since < 0:
        return None
    return Misled(state.misled_since, others_weight(state), OTHERS_LEAST_WEIGHT)


def _new_stack(state: State) -> OnlineLogistic:
    """Starts as the mean of its inputs' log-odds; what others showed, where something is known, counts most."""
    if state.runs is None:
        return OnlineLogistic.averaging(1 + len(FITTED))
    rest = (1.0 - RUNS_SHARE) / (1 + len(FITTED))
    slopes = np.array([rest] * (1 + len(FITTED)) + [RUNS_SHARE])
    return OnlineLogistic.starting(slopes, np.full(len(slopes), SLOPE_VARIANCE))


def _admit(state: State, pool: Pool) -> None:
    """Let the priors that have something to say since take part in the mixture."""
    absent = set(FITTED) - set(_mixed(state, pool))
    if state.stack is None:
        absent.add(STACKED)
    if state.embedding is None:
        absent.add("embedding")
    if state.runs is None:
        absent.add(RUNS)
    if not np.isfinite(pool.prior_rates(state.n_prompts)).any():
        absent.add("caller")
    state.mixture.admit(present(*absent))
