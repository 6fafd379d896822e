"""What can go wrong between a caller and the store.

    StoreError
    ├── DatabaseUrlUnusable      database_url         the URL names no database that we can use
    ├── StoreUnavailable         store_unavailable    the database did not answer; the call may be repeated
    ├── SchemaMismatch           schema_mismatch      the database has another schema than this release
    ├── MigrationFailed          migration_failed     a migration was given up, and has changed nothing
    ├── NaiveDatetime            naive_datetime       a datetime without a time zone
    ├── RunUnknown               run_unknown
    ├── RunExists                run_exists           a fork must be a new run
    ├── PromptUnknown            prompt_unknown
    ├── PromptConflict           prompt_conflict      a prompt id is taken by another prompt
    ├── EmbedderFixed            embedder_fixed       the pool's vectors come from another embedder
    ├── EmbeddingWidthConflict   embedding_width      the pool's vectors have another length
    ├── VectorUnstorable         vector_unstorable    a value that a 16-bit float cannot hold
    ├── RequestConflict          request_conflict     a request id was used with another body
    ├── SelectionUnknown         selection_unknown
    ├── SelectionConflict        selection_conflict   a step was chosen before with other arguments
    ├── SelectionVoided          selection_voided     a rewind has voided the selection
    ├── ChoiceOutdated           choice_outdated      what a batch was chosen on has changed
    ├── PolicyUnknown            policy_unknown       a budget policy that the run has not
    ├── PolicyLimit              policy_limit         the run holds as many budget policies as it may
    ├── SnapshotUnknown          snapshot_unknown
    ├── RefitLost                refit_lost           another worker has taken the refit over
    ├── KeyConflict              key_conflict         the name of an API key is taken
    └── KeyUnknown               key_unknown

`code` is stable and meant for programs, the message for people. Knows no HTTP: status numbers belong to the
API.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class StoreError(Exception):
    """Root of everything that the storage room raises on purpose."""

    code: ClassVar[str] = "store_error"


class DatabaseUrlUnusable(StoreError):
    code = "database_url"


class StoreUnavailable(StoreError):
    """Nothing is wrong with the call: repeated later, it may succeed."""

    code = "store_unavailable"


class SchemaMismatch(StoreError):
    code = "schema_mismatch"


class MigrationFailed(StoreError):
    """The schema is the old one, or (where the connection broke at the very end) the new one."""

    code = "migration_failed"


class RunUnknown(StoreError):
    code = "run_unknown"


class RunExists(StoreError):
    code = "run_exists"


class PromptUnknown(StoreError):
    code = "prompt_unknown"


class PromptConflict(StoreError):
    """A prompt id stands for another prompt already.

    Attributes:
        item: Position of the offending prompt among the prompts of the call, from 0.
        prompt_id: Its id.
        attribute: What differs: `text`, `group`, `features` or `prior_rate`.
    """

    code = "prompt_conflict"

    def __init__(self, *, item: int, n_items: int, prompt_id: str, attribute: str, earlier_in_call: bool) -> None:
        self.item = item
        self.prompt_id = prompt_id
        self.attribute = attribute
        where = "stands earlier in this call" if earlier_in_call else "is in the pool"
        differs = attribute.replace("_", " ")
        super().__init__(
            f"prompt {item + 1} of {n_items}: id {prompt_id!r} {where} with another {differs}: "
            f"send it under another prompt_id, or leave the {differs} out"
        )


class EmbedderFixed(StoreError):
    code = "embedder_fixed"


class EmbeddingWidthConflict(StoreError):
    code = "embedding_width"


class VectorUnstorable(StoreError):
    code = "vector_unstorable"


class RequestConflict(StoreError):
    code = "request_conflict"


class SelectionUnknown(StoreError):
    code = "selection_unknown"


class SelectionConflict(StoreError):
    code = "selection_conflict"


class SelectionVoided(StoreError):
    code = "selection_voided"


class ChoiceOutdated(StoreError):
    """Something was voided, or another batch recorded, after the batch was chosen: choose again."""

    code = "choice_outdated"


class PolicyUnknown(StoreError):
    code = "policy_unknown"


class PolicyLimit(StoreError):
    code = "policy_limit"


class SnapshotUnknown(StoreError):
    code = "snapshot_unknown"


class RefitLost(StoreError):
    code = "refit_lost"


class KeyConflict(StoreError):
    code = "key_conflict"


class KeyUnknown(StoreError):
    code = "key_unknown"


class AccessRefused(Exception):
    """The call is not allowed. `status` is 401 without a valid key, 403 with one that may not, 429 above its rate."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class ChatRefused(ValueError):
    """A chat request that this model cannot answer. The message says which part and what to send."""


class DeskFull(Exception):
    """More requests wait than the desk holds. The message says how many."""


class DeadlinePassed(Exception):
    """The answer would come too late. The message names the deadline."""


class EmbeddingRefused(ValueError):
    """A vector was sent that the run cannot take. The message names the item and the limit."""


class EmbedderNotAllowed(ValueError):
    """The embedder is a model that the operator has not listed. The message names it and those that are allowed."""


class RoundsFull(Exception):
    """More questions about a run wait than may. The message says how many."""


class NotEnoughPrompts(ValueError):
    """Fewer prompts may be selected than were asked for. `group` is None for the batch as a whole."""

    def __init__(self, *, asked: int, eligible: int, group: str | None = None, advice: str = "") -> None:
        self.asked, self.eligible, self.group = asked, eligible, group
        what = "batch_size" if group is None else f"groups: the share of {group!r}"
        super().__init__(f"{what} asks for {asked} prompts, {eligible} may be selected{advice}")


class BudgetTooSmall(ValueError):
    """The budget does not pay for the least attempts that were asked for."""


class CheckpointUnusable(ValueError):
    """The bytes are no checkpoint of this release's fold. Fold from the log's beginning instead."""


class SharesConflict(ValueError):
    """A group's least share of a batch is above its largest."""


class UnknownPrompts(LookupError):
    """Prompt ids that the pool does not have."""

    def __init__(self, run: str, prompt_ids: Sequence[str], *, path: str, hint: str) -> None:
        shown = ", ".join(repr(i) for i in prompt_ids[:5]) + (", ..." if len(prompt_ids) > 5 else "")
        super().__init__(f"{path}: {len(prompt_ids)} not in the pool of run {run!r}: {shown}; {hint}")


class ModelError(Exception):
    """Root of this room's errors. The message names the thing, what is wrong with it, and the next step."""

    code = "model_error"


class EmbedderUnavailable(ModelError):
    """The embedding model could not be opened, or gave no usable vectors when it was tried."""

    code = "embedder_unavailable"


class DeviceUnavailable(ModelError):
    """The named torch device does not exist here, or cannot be used."""

    code = "device_unavailable"


class TorchMissing(ModelError):
    """A prediction needs torch, and this process was installed without it."""

    code = "torch_missing"


class SnapshotUnusable(ModelError):
    """A snapshot's bytes cannot be used here. The message says why and what to do."""

    code = "snapshot_unusable"
