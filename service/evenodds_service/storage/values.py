"""The frozen values that a Store method returns. Nothing here is bound to a connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

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
    n_prompts: int
    log_position: int


@dataclass(frozen=True, slots=True)
class Appended:
    """`replayed` means that the request id was known: the other fields are the first answer's."""

    log_position: int
    accepted: int
    model_version: int
    replayed: bool


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
