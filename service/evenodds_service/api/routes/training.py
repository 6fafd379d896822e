"""The trainer's and gateway's endpoints: observe, predict, select_batch.

Each translates the wire into values, calls the store and the live run, and translates back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, TypeVar

import numpy as np
from fastapi import APIRouter, BackgroundTasks, Body, Query
from fastapi.responses import Response
from pydantic import Discriminator, Tag
from starlette.concurrency import run_in_threadpool

from evenodds.schemas import (
    FallbackNotice,
    FillForecast,
    Forecast,
    Observation,
    ObserveReply,
    ObserveRequest,
    PredictReply,
    PredictRequest,
    PromptRef,
    SelectedPrompt,
    SelectReply,
    SelectRequest,
    VerdictRequest,
)
from evenodds_service.api.dependencies import PROBLEMS, REPLAYABLE, REPLAYED_HEADER, Dependencies, Services, described
from evenodds_service.api.intervals import credible_intervals
from evenodds_service.api.wire import now, observed_hash, predictions, recorded_reply, selected_hash
from evenodds_service.domain.arrays import IntArray
from evenodds_service.domain.distributions import mean_and_std
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.selection.fill import Fill, Outlook
from evenodds_service.domain.selection.selection import Chosen, SelectionRequest
from evenodds_service.domain.settings import RunSettings, check_shares
from evenodds_service.errors import (
    ChoiceOutdated,
    PoolChanged,
    RequestConflict,
    RunUnknown,
    StepJump,
    StoreError,
    UnknownPrompts,
    VectorsGone,
)
from evenodds_service.runtime.beliefs import UNKNOWN_HINT, beliefs_about
from evenodds_service.runtime.coalescer import Coalescer
from evenodds_service.runtime.decisions import run_of
from evenodds_service.runtime.featurizer import new_prompt
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.storage.store import Appended, NewSelection, Run, Written
from evenodds_service.timing import phase

logger = logging.getLogger(__name__)
T = TypeVar("T")
router = APIRouter(responses=PROBLEMS, tags=["loop"])

MOST_AT_ONCE = 64
"""Small requests for predictions that are answered together."""

MOST_WAITING = 1_000
"""Those of one run that may wait: the first of them take seconds already where the database hangs."""

_TRIES = 5

_SMALL_PROMPTS = 256
"""A request about so many prompts at most is small."""


ConfirmStep = Annotated[
    bool, Query(description="confirms a step that lies far beyond the run's newest (409 step_jump without it)")
]
ObserveBody = Annotated[
    Annotated[ObserveRequest, Tag("by-run")] | Annotated[VerdictRequest, Tag("by-decision")],
    Discriminator(lambda body: "by-decision" if isinstance(body, dict) and "decision_id" in body else "by-run"),
    Body(examples=ObserveRequest.model_json_schema()["examples"]),
]


@router.post(
    "/observe",
    summary="Report outcomes of attempts",
    responses={
        **REPLAYABLE,
        **described(410, "The decision was made more than 24 hours ago", "decision_expired", "report the outcome anew"),
    },
)
def observe(
    body: ObserveBody,
    services: Dependencies,
    afterwards: BackgroundTasks,
    response: Response,
    confirm_step: ConfirmStep = False,
) -> ObserveReply:
    """Append outcomes to the run's log, all of them or none. With a `request_id`, the call may be repeated safely.

    Leave out of `attempts` what failed or timed out for a reason other than the policy. Outcomes may come late, out of
    order, in several calls, and for prompts that the selection did not choose. Each counts at its `step`. Instead of a
    run and a step, a gateway may send the `decision_id` of a budget, within 24 hours.
    """
    outcomes = _by_decision(body, services) if isinstance(body, VerdictRequest) else body
    if not confirm_step:
        _check_step(outcomes, services)
    try:
        appended = _append(outcomes, services)
    except RequestConflict as error:
        if not isinstance(body, VerdictRequest) or body.request_id is not None:
            raise
        raise RequestConflict(  # of an id that the caller has never seen
            f"decision {body.decision_id!r} has a verdict with other rewards, and that one counts: send a request_id "
            "of your own to report a further attempt"
        ) from error
    if appended.written is not None:
        afterwards.add_task(_keep_up, services, appended.written)
    if appended.replayed:
        response.headers[REPLAYED_HEADER] = "true"
    return ObserveReply(
        run=outcomes.run,
        log_position=appended.log_position,
        accepted=appended.accepted,
        model_version=appended.model_version,
        replayed=appended.replayed,
    )


def _check_step(body: ObserveRequest | SelectRequest, services: Services, run: Run | None = None) -> None:
    """Look whether the step may be a slip. The first step of a run may be any: there is nothing that it could age.

    Args:
        run: As it is now, if that was read already. What memory holds may be older, and is good for a first look.

    Raises:
        StepJump
    """

    if run is None:
        held = services.live_runs.held(body.run, math.inf)
        head = -1 if held is None else held.live.state.head_step
        if head >= 0 and body.step - head <= services.max_step_jump:
            return
        run = services.store.run(body.run)
    if run.head_step is not None and body.step - run.head_step > services.max_step_jump:
        raise StepJump(
            f"step {body.step} lies {body.step - run.head_step:,} steps beyond the newest of run {run.name!r}, "
            f"{run.head_step}, and the limit is {services.max_step_jump:,} (EVENODDS_MAX_STEP_JUMP). A wrong step "
            "would age all that the run has learned, for good: send the right step, or repeat the call with "
            "?confirm_step=true"
        )


def _by_decision(body: VerdictRequest, services: Services) -> ObserveRequest:
    """The report that a verdict amounts to.

    Raises:
        DecisionExpired, DecisionUnknown
    """
    decision = services.decisions.find(body.decision_id)
    prompt = json.loads(decision.prompt)
    return ObserveRequest(
        run=run_of(body.decision_id),
        step=decision.step,
        request_id=body.request_id or hashlib.sha256(body.decision_id.encode()).hexdigest(),
        observations=(Observation.model_validate({**prompt, "rewards": body.rewards}),),
    )


def _append(body: ObserveRequest, services: Services) -> Appended:
    """Append what is reported, with the prompts that are new.

    A prompt keeps its index while it is in the pool, and a pool its embedder: the run as it was at any time will do, if
    it knows both, and no prompt was retired since.

    Raises:
        UnknownPrompts: neither in the pool nor described by a text.
    """
    ids = [new_prompt(item).prompt_id for item in body.observations]
    described = {i for i, item in zip(ids, body.observations, strict=True) if item.text is not None}
    folded = services.live_runs.held(body.run, math.inf)
    if folded is not None:
        known, known_at = folded.live.known(ids)
        has_embedder = folded.run.n_prompts > 0 and folded.run.settings.embedder is not None
        if all(i in known or (i in described and has_embedder) for i in ids):
            try:
                return _append_known(body, services, folded.run, ids, known, known_at)
            except (RunUnknown, PoolChanged, VectorsGone):  # deleted since; there may be another one of its name
                services.live_runs.forget(body.run)
    tries = _TRIES
    while True:
        folded = services.live_runs.at_head(body.run)
        known, known_at = folded.live.known(ids)
        unknown = [i for i in ids if i not in known and i not in described]
        if unknown:
            hint = "send its text along, or load it with POST /runs/{run}/prompts"
            raise UnknownPrompts(body.run, unknown, path="observations", hint=hint)
        try:
            return _append_known(body, services, folded.run, ids, known, known_at)
        except (PoolChanged, VectorsGone):
            tries -= 1
            if not tries:
                raise


def _append_known(
    body: ObserveRequest, services: Services, run: Run, ids: Sequence[str], known: Mapping[str, int], known_at: int
) -> Appended:
    """Append observations of these prompts. `known` holds the indices of those that are in the pool at `known_at`."""
    # A prompt that comes with its text is new, or is checked against the text that the pool has.
    with_text = {f"observations[{i}]": item for i, item in enumerate(body.observations) if item.text is not None}
    new = None
    if with_text:
        new = services.featurizer.prepare(run, tuple(with_text.values()), names=tuple(with_text), known=known)
    outcomes = Outcomes(
        step=body.step,
        observations=[_observed(item, known.get(i, i)) for i, item in zip(ids, body.observations, strict=True)],
        request_id=body.request_id,
        request_hash=None if body.request_id is None else observed_hash(body),
        selection_id=body.selection_id,
    )
    return services.store.append_observations(run.id, outcomes, new=new, known_at=known_at, now=now())


def _observed(item: Observation, prompt: int | str) -> NewObservation:
    if item.rewards is not None:
        return NewObservation.of_rewards(prompt, item.rewards)
    return NewObservation.of_counts(prompt, item.successes or 0.0, item.attempts or 1)


def _keep_up(services: Services, written: Written) -> None:
    """Fold in what was acknowledged while the trainer goes on, so that its next question finds it done."""
    try:
        live = services.live_runs.fold(written.run, written.entries)
    except StoreError as error:  # whoever asks next meets it, or does not
        logger.info("run %r: not folded ahead of time: %s", written.run.name, error)
    else:
        live.save_behind(services.store, written.run, now=now())
        services.tidying.behind(live, written.run, now=now())
    services.run_states.look_at(written.run.name)


@router.post("/predict", summary="Predict success rates", response_model=PredictReply)
async def predict(body: PredictRequest, services: Dependencies) -> Response:
    """The belief about prompts of the pool, or about new texts, in the order asked. Nothing is stored."""
    is_exact = services.predict_staleness_seconds == 0.0
    if is_exact and len(body.prompts) <= _SMALL_PROMPTS and all(_is_reference(prompt) for prompt in body.prompts):
        reply = await services.predictions.ask(body.run, body)
    else:
        reply = await run_in_threadpool(_predict, body, services)
    return Response(reply, media_type="application/json")


def _is_reference(prompt: PromptRef) -> bool:
    """Whether only the pool can tell what is asked about."""
    return prompt.text is None and prompt.embedding is None


def prediction_coalescer(live_runs: LiveRuns) -> Coalescer[PredictRequest, str]:
    """Answers small questions about the prompts of one pool together, a round of a run at a time.

    A round looks at the log's head once, and passes over the arrays once for all of them.
    """

    async def answer(run: str, bodies: Sequence[PredictRequest]) -> list[str | Exception]:
        return await run_in_threadpool(_predict_known, live_runs, run, bodies)

    def refusal(run: str, n_of_run: int, n_in_all: int) -> str | None:
        if n_of_run < MOST_WAITING:
            return None
        return (
            f"{n_of_run} requests wait for a prediction of run {run!r}, the limit is {MOST_WAITING}: repeat the call "
            "later"
        )

    return Coalescer(answer, refusal=refusal, most_at_once=MOST_AT_ONCE, one_at_a_time=True)


def _predict_known(live_runs: LiveRuns, run_name: str, bodies: Sequence[PredictRequest]) -> list[str | Exception]:
    """JSON replies to requests about prompts of one run's pool, or what is wrong with them, in their order."""
    run, live, _ = live_runs.at_head(run_name)
    answers: list[str | Exception] = [""] * len(bodies)
    parts: dict[int, slice] = {}
    ids: list[str] = []
    found: list[IntArray] = []
    steps: list[IntArray] = []
    with live.lock:
        position, model_version = live.state.position, live.state.model_version
        for number, body in enumerate(bodies):
            step = live.state.head_step if body.step is None else body.step
            asked = [prompt.prompt_id or "" for prompt in body.prompts]
            try:
                found.append(live.indices(run_name, asked, path="prompts", hint=UNKNOWN_HINT))
            except UnknownPrompts as error:
                answers[number] = error
                continue
            parts[number] = slice(len(ids), len(ids) + len(asked))
            ids += asked
            steps.append(np.full(len(asked), step))
        if not ids:
            return answers
        indices = np.concatenate(found)
        a, b, experts = live.mixed_beliefs(run.settings.predictor, indices, steps_n=np.concatenate(steps))
        seen = live.state.attempts_N[indices]
    sizes = {number: bodies[number].group_size or run.settings.group_size for number in parts}
    intervals = credible_intervals(experts(), a, b)
    told = {size: predictions(ids, a, b, seen, size, intervals) for size in set(sizes.values())}
    for number, part in parts.items():
        reply = PredictReply(
            run=run.name,
            model_version=model_version,
            log_position=position,
            predictions=told[sizes[number]][part],
        )
        answers[number] = reply.model_dump_json()
    return answers


