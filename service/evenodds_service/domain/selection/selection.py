"""The whole decision for a step: who may be chosen, who rests or is waited for, and the batch.

Pure: a function of state, pool, settings, request and beliefs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.learning.features import Pool, directions
from evenodds_service.domain.learning.guardrails import Fallback
from evenodds_service.domain.learning.prediction import EachBlock, in_blocks
from evenodds_service.domain.learning.predictors import PREDICTORS, acquisition_of
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.selection.batch import Candidates, Choice, Shares, choose
from evenodds_service.domain.selection.eligibility import held_back, outstanding, rest_steps, resting
from evenodds_service.domain.selection.fill import Calibration, Fill, Outlook, filled, outlook
from evenodds_service.domain.selection.pickers import (
    Good,
    Likeness,
    MaxSum,
    MostUnlike,
    Picker,
    best,
)
from evenodds_service.domain.selection.scores import scores
from evenodds_service.domain.settings import Acquisition, RunSettings
from evenodds_service.errors import FillNeedsRest, NotEnoughPrompts

REPROBE_SHARE = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class SelectionRequest:
    """What a choice depends on besides the state and the settings.

    Attributes:
        batch_size: Prompts; with `fill` the informative groups that are wanted.
        seed: Of all chance in it, together with the step.
        fill: Choose as many prompts as it takes to find so many informative groups.
        candidates: Rows of the pool to choose among, int64; None for all.
        exclude: Rows to leave out, int64.
        allow_outstanding: Whether prompts may be chosen again whose outcomes have not come yet.
        are_groups_strict: Whether a group with too few prompts for its least share is an error.
    """

    step: int
    batch_size: int
    seed: int = 0
    candidates: IntArray | None = None
    exclude: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    allow_outstanding: bool = False
    are_groups_strict: bool = False
    fill: Fill | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Forecasts:
    """Beliefs Beta(a, b) about the pool's prompts, and mean and standard deviation of the chance that a group of
    attempts is informative under them; [N] each.
    """

    a_N: FloatArray
    b_N: FloatArray
    informative_N: FloatArray
    informative_std_N: FloatArray

    @staticmethod
    def of(a_N: FloatArray, b_N: FloatArray, group_size: int, *, each_block: EachBlock = map) -> Forecasts:
        """What these beliefs say of groups of `group_size` attempts."""
        informative_N, informative_std_N = np.empty(len(a_N)), np.empty(len(a_N))

        def compute(block: slice) -> None:
            informative_N[block], informative_std_N[block] = informative_moments(a_N[block], b_N[block], group_size)

        for _ in each_block(compute, in_blocks(len(a_N))):
            pass
        return Forecasts(a_N, b_N, informative_N, informative_std_N)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A batch, what is believed of its prompts, and the state that it was chosen in.

    Attributes:
        a, b: Beta parameters of the beliefs, [B].
        prompts: Their indices in the log, int64 [B]; those of `choice` are places in the pool.
        prompt_ids, groups: Of the prompts, B of each.
        fallback: Why the batch is uniform, if it was to be another.
        outlook: What to expect of a filled one.
        position, model_version: Of that state.
    """

    choice: Choice
    prompts: IntArray
    a: FloatArray
    b: FloatArray
    prompt_ids: tuple[str, ...]
    groups: tuple[str | None, ...]
    fallback: Fallback | None
    position: int
    model_version: int
    outlook: Outlook | None = None


def picker_of(
    acquisition: Acquisition,
    diversity: float,
    recent_batches: Sequence[IntArray],
    directions_of: Callable[[IntArray], FloatArray],
) -> Picker:
    """The rule by which the best are picked: each acquisition has its own, to which `diversity` means its own."""
    if acquisition == "yield" and diversity > 0.0:
        return MostUnlike(Good(tolerance=diversity), Likeness.to(recent_batches, directions_of))
    if acquisition == "paper":
        return MaxSum(Likeness.to(recent_batches, directions_of), weight=diversity)
    return best  # chance, and Thompson sampling as published, heed nothing but the score


def rest_of(acquisition: Acquisition, settings: RunSettings, *, n_prompts: int, batch_size: int) -> int:
    """The rest rule: for how many steps a chosen prompt rests while there are enough others.

    Published acquisitions stay as published: only the yield score needs the rest. A cooldown takes its place.
    """
    if acquisition != "yield" or settings.cooldown_steps is not None:
        return 0
    return rest_steps(n_prompts, batch_size)


