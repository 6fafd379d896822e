"""The report of a run. Translates the wire into a look at the folded run, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query
from pydantic_core import to_jsonable_python

from evenodds.schemas import MAX_STEP, BeliefReport, BelievedPrompt, FallbackNotice, RunReport
from evenodds_service.api.dependencies import PROBLEMS, Dependencies, RunPath
from evenodds_service.api.middleware.access import Caller, may_touch
from evenodds_service.domain.arrays import IntArray
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.report.findings import notes
from evenodds_service.domain.report.report import report
from evenodds_service.domain.report.verdict import judged_lift, verdict_of

router = APIRouter(responses=PROBLEMS, tags=["runs"])

_BINS = 20
_SHOWN_TEXT = 500


@router.get("/runs/{run}/report", summary="How well a run is served")
def get_report(
    run: RunPath,
    services: Dependencies,
    caller: Caller,
    since_step: Annotated[
        int, Query(ge=0, le=MAX_STEP, description="leave out windows of steps that end before this one")
    ] = 0,
) -> RunReport:
    """Calibration, rank correlation by step window, both arms, lift over the control arm, coverage, categories, skill.

    Read from sums that the log's fold keeps: the same at every replica, and as fast after a million observations.
    """
    stored, live, _ = services.live_runs.at_head(run)
    with live.lock:
        state = live.state
        in_common = live.model.in_common if live.model is not None else {}
        found = report(state, live.pool, since_step=since_step, in_common=in_common)
        verdict = verdict_of(state, live.alarms(stored.settings), judged_lift(state))
        noted = notes(state, stored.settings)
        fallback = live.fallback(stored.settings.predictor) if stored.settings.fallback else None
        position, version, n = state.position, state.model_version, state.n_observations
    if found.others is not None:  # a key that is bound to runs learns of no others
        seen = tuple(source for source in found.others.sources if source.run is None or may_touch(caller, source.run))
        found = replace(found, others=replace(found.others, sources=seen))
    return RunReport.model_validate(
        {
            **to_jsonable_python(found),  # asdict takes four times as long
            "run": run,
            "verdict": verdict,
            "notes": to_jsonable_python(noted),
            "log_position": position,
            "model_version": version,
            "observations": n,
            "fallback": FallbackNotice(reason=fallback.reason, since_step=fallback.since_step) if fallback else None,
        }
    )


@router.get("/runs/{run}/beliefs", summary="Beliefs about the whole pool")
def get_beliefs(
    run: RunPath,
    services: Dependencies,
    shown: Annotated[int, Query(ge=0, le=100, description="how many of the hardest and of the easiest prompts")] = 8,
) -> BeliefReport:
    """How the believed success rates and informative probabilities are spread, and the hardest and easiest prompts."""
    stored, live, _ = services.live_runs.at_head(run)
    with live.lock:
        a, b = live.beliefs(stored.settings.predictor)
        seen, serials = live.state.attempts_N.copy(), live.state.serials_N.copy()
        position, version = live.state.position, live.state.model_version
    rates = a / (a + b)
    informative, _ = informative_moments(a, b, stored.settings.group_size)
    shown = min(shown, len(rates))

    def described(indices: IntArray) -> tuple[BelievedPrompt, ...]:
        prompts = services.store.prompts_at(stored.id, serials[indices].tolist())
        places = np.searchsorted(serials, [prompt.index for prompt in prompts])
        return tuple(
            BelievedPrompt(
                prompt_id=prompt.prompt_id,
                category=prompt.group,
                text=prompt.text[:_SHOWN_TEXT] if prompt.text is not None else None,
                success_rate=float(rates[place]),
                informative_probability=float(informative[place]),
                attempts_seen=int(seen[place]),
            )
            for prompt, place in zip(prompts, places.tolist(), strict=True)
        )

    order = np.argsort(rates, kind="stable") if shown else np.zeros(0, np.int64)
    return BeliefReport(
        run=run,
        model_version=version,
        log_position=position,
        pool_size=len(rates),
        success_rate_counts=tuple(np.histogram(rates, _BINS, (0.0, 1.0))[0].tolist()),
        informative_counts=tuple(np.histogram(informative, _BINS, (0.0, 1.0))[0].tolist()),
        hardest=described(order[:shown]),
        easiest=described(order[::-1][:shown]),
    )