def _predict(body: PredictRequest, services: Services) -> str:
    run, live, _ = services.live_runs.within(body.run, services.predict_staleness_seconds)
    names = [f"prompts[{i}]" for i in range(len(body.prompts))]
    asked = beliefs_about(services.featurizer, run, live, body.prompts, names=names, step=body.step)
    reply = PredictReply(
        run=body.run,
        model_version=asked.model_version,
        log_position=asked.log_position,
        predictions=predictions(
            asked.ids,
            asked.a,
            asked.b,
            asked.seen,
            body.group_size or run.settings.group_size,
            credible_intervals(asked.experts(), asked.a, asked.b),
        ),
    )
    return reply.model_dump_json()


@router.post("/select_batch", summary="Choose the prompts of a step", response_model=SelectReply, responses=REPLAYABLE)
def select_batch(body: SelectRequest, services: Dependencies, confirm_step: ConfirmStep = False) -> Response:
    """Choose a batch and record it. The same run, step and arguments return the same batch; other arguments give 409.

    A prompt that an earlier selection chose is left out while its outcome is awaited, for `lease_steps` steps at most.
    With `allow_outstanding`, or if too few other prompts remain, the prompts that were awaited the longest are chosen
    again, and `outstanding` says how many they are. Steps may be chosen in any order.
    """
    arguments_hash = selected_hash(body)
    replayed, recorded = True, None
    while recorded is None:
        run, recorded = services.store.run_and_selection(body.run, body.step, arguments_hash=arguments_hash)
        if recorded is not None:
            break
        if not confirm_step:
            _check_step(body, services, run)
        with services.live_runs.live(run.id).selecting:
            live = services.live_runs.fold(run)  # at least; it holds what was chosen here while this one waited
            chosen = live.choose(_overlaid(body, run.settings), partial(_request, body, run, live))
            with phase("reply"):
                reply = _select_reply(body, run, chosen)
            try:
                recorded, written = services.store.record_selection(
                    run.id, _new_selection(reply, chosen, run, body, arguments_hash), now=now()
                )
            except ChoiceOutdated as error:  # by another process: once more, on what is now
                logger.info("%s", error)
                continue
            replayed = written is None
            if written is not None:  # the next choice knows of this one
                live.catch_up(services.store, written.run, written=written.entries)
                services.run_states.look_at(run.name)
    # The recorded reply is JSON already, without what differs between this run, its forks and a repetition. Reading it
    # and writing it again would take milliseconds for a large batch.
    head = f'{{"run":"{run.name}","replayed":{str(replayed).lower()},'
    headers = {REPLAYED_HEADER: "true"} if replayed else None
    return Response(head + recorded_reply(recorded.reply)[1:], headers=headers, media_type="application/json")


