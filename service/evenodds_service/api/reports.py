"""The report of a run. Translates the wire into a look at the folded view, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query

from evenodds.schemas import MAX_STEP, FallbackNotice, RunReport
from evenodds_service.api.services import PROBLEMS, Hands, RunPath
from evenodds_service.domain.report import report

router = APIRouter(responses=PROBLEMS)


@router.get("/runs/{run}/report", tags=["runs"], summary="How well a run is served")
def get_report(
    run: RunPath,
    hands: Hands,
    since_step: Annotated[
        int, Query(ge=0, le=MAX_STEP, description="leave out windows of steps that end before this one")
    ] = 0,
) -> RunReport:
    """Calibration, rank correlation by step window, both arms, lift over the control arm, coverage, groups, skill.

    Read from sums that the log's fold keeps: the same at every replica, and as fast after a million observations.
    """
    stored = hands.store.run(run)
    live = hands.live_runs.at_head(stored)
    with live.lock:
        state = live.state
        found = report(state, live.pool, since_step=since_step)
        fallback = live.fallback(stored.settings.predictor) if stored.settings.fallback else None
        position, version, n = state.position, state.model_version, state.n_observations
    return RunReport.model_validate(
        {
            **asdict(found),
            "run": run,
            "log_position": position,
            "model_version": version,
            "observations": n,
            "fallback": FallbackNotice(reason=fallback.reason, since_step=fallback.since_step) if fallback else None,
        }
    )
