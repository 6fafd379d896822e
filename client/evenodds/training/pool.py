"""What a trainer finds at the service when it starts: its run, and a pool that may be more or less than its own.

A data set changes between two starts: prompts are left out, added, edited. The trainer's own prompts are what it can
attempt, so they are the candidates of every choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from evenodds.client import Client
from evenodds.errors import Forbidden, NotFound, ProblemError
from evenodds.schemas import MAX_ITEMS, RunState, SelectRequest
from evenodds.training.inputs import Setup
from evenodds.training.status import Status

_NAMED = 3
"""So many of a list stand in a message."""


@dataclass(frozen=True)
class Pool:
    """What the service has for this trainer.

    Attributes:
        head_step: The highest step of the run before this trainer did anything; None for a new run.
        group_size: Attempts per prompt that the run counts on.
        n_missing: The trainer's prompts that the pool lacks.
        candidates: The trainer's prompts, where the pool has others too; None for the whole pool.
        exclude: The others, where they are fewer than can be listed and the trainer's are more.
    """

    head_step: int | None = None
    group_size: int | None = None
    n_missing: int = 0
    candidates: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = field(default=())

    def narrowed(self, request: SelectRequest) -> SelectRequest:
        """The request, so that only the trainer's prompts can be chosen."""
        if request.candidates is not None:
            return request
        if self.candidates is not None:
            left_out = frozenset(request.exclude or ())
            among = tuple(prompt_id for prompt_id in self.candidates if prompt_id not in left_out)
            return request.model_copy(update={"candidates": among, "exclude": None})
        if self.exclude and len(self.exclude) + len(request.exclude or ()) <= MAX_ITEMS:
            return request.model_copy(update={"exclude": (*(request.exclude or ()), *self.exclude)})
        return request


def load_pool(client: Client, setup: Setup, prompt_ids: Sequence[str], status: Status) -> Pool:
    """Create the run and load its pool, as far as that is the trainer's wish, and look at what is there.

    Prompts that the pool has with another content keep it, and are named in a warning.

    Raises:
        EvenOddsError: The service does not do it now, or refuses the settings.
    """
    if setup.run_settings is None and setup.prompts is None:
        return look_at_pool(client, setup, prompt_ids, status)
    run = put_run(client, setup, status)
    if setup.prompts is None:
        return _compared(client, setup, run, prompt_ids, run.pool_size, status)
    added = client.add_prompts(setup.run, setup.prompts, keep_existing=True)
    if added.conflicts:
        named = ", ".join(f"{i!r} (another {what})" for i, what in list(added.conflicts.items())[:_NAMED])
        status.say_once(
            "conflicts",
            f"{len(added.conflicts)} of {len(setup.prompts)} prompts have changed since the pool was loaded; it keeps "
            f"their old content, and the other prompts are loaded: {named}. Give a changed prompt another prompt_id",
        )
    return _compared(client, setup, run, prompt_ids, added.pool_size, status, is_loaded=True)


def put_run(client: Client, setup: Setup, status: Status) -> RunState:
    """Create the run or change its settings; without `learn_from` where a source is unknown or not for this key.

    Raises:
        EvenOddsError: The service does not do it now, or refuses the settings.
    """
    settings = dict(setup.run_settings or {})
    try:
        return client.put_run(setup.run, **settings)
    except (Forbidden, NotFound) as error:
        if not error.detail.startswith("learn_from"):
            raise
        named = list(settings.pop("learn_from", None) or ())
        status.say_once(
            "learn_from",
            f"the service refused run_settings['learn_from'] {named!r}, and the run goes on without it: "
            f"{error.detail}. What other runs showed is used once the mended list is set, at the next start or with "
            "Client.put_run",
        )
    return client.put_run(setup.run, **settings)


def look_at_pool(
    client: Client, setup: Setup, prompt_ids: Sequence[str], status: Status, *, is_loaded: bool = False
) -> Pool:
    """What the service has, without a change. `is_loaded`: the pool has all of the trainer's prompts."""
    try:
        run = client.run(setup.run)
    except NotFound:
        return Pool(n_missing=len(prompt_ids))
    return _compared(client, setup, run, prompt_ids, run.pool_size, status, is_loaded=is_loaded)


def _compared(
    client: Client,
    setup: Setup,
    run: RunState,
    prompt_ids: Sequence[str],
    pool_size: int,
    status: Status,
    *,
    is_loaded: bool = False,
) -> Pool:
    """The trainer's prompts beside the pool's. `is_loaded`: the pool has all of the trainer's."""
    pool = Pool(run.head_step, run.group_size)
    n_own = len(prompt_ids)
    if is_loaded and pool_size <= n_own:
        return pool
    if is_loaded and n_own <= MAX_ITEMS:
        return Pool(run.head_step, run.group_size, candidates=tuple(prompt_ids))
    there = {prompt.prompt_id for prompt in client.prompts(setup.run)}
    own = tuple(prompt_id for prompt_id in prompt_ids if prompt_id in there)
    others = there.difference(own)
    if len(own) < n_own:
        lacking = next(prompt_id for prompt_id in prompt_ids if prompt_id not in there)
        status.say_once(
            "missing",
            f"the pool lacks {n_own - len(own)} of this trainer's {n_own} prompts, so that the service never chooses "
            f"them: {lacking!r} ...; give the selector their texts, or load them with `evenodds import`",
        )
    candidates: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    if others and own and len(own) <= MAX_ITEMS:
        candidates = own
    elif others and len(others) <= MAX_ITEMS:
        exclude = tuple(sorted(others))
    elif others:
        status.say_once(
            "others",
            f"the pool has {len(others)} prompts besides this trainer's {len(own)}: more than a request can list "
            f"({MAX_ITEMS}), so that batches may be uniform: use a run of its own for this data set",
        )
    return Pool(run.head_step, run.group_size, n_own - len(own), candidates, exclude)


def is_for_good(error: ProblemError) -> bool:
    """Whether the service itself, and no proxy, has refused a call for what it holds."""
    return error.code == "prompt_unknown" or (error.status in (409, 413, 422) and not error.code.startswith("http_"))
