"""Which alarms and notes a run has now, read from what the fold keeps, and put in words.

An alarm says in whole sentences what was seen, against what, since which step, and what to do. It ends with
what was seen. `sequential` says when outcomes are too far from their forecasts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import misled, unseen_share
from evenodds_service.domain.learning.guardrails import (
    ANSWERED,
    COVERAGE_SELECTIONS,
    FALLBACK_NATS,
    FORESEEN,
    JUDGED,
    NATS,
    OTHERS_FORESEEN,
    OTHERS_FOUND,
    SELECTED,
    SELECTIONS,
    SINCE,
    Constant,
    Guardrails,
    Misled,
    Repeats,
)
from evenodds_service.domain.learning.predictors import PREDICTORS
from evenodds_service.domain.learning.sequential import ALARM_NATS, DULL, FLIPPED, HIGH, LOW, Watch, tolerated
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.learning.tallies import MAX_GROUPS, Tallies
from evenodds_service.domain.report.alarms import Alarm, Remedy, Scope
from evenodds_service.domain.report.lift import judged_windows, lift_of, most_lift
from evenodds_service.domain.report.report import first_step_of, used_windows
from evenodds_service.domain.settings import RunSettings

LEAST_LIFT = 0.05
"""A lift that is certainly smaller is not worth the choosing."""

_LIFT_Z = 3.5
"""Standard errors on either side of the lift: it is looked at again and again, and one false alarm is too many."""

_LEAST_ROOM = 0.2
"""Where uniform batches are informative but for so little, choosing has nothing to gain, and nothing is wrong."""

_SILENT_SELECTED, _SILENT_SELECTIONS, _ANSWERED_SHARE = 128, 8, 0.1
_OTHERS_ALIVE = 0.5
_QUIET_SELECTIONS = 8
_CONSTANT_PROMPTS, _CONSTANT_CALLS = 64, 2
_REPEATED_STEPS = 3
_SIZED_SELECTIONS, _SIZED_PROMPTS, _SIZED_SHARE = 3, 16, 0.95
_COVERAGE_LEAST, _FRESH_SHARE, _UNSEEN_SHARE = 64, 0.01, 0.01
_NOTED_STEPS = 200
"""For so many steps a fault that has ended is told, so that what was learned from it can be taken back."""

_FOLLOWS_STEPS = 3
_MOST_CATEGORIES = 20


def alarms(state: State, pool: Pool, settings: RunSettings) -> tuple[Alarm, ...]:
    """What asks for an action now, the most urgent first."""
    is_mixed = PREDICTORS[settings.predictor].is_mixed
    found = [*_forecast_off(state), *_rewards_constant(state.constant), *_outcomes_stopped(state.guardrails)]
    found += [*_group_size_mismatch(state.tallies, settings.group_size), *_run_restarted(state.repeats)]
    if not found or found[0].code not in ("forecast_off", "rewards_constant"):  # else every category is off
        found += [*_categories(state, pool.group_names), *_lift_not_positive(state.tallies)]
    if is_mixed and settings.fallback:
        found += _fallback(state.guardrails)
    if is_mixed:
        found += _sources_mislead(misled(state))
    return (*found, *_coverage_stalls(state))


def notes(state: State, settings: RunSettings) -> tuple[Alarm, ...]:
    """What asks for no action, or for none any more."""
    found = [*_forecast_was_off(state)]
    if PREDICTORS[settings.predictor].is_mixed:
        found += _skill_not_positive(state.guardrails)
    return tuple(found)


def _alarm(
    code: str,
    seen: str,
    next_step: str,
    *,
    since_step: int,
    value: float,
    limit: float,
    category: str | None = None,
    remedy: Remedy | None = None,
    scope: Scope = "run",
) -> Alarm:
    return Alarm(code, f"{seen} {next_step}", since_step, value, limit, next_step, category, remedy, scope)


def _forecast_off(state: State) -> list[Alarm]:
    """The run's own faults that are on, as one alarm: it tells the first of them, and the window of all."""
    watch = state.watch
    raised = [t for t in (FLIPPED, LOW, HIGH, DULL) if watch.is_raised[0, t] and not _is_of_categories(watch, t)]
    if not raised:
        return []
    since, last = int(watch.since[0, raised].min()), int(watch.last[0, raised].max())
    n, forecast, outcome = watch.sums[0, raised[0]].tolist()
    before = _ended_before(watch, since)
    first, last = before or (since, last)
    window = f'{{"from_step": {first}, "to_step": {last}}}'
    if before is None:
        next_step = (
            f"Check the verifier and the trainer's log at step {since}. If these outcomes are wrong, make the run "
            f"forget them: POST /runs/{{run}}/retract with {window}."
        )
    else:  # the model still expects what a fault has taught it
        next_step = (
            f"This follows a fault from step {first} to step {last}, and the run has learned from it. Make the run "
            f"forget those outcomes: POST /runs/{{run}}/retract with {window}."
        )
    return [
        _alarm(
            "forecast_off",
            _seen(raised[0], n, forecast / n, outcome / n, since, "The run"),
            next_step,
            since_step=since,
            value=outcome / n,
            limit=_limit(raised[0], forecast / n),
            remedy=Remedy("retract", {"from_step": first, "to_step": last}),
        )
    ]


