"""The trainer's and gateway's endpoints: observe, predict, select_batch.

Each translates the wire into values, calls the store and the live view, and translates back.
"""

from __future__ import annotations

import logging
import uuid
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from evenodds.schemas import (
    FallbackNotice,
    Forecast,
    ObserveReply,
    ObserveRequest,
    PredictReply,
    PredictRequest,
    SelectedPrompt,
    SelectReply,
    SelectRequest,
)
from evenodds_service.api.features import new_prompt
from evenodds_service.api.questions import beliefs_about
from evenodds_service.api.services import PROBLEMS, Hands, content_hash, now, predictions
from evenodds_service.domain.acquisition import Choice
from evenodds_service.domain.distributions import mean_and_std
from evenodds_service.domain.types import FloatArray, NewObservation
from evenodds_service.live_run import LiveRun, SelectArguments, UnknownPrompts
from evenodds_service.storage.errors import ChoiceOutdated
from evenodds_service.storage.store import Run

logger = logging.getLogger(__name__)
router = APIRouter(responses=PROBLEMS, tags=["loop"])


@router.post("/observe", summary="Report outcomes of attempts")
def observe(body: ObserveRequest, hands: Hands) -> ObserveReply:
    """Append outcomes to the run's log. All or nothing; with a `request_id` the call may be repeated safely.

    An attempt that failed or timed out for other reasons than the policy is left out of `attempts`. Outcomes may come
    late, out of order, in several calls, and for prompts that the selection did not choose: each counts at its `step`.
    """
    run = hands.store.run(body.run)
    live = hands.live_runs.at_head(run)
    items = body.observations
    prompts = [new_prompt(item) for item in items]
    with live.lock:
        known = [live.pool.index.get(prompt.prompt_id) for prompt in prompts]
    described = {prompt.prompt_id for prompt in prompts if prompt.text is not None}
    unknown = [p.prompt_id for p, i in zip(prompts, known, strict=True) if i is None and p.prompt_id not in described]
    if unknown:
        hint = "send its text along, or load it with POST /runs/{run}/prompts"
        raise UnknownPrompts(body.run, unknown, path="observations", hint=hint)
    # A prompt that comes with its text is new, or is checked against the text that the pool has.
    with_text = [i for i, item in enumerate(items) if item.text is not None]
    prepared = hands.featurizer.prepare(
        run, [items[i] for i in with_text], names=[f"observations[{i}]" for i in with_text]
    )
    observations = [
        NewObservation.of_rewards(prompt.prompt_id if index is None else index, item.rewards)
        if item.rewards is not None
        else NewObservation.of_counts(
            prompt.prompt_id if index is None else index, item.successes or 0.0, item.attempts or 1
        )
        for item, prompt, index in zip(items, prompts, known, strict=True)
    ]
    content = body.model_dump_json(exclude={"run", "request_id"}, exclude_none=True)
    appended = hands.store.append_observations(
        run.id,
        step=body.step,
        observations=observations,
        model_version=run.model_version,
        now=now(),
        request_id=body.request_id,
        request_hash=content_hash(content) if body.request_id is not None else None,
        selection_id=body.selection_id,
        new_prompts=prepared.prompts,
        vectors=prepared.vectors,
        embedder=prepared.embedder if prepared.prompts else None,
        embedding_width=prepared.embedding_width if prepared.prompts else None,
    )
    return ObserveReply(
        run=body.run,
        log_position=appended.log_position,
        accepted=appended.accepted,
        model_version=appended.model_version,
        replayed=appended.replayed,
    )


@router.post("/predict", summary="Predict success rates")
def predict(body: PredictRequest, hands: Hands) -> PredictReply:
    """The belief about prompts of the pool, or about new texts, in the order asked. Nothing is stored."""
    view = hands.views.recent(body.run, hands.predict_staleness_seconds)
    run, live = view.run, view.live
    names = [f"prompts[{i}]" for i in range(len(body.prompts))]
    asked = beliefs_about(hands.featurizer, run, live, body.prompts, names=names)
    return PredictReply(
        run=body.run,
        model_version=asked.model_version,
        log_position=asked.log_position,
        predictions=predictions(asked.ids, asked.a, asked.b, asked.seen, body.group_size or run.settings.group_size),
    )


