"""What a run is made to forget: rewind after a trainer's restart, retract after bad outcomes."""

from __future__ import annotations

from fastapi import APIRouter

from evenodds.schemas import RetractRequest, RewindRequest, Voided
from evenodds_service.api.dependencies import PROBLEMS, Dependencies, RunPath
from evenodds_service.api.wire import now
from evenodds_service.storage import values

router = APIRouter(responses=PROBLEMS, tags=["runs"])


@router.post("/runs/{run}/rewind", summary="Forget what came after a step")
def rewind(run: RunPath, body: RewindRequest, services: Dependencies) -> Voided:
    """Forget every observation and selection with a step above `step`, after a trainer restarted from its checkpoint.

    The run then stands as if none of it had happened. Prompts stay in the pool. A step above may be selected and
    reported anew, also under the same request ids. Outcomes for a selection that was forgotten are refused (409). With
    an `incarnation`, what the restarted trainer itself has already reported is kept, and what an older one still
    reports for these steps is refused (409), also without a selection.
    """
    run_id = services.store.run(run).id
    voided = services.store.rewind(run_id, step=body.step, incarnation=body.incarnation, now=now())
    services.live_runs.forget(run)
    services.run_states.look_at(run)
    return _reply(run, voided)


@router.post("/runs/{run}/retract", summary="Drop observations")
def retract(run: RunPath, body: RetractRequest, services: Dependencies) -> Voided:
    """Drop the observations that meet every condition, for example those of the steps when a verifier was down.

    Selections stay. The run then stands as if the observations had never been reported. A report that was dropped
    whole may be sent again under its request id.
    """
    if body.prompt_ids is None:
        stored, prompts = services.store.run(run), None
    else:
        stored, live, _ = services.live_runs.at_head(run)
        with live.lock:
            rows = live.indices(run, body.prompt_ids, path="prompt_ids", hint="leave it out")
            prompts = live.state.serials_N[rows].tolist()
    voided = services.store.retract(
        stored.id,
        from_step=body.from_step,
        to_step=body.to_step,
        prompts=prompts,
        request_id=body.request_id,
        now=now(),
    )
    services.live_runs.forget(run)
    services.run_states.look_at(run)
    return _reply(run, voided)


def _reply(run: str, voided: values.Voided) -> Voided:
    return Voided(
        run=run,
        log_position=voided.log_position,
        head_step=voided.head_step,
        voided_observations=voided.n_observations,
        voided_selections=voided.n_selections,
    )