def _is_of_categories(watch: Watch, test: int) -> bool:
    """Whether the run is off because some categories are, while others are as forecast."""
    others = watch.nats[1:, test][watch.met[1:] >= watch.since[0, test]]
    return bool(watch.is_raised[1:, test].any() and (others <= 0.0).any())


def _ended_before(watch: Watch, since: int) -> tuple[int, int] | None:
    """The fault that ended just before this step, if one did."""
    first, last = watch.ended[int(watch.ended[:, 1].argmax())].tolist()
    return (first, last) if 0 <= first < since and abs(since - last) <= _FOLLOWS_STEPS else None


def _seen(test: int, n: float, forecast: float, outcome: float, since: int, subject: str) -> str:
    if test == FLIPPED:
        return (
            f"{subject}: since step {since}, prompts that were forecast to be easy have been hard, and the hard ones "
            f"easy, over {n:,.0f} prompts. Rewards may be inverted, or outcomes may be reported for the wrong prompts."
        )
    if test == DULL:
        return (
            f"{subject}: since step {since}, far fewer groups have been informative than forecast: {outcome:.0%} of "
            f"{n:,.0f} groups, where {forecast:.0%} were forecast."
        )
    direction = "lower" if test == LOW else "higher"
    return (
        f"{subject}: since step {since}, success rates have been far {direction} than forecast: {outcome:.2f} on "
        f"average over {n:,.0f} prompts, where {forecast:.2f} was forecast."
    )


def _limit(test: int, forecast: float) -> float:
    """The mean outcome at which it begins to count against the forecast."""
    if test == FLIPPED:
        return forecast
    edge = float(tolerated(np.array([1.0 - forecast if test == HIGH else forecast]))[0])
    return 1.0 - edge if test == HIGH else edge


def _rewards_constant(constant: Constant) -> list[Alarm]:
    is_on = constant.prompts >= _CONSTANT_PROMPTS and constant.calls >= _CONSTANT_CALLS and constant.nats >= ALARM_NATS
    if not is_on:
        return []
    reward = f"{constant.rate:.3g}"
    return [
        _alarm(
            "rewards_constant",
            f"Every reward since step {constant.since} has been {reward}: {constant.attempts:,.0f} attempts at "
            f"{constant.prompts:,} prompts, of which the forecasts expected some to differ.",
            "Check whether the verifier answers, and what it is given. If the prompts are all too hard or too easy for "
            "this model, load others.",
            since_step=constant.since,
            value=float(constant.prompts),
            limit=float(_CONSTANT_PROMPTS),
        )
    ]


def _outcomes_stopped(guardrails: Guardrails) -> list[Alarm]:
    n = guardrails.quiet_selections
    if n < _QUIET_SELECTIONS:
        return []
    return [
        _alarm(
            "outcomes_stopped",
            f"{n} batches were selected since step {guardrails.quiet_since} and no outcome was observed.",
            "Check that the trainer reports to POST /observe of this run, and that no filter drops all outcomes.",
            since_step=guardrails.quiet_since,
            value=float(n),
            limit=float(_QUIET_SELECTIONS),
        )
    ]


def _group_size_mismatch(tallies: Tallies, group_size: int) -> list[Alarm]:
    """Read from the newest selections, but for the newest one with outcomes, which may be only partly reported."""
    ends = np.cumsum(tallies.open_sizes)
    attempts = [tallies.open_seen[end - n : end, 1] for end, n in zip(ends, tallies.open_sizes, strict=True)]
    told = [(int(step), n[n > 0.0]) for step, n in zip(tallies.open_steps, attempts, strict=True) if (n > 0.0).any()]
    wrong: list[tuple[int, FloatArray]] = []
    for step, n in reversed(told[:-1]):
        differs = (n < group_size).mean() >= _SIZED_SHARE or (n > group_size).mean() >= _SIZED_SHARE
        if not differs:
            break
        wrong.insert(0, (step, n))
    if len(wrong) < _SIZED_SELECTIONS or sum(len(n) for _, n in wrong) < _SIZED_PROMPTS:
        return []
    counts, n_prompts = np.unique(np.concatenate([n for _, n in wrong]), return_counts=True)
    usual, since = float(counts[n_prompts.argmax()]), wrong[0][0]
    return [
        _alarm(
            "group_size_mismatch",
            f"Since step {since}, prompts of this run's batches have been reported with {usual:g} attempts each, "
            f"{int(n_prompts.sum()):,} of them. The run's group_size is {group_size}, and batches are chosen for "
            "that number.",
            f'Set the run to what the trainer does: PUT /runs/{{run}} with {{"group_size": {usual:g}}}. If attempts '
            "get lost on the way, report all of them.",
            since_step=since,
            value=usual,
            limit=float(group_size),
        )
    ]


