"""The pool of a run as a resource: load prompts, list them, look at one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor

from evenodds.schemas import (
    KnownCounts,
    PromptId,
    PromptIn,
    PromptInfo,
    PromptPage,
    PromptsAdded,
    PromptsIn,
    PromptState,
    Visit,
    VisitForecast,
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
from evenodds_service.api.intervals import beta_intervals, credible_intervals
from evenodds_service.api.middleware.access import Caller
from evenodds_service.api.middleware.request_body import forget, lift_limit
from evenodds_service.api.wire import now, predictions
from evenodds_service.domain.prompts import KnownRate, Prompt
from evenodds_service.errors import PromptConflict, VectorsGone
from evenodds_service.runtime.retention import erase
from evenodds_service.storage import values
from evenodds_service.storage.store import PromptVisit, Run

_NDJSON = "application/x-ndjson"
_NDJSON_BLOCK = 2_000
_MAX_BLOCK_BYTES = 16 * 2**20
_MAX_LINE_BYTES = 8 * 2**20
_HISTORY = 100

T = TypeVar("T")


class _AnyId(Convertor[str]):
    """The rest of a path, whatever it holds. Starlette's own `path` ends at a line break."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("id", _AnyId())
router = APIRouter(responses=PROBLEMS, tags=["prompts"])


@router.post(
    "/runs/{run}/prompts",
    summary="Load prompts into the pool",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/PromptsIn"}},
                _NDJSON: {
                    "schema": {"type": "string", "description": "one PromptIn as JSON on each line"},
                    "example": '{"prompt_id": "a", "text": "1 + 1 = ?"}\n{"prompt_id": "b", "text": "2 + 2 = ?"}\n',
                },
            },
        }
    },
)
async def add_prompts(
    run: RunPath,
    request: Request,
    services: Dependencies,
    first_line: Annotated[
        int, Query(ge=1, le=2**53, description="of NDJSON: by which number errors call the first line")
    ] = 1,
    keep_existing: Annotated[
        bool,
        Query(description="prompts that the pool has with other content are left as they are and named in `conflicts`"),
    ] = False,
) -> PromptsAdded:
    """Add prompts. Repeatable: those that the pool has already, with the same content, count as existing.

    A JSON body is all or nothing. NDJSON (`application/x-ndjson`, one prompt a line, any number) is stored in blocks
    of 2,000 lines, fewer where they are long: an error names its line and says which lines were stored; the same file
    may be sent again. Any body may be compressed (`Content-Encoding: gzip`).
    """
    stored = await run_in_threadpool(services.store.run, run)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _NDJSON:
        body = _parsed(PromptsIn.model_validate_json, await request.body(), ())
        names = [f"prompts[{i}]" for i in range(len(body.prompts))]
        return await run_in_threadpool(_add_block, services, stored, body.prompts, names, keep_existing)
    lift_limit(request)
    # Any error tells.
    request.state.done = "no line was stored" if first_line == 1 else f"no line from {first_line} on was stored"
    added = existing = 0
    conflicts: dict[str, str] = {}
    line = first_line - 1
    last: PromptsAdded | None = None
    async for lines in _line_blocks(request.stream()):
        contents = {f"line {line + i}": content for i, content in enumerate(lines, start=1) if content}
        line += len(lines)
        if contents:
            try:
                last = await run_in_threadpool(_add_lines, services, stored, contents, keep_existing)
            except PromptConflict as error:
                request.state.place = tuple(contents)[error.item]
                raise
            added, existing = added + last.added, existing + last.existing
            conflicts |= last.conflicts
        request.state.done = f"lines {first_line} to {line} were stored"
        forget(request)
    if last is None:
        raise RequestValidationError([_fault(("body",), "send at least one prompt, one JSON object a line")])
    return last.model_copy(update={"added": added, "existing": existing, "conflicts": conflicts})


def _add_lines(services: Services, run: Run, contents: Mapping[str, bytes], keeps_existing: bool) -> PromptsAdded:
    """Lines by their names. Parsed in a thread: thousands at once would keep the event loop from other requests."""
    items = [_parsed(PromptIn.model_validate_json, content, (name,)) for name, content in contents.items()]
    return _add_block(services, run, items, tuple(contents), keeps_existing)


