"""Everything that the service raises on purpose: one tree. Each class has a stable `code` for programs.

    ServiceError                 service_error
    ├── AccessRefused            access_refused        the call is not allowed
    │   ├── KeyMissing           key_missing           the service requires an API key, and none was sent
    │   ├── KeyInvalid           key_invalid           the key is unknown here, or was revoked
    │   ├── ScopeMissing         scope_missing         the key may not make calls of this kind
    │   ├── RunForbidden         run_forbidden         the key is bound to other runs
    │   ├── RateLimited          rate_limited          the key has made its requests of this minute
    │   ├── HostRefused          host_refused          the request names another host than this service
    │   └── OriginRefused        origin_refused        a web page of another site may change nothing
    ├── Overloaded               overloaded            too many requests wait: the call may be repeated
    ├── DeadlinePassed           deadline_passed       the answer would come too late
    ├── ChatRefused              malformed             a chat request that this model cannot answer
    ├── UnknownPrompts           prompt_unknown        prompt ids that are not in the pool
    ├── NotEnoughPrompts         not_enough_prompts    fewer prompts may be selected than were asked for
    ├── StepJump                 step_jump             a step far beyond all others has to be confirmed
    ├── FillNeedsRest            fill_needs_rest       a batch is to be filled where no prompt rests
    ├── SharesConflict           shares_conflict       a category's least share of a batch is above its largest
    ├── EmbeddingRefused         embedding_refused     a vector that the run cannot take
    ├── EmbedderNotAllowed       embedder_not_allowed  a model that the operator has not listed
    ├── BudgetTooSmall           budget_too_small      the budget does not pay for the least attempts
    ├── NothingToFit             nothing_to_fit        a run without prompts cannot be fitted
    ├── CheckpointUnusable       checkpoint_unusable   bytes that are no checkpoint of this release
    ├── ModelError               model_error           a model cannot be opened or used
    │   ├── EmbedderUnavailable  embedder_unavailable  the embedding model cannot be opened
    │   ├── DeviceUnavailable    device_unavailable    the torch device does not exist here
    │   ├── TorchMissing         torch_missing         this process was installed without torch
    │   └── SnapshotUnusable     snapshot_unusable     the bytes of a fitted model cannot be used here
    └── StoreError               store_error           the database cannot do what was asked
        ├── DatabaseUrlUnusable     database_url         the URL names no database that we can use
        ├── StoreUnavailable        store_unavailable    the database did not answer: the call may be repeated
        ├── SchemaMismatch          schema_mismatch      the database has another schema than this release
        ├── MigrationFailed         migration_failed     a migration was given up, and nothing is half done
        ├── NaiveDatetime           naive_datetime       a datetime without a time zone (in `storage.tables`)
        ├── RunUnknown              run_unknown          there is no such run
        ├── RunExists               run_exists           a fork must be a new run
        ├── DecisionUnknown         decision_unknown     there is no such decision on a budget
        ├── DecisionExpired         decision_expired     a decision on a budget of more than a day ago
        ├── PromptUnknown           prompt_unknown       there is no such prompt
        ├── BelowBase               below_base           it reaches back to where the log was compacted
        ├── LogCompacted            log_compacted        what was to be read was compacted meanwhile
        ├── PoolChanged             pool_changed         prompts were retired after the caller looked
        ├── VectorsGone             vectors_gone         vectors were erased after the caller looked
        ├── PromptConflict          prompt_conflict      a prompt id is taken by another prompt
        ├── EmbedderFixed           embedder_fixed       the pool's vectors come from another embedder
        ├── EmbeddingWidthConflict  embedding_width      the pool's vectors have another length
        ├── RateNamesLimit          rate_names_limit     rates of more others than a run may know
        ├── VectorUnstorable        vector_unstorable    a value that a 16-bit float cannot hold
        ├── RequestConflict         request_conflict     a request id was used with another body
        ├── SelectionUnknown        selection_unknown    there is no such selection
        ├── SelectionConflict       selection_conflict   a step was chosen before with other arguments
        ├── SelectionVoided         selection_voided     a rewind has voided the selection
        ├── ChoiceOutdated          choice_outdated      what a batch was chosen on has changed
        ├── PolicyUnknown           policy_unknown       the run has no budget policy of this name
        ├── PolicyLimit             policy_limit         the run holds as many budget policies as it may
        ├── SnapshotUnknown         snapshot_unknown     there is no such snapshot
        ├── RefitLost               refit_lost           another worker has taken the refit over
        ├── KeyConflict             key_conflict         the name of an API key is taken
        └── KeyUnknown              key_unknown          there is no API key of this name

The code is for programs, the message for people: it names the thing, the value, the limit and the next step. What a
command refuses before it begins stays in the command's module. Knows no HTTP: `api.problems` gives codes their status.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class ServiceError(Exception):
    """Root of everything that the service raises on purpose.

    Attributes:
        retry_after_seconds: When the call may be repeated; None where repeating it does not help.
    """

    code: ClassVar[str] = "service_error"
    retry_after_seconds: int | None = None


class AccessRefused(ServiceError):
    """The call is not allowed."""

    code = "access_refused"


class KeyMissing(AccessRefused):
    """The service requires an API key, and none was sent."""

    code = "key_missing"


class KeyInvalid(AccessRefused):
    """The key is unknown here, or was revoked."""

    code = "key_invalid"


class ScopeMissing(AccessRefused):
    """The key may not make calls of this kind."""

    code = "scope_missing"


class RunForbidden(AccessRefused):
    """The key is bound to other runs."""

    code = "run_forbidden"


class RateLimited(AccessRefused):
    """The key has made its requests of this minute."""

    code = "rate_limited"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class HostRefused(AccessRefused):
    """The request names another host than this service."""

    code = "host_refused"


class OriginRefused(AccessRefused):
    """A web page of another site may change nothing."""

    code = "origin_refused"


class Overloaded(ServiceError):
    """Too many requests wait. The message says how many may."""

    code = "overloaded"
    retry_after_seconds = 1


class DeadlinePassed(ServiceError):
    """The answer would come too late. The message names the deadline."""

    code = "deadline_passed"


class ChatRefused(ServiceError):
    """A chat request that this model cannot answer. The message says which part and what to send."""

    code = "malformed"


class UnknownPrompts(ServiceError):
    """Prompt ids that the pool does not have."""

    code = "prompt_unknown"

    def __init__(self, run: str, prompt_ids: Sequence[str], *, path: str, hint: str) -> None:
        shown = ", ".join(repr(i) for i in prompt_ids[:5]) + (", ..." if len(prompt_ids) > 5 else "")
        n = len(prompt_ids)
        who = "1 prompt is" if n == 1 else f"{n} prompts are"
        super().__init__(f"{path}: {who} not in the pool of run {run!r}: {shown}; {hint}")


class NotEnoughPrompts(ServiceError):
    """Fewer prompts may be selected than were asked for. `group` is None for the batch as a whole."""

    code = "not_enough_prompts"

    def __init__(
        self, *, asked: int, eligible: int, group: str | None = None, advice: str = "", what: str = "batch_size"
    ) -> None:
        self.asked, self.eligible, self.group, self.what = asked, eligible, group, what
        who = what if group is None else f"categories: the share of {group!r}"
        super().__init__(f"{who} asks for {asked} prompts, {eligible} may be selected{advice}")


class StepJump(ServiceError):
    """A step lies far beyond all that the run has gone through: a slip would age all that it knows, for good."""

    code = "step_jump"


class FillNeedsRest(ServiceError):
    """A batch is to be filled where chosen prompts do not rest."""

    code = "fill_needs_rest"


class SharesConflict(ServiceError):
    """A category's least share of a batch is above its largest."""

    code = "shares_conflict"