def _run_restarted(repeats: Repeats) -> list[Alarm]:
    if repeats.steps < _REPEATED_STEPS:
        return []
    return [
        _alarm(
            "run_restarted",
            f"Steps {repeats.first} to {repeats.last} have been reported a second time, with the same prompts. The "
            "trainer seems to have restarted from a checkpoint, and the outcomes of both times count.",
            f"Make the run forget everything from step {repeats.first} on: POST /runs/{{run}}/rewind with "
            f'{{"step": {repeats.first - 1}}}. PromptSelector does this when the trainer calls '
            "load_state_dict.",
            since_step=repeats.first,
            value=float(repeats.steps),
            limit=float(_REPEATED_STEPS),
            remedy=Remedy("rewind", {"step": repeats.first - 1}),
        )
    ]


def _categories(state: State, names: Sequence[str | None]) -> list[Alarm]:
    """Categories that are silent, or else off their forecasts; the first twenty."""
    found: list[Alarm] = []
    silent = _silent(state.guardrails)
    off = np.flatnonzero(state.watch.is_raised[1:].any(axis=1))
    for code in sorted({*silent.tolist(), *off.tolist()})[:_MOST_CATEGORIES]:
        category = None if code == MAX_GROUPS else names[code]
        name = f"Category {category!r}" if category is not None else "Prompts without a category"
        name = "The categories that came later than the first 500" if code == MAX_GROUPS else name
        if code in silent:
            found.append(_category_silent(state.guardrails.silence[code].tolist(), name, category))
        else:
            found.append(_category_off(state.watch, code + 1, name, category))
    return found


def _silent(guardrails: Guardrails) -> IntArray:
    """Codes of the categories that are silent while the others are not."""
    watched = guardrails.silence
    others_found = guardrails.found - watched[:, OTHERS_FOUND]
    others_foreseen = guardrails.foreseen - watched[:, FORESEEN] - watched[:, OTHERS_FORESEEN]
    is_silent = watched[:, NATS] >= ALARM_NATS
    is_unanswered = (watched[:, SELECTED] >= _SILENT_SELECTED) & (watched[:, SELECTIONS] >= _SILENT_SELECTIONS)
    is_unanswered &= watched[:, ANSWERED] <= _ANSWERED_SHARE * watched[:, SELECTED]
    are_others_alive = (others_found >= 1.0) & (others_found >= _OTHERS_ALIVE * others_foreseen)
    return np.flatnonzero((is_silent | is_unanswered) & (watched[:, SINCE] >= 0.0) & are_others_alive)


def _category_silent(watched: list[float], name: str, category: str | None) -> Alarm:
    since, n, foreseen = int(watched[SINCE]), watched[JUDGED], watched[FORESEEN]
    next_step = (
        "Check this category's verifier and how hard its prompts are, or lower its share with categories_at_most."
    )
    if watched[NATS] >= ALARM_NATS:
        seen = (
            f"{name}: since step {since}, none of {n:,.0f} groups was informative, where {foreseen:.1f} were forecast; "
            "other categories were informative meanwhile."
        )
        value, limit = 0.0, foreseen
    else:
        seen = (
            f"{name}: since step {since}, {watched[SELECTED]:,.0f} prompts were chosen and hardly an outcome "
            "came; other categories were informative meanwhile."
        )
        value, limit = watched[SELECTED], float(_SILENT_SELECTED)
    return _alarm(
        "category_silent",
        seen,
        next_step,
        since_step=since,
        value=value,
        limit=limit,
        category=category,
        scope="category",
    )


def _category_off(watch: Watch, row: int, name: str, category: str | None) -> Alarm:
    test = next(test for test in (LOW, HIGH, DULL) if watch.is_raised[row, test])
    n, forecast, outcome = watch.sums[row, test].tolist()
    since = int(watch.since[row, test])
    return _alarm(
        "forecast_off",
        _seen(test, n, forecast / n, outcome / n, since, name),
        f"Check this category's verifier at step {since}, and whether its prompts have changed.",
        since_step=since,
        value=outcome / n,
        limit=_limit(test, forecast / n),
        category=category,
        scope="category",
    )


