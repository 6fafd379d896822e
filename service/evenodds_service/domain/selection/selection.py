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
from evenodds_service.domain.learning.fold import unseen_share
from evenodds_service.domain.learning.guardrails import Fallback
from evenodds_service.domain.learning.prediction import EachBlock, in_blocks
from evenodds_service.domain.learning.predictors import PREDICTORS, acquisition_of
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.selection.batch import Candidates, Choice, Shares, choose, drawn_by
from evenodds_service.domain.selection.eligibility import Allowed, allowed_by, held_back, left_by, rest_steps, resting
from evenodds_service.domain.selection.fill import Calibration, Fill, Outlook, filled, most_prompts, outlook
from evenodds_service.domain.selection.part import Part, PartTooSmall, check_stands_for_all, part_of
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
        unseen_share: As in `SelectEntry`.
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
    unseen_share: float | None = None


def picker_of(
    acquisition: Acquisition,
    diversity: float,
    recent_batches: Sequence[IntArray],
    directions_of: Callable[[IntArray], FloatArray],
    rows: IntArray | None = None,
) -> Picker:
    """The rule by which the best are picked: each acquisition has its own, to which `diversity` means its own.

    Args:
        recent_batches, directions_of: As in `Likeness.to`.
        rows: The prompts that are picked from, without it all of the pool.
    """
    if acquisition == "yield" and diversity > 0.0:
        return MostUnlike(Good(tolerance=diversity), Likeness.to(recent_batches, directions_of, rows))
    if acquisition == "paper":
        return MaxSum(Likeness.to(recent_batches, directions_of, rows), weight=diversity)
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


def looked_at(state: State, pool: Pool, settings: RunSettings, request: SelectionRequest) -> Part:
    """The prompts whose beliefs a choice needs: of a large pool a part, where the acquisition asks for good prompts and
    not for the best ones of all.
    """
    acquisition, _ = _acquisition(state, settings)
    fill, n_wanted = request.fill, request.batch_size
    return part_of(
        _allowed(state, settings, request),
        pool,
        settings,
        batch_size=n_wanted if fill is None else most_prompts(n_wanted, fill),
        step=request.step,
        rest=rest_of(acquisition, settings, n_prompts=state.n_prompts, batch_size=n_wanted),
        allow_outstanding=request.allow_outstanding,
        may_sample=acquisition == "uniform" or (acquisition == "yield" and settings.diversity > 0.0),
        generator=np.random.default_rng([request.seed, request.step, 1]),
    )


def choose_batch(
    state: State,
    pool: Pool,
    settings: RunSettings,
    request: SelectionRequest,
    forecasts_of: Callable[[IntArray | None], Forecasts],
) -> Chosen:
    """Choose a batch: from a part of a large pool, and from all of it where the part turns out not to do.

    Args:
        settings: The run's, overlaid by what was asked for.
        forecasts_of: About the prompts in these rows of the pool, int64, ascending; None for all of it.

    Raises:
        FillNeedsRest, NotEnoughPrompts: as `select`.
    """
    part = looked_at(state, pool, settings, request)
    try:
        return select(state, pool, settings, request, forecasts_of(part.rows), part)
    except PartTooSmall:
        return select(state, pool, settings, request, forecasts_of(None))