def _add_block(
    services: Services, run: Run, items: Sequence[PromptIn], names: Sequence[str], keeps_existing: bool
) -> PromptsAdded:
    run = services.store.run(run.name)
    try:
        result = _added(services, run, items, names, keeps_existing)
    except VectorsGone:  # some that were stored before; now they are computed
        result = _added(services, run, items, names, keeps_existing)
    if result.added:
        services.run_states.look_at(run.name)
    return PromptsAdded(
        run=run.name,
        added=result.added,
        existing=result.existing,
        pool_size=result.pool_size,
        log_position=result.log_position,
        conflicts=dict(result.conflicts),
    )


def _added(
    services: Services, run: Run, items: Sequence[PromptIn], names: Sequence[str], keeps_existing: bool
) -> values.PromptsAdded:
    prepared = services.featurizer.prepare(run, items, names=names)
    return services.store.add_prepared(run.id, replace(prepared, keeps_existing=keeps_existing), now=now())


async def _line_blocks(stream: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Lines of a body in blocks of 2,000, or fewer where they are long, without holding the body."""
    rest = bytearray()
    lines: list[bytes] = []
    n_bytes = 0
    async for chunk in stream:
        rest += chunk
        complete: list[bytearray] = []
        if b"\n" in chunk:  # else a long line would be copied with every piece of it
            *complete, rest = rest.split(b"\n")
        for content in complete:
            lines.append(bytes(content.strip()))
            n_bytes += len(content)
            if len(lines) == _NDJSON_BLOCK or n_bytes >= _MAX_BLOCK_BYTES:
                yield lines
                lines, n_bytes = [], 0
        if len(rest) > _MAX_LINE_BYTES:
            message = f"a line is longer than {_MAX_LINE_BYTES:,} bytes: put each prompt on a line of its own"
            raise RequestValidationError([_fault((), message)])
    lines.append(bytes(rest.strip()))
    yield lines


@router.get("/runs/{run}/prompts", summary="List the pool")
def list_prompts(
    run: RunPath,
    services: Dependencies,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    cursor: CursorQuery = None,
    search: Annotated[
        str | None, Query(min_length=1, max_length=200, description="a part of the id or text, in any case")
    ] = None,
) -> PromptPage:
    """Prompts in the order in which they came, in pages; with `search`, those that have it in their id or text."""
    stored = services.store.run(run)
    listing = f"prompts of run {stored.id}"
    first = int(place_of(cursor, listing=listing, caller=caller) or 0)
    prompts = services.store.prompts(stored.id, first=first, limit=limit + 1, containing=search)
    following = prompts[limit].index if len(prompts) > limit else None
    return PromptPage(
        prompts=tuple(PromptInfo(**_prompt_fields(prompt)) for prompt in prompts[:limit]),
        next_cursor=None if following is None else cursor_at(str(following), listing=listing, caller=caller),
    )


@router.get("/runs/{run}/prompt", summary="A prompt by an id in the query", responses=FOLLOWED)
def find_prompt(
    run: RunPath, prompt_id: Annotated[PromptId, Query()], services: Dependencies, response: Response
) -> PromptState:
    """As `/runs/{run}/prompts/{prompt_id}`, for any id.

    No path can hold the ids `.` and `..`, and proxies change paths with `/` and some other characters.
    """
    return get_prompt(run, prompt_id, services, response)


@router.get("/runs/{run}/prompts/{prompt_id:id}", summary="A prompt's belief and history", responses=FOLLOWED)
def get_prompt(
    run: RunPath, prompt_id: Annotated[PromptId, Path()], services: Dependencies, response: Response
) -> PromptState:
    """One prompt with the present belief about it and its newest 100 observations."""
    response.headers[EVENT_HEADER] = services.changes.shown(run)  # read before what it speaks of
    prompt = services.store.prompt(services.store.run(run).id, prompt_id)
    stored, live, _ = services.live_runs.at_head(run)  # read after the prompt, so that its log holds the prompt's entry
    with live.lock:
        state, position, version = live.state, live.state.position, live.state.model_version
        index = live.indices(run, [prompt_id], path="prompt_id", hint="it was retired or erased meanwhile")
        a, b, experts = live.mixed_beliefs(stored.settings.predictor, index)
        seen = state.attempts_N[index]
        visits, last_step = int(state.visits_N[index[0]]), int(state.last_step_N[index[0]])
    history = services.store.prompt_history(stored.id, prompt.index, limit=_HISTORY) if visits else ()
    forecasts = _forecasts(services, stored.id, prompt.index, history)
    return PromptState(
        **_prompt_fields(prompt),
        run=run,
        model_version=version,
        log_position=position,
        belief=predictions([prompt_id], a, b, seen, stored.settings.group_size, credible_intervals(experts(), a, b))[0],
        visits=visits,
        last_step=last_step if last_step >= 0 else None,
        history=tuple(
            Visit(
                log_position=visit.log_position,
                step=visit.step,
                successes=visit.successes,
                attempts=int(visit.attempts),
                selection_id=visit.selection_id,
                forecast=forecasts.get(visit.selection_id),
            )
            for visit in history
        ),
    )


def _forecasts(
    services: Services, run_id: int, index: int, history: Sequence[PromptVisit]
) -> dict[str | None, VisitForecast]:
    """What was believed about the prompt when it was chosen, by selection."""
    selections = {visit.selection_id for visit in history if visit.selection_id is not None}
    beliefs = services.store.chosen_beliefs(run_id, index, selections)
    a_n, b_n = (np.array([belief[i] for belief in beliefs.values()]) for i in (0, 1))
    columns = zip(beliefs, a_n / (a_n + b_n), *beta_intervals(a_n, b_n), strict=True)
    return {
        name: VisitForecast(success_rate=float(rate), interval=(float(low), float(high)))
        for name, rate, low, high in columns
    }


@router.delete("/runs/{run}/prompts/{prompt_id:id}", summary="Erase a prompt", status_code=204)
def delete_prompt(run: RunPath, prompt_id: Annotated[PromptId, Path()], services: Dependencies) -> Response:
    """Remove a prompt with its text, its vectors and its outcomes from all that is stored. This cannot be undone.

    The counts that it added to what all prompts share stay, as numbers. The run's log is compacted up to now: a rewind,
    a retraction or a fork cannot reach back behind this call. Takes seconds in a large run.
    """
    stored, live, _ = services.live_runs.at_head(run)
    try:
        erase(services.store, services.decisions, live, stored, prompt_id, now=now())
    finally:  # the log has grown where only a part is done
        services.run_states.look_at(run)
    services.live_runs.forget(run)
    return Response(status_code=204)


@router.delete("/runs/{run}/prompt", summary="Erase a prompt by an id in the query", status_code=204)
def delete_found_prompt(run: RunPath, prompt_id: Annotated[PromptId, Query()], services: Dependencies) -> Response:
    """As `DELETE /runs/{run}/prompts/{prompt_id}`, for any id.

    No path can hold the ids `.` and `..`, and proxies change paths with `/` and some other characters.
    """
    return delete_prompt(run, prompt_id, services)


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "text": prompt.text,
        "category": prompt.group,
        "features": dict(prompt.features) if prompt.features else None,
        "prior_rate": prompt.prior_rate,
        "prior_rates": _rates_told(prompt.prior_rates),
        "answer": prompt.answer,
    }


def _rates_told(known: Mapping[str, KnownRate] | None) -> dict[str, float | KnownCounts] | None:
    if known is None:
        return None
    return {
        name: KnownCounts(successes=rate[0], attempts=rate[1]) if isinstance(rate, tuple) else rate
        for name, rate in known.items()
    }


def _fault(location: tuple[str, ...], message: str) -> dict[str, Any]:
    return {"type": "value_error", "loc": location, "msg": message, "input": None}


def _parsed(validate: Callable[[bytes], T], content: bytes, location: tuple[str, ...]) -> T:
    """Validate raw JSON; faults come out as FastAPI's own, with `location` before them."""
    try:
        return validate(content)
    except ValidationError as error:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as cause:
            where = f"byte 0x{content[cause.start]:02x} at position {cause.start}"
            message = ("" if location else "body: ") + f"it is not UTF-8 ({where}): encode it as UTF-8"
            raise RequestValidationError([_fault(location, message)]) from error
        faults = [{**fault, "loc": (*location, *fault["loc"])} for fault in error.errors(include_url=False)]
        raise RequestValidationError(faults) from error