def _overlaid(body: SelectRequest, settings: RunSettings) -> RunSettings:
    """The run's settings, and the request's where it speaks.

    Raises:
        SharesConflict: a group's least share is above its largest.
    """
    overlaid = replace(
        settings,
        acquisition=_given(body.acquisition, settings.acquisition),
        group_size=_given(body.group_size, settings.group_size),
        target_rate=_given(body.target_rate, settings.target_rate),
        optimism=_given(body.optimism, settings.optimism),
        diversity=_given(body.diversity, settings.diversity),
        cooldown_steps=_given(body.cooldown_steps, settings.cooldown_steps),
        max_visits=_given(body.max_visits, settings.max_visits),
        groups=_given(body.categories, settings.groups),
        groups_at_most=_given(body.categories_at_most, settings.groups_at_most),
    )
    check_shares(overlaid.groups or {}, overlaid.groups_at_most or {})
    return overlaid


def _given(asked: T | None, own: T) -> T:
    return own if asked is None else asked


def _request(body: SelectRequest, run: Run, live: LiveRun) -> SelectionRequest:
    """Raises UnknownPrompts."""
    candidates = None
    if body.candidates is not None:
        hint = "load it with POST /runs/{run}/prompts, or leave it out"
        candidates = live.indices(run.name, body.candidates, path="candidates", hint=hint)
    return SelectionRequest(
        step=body.step,
        batch_size=body.batch_size or body.informative_groups or 1,
        seed=body.seed,
        candidates=candidates,
        exclude=live.indices(run.name, body.exclude or (), path="exclude", hint="leave it out"),
        allow_outstanding=body.allow_outstanding,
        are_groups_strict=body.categories is not None,
        fill=_fill(body),
    )