def reprobe_share_of(settings: RunSettings) -> float:
    """As set. Else chance needs no floor for the least recently seen, and Thompson sampling is left as published."""
    if settings.reprobe_share is not None:
        return settings.reprobe_share
    return REPROBE_SHARE if acquisition_of(settings) in ("yield", "paper") else 0.0


def select(state: State, pool: Pool, settings: RunSettings, request: SelectionRequest, forecasts: Forecasts) -> Chosen:
    """Choose a batch. Longer than other functions: it names every phase once, in order, and computes in none of them.

    Args:
        settings: The run's, overlaid by what was asked for.
        forecasts: About all prompts of the state.

    Raises:
        FillNeedsRest: a batch is to be filled, and no prompt rests.
        NotEnoughPrompts: fewer may be selected than were asked for.
    """
    acquisition, fallback = _acquisition(state, settings)
    fill, n_wanted = request.fill, request.batch_size
    if fill is not None:
        _check_rest(settings)
    generator = np.random.default_rng([request.seed, request.step])
    scores_N = _scores(forecasts, acquisition, settings, generator)
    shares = _shares(settings, pool, state.n_prompts, request, may_reprobe=fallback is None)
    allowed = _allowed(state, settings, request)
    directions_of = partial(_directions, state, pool)
    picker = picker_of(acquisition, settings.diversity, state.recent_batches, directions_of)
    rest = rest_of(acquisition, settings, n_prompts=state.n_prompts, batch_size=n_wanted)
    preferred = partial(_preferred, allowed, state, request, rest=rest, scores_N=scores_N, least=shares.least)
    among = partial(
        choose, scores_N, forecasts.informative_N, shares=shares, picker=picker, generator=generator, n_wanted=n_wanted
    )

    def of_size(n: int) -> Choice:
        try:
            return among(preferred(n), batch_size=n)
        except NotEnoughPrompts:  # the groups' limits leave too few: do not stop a trainer
            everyone = Candidates(allowed.eligible_N, allowed.eligible_N, allowed.last_seen_N)
            return among(everyone, batch_size=n)

    calibration = Calibration(state.found_informative, state.foreseen_informative)
    n_eligible = int(np.count_nonzero(allowed.eligible_N))
    try:
        if fill is None:
            choice = of_size(n_wanted)
        else:
            choice = filled(n_wanted, fill, calibration, of_size, n_eligible=n_eligible)
    except NotEnoughPrompts as error:
        raise _advised(error, state.n_prompts, settings) from None

    def plain() -> FloatArray:
        rested = preferred(min(n_wanted, n_eligible))
        return forecasts.informative_N[best(scores_N, np.zeros_like(scores_N), rested.eligible_N, n_wanted)]

    expected = None
    if fill is not None:
        expected = outlook(choice.informative_probabilities, plain, n_wanted, fill.update_cost, calibration)
    prompts = choice.prompts
    return Chosen(
        choice=replace(choice, n_outstanding=int(allowed.waited_for_N[prompts].sum())),
        prompts=state.serials_N[prompts],
        a=forecasts.a_N[prompts],
        b=forecasts.b_N[prompts],
        prompt_ids=tuple(pool.prompt_ids[i] for i in prompts),
        groups=tuple(pool.groups[i] for i in prompts),
        fallback=fallback,
        position=state.position,
        model_version=state.model_version,
        outlook=expected,
    )


def _shares(
    settings: RunSettings, pool: Pool, n_prompts: int, request: SelectionRequest, *, may_reprobe: bool
) -> Shares:
    return Shares(
        least=_members(settings.groups, pool, n_prompts),
        most=_members(settings.groups_at_most, pool, n_prompts),
        is_least_strict=request.are_groups_strict,
        reprobe=reprobe_share_of(settings) if may_reprobe else 0.0,
        control=settings.control_share,
    )


def _check_rest(settings: RunSettings) -> None:
    """Raises FillNeedsRest where chosen prompts do not rest: filled batches would take the same ones again and again.
    Batches by chance do not.
    """
    acquisition = acquisition_of(settings)
    if acquisition == "uniform" or (settings.cooldown_steps or 0) > 0:
        return
    if settings.cooldown_steps == 0 or acquisition != "yield":
        why = (
            "cooldown_steps is 0"
            if settings.cooldown_steps == 0
            else f"prompts do not rest by default under {acquisition!r}"
        )
        raise FillNeedsRest(
            f"informative_groups needs prompts to rest after they were chosen, and {why}: filled batches would have "
            "the "
            "same prompts again and again. Set cooldown_steps to 10 or more, or ask for a batch_size"
        )


