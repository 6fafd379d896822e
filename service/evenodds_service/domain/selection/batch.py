"""A batch from scored prompts: the control arm, group minima, the least recently seen, and the picker's best.

Pure functions; chance comes in as a generator, so that a batch is deterministic in (arguments, seed). How prompts are
scored and by which rule the best are picked is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.selection.pickers import Picker, at_least_best, best
from evenodds_service.errors import NotEnoughPrompts

REPROBE_SEEN = 0.25
"""Share of the least recently seen that is kept for prompts seen before."""

_LEAST_CHANCE = 2.0**-53


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Who may be chosen.

    Attributes:
        eligible_N: bool [N].
        control_N: Who may be drawn for the control arm, bool [N]. What merely rests should be among them, or the arm
            would miss the prompts that were just found to be good.
        last_seen_N: Step of the last selection or observation, int64 [N], -1 for never.
        weights_N: For how many prompts each stands where it is drawn by chance, at least 1; None: each for itself.
    """

    eligible_N: BoolArray
    control_N: BoolArray
    last_seen_N: IntArray
    weights_N: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """What of a batch of B prompts is not left to the picker. The limits of groups hold for the batch as a whole.

    Attributes:
        least: Least share and membership, bool [N], by group: at least floor(share B) prompts.
        most: Largest share, likewise: at most ceil(share B) prompts.
        is_least_strict: Whether a group with too few eligible prompts for its least share is an error; else it gets
            what there is.
        reprobe: For the least recently seen, in [0, 1].
        control: Drawn uniformly, in [0, 1].
    """

    least: Mapping[str, tuple[float, BoolArray]] = field(default_factory=dict)
    most: Mapping[str, tuple[float, BoolArray]] = field(default_factory=dict)
    is_least_strict: bool = True
    reprobe: float = 0.0
    control: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A batch.

    Attributes:
        prompts: int64 [B], in the order of choice.
        informative_probabilities: Of these prompts, [B].
        pad_to: How many prompts to take, by score, for B informative groups in expectation; None if all eligible
            prompts together do not give that many.
        control: bool [B], which were chosen uniformly; they stand last.
        n_outstanding: How many of them are still waited for from earlier selections.
    """

    prompts: IntArray
    informative_probabilities: FloatArray
    pad_to: int | None
    control: BoolArray
    n_outstanding: int = 0

    @property
    def informative_share(self) -> float:
        """Forecast of the share of informative groups in the batch."""
        return float(self.informative_probabilities.mean())


def choose(
    scores_N: FloatArray,
    informative_N: FloatArray,
    candidates: Candidates,
    shares: Shares,
    *,
    batch_size: int,
    picker: Picker,
    generator: np.random.Generator,
    n_wanted: int | None = None,
) -> Choice:
    """Choose a batch in four phases, each from what the ones before have left.

    Args:
        scores_N: From `scores`.
        informative_N: Predictive probability of an informative group, for the forecast.
        batch_size: B, at least 1.
        picker: Picks by score for the groups' minima and for what is left in the end.
        generator: Breaks ties, and draws the control arm.
        n_wanted: Informative groups that are wanted, for `pad_to`; B by default.

    Raises:
        NotEnoughPrompts: fewer than B are eligible, or fewer than a group's share.
    """
    draft = _Draft.empty(candidates, shares, batch_size, generator)
    control = _control_arm(draft, candidates, shares.control, generator)  # 1
    _group_minima(draft, scores_N, picker, is_strict=shares.is_least_strict)  # 2
    _least_recently_seen(draft, candidates.last_seen_N, shares.reprobe, generator)  # 3
    draft.take(picker, scores_N, draft.open_to(candidates.eligible_N, scores_N), draft.room())  # 4

    prompts = np.concatenate((*draft.chosen, control))
    is_control = np.arange(batch_size) >= batch_size - len(control)
    n_wanted = batch_size if n_wanted is None else n_wanted
    pad_to = _pad_to(scores_N, informative_N, candidates.eligible_N, prompts, n_wanted)
    return Choice(prompts, informative_N[prompts], pad_to, is_control)


def drawn_by(chances_N: FloatArray, weights_N: FloatArray | None) -> FloatArray:
    """Keys whose greatest k are a draw without replacement in proportion to the weights (Efraimidis and Spirakis,
    "Weighted random sampling with a reservoir", 2006).

    Args:
        chances_N: Drawn uniformly from [0, 1).
        weights_N: At least 1; None: all alike.
    """
    if weights_N is None:
        return chances_N
    return exact.exp(exact.log(np.maximum(chances_N, _LEAST_CHANCE)) / weights_N)  # chances to the power of 1 / weights


def count_of(share: float, batch_size: int) -> int:
    """How many prompts of a batch a least share is."""
    return math.floor(share * batch_size + 1e-9)


def most_of(share: float, batch_size: int) -> int:
    """How many prompts of a batch a largest share is."""
    return math.ceil(share * batch_size - 1e-9)


def n_fitting(eligible_N: BoolArray, most: Iterable[tuple[int, BoolArray]]) -> int:
    """How many of these prompts a batch can have that takes so many of each group at most."""
    fitting = int(np.count_nonzero(eligible_N))
    for cap, members_N in most:
        fitting -= max(0, int(np.count_nonzero(eligible_N & members_N)) - cap)
    return fitting


@dataclass(slots=True, eq=False)
class _Draft:
    """A batch while it fills.

    Attributes:
        least, most: Numbers of prompts and membership by group.
        taken_N: Who is in it, bool [N].
        chosen: The picks so far, without the control arm.
    """

    batch_size: int
    eligible_N: BoolArray
    ties_N: FloatArray
    least: Mapping[str, tuple[int, BoolArray]]
    most: Mapping[str, tuple[int, BoolArray]]
    taken_N: BoolArray
    chosen: list[IntArray] = field(default_factory=list)

    @staticmethod
    def empty(candidates: Candidates, shares: Shares, batch_size: int, generator: np.random.Generator) -> _Draft:
        """Raises NotEnoughPrompts where the eligible prompts that fit the groups' limits do not fill a batch."""
        eligible_N = candidates.eligible_N
        least = {group: (count_of(share, batch_size), members) for group, (share, members) in shares.least.items()}
        most = {group: (most_of(share, batch_size), members) for group, (share, members) in shares.most.items()}
        fitting = n_fitting(eligible_N, most.values())
        if fitting < batch_size:
            raise NotEnoughPrompts(asked=batch_size, eligible=fitting)
        # Not before: an attempt that fails here draws nothing.
        ties_N = drawn_by(generator.random(len(eligible_N)), candidates.weights_N)
        return _Draft(batch_size, eligible_N, ties_N, least, most, np.zeros(len(eligible_N), dtype=bool))

    def room(self) -> int:
        return self.batch_size - int(np.count_nonzero(self.taken_N))

    def take(self, picker: Picker, order_N: FloatArray, among_N: BoolArray, n: int) -> None:
        """Add the picker's n of these, the highest by `order` first."""
        if n > 0:
            prompts = picker(order_N, self.ties_N, among_N, n)
            self.taken_N[prompts] = True
            self.chosen.append(prompts)

    def open_to(self, among_N: BoolArray, order_N: FloatArray) -> BoolArray:
        """Who of these may still be taken: of a group with little room left, only its highest by `order`."""
        open_N = self.eligible_N & among_N & ~self.taken_N
        for cap, members_N in self.most.values():
            room = max(0, cap - int(np.count_nonzero(self.taken_N & members_N)))
            members = np.flatnonzero(open_N & members_N)
            if len(members) > room:
                kept = best(order_N, self.ties_N, open_N & members_N, room)
                open_N[members] = False
                open_N[kept] = True
        return open_N


