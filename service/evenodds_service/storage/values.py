"""The frozen values that a Store method returns. Nothing here is bound to a connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.log_entries import Entry
from evenodds_service.domain.report.summary import Summary, Verdict
from evenodds_service.domain.settings import RunSettings

Scope = Literal["read", "write", "admin"]
RefitStatus = Literal["pending", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it stands. `log_position` is the head of its log, `model_version` the newest snapshot that counts."""

    id: int
    name: str
    settings: RunSettings
    embedding_width: int | None  # length of the pool's vectors, fixed by the first one
    n_prompts: int
    log_position: int
    head_step: int | None
    n_observations: int
    model_version: int
    created_at: datetime
    void_position: int = 0  # of the newest rewind or retract in the log; 0 before the first
    fork_of: str | None = None  # name of the run that it started from
    fork_step: int | None = None  # as it stood at this step; None: with everything
    rate_names: tuple[str, ...] = ()  # who showed what the pool's prompts have among their `prior_rates`
    n_retired: int = 0  # of the `n_prompts` that have come
    retired_position: int = 0  # of the newest entry that retired some
    base_position: int = 0  # its log begins behind this position, from a checkpoint; 0: from nothing
    base_step: int | None = None  # the highest step up to there
    base_observations: int = 0  # that count up to there

    @property
    def pool_size(self) -> int:
        """Prompts that are in the pool."""
        return self.n_prompts - self.n_retired


@dataclass(frozen=True, slots=True)
class Voided:
    """What a rewind or retract made the run forget. `log_position` and `head_step` are the run's afterwards."""

    log_position: int
    head_step: int | None
    n_observations: int
    n_selections: int


@dataclass(frozen=True, slots=True)
class PromptsAdded:
    """`log_position` is the head of the log afterwards, also where nothing was new."""

    added: int
    existing: int
    pool_size: int
    log_position: int
    conflicts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """What a call wrote to the log: its entries, as anybody reads them, and the run as it stood right after them."""

    run: Run
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Appended:
    """`replayed` means that the request id was known: nothing was written, and the answer is the first one's."""

    log_position: int
    accepted: int
    model_version: int
    replayed: bool
    written: Written | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class NewSelection:
    """A batch that was chosen, on its way into the log.

    Attributes:
        selection_id: Unique in the run.
        reply: JSON text that is answered, less what changes on repetition.
        prompts: int64 [B], indices of the chosen prompts.
        control_share, control: The share of the control arm, and which of the prompts are in it, bool [B].
        a, b: Parameters of the belief about each prompt, positive, [B]; both or neither.
        chosen_at: Log position of the state that the batch was chosen in.
        is_alone: Whether the choice holds only if no other was recorded after `chosen_at`.
        unseen_share: As in `SelectEntry`.
    """

    selection_id: str
    step: int
    arguments_hash: str
    reply: str
    prompts: IntArray
    control_share: float = 0.0
    control: BoolArray | None = None
    a: FloatArray | None = None
    b: FloatArray | None = None
    chosen_at: int | None = None
    is_alone: bool = False
    unseen_share: float | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """A recorded batch. `reply` is the JSON text that was answered, less what changes on repetition."""

    selection_id: str
    step: int
    arguments_hash: str
    reply: str
    log_position: int  # of the log entry that records it


@dataclass(frozen=True, slots=True)
class PromptVisit:
    """One observation of one prompt, 0 <= successes <= attempts."""

    log_position: int
    step: int
    successes: float
    attempts: float
    selection_id: str | None


@dataclass(frozen=True, slots=True)
class Refit:
    """One fit of the shared model. `attempts` counts its claims: the number fences what is published."""

    id: int
    run_id: int
    status: RefitStatus
    worker: str | None
    attempts: int
    requested_at: datetime
    lease_until: datetime | None
    finished_at: datetime | None
    model_version: int | None
    report: Mapping[str, object] | None
    error: str | None


@dataclass(frozen=True, slots=True)
class NewSnapshot:
    """A fitted model on its way into the log.

    Attributes:
        fitted_position: Log position whose history the weights were fitted on.
        report: Kept as JSON; no NaN, no infinity.
    """

    embedder: str
    weights: bytes
    fitted_position: int
    report: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A fitted model as bytes. `version` counts from 1 within its run."""

    run_id: int
    version: int
    embedder: str
    weights: bytes
    fitted_position: int  # the log position whose history it was fitted on
    log_position: int  # of the log entry that switches it on
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Who may call. Only the hash of the secret is known.

    Attributes:
        name: Unique, also among revoked keys.
        secret_hash: Hexadecimal SHA-256.
        second_hash: The same of the secret before it, while that works on beside it.
        expires_at: From when on it opens nothing; None is never.
        last_used_at: To the minute; None where it was not used yet.
        runs: Pattern of the run names that it may touch, with `*` and `?`.
        requests_per_minute, max_body_bytes: Limits; None sets none.
    """

    name: str
    secret_hash: str
    scopes: frozenset[Scope]
    runs: str
    requests_per_minute: int | None
    max_body_bytes: int | None
    created_at: datetime
    revoked_at: datetime | None
    second_hash: str | None = None
    expires_at: datetime | None = None
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """A budget that was answered.

    Attributes:
        step: Version of the served model.
        prompt: JSON of what an observation says of its prompt.
        prompt_id: Its id, which a new text has too; None where an older release kept the decision.
        text_key: Of the text in it; None without one.
    """

    decision_id: str
    run_id: int
    step: int
    prompt: str
    created_at: datetime
    prompt_id: str | None
    text_key: str | None = None


@dataclass(frozen=True, slots=True)
class RunState:
    """How a run stood when somebody looked last.

    Attributes:
        log_position: Of the log as far as the state knows it.
        active_at: When the newest batch was chosen or outcomes were reported; None before any.
        began_at: When the first batch was chosen; None where no saving of rollouts is measured.
        saved_at: When the state was saved.
    """

    run_id: int
    log_position: int
    summary: Summary
    active_at: datetime | None
    began_at: datetime | None
    saved_at: datetime


@dataclass(frozen=True, slots=True)
class WatchedRun:
    """A run with everything that is watched of it.

    Attributes:
        state: None where none was saved yet: nobody has looked at the run since the release that saves states.
        refit: The newest refit, in whatever state.
        done_refit: The newest one whose snapshot stands: it was published, and not voided since.
    """

    run: Run
    state: RunState | None
    refit: Refit | None
    done_refit: Refit | None


RunSort = Literal["name", "alarms", "activity", "lift", "informative", "created"]


@dataclass(frozen=True, slots=True)
class RunListing:
    """Which runs are asked for, and in which order.

    Attributes:
        names: Pattern that their names fulfil, with `*` and `?`; None for all.
        search: A part of their names, in any case.
        verdicts: Any of these; all where there is none.
        alarm: The code of an alarm that is on, or `any`; None for all.
        sort: `name`; or what is first: `alarms` (broken runs, then those with the most), the newest `activity`, the
            largest `lift` or `informative` share, the newest `created`.
    """

    names: str | None = None
    search: str = ""
    verdicts: tuple[Verdict, ...] = ()
    alarm: str | None = None
    sort: RunSort = "name"


@dataclass(frozen=True, slots=True)
class ListedRun:
    """A run in a list. `state` is None where nobody has looked at the run yet, `refit` its newest, in any state."""

    run: Run
    state: RunState | None
    refit: Refit | None