def select(
    state: State,
    pool: Pool,
    settings: RunSettings,
    request: SelectionRequest,
    forecasts: Forecasts,
    part: Part | None = None,
) -> Chosen:
    """Choose a batch. Longer than other functions: it names every phase once, in order, and computes in none of them.

    Args:
        settings: The run's, overlaid by what was asked for.
        forecasts: About all prompts of the part, or of the state without one.

    Raises:
        FillNeedsRest: a batch is to be filled, and no prompt rests.
        NotEnoughPrompts: fewer may be selected than were asked for.
        PartTooSmall: the part is a sample, and all prompts should be looked at.
    """
    acquisition, fallback = _acquisition(state, settings)
    fill, n_wanted = request.fill, request.batch_size
    if fill is not None:
        _check_rest(settings)
    part = Part(None, _allowed(state, settings, request)) if part is None else part
    rows, allowed = part.rows, part.allowed
    generator = np.random.default_rng([request.seed, request.step])
    scores_N = _scores(forecasts, acquisition, settings, generator)
    if acquisition == "uniform":
        scores_N = drawn_by(scores_N, part.weights)
    shares = _shares(settings, pool, state.n_prompts, request, rows, may_reprobe=fallback is None)
    directions_of = partial(_directions, state, pool)
    picker = picker_of(acquisition, settings.diversity, state.recent_batches, directions_of, rows)
    rest = rest_of(acquisition, settings, n_prompts=state.n_prompts, batch_size=n_wanted)
    preferred = partial(_preferred, part, request, rest=rest, scores_N=scores_N, shares=shares)
    among = partial(
        choose, scores_N, forecasts.informative_N, shares=shares, picker=picker, generator=generator, n_wanted=n_wanted
    )

    def of_size(n: int) -> Choice:
        rested = preferred(n)
        if acquisition != "uniform":
            check_stands_for_all(part, scores_N, rested.eligible_N, n, tolerance=settings.diversity)
        try:
            return among(rested, batch_size=n)
        except NotEnoughPrompts:  # the groups' limits leave too few: do not stop a trainer
            everyone = Candidates(allowed.eligible_N, allowed.eligible_N, allowed.last_seen_N, part.weights)
            return among(everyone, batch_size=n)

    calibration = Calibration(state.found_informative, state.foreseen_informative)
    n_eligible = int(np.count_nonzero(allowed.eligible_N))
    try:
        if fill is None:
            choice = of_size(n_wanted)
        else:
            choice = filled(n_wanted, fill, calibration, of_size, n_eligible=n_eligible)
    except NotEnoughPrompts as error:
        if part.weights is not None:
            raise PartTooSmall from error
        raise _advised(error, state.n_prompts, settings) from None

    def plain() -> FloatArray:
        rested = preferred(min(n_wanted, n_eligible))
        return forecasts.informative_N[best(scores_N, np.zeros_like(scores_N), rested.eligible_N, n_wanted)]

    expected = None
    if fill is not None:
        expected = outlook(choice.informative_probabilities, plain, n_wanted, fill.update_cost, calibration)
    places = choice.prompts
    prompts = places if rows is None else rows[places]
    return Chosen(
        choice=replace(choice, prompts=prompts, n_outstanding=int(allowed.waited_for_N[places].sum())),
        prompts=state.serials_N[prompts],
        a=forecasts.a_N[places],
        b=forecasts.b_N[places],
        prompt_ids=tuple(pool.prompt_ids[i] for i in prompts),
        groups=tuple(pool.groups[i] for i in prompts),
        fallback=fallback,
        position=state.position,
        model_version=state.model_version,
        outlook=expected,
        unseen_share=_unseen_share(state, request),
    )


def _unseen_share(state: State, request: SelectionRequest) -> float | None:
    if request.candidates is None and not len(request.exclude):
        return None
    return unseen_share(state, left_by(state.n_prompts, candidates=request.candidates, exclude=request.exclude))


def _allowed(state: State, settings: RunSettings, request: SelectionRequest) -> Allowed:
    return allowed_by(state, settings, step=request.step, candidates=request.candidates, exclude=request.exclude)


def _shares(
    settings: RunSettings,
    pool: Pool,
    n_prompts: int,
    request: SelectionRequest,
    rows: IntArray | None,
    *,
    may_reprobe: bool,
) -> Shares:
    return Shares(
        least=_members(settings.groups, pool, n_prompts, rows),
        most=_members(settings.groups_at_most, pool, n_prompts, rows),
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
            "the same prompts again and again. Set cooldown_steps to 10 or more, or ask for a batch_size"
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


def _members(
    shares: Mapping[str, float] | None, pool: Pool, n: int, rows: IntArray | None
) -> dict[str, tuple[float, BoolArray]]:
    here = slice(None) if rows is None else rows
    return {group: (share, pool.members(group, n)[here]) for group, share in (shares or {}).items()}


def _directions(state: State, pool: Pool, prompts: IntArray) -> FloatArray:
    assert state.basis is not None  # a pool with a prompt to choose has one
    return directions(pool.rows(state.basis, prompts))


def _preferred(
    part: Part,
    request: SelectionRequest,
    batch_size: int,
    *,
    rest: int,
    scores_N: FloatArray,
    shares: Shares,
) -> Candidates:
    """Without those that had their visits, those that are waited for, and those that rest, while there are enough
    others: who rests comes back first, who had its visits last and by the fewest of them.
    """
    allowed = part.allowed
    without = partial(held_back, scores_N=scores_N, batch_size=batch_size, groups=shares.least, caps=shares.most)
    here_N = without(allowed.eligible_N, allowed.spent_N, allowed.visits_N, all_alike=True)
    if not request.allow_outstanding:
        here_N = without(here_N, allowed.waited_for_N, allowed.outstanding_step_N)
    resting_N = resting(allowed.last_seen_N, step=request.step, rest=rest)
    rested_N = without(here_N, resting_N, allowed.last_seen_N, all_alike=True)
    return Candidates(rested_N, here_N, allowed.last_seen_N, part.weights)


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