def _control_arm(draft: _Draft, candidates: Candidates, share: float, generator: np.random.Generator) -> IntArray:
    """Phase 1. Drawn before all others, all who may be equally likely as far as the groups' limits leave the choice."""
    if share <= 0.0:
        return np.empty(0, dtype=np.int64)
    n = min(math.floor(share * draft.batch_size + generator.random()), draft.batch_size)
    order = np.flatnonzero(candidates.control_N)
    if candidates.weights_N is None:
        order = generator.permutation(order)
    else:
        keys = drawn_by(generator.random(len(order)), candidates.weights_N[order])
        order = order[np.argsort(-keys, kind="stable")]
    may, is_owed = np.ones(len(order), dtype=bool), np.zeros(len(order), dtype=bool)
    for cap, members_N in draft.most.values():
        members = members_N[order]
        may &= ~members | (np.cumsum(members) <= cap)
    for owed, members_N in draft.least.values():
        members = members_N[order]
        is_owed |= members & (np.cumsum(members) <= owed)
    # What is not owed to a group must leave room for what is.
    spends = may & ~is_owed
    may &= ~(spends & (np.cumsum(spends) > draft.batch_size - sum(owed for owed, _ in draft.least.values())))
    control = np.asarray(order[may][:n])
    draft.taken_N[control] = True
    return control


