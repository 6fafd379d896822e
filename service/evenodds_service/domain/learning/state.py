"""The state of a run: what was learned from its log up to a position, and how its arrays grow with the pool."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray, ScalarT
from evenodds_service.domain.learning.features import Basis
from evenodds_service.domain.learning.guardrails import Constant, Guardrails, Repeats
from evenodds_service.domain.learning.known_rates import RateColumns
from evenodds_service.domain.learning.mixture import FITTED, MEMORIES, PRIORS, RUNS, STACKED, Mixture
from evenodds_service.domain.learning.regression import OnlineLogistic
from evenodds_service.domain.learning.sequential import Watch
from evenodds_service.domain.learning.tallies import Tallies


@dataclass(slots=True)
class State:
    """The fold of a run's log up to `position`.

    Attributes:
        stack: Weighs the log-odds of the online regression, of the fitted priors, and of `runs` once there is one; None
            before the first snapshot.
        columns: How what others showed on the pool's prompts becomes inputs of `runs`; None where nothing is known.
        runs: The regression on these columns.
        closeness_R: How well each of them foresaw the outcomes, older ones counting less; kept where they are many.
        n_compared: Over how many prompts.
        others_nats, others_counts: By how much the mixture foresaw outcomes better than it would have without what
            others showed, in nats, and over how many prompts.
        misled_since: Step since which the others' weights have vanished; -1 where they have not.
        n_prompts, n_retired: Prompts of the pool, N, and those that were in it.
        serials_N: The index of each prompt in the log, which never changes, rising; axis N is the pool as it is now.
        touched_N: When its last outcome came, or itself, in seconds since 1970.
        group_names, tellers: Of the pool in their order at the last retirement: what a pool of those who are left would
            not know.
        surface, quick, embedding: Online regressions; `quick` forgets within some steps.
        successes_L_N, failures_L_N: float32 own evidence under each memory, as of the prompt's last step.
        attempts_N, visits_N, last_step_N: Of observations: attempts, distinct steps, newest step (-1: never).
        selected_N, last_selected_N: How often and at which step a prompt was last chosen (-1: never). A choice whose
            outcome never came counts no more once the prompt is chosen again.
        outstanding_step_N: The newest step for which a prompt was chosen without an outcome yet (-1: none).
        running_successes, running_counts: The discounted outcomes of all prompts.
        gap_steps, n_gaps: Mean number of steps between two visits of one prompt, over n_gaps visits.
        advance_steps, n_advances: Mean advance of the head step, over n_advances: the unit of ageing.
        found_informative, foreseen_informative: Informative groups of past selections, and how many their forecasts had
            let expect, discounted with each advance of the head step.
        tallies, guardrails, watch, constant, repeats: What the report is made of, and what alarms and the fallback are
            read from.
    """

    position: int = 0
    n_prompts: int = 0
    n_retired: int = 0
    head_step: int = -1
    n_observations: int = 0
    model_version: int = 0
    basis: Basis | None = None
    mixture: Mixture = field(
        default_factory=lambda: Mixture.new(present("embedding", "caller", *FITTED, STACKED, RUNS))
    )
    surface: OnlineLogistic | None = None
    quick: OnlineLogistic | None = None
    embedding: OnlineLogistic | None = None
    stack: OnlineLogistic | None = None
    columns: RateColumns | None = None
    runs: OnlineLogistic | None = None
    closeness_R: FloatArray = field(default_factory=lambda: np.zeros(0))
    n_compared: int = 0
    others_nats: float = 0.0
    others_counts: int = 0
    misled_since: int = -1
    group_names: tuple[str | None, ...] = ()
    tellers: tuple[str, ...] = ()
    serials_N: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    touched_N: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
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
    found_informative: float = 0.0
    foreseen_informative: float = 0.0
    recent_batches: tuple[IntArray, ...] = ()
    tallies: Tallies = field(default_factory=Tallies)
    guardrails: Guardrails = field(default_factory=Guardrails)
    watch: Watch = field(default_factory=Watch)
    constant: Constant = field(default_factory=Constant)
    repeats: Repeats = field(default_factory=Repeats)


_COUNTED = Tallies | Guardrails | Watch | Constant | Repeats


def copied(state: State) -> State:
    """A state of one's own for reading at length, while the other is folded on.

    Values that are not updated in place are shared.
    """
    values = {each.name: getattr(state, each.name) for each in fields(state)}
    return State(**{name: _copied(value) for name, value in values.items()})


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray | OnlineLogistic):
        return value.copy()
    return copy.deepcopy(value) if isinstance(value, Mixture | _COUNTED) else value


def grow(state: State, n_prompts: int, *, at: int) -> None:
    """Make room for those that came at this time: `n_prompts` have come in all."""
    before, n_prompts = state.n_prompts, n_prompts - state.n_retired
    for name in ("successes_L_N", "failures_L_N", "attempts_N", "visits_N", "selected_N"):
        setattr(state, name, _grown(getattr(state, name), n_prompts, fill=0))
    for name in ("last_step_N", "last_selected_N", "outstanding_step_N", "serials_N", "touched_N"):
        setattr(state, name, _grown(getattr(state, name), n_prompts, fill=-1))
    state.serials_N[before:] = np.arange(before, n_prompts) + state.n_retired
    state.touched_N[before:] = at
    state.n_prompts = n_prompts


def rows_of_serials(state: State, serials: IntArray) -> IntArray:
    """Where the prompts of these indices of the log stand at present, -1 for those that are not in the pool."""
    if not state.n_retired:
        return np.where((serials >= 0) & (serials < state.n_prompts), serials, -1)
    if not state.n_prompts:
        return np.full(len(serials), -1, dtype=np.int64)
    rows = np.minimum(np.searchsorted(state.serials_N, serials), state.n_prompts - 1)
    return np.where(state.serials_N[rows] == serials, rows, -1)


def without(state: State, kept_N: BoolArray) -> None:
    """Let go of all rows but these."""
    moved_N = np.where(kept_N, np.cumsum(kept_N) - 1, -1)
    for each in fields(state):
        if each.name.endswith("_N"):
            setattr(state, each.name, np.ascontiguousarray(getattr(state, each.name)[..., kept_N]))
    state.recent_batches = tuple(rows[rows >= 0] for rows in (moved_N[batch] for batch in state.recent_batches))
    state.tallies.move(moved_N)
    n = int(kept_N.sum())
    state.n_prompts, state.n_retired = n, state.n_retired + state.n_prompts - n


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


def present(*absent: str) -> BoolArray:
    """Which of `PRIORS` take part, bool [C]: all but these."""
    return np.array([prior not in absent for prior in PRIORS])