def _fill(body: SelectRequest) -> Fill | None:
    if body.informative_groups is None:
        return None
    return Fill(most=body.most_prompts, factor=_given(body.fill_factor, 1.0), update_cost=body.update_cost)


def _new_selection(
    reply: SelectReply, chosen: Chosen, run: Run, body: SelectRequest, arguments_hash: str
) -> NewSelection:
    return NewSelection(
        selection_id=reply.selection_id,
        step=body.step,
        arguments_hash=arguments_hash,
        reply=reply.model_dump_json(exclude={"run", "replayed"}),
        prompts=chosen.prompts,
        control_share=run.settings.control_share,
        control=chosen.choice.control,
        a=chosen.a,
        b=chosen.b,
        chosen_at=chosen.position,
        is_alone=run.settings.lease_steps > 0 and not body.allow_outstanding,
        unseen_share=chosen.unseen_share,
    )


def _fill_forecast(n_wanted: int | None, outlook: Outlook | None) -> FillForecast | None:
    if n_wanted is None or outlook is None:
        return None
    cost = outlook.relative_cost
    return FillForecast(
        informative_groups=n_wanted,
        expected_informative=outlook.expected,
        low=outlook.low,
        high=outlook.high,
        relative_cost=cost,
        pays=None if cost is None else cost < 1.0,
    )