def _scores(
    forecasts: Forecasts, acquisition: Acquisition, settings: RunSettings, generator: np.random.Generator
) -> FloatArray:
    return scores(
        forecasts.a_N,
        forecasts.b_N,
        forecasts.informative_N,
        forecasts.informative_std_N,
        acquisition=acquisition,
        target_rate=settings.target_rate,
        optimism=settings.optimism,
        generator=generator,
    )


def _acquisition(state: State, settings: RunSettings) -> tuple[Acquisition, Fallback | None]:
    """By which to choose now: chance where the mixture has misled, and why."""
    acquisition = acquisition_of(settings)
    if acquisition == "uniform" or not settings.fallback or not PREDICTORS[settings.predictor].is_mixed:
        return acquisition, None
    fallback = state.guardrails.fallback()
    return acquisition if fallback is None else "uniform", fallback


def _members(shares: Mapping[str, float] | None, pool: Pool, n: int) -> dict[str, tuple[float, BoolArray]]:
    return {group: (share, pool.members(group, n)) for group, share in (shares or {}).items()}


def _directions(state: State, pool: Pool, prompts: IntArray) -> FloatArray:
    assert state.basis is not None  # a pool with a prompt to choose has one
    return directions(pool.rows(state.basis, prompts))


@dataclass(frozen=True, slots=True, eq=False)
class _Allowed:
    """Who may be chosen if need be, bool [N] each, and int64 [N].

    Attributes:
        eligible_N: Rested if a cooldown is set, among the candidates, not excluded.
        spent_N: Visited as often as the cap allows. A visit is a selection or an observed step.
        visits_N: How often, int64 [N].
        waited_for_N: Chosen before, and the outcome has not come.
        last_seen_N: Step of the last selection or observation that counts, -1 for never.
    """

    eligible_N: BoolArray
    spent_N: BoolArray
    visits_N: IntArray
    waited_for_N: BoolArray
    last_seen_N: IntArray


def _allowed(state: State, settings: RunSettings, request: SelectionRequest) -> _Allowed:
    waited_for, lost = outstanding(
        state.outstanding_step_N, step=max(request.step, state.head_step), lease_steps=settings.lease_steps
    )
    selected, last_selected = state.selected_N, state.last_selected_N
    if lost.any():  # whose outcome never came was not seen: it neither rests nor has spent a visit
        selected, last_selected = selected - lost, np.where(lost, -1, last_selected)
    last_seen = np.maximum(last_selected, state.last_step_N)
    may = ~resting(last_seen, step=request.step, rest=settings.cooldown_steps or 0)
    if request.candidates is not None:
        among = np.zeros(state.n_prompts, dtype=bool)
        among[request.candidates] = True
        may &= among
    may[request.exclude] = False
    visits = np.maximum(selected, state.visits_N)
    spent = visits >= settings.max_visits if settings.max_visits > 0 else np.zeros(len(visits), dtype=bool)
    return _Allowed(may, spent, visits, waited_for, last_seen)


def _preferred(
    allowed: _Allowed,
    state: State,
    request: SelectionRequest,
    batch_size: int,
    *,
    rest: int,
    scores_N: FloatArray,
    least: Mapping[str, tuple[float, BoolArray]],
) -> Candidates:
    """Without those that had their visits, those that are waited for, and those that rest, while there are enough
    others: who rests comes back first, who had its visits last and by the fewest of them.
    """

    without = partial(held_back, scores_N=scores_N, batch_size=batch_size, groups=least)
    here_N = without(allowed.eligible_N, allowed.spent_N, allowed.visits_N, all_alike=True)
    if not request.allow_outstanding:
        here_N = without(here_N, allowed.waited_for_N, state.outstanding_step_N)
    resting_N = resting(allowed.last_seen_N, step=request.step, rest=rest)
    rested_N = without(here_N, resting_N, allowed.last_seen_N, all_alike=True)
    return Candidates(rested_N, here_N, allowed.last_seen_N)


def _advised(error: NotEnoughPrompts, n_prompts: int, settings: RunSettings) -> NotEnoughPrompts:
    """The same error with what rules prompts out, and what to do."""
    shares = [f"{group!r}: {share:g}" for group, share in (settings.groups_at_most or {}).items()]
    more = ", ..." if len(shares) > 5 else ""
    most = f", categories_at_most {{{', '.join(shares[:5])}{more}}}" if shares else ""
    return NotEnoughPrompts(
        asked=error.asked,
        eligible=error.eligible,
        group=error.group,
        what=error.what,
        advice=f" (pool {n_prompts}, cooldown_steps {settings.cooldown_steps or 0}{most}): ask for fewer, load more "
        "prompts, or loosen the settings that leave prompts out",
    )