class EmbeddingRefused(ServiceError):
    """A vector was sent that the run cannot take. The message names the item and the limit."""

    code = "embedding_refused"


class EmbedderNotAllowed(ServiceError):
    """The embedder is a model that the operator has not listed. The message names it and those that are allowed."""

    code = "embedder_not_allowed"


class BudgetTooSmall(ServiceError):
    """The budget does not pay for the least attempts that were asked for."""

    code = "budget_too_small"


class NothingToFit(ServiceError):
    """A run without prompts cannot be fitted."""

    code = "nothing_to_fit"


class CheckpointUnusable(ServiceError):
    """The bytes are no checkpoint of this release's fold: fold from the log's beginning instead. Or no kept history."""

    code = "checkpoint_unusable"


class ModelError(ServiceError):
    """A model cannot be opened or used."""

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


class StoreError(ServiceError):
    """The database cannot do what was asked."""

    code = "store_error"


class DatabaseUrlUnusable(StoreError):
    """The URL names no database that we can use."""

    code = "database_url"


class StoreUnavailable(StoreError):
    """The database did not answer. Nothing is wrong with the call: repeated later, it may succeed."""

    code = "store_unavailable"
    retry_after_seconds = 1


class SchemaMismatch(StoreError):
    """The database has another schema than this release."""

    code = "schema_mismatch"


