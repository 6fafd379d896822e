"""Runs as resources.

Each endpoint translates the wire into values, calls the store, and translates back.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from evenodds import schemas
from evenodds.schemas import (
    OLDER_NAMES,
    RefitPolicy,
    Retention,
    RunPage,
    RunSort,
    RunState,
    RunUpdate,
    SharePoint,
    Verdict,
)
from evenodds_service.api.cursors import cursor_at, place_of
from evenodds_service.api.dependencies import (
    EVENT_HEADER,
    FOLLOWED,
    PROBLEMS,
    CursorQuery,
    Dependencies,
    RunPath,
    Services,
)
from evenodds_service.api.middleware.access import Caller, may_touch
from evenodds_service.api.routes.refits import refit_state
from evenodds_service.api.wire import now
from evenodds_service.domain.learning.predictors import acquisition_of
from evenodds_service.domain.report.summary import Estimate, Summary
from evenodds_service.domain.selection.selection import reprobe_share_of
from evenodds_service.domain.settings import RunSettings, check_shares
from evenodds_service.errors import RunForbidden, RunUnknown, ScopeMissing
from evenodds_service.storage import values
from evenodds_service.storage.store import ApiKey, ListedRun, RunListing, Store

router = APIRouter(responses=PROBLEMS, tags=["runs"])

_STORED_AS = {"categories": "groups", "categories_at_most": "groups_at_most"}
"""Settings that the wire has another word for than the store."""


@router.put(
    "/runs/{run}", summary="Create or update a run", response_model=RunState, responses={201: {"model": RunState}}
)
def put_run(run: RunPath, body: RunUpdate, services: Dependencies, caller: Caller) -> JSONResponse:
    """Create the run (201), or change the settings that are sent (200). A field that is left out keeps its value.

    With `fork_of` the run must be new: it starts with the other's pool, settings and memory, as that run would stand
    after a rewind to `at_step`. The two share nothing afterwards. Repeating the call is safe.
    """
    try:
        settings = services.store.run(run).settings
    except RunUnknown:
        settings = RunSettings() if body.fork_of is None else services.store.run(body.fork_of).settings
    defaults: dict[str, Any] = {field.name: field.default for field in fields(RunSettings)}
    sent: dict[str, Any] = {
        _STORED_AS.get(name, name): getattr(body, name)
        for name in body.model_fields_set - {"refit", "retention", "fork_of", "at_step", "learn_from", *OLDER_NAMES}
    }
    if "refit" in body.model_fields_set:
        policy = body.refit or RefitPolicy()
        sent |= {f"refit_{name}": getattr(policy, name) for name in policy.model_fields_set or RefitPolicy.model_fields}
    if "retention" in body.model_fields_set:
        kept = body.retention
        sent |= {"retain_prompts": kept and kept.prompts, "retain_days": kept and kept.days}
        sent["is_retention_settled"] = None
    changes = {name: defaults[name] if value is None else value for name, value in sent.items()}
    before, settings = settings, replace(settings, **changes, **_learning(services.store, caller, settings, body))
    check_shares(settings.groups or {}, settings.groups_at_most or {})
    services.featurizer.embedder(settings)  # a model that cannot be loaded is refused here, not at the first prompt
    created = False
    if body.fork_of is not None:
        _, created = services.store.fork_run(run, settings, fork_of=body.fork_of, at_step=body.at_step, now=now())
    if not created:
        stored, created = services.store.put_run(run, settings, now=now())
        if stored.n_prompts and _learned(before) != _learned(settings):
            services.store.request_refit(stored.id, now=now())
    services.live_runs.forget(run)
    services.run_states.look_at(run)
    return JSONResponse(_watched(services, run).model_dump(mode="json"), 201 if created else 200)


def _learning(store: Store, caller: ApiKey | None, before: RunSettings, body: RunUpdate) -> dict[str, Any]:
    """From which runs to learn, where the body says it, and within which runs: those of its key.

    Raises:
        RunForbidden: a run is named that the key may not touch.
        RunUnknown: a run is named that does not exist.
        ScopeMissing: the key may not read.
    """
    bound: tuple[str, ...] = () if caller is None or caller.runs == "*" else (caller.runs,)
    if "learn_from" not in body.model_fields_set:
        inherited = body.fork_of is not None and before.learn_from
        return {"learn_within": tuple(dict.fromkeys((*before.learn_within, *bound)))} if inherited else {}
    names = body.learn_from or ()
    if names and caller is not None and "read" not in caller.scopes:
        scopes = ", ".join(sorted(caller.scopes))
        raise ScopeMissing(f"learn_from needs the scope 'read', key {caller.name!r} has {scopes}")
    for name in names:
        if "*" in name or "?" in name:
            continue
        if caller is not None and not may_touch(caller, name):
            raise RunForbidden(
                f"learn_from: key {caller.name!r} is bound to runs {caller.runs!r}, not to {name!r}: leave it out, or "
                "ask for a key that may read both"
            )
        if name in (before.learn_from or ()):
            continue  # one that was deleted since may stand there
        try:
            store.run(name)
        except RunUnknown:
            raise RunUnknown(
                f"learn_from: run {name!r} does not exist: correct the name, leave it out, or create that run first"
            ) from None
    return {"learn_from": names or None, "learn_within": bound if names else ()}


def _learned(settings: RunSettings) -> tuple[object, ...]:
    return settings.learn_from, settings.learn_within, settings.data_set


@router.get("/runs", summary="List runs", responses=FOLLOWED)
def list_runs(
    services: Dependencies,
    caller: Caller,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    cursor: CursorQuery = None,
    state: Annotated[tuple[Verdict, ...], Query(description="runs of this verdict; may be given several times")] = (),
    alarm: Annotated[
        str | None, Query(max_length=64, description="runs with this alarm on, by its code, or any")
    ] = None,
    sort: Annotated[
        RunSort,
        Query(
            description="order of the list: `name`; `alarms`, broken runs and those with most alarms first; "
            "`activity`, the newest first; `lift` or `informative`, the largest first; `created`, the newest first"
        ),
    ] = "name",
    search: Annotated[str | None, Query(min_length=1, max_length=128, description="a part of the name")] = None,
) -> RunPage:
    """Runs with how they stand, in pages. A key that is bound to certain runs sees those, and learns of no others.

    Pages by name are exact. By anything else a run that moves meanwhile may stand on two pages, or on none.
    """
    names = None if caller is None or caller.runs == "*" else caller.runs
    if names is None:  # whose stream of events tells of all runs
        response.headers[EVENT_HEADER] = services.changes.shown(None)  # read before what it speaks of
    asked = RunListing(names=names, search=search or "", verdicts=state, alarm=alarm, sort=sort)
    listing = f"runs {sort} {sorted(state)} {alarm} {search}"
    place = place_of(cursor, listing=listing, caller=caller)
    is_by_name = sort == "name"
    after, skipped = (place or "", 0) if is_by_name else ("", int(place or 0))
    found = services.store.listed_runs(asked, after=after, skipped=skipped, limit=limit + 1)
    next_cursor = None
    if len(found) > limit:
        end = found[limit - 1].run.name if is_by_name else str(skipped + limit)
        next_cursor = cursor_at(end, listing=listing, caller=caller)
    return RunPage(
        runs=tuple(_run_state(listed) for listed in found[:limit] if may_touch(caller, listed.run.name)),
        next_cursor=next_cursor,
    )


@router.get("/runs/{run}", summary="State of a run")
def get_run(run: RunPath, services: Dependencies) -> RunState:
    """Settings, pool size, head of the log, model version, and alarms: what a person should look at."""
    return _watched(services, run)


@router.delete("/runs/{run}", summary="Delete a run", status_code=204)
def delete_run(run: RunPath, services: Dependencies) -> Response:
    """Delete the run with its pool, history and selections. This cannot be undone."""
    stored = services.store.run(run)
    services.store.delete_run(run)
    services.live_runs.drop(stored)
    return Response(status_code=204)


def _watched(services: Services, name: str) -> RunState:
    """The run as it stands now, by what its log folds to."""
    run, live, _ = services.live_runs.at_head(name)
    summary = live.summary(run.settings)[1]
    seen = services.store.run_states([run.id]).get(run.id)
    refits = services.store.refits(run.id, limit=1)
    active_at, began_at = (None, None) if seen is None else (seen.active_at, seen.began_at)
    state = values.RunState(run.id, run.log_position, summary, active_at, began_at, now())
    return _run_state(ListedRun(run, state, refits[0] if refits else None))


def _estimate(found: Estimate | None) -> schemas.Estimate | None:
    return None if found is None else schemas.Estimate(value=found.value, low=found.low, high=found.high)


def _verdict(listed: ListedRun) -> Verdict | None:
    """Where nobody has looked at the run yet, only that there is nothing to look at is known."""
    if listed.state is not None:
        return listed.state.summary.verdict
    return "no_data" if listed.run.n_observations == 0 else None


def _run_state(listed: ListedRun) -> RunState:
    run, settings = listed.run, listed.run.settings
    summary = listed.state.summary if listed.state is not None else Summary(verdict="no_data")
    return RunState(
        run=run.name,
        predictor=settings.predictor,
        group_size=settings.group_size,
        target_rate=settings.target_rate,
        embedder=settings.embedder or "builtin",
        embedder_prompt=settings.embedder_prompt,
        acquisition=acquisition_of(settings),
        optimism=settings.optimism,
        diversity=settings.diversity,
        cooldown_steps=settings.cooldown_steps,
        lease_steps=settings.lease_steps,
        max_visits=settings.max_visits,
        keep_text=settings.keep_text,
        model_size=settings.model_size,
        refit=RefitPolicy(
            every_observations=settings.refit_every_observations, every_seconds=settings.refit_every_seconds
        ),
        control_share=settings.control_share,
        reprobe_share=reprobe_share_of(settings),
        categories=dict(settings.groups) if settings.groups else None,
        categories_at_most=dict(settings.groups_at_most) if settings.groups_at_most else None,
        fallback=settings.fallback,
        learn_from=settings.learn_from,
        data_set=settings.data_set,
        retention=None
        if settings.retain_prompts is None
        else Retention(prompts=settings.retain_prompts, days=settings.retain_days),
        base_step=run.base_step,
        last_refit=refit_state(listed.refit) if listed.refit is not None else None,
        pool_size=run.pool_size,
        log_position=run.log_position,
        head_step=run.head_step,
        model_version=run.model_version,
        observations=run.n_observations,
        fork_of=run.fork_of,
        at_step=run.fork_step,
        created_at=run.created_at,
        verdict=_verdict(listed),
        lift=_estimate(summary.lift),
        rollouts_saved=_estimate(summary.rollouts_saved),
        informative_shares=tuple(
            SharePoint(first_step=point.first_step, last_step=point.last_step, share=point.share)
            for point in summary.informative_shares
        ),
        active_at=listed.state.active_at if listed.state is not None else None,
        began_at=listed.state.began_at if listed.state is not None else None,
        alarms=tuple(schemas.Alarm.model_validate(asdict(alarm)) for alarm in summary.alarms)
        if listed.state is not None
        else None,
    )