def _lift_not_positive(tallies: Tallies) -> list[Alarm]:
    windows = judged_windows(tallies, used_windows(tallies))
    found = lift_of(tallies, windows)[0] if windows else None
    if found is None:
        return []
    has_room = found.control_share.value <= 1.0 - _LEAST_ROOM
    if not has_room or most_lift(tallies, windows, z=_LIFT_Z) >= LEAST_LIFT:
        return []
    since = first_step_of(tallies, windows[0])
    return [
        _alarm(
            "lift_not_positive",
            f"Since step {since}, {found.policy_share.value:.0%} of {found.policy_share.observations:,} chosen groups "
            f"were informative, and {found.control_share.value:.0%} of {found.control_share.observations:,} groups "
            f"of the uniform control arm: choosing gains less than {LEAST_LIFT:.0%}.",
            "Look at rank_correlation in the report. If it is near 0, give prompts categories or prior_rates, or let "
            'the run learn from others. If nothing is known of the prompts, set {"predictor": "uniform"}.',
            since_step=since,
            value=found.difference,
            limit=LEAST_LIFT,
        )
    ]


def _fallback(guardrails: Guardrails) -> list[Alarm]:
    fallback = guardrails.fallback()
    if fallback is None:
        return []
    nats, _ = guardrails.skill()
    return [
        _alarm(
            "fallback",
            f"{fallback.reason[:1].upper()}{fallback.reason[1:]}.",
            "Check whether texts, categories or rates sent beforehand mislead. Model-based choice resumes on its own; "
            '{"fallback": false} switches the fallback off.',
            since_step=fallback.since_step,
            value=nats,
            limit=-FALLBACK_NATS,
        )
    ]


def _sources_mislead(found: Misled | None) -> list[Alarm]:
    if found is None:
        return []
    return [
        _alarm(
            "sources_mislead",
            "What other runs and prior_rates showed does not predict outcomes here: after hundreds of outcomes it "
            f"is used with a weight of {found.weight:.2f}. A weight of 1 means unchanged, and below 0 reversed.",
            "It costs little. Check whether learn_from and prior_rates name runs and models of these prompts, graded "
            "by the same verifier.",
            since_step=found.since_step,
            value=found.weight,
            limit=found.limit,
        )
    ]


def _coverage_stalls(state: State) -> list[Alarm]:
    guardrails = state.guardrails
    chosen, fresh, _ = guardrails.choices.sum(axis=0).tolist()
    unseen, among = guardrails.unseen_share, "prompts that might be chosen were"
    if unseen < 0.0:
        unseen, among = unseen_share(state), "pool was"
    if guardrails.choices[0, 0] == 0 or chosen < _COVERAGE_LEAST or unseen < _UNSEEN_SHARE:
        return []
    if fresh >= _FRESH_SHARE * chosen:
        return []
    since = int(guardrails.choices[0, 2])
    return [
        _alarm(
            "coverage_stalls",
            f"Since step {since}, {fresh:,} of the {chosen:,} prompts in {COVERAGE_SELECTIONS} batches were new, "
            f"although {unseen:.0%} of the {among} never tried.",
            "Raise reprobe_share or optimism, or set max_visits.",
            since_step=since,
            value=fresh / chosen,
            limit=_FRESH_SHARE,
        )
    ]


def _forecast_was_off(state: State) -> list[Alarm]:
    """The newest fault that has ended, for a while."""
    first, last = state.watch.ended[int(state.watch.ended[:, 1].argmax())].tolist()
    if last < 0 or state.head_step - last > _NOTED_STEPS:
        return []
    return [
        _alarm(
            "forecast_was_off",
            f"From step {first} to step {last}, outcomes were far from their forecasts. They are as forecast again, "
            "and what was learned from them still counts.",
            f"If they were wrong, make the run forget them: POST /runs/{{run}}/retract with "
            f'{{"from_step": {first}, "to_step": {last}}}.',
            since_step=first,
            value=float(last - first + 1),
            limit=1.0,
            remedy=Remedy("retract", {"from_step": first, "to_step": last}),
        )
    ]


def _skill_not_positive(guardrails: Guardrails) -> list[Alarm]:
    if guardrails.skill_since < 0:
        return []
    nats, n = guardrails.skill()
    return [
        _alarm(
            "skill_not_positive",
            f"Over the newest {n:,} observations the model has predicted outcomes no better than one Beta for "
            f"each prompt (flat MoPPS): {nats:.1f} nats.",
            "Nothing needs to be done: this is usual where texts say little about difficulty, and the lift and the "
            "rank correlation decide whether choosing helps.",
            since_step=guardrails.skill_since,
            value=nats,
            limit=0.0,
        )
    ]