class MigrationFailed(StoreError):
    """A migration was given up. The schema is the old one, or (where the connection broke at the end) the new one."""

    code = "migration_failed"


class RunUnknown(StoreError):
    """There is no such run."""

    code = "run_unknown"


class RunExists(StoreError):
    """A fork must be a new run."""

    code = "run_exists"


class PromptUnknown(StoreError):
    """There is no such prompt."""

    code = "prompt_unknown"


class PromptConflict(StoreError):
    """A prompt id stands for another prompt already.

    Attributes:
        item: Position of the offending prompt among the prompts of the call, from 0.
        prompt_id: Its id.
        attribute: What differs: `text`, `category`, `features`, `prior_rate` or `prior_rates`.
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
    """The pool's vectors come from another embedder."""

    code = "embedder_fixed"


class EmbeddingWidthConflict(StoreError):
    """The pool's vectors have another length."""

    code = "embedding_width"


class RateNamesLimit(StoreError):
    """The pool's prompts bring rates of more others than a run may know."""

    code = "rate_names_limit"


class VectorUnstorable(StoreError):
    """A vector holds a value that a 16-bit float cannot hold."""

    code = "vector_unstorable"


class RequestConflict(StoreError):
    """A request id was used with another body."""

    code = "request_conflict"


class BelowBase(StoreError):
    """What is asked for reaches back to where the run's log was compacted."""

    code = "below_base"


class LogCompacted(StoreError):
    """What was to be read was compacted meanwhile: look at the run again, and start from its base."""

    code = "log_compacted"


class PoolChanged(StoreError):
    """Prompts were retired after the caller looked at the pool: look again."""

    code = "pool_changed"


class VectorsGone(StoreError):
    """Vectors that were stored when the caller looked were erased since: compute them."""

    code = "vectors_gone"


class SelectionUnknown(StoreError):
    """There is no such selection."""

    code = "selection_unknown"


class SelectionConflict(StoreError):
    """A step was chosen before with other arguments."""

    code = "selection_conflict"


class SelectionVoided(StoreError):
    """A rewind has voided the selection."""

    code = "selection_voided"


class DecisionUnknown(StoreError):
    """No decision of this id is kept."""

    code = "decision_unknown"


class DecisionExpired(StoreError):
    """The decision was made so long ago that it is not kept any more."""

    code = "decision_expired"


class ChoiceOutdated(StoreError):
    """Something was voided, or another batch recorded, after the batch was chosen: choose again."""

    code = "choice_outdated"


class PolicyUnknown(StoreError):
    """The run has no budget policy of this name."""

    code = "policy_unknown"


class PolicyLimit(StoreError):
    """The run holds as many budget policies as it may."""

    code = "policy_limit"


class SnapshotUnknown(StoreError):
    """There is no such snapshot."""

    code = "snapshot_unknown"


class RefitLost(StoreError):
    """Another worker has taken the refit over."""

    code = "refit_lost"


class KeyConflict(StoreError):
    """The name of an API key is taken."""

    code = "key_conflict"


class KeyUnknown(StoreError):
    """There is no API key of this name."""

    code = "key_unknown"