def _select_reply(body: SelectRequest, run: Run, chosen: Chosen) -> SelectReply:
    mean, std = mean_and_std(chosen.a, chosen.b)
    choice, fallback = chosen.choice, chosen.fallback
    informative = choice.informative_probabilities
    return SelectReply(
        run=run.name,
        step=body.step,
        selection_id=uuid.uuid4().hex,
        model_version=chosen.model_version,
        log_position=chosen.position,
        replayed=False,
        outstanding=choice.n_outstanding,
        forecast=Forecast(
            informative_share=choice.informative_share,
            informative_groups=float(informative.sum()),
            pad_to=choice.pad_to,
        ),
        fill=_fill_forecast(body.informative_groups, chosen.outlook),
        fallback=FallbackNotice(reason=fallback.reason, since_step=fallback.since_step) if fallback else None,
        prompts=tuple(
            SelectedPrompt(
                prompt_id=prompt_id,
                category=category,
                success_rate=rate,
                std=deviation,
                informative_probability=probability,
                arm="control" if is_control else "policy",
            )
            for prompt_id, category, rate, deviation, probability, is_control in zip(
                chosen.prompt_ids,
                chosen.groups,
                mean.tolist(),
                std.tolist(),
                informative.tolist(),
                choice.control.tolist(),
                strict=True,
            )
        ),
    )
