"""The trainer's and gateway's endpoints: observe, predict, select_batch.

Each translates the wire into values, calls the store and the live view, and translates back.
"""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi.responses import Response

from evenodds.schemas import (
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
from evenodds_service.api.services import PROBLEMS, Hands, content_hash, mean_and_std, now, predictions
from evenodds_service.domain.types import NewObservation
from evenodds_service.live_run import LiveRun, SelectArguments, UnknownPrompts
from evenodds_service.storage.store import Run

router = APIRouter(responses=PROBLEMS, tags=["loop"])


@router.post("/observe", summary="Report outcomes of attempts")
def observe(body: ObserveRequest, hands: Hands) -> ObserveReply:
    """Append outcomes to the run's log. All or nothing; with a `request_id` the call may be repeated safely.

    An attempt that failed or timed out for other reasons than the policy is left out of `attempts`.
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
    content = body.model_dump_json(exclude={"request_id"}, exclude_none=True)
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
    run = hands.store.run(body.run)
    live = hands.live_runs.at_head(run)
    group_size = body.group_size or run.settings.group_size
    ids = [new_prompt(item).prompt_id for item in body.prompts]
    with live.lock:
        known = [live.pool.index.get(prompt_id) for prompt_id in ids]
    outside = [i for i, index in enumerate(known) if index is None]
    unknown = [ids[i] for i in outside if body.prompts[i].text is None]
    if unknown:
        hint = "send its text instead, or load it with POST /runs/{run}/prompts"
        raise UnknownPrompts(body.run, unknown, path="prompts", hint=hint)
    block = None
    if outside:
        names = [f"prompts[{i}]" for i in outside]
        block = hands.featurizer.block(run, [body.prompts[i] for i in outside], names=names)
    inside = [i for i, index in enumerate(known) if index is not None]
    rows = np.array([index for index in known if index is not None], dtype=np.int64)
    n = len(ids)
    a, b, seen = np.ones(n), np.ones(n), np.zeros(n)
    with live.lock:
        position, model_version = live.state.position, live.state.model_version
        if inside:
            a[inside], b[inside] = live.beliefs(run.settings.predictor, rows)
            seen[inside] = live.state.attempts_N[rows]
        if block is not None:
            a[outside], b[outside] = live.new_beliefs(
                run.settings.predictor, [body.prompts[i].text for i in outside], block
            )
    return PredictReply(
        run=body.run,
        model_version=model_version,
        log_position=position,
        predictions=predictions(ids, a, b, seen, group_size),
    )


@router.post("/select_batch", summary="Choose the prompts of a step", response_model=SelectReply)
def select_batch(body: SelectRequest, hands: Hands) -> Response:
    """Choose and record a batch. The same (run, step) and arguments return the same batch, other arguments 409."""
    run = hands.store.run(body.run)
    arguments_hash = content_hash(body.model_dump_json())
    recorded = hands.store.selection(run.id, body.step, arguments_hash=arguments_hash)
    replayed = recorded is not None
    if recorded is None:
        live = hands.live_runs.at_head(run)
        with live.lock:
            reply, indices = _choose(body, run, live)
        recorded, replayed = hands.store.record_selection(
            run.id,
            selection_id=reply.selection_id,
            step=body.step,
            arguments_hash=arguments_hash,
            prompts=indices,
            reply=reply.model_dump_json(exclude={"replayed"}),
            now=now(),
        )
    # The recorded reply is JSON already; only `replayed` differs from call to call.
    return Response(f'{{"replayed":{str(replayed).lower()},{recorded.reply[1:]}', media_type="application/json")


def _choose(body: SelectRequest, run: Run, live: LiveRun) -> tuple[SelectReply, list[int]]:
    settings = run.settings

    def setting(name: str) -> Any:
        given = getattr(body, name)
        return getattr(settings, name) if given is None else given

    arguments = SelectArguments(
        step=body.step,
        batch_size=body.batch_size,
        seed=body.seed,
        predictor=settings.predictor,
        acquisition=body.acquisition or settings.effective_acquisition,
        group_size=setting("group_size"),
        target_rate=setting("target_rate"),
        optimism=setting("optimism"),
        diversity=setting("diversity"),
        cooldown_steps=setting("cooldown_steps"),
        max_visits=setting("max_visits"),
        candidates=body.candidates,
        exclude=body.exclude or (),
        groups=body.groups or {},
    )
    choice, a, b = live.choose(run.name, arguments)
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
        forecast=Forecast(
            informative_share=choice.informative_share,
            informative_groups=float(informative.sum()),
            pad_to=choice.pad_to,
        ),
        prompts=tuple(
            SelectedPrompt(
                prompt_id=prompt_id,
                group=live.pool.groups[index],
                success_rate=rate,
                std=deviation,
                informative_probability=probability,
            )
            for prompt_id, index, rate, deviation, probability in zip(
                ids, choice.prompts, mean.tolist(), std.tolist(), informative.tolist(), strict=True
            )
        ),
    )
    return reply, choice.prompts.tolist()