def _group_minima(draft: _Draft, scores_N: FloatArray, picker: Picker, *, is_strict: bool) -> None:
    """Phase 2. For each group what it lacks for its least share, by the picker."""
    for group, (wanted, members_N) in draft.least.items():
        missing = max(0, wanted - int(np.count_nonzero(draft.taken_N & members_N)))
        open_N = draft.eligible_N & members_N & ~draft.taken_N
        available = int(np.count_nonzero(open_N))
        if available < missing and is_strict:
            raise NotEnoughPrompts(asked=wanted, eligible=wanted - missing + available, group=group)
        draft.take(picker, scores_N, open_N, min(missing, available))


def _least_recently_seen(draft: _Draft, last_seen_N: IntArray, share: float, generator: np.random.Generator) -> None:
    """Phase 3. A floor that no belief lowers. Those never seen come first; but a quarter of the floor is kept for
    prompts that were seen before, however hopeless (or solved) they are believed to be, so that these are tried again
    though a large pool is not yet through.
    """
    if share <= 0.0:
        return
    quota = min(draft.room(), math.floor(share * draft.batch_size + generator.random()))
    left_after = draft.room() - quota
    of_seen = math.floor(REPROBE_SEEN * quota + generator.random())
    longest_N = np.negative(last_seen_N, dtype=np.float64)
    draft.take(best, longest_N, draft.open_to(last_seen_N >= 0, longest_N), min(of_seen, quota))
    draft.take(best, longest_N, draft.open_to(draft.eligible_N, longest_N), draft.room() - left_after)


def _pad_to(
    scores_N: FloatArray, informative_N: FloatArray, eligible_N: BoolArray, prompts: IntArray, n_wanted: int
) -> int | None:
    """The batch, then the best of the others, until so many informative groups are expected."""
    wanted = float(n_wanted)
    reached = float(informative_N[prompts].sum())
    if reached >= wanted - 1e-9:
        return len(prompts)
    open_N = eligible_N.copy()
    open_N[prompts] = False
    size = max(4 * len(prompts), 256)
    while True:
        others = at_least_best(scores_N, open_N, size)
        others = others[np.argsort(-scores_N[others], kind="stable")]
        total = reached + np.cumsum(informative_N[others])
        if len(others) and total[-1] >= wanted - 1e-9:
            return len(prompts) + int(np.searchsorted(total, wanted - 1e-9)) + 1
        if len(others) < size or reached + float(informative_N[open_N].sum()) < wanted - 1e-9:
            return None
        size *= 8