@router.post("/select_batch", summary="Choose the prompts of a step", response_model=SelectReply)
def select_batch(body: SelectRequest, hands: Hands) -> Response:
    """Choose and record a batch. The same (run, step) and arguments return the same batch, other arguments 409.

    Prompts that earlier selections chose and whose outcomes have not come within `lease_steps` are left out, unless
    `allow_outstanding` is set or too few others remain: then those waited for the longest are chosen again, and
    `outstanding` says how many. Steps may be chosen in any order.
    """
    run = hands.store.run(body.run)
    arguments_hash = content_hash(body.model_dump_json(exclude={"run"}))  # as a fork's: it has another name
    recorded = hands.store.selection(run.id, body.step, arguments_hash=arguments_hash)
    replayed = recorded is not None
    while recorded is None:
        live = hands.live_runs.view(run)
        with live.selecting:  # the next choice knows of this one
            run = hands.store.run(body.run)
            live = hands.live_runs.at_head(run)
            with live.lock:
                reply, choice, beliefs = _choose(body, run, live)
            try:
                recorded, replayed = hands.store.record_selection(
                    run.id,
                    selection_id=reply.selection_id,
                    step=body.step,
                    arguments_hash=arguments_hash,
                    prompts=choice.prompts.tolist(),
                    reply=reply.model_dump_json(exclude={"run", "replayed"}),
                    now=now(),
                    chosen_at=reply.log_position,
                    is_alone=run.settings.lease_steps > 0 and not body.allow_outstanding,
                    control_share=run.settings.control_share,
                    control=choice.control.tolist(),
                    beliefs=beliefs,
                )
            except ChoiceOutdated as error:  # by another process: once more, on what is now
                logger.info("%s", error)
    # The recorded reply is JSON already: of this run and of those that fork from it.
    head = f'{{"run":"{run.name}","replayed":{str(replayed).lower()},'
    return Response(head + recorded.reply[1:], media_type="application/json")


def _choose(body: SelectRequest, run: Run, live: LiveRun) -> tuple[SelectReply, Choice, tuple[FloatArray, FloatArray]]:
    settings = run.settings

    def setting(name: str) -> Any:
        given = getattr(body, name)
        return getattr(settings, name) if given is None else given

    acquisition = body.acquisition or settings.effective_acquisition
    arguments = SelectArguments(
        step=body.step,
        batch_size=body.batch_size,
        seed=body.seed,
        predictor=settings.predictor,
        acquisition=acquisition,
        group_size=setting("group_size"),
        target_rate=setting("target_rate"),
        optimism=setting("optimism"),
        cooldown_steps=setting("cooldown_steps"),
        max_visits=setting("max_visits"),
        lease_steps=settings.lease_steps,
        allow_outstanding=body.allow_outstanding,
        candidates=body.candidates,
        exclude=body.exclude or (),
        groups=setting("groups") or {},
        groups_at_most=setting("groups_at_most") or {},
        are_groups_strict=body.groups is not None,
        reprobe_share=settings.reprobe_share_under(acquisition),
        control_share=settings.control_share,
        may_fall_back=settings.fallback,
    )
    choice, a, b, fallback = live.choose(run.name, arguments)
    mean, std = mean_and_std(a, b)
    informative = choice.informative_probabilities
    ids = [live.pool.prompt_ids[i] for i in choice.prompts]
    reply = SelectReply(
        run=run.name,
        step=body.step,
        selection_id=uuid.uuid4().hex,
        model_version=live.state.model_version,
        log_position=live.state.position,
        replayed=False,
        outstanding=choice.n_outstanding,
        forecast=Forecast(
            informative_share=choice.informative_share,
            informative_groups=float(informative.sum()),
            pad_to=choice.pad_to,
        ),
        fallback=FallbackNotice(reason=fallback.reason, since_step=fallback.since_step) if fallback else None,
        prompts=tuple(
            SelectedPrompt(
                prompt_id=prompt_id,
                group=live.pool.groups[index],
                success_rate=rate,
                std=deviation,
                informative_probability=probability,
                arm="control" if is_control else "policy",
            )
            for prompt_id, index, rate, deviation, probability, is_control in zip(
                ids,
                choice.prompts,
                mean.tolist(),
                std.tolist(),
                informative.tolist(),
                choice.control.tolist(),
                strict=True,
            )
        ),
    )
    return reply, choice, (a, b)
