"""The values that cross rooms: settings, prompts and the entries of a run's log.

Validated where they are made (finite, in range), so that no later check is needed. Knows no HTTP and no SQL.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

Predictor = Literal["gps", "gps-paper", "mopps", "uniform"]
Acquisition = Literal["yield", "paper", "thompson", "uniform"]
ModelSize = Literal["small", "published"]

BudgetMode = Literal["parallel", "sequential"]

BUILTIN, CALLER, NO_EMBEDDER = "builtin", "caller", "none"
REPROBE_SHARE = 0.05
MAX_CONTROL_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class EffortTier:
    """What requests of a success rate of `at_least` get, down from the next tier's: an effort by its label.

    `max_tokens_scale` multiplies the length limit that the caller would have used; positive.
    """

    label: str
    at_least: float
    max_tokens_scale: float = 1.0


DEFAULT_TIERS = (EffortTier("low", 0.8, 0.5), EffortTier("medium", 0.3, 1.0), EffortTier("high", 0.0, 2.0))


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """How a gateway turns a belief into a budget; named, and with a new version whenever it changes.

    Attributes:
        version: From 1; 0 is the built-in policy of a run that has stored none.
        mode: `parallel`, all attempts at once; `sequential`, one after another until the first success.
        target_attempts: Attempts per request on average; recent traffic fits the price that keeps to it.
        min_attempts, max_attempts: Of each request, 1 <= min <= target <= max.
        price: A fixed price in [0, 1] instead of the fitted one.
        tiers: By falling `at_least`, the last one's is 0.
    """

    name: str = "default"
    version: int = 0
    mode: BudgetMode = "parallel"
    target_attempts: float = 4.0
    min_attempts: int = 1
    max_attempts: int = 32
    price: float | None = None
    tiers: tuple[EffortTier, ...] = DEFAULT_TIERS

    def tier(self, success_rate: float) -> EffortTier:
        """The first tier that this rate reaches."""
        return next((tier for tier in self.tiers if success_rate >= tier.at_least), self.tiers[-1])


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What a caller may set on a run.

    Attributes:
        predictor: Which belief answers: `gps` the mixture of section 3, `gps-paper` the published model alone,
            `mopps` a flat prior with the prompt's own evidence, `uniform` none.
        group_size: Attempts per prompt in training, at least 1.
        target_rate: Success rate in (0, 1) to aim at; None aims at the likeliest to be informative.
        embedder: `builtin`, `caller`, `none`, or a sentence-transformers model; None until the first prompt
            decides between `builtin` and `caller`.
        embedder_prompt: Instruction put before each text by the embedder.
        acquisition: None follows the predictor (`yield`; `paper` under `gps-paper`, `thompson` under `mopps`,
            `uniform` under `uniform`).
        optimism: Weight of the standard deviation in the yield score.
        diversity: How much of the yield score may be given up for unlike prompts, in [0, 1]; under `paper` the
            spread of the diversity terms in units of the scores' spread.
        cooldown_steps: Steps that a chosen prompt rests, come what may; None lets it rest for a twentieth of an epoch
            under `yield` while there are enough others, and not at all under the published acquisitions.
        lease_steps: For so many steps a chosen prompt is waited for and not chosen again before its outcome comes;
            0 waits for none.
        max_visits: A prompt is chosen at most so often; 0 sets no limit.
        keep_text: Whether the pool keeps the texts; without them only hashes and vectors are stored.
        model_size: Of the networks of `gps-paper`: `small` for a CPU, `published` has 20 million parameters.
        refit_every_observations: A refit is due after so many new observations (sooner while there are few).
        refit_every_seconds: A refit is due so long after the one before, if anything was observed since.
        control_share: Share of each batch that is chosen uniformly, in [0, .5].
        reprobe_share: Least share of each batch for the prompts least recently seen, in [0, 1]; None follows the
            acquisition (.05 under `yield` and `paper`, else none).
        groups, groups_at_most: Least and largest share of a batch by group.
        fallback: Choose uniformly while the mixture's skill against MoPPS stays negative.
        budget_policies: By name, one of each.
    """

    predictor: Predictor = "gps"
    group_size: int = 8
    target_rate: float | None = None
    embedder: str | None = None
    embedder_prompt: str | None = None
    acquisition: Acquisition | None = None
    optimism: float = 0.5
    diversity: float = 0.1
    cooldown_steps: int | None = None
    lease_steps: int = 8
    max_visits: int = 0
    keep_text: bool = True
    model_size: ModelSize = "small"
    refit_every_observations: int = 2_048
    refit_every_seconds: int = 600
    control_share: float = 0.0
    reprobe_share: float | None = None
    groups: Mapping[str, float] | None = None
    groups_at_most: Mapping[str, float] | None = None
    fallback: bool = True
    budget_policies: tuple[BudgetPolicy, ...] = ()

    @property
    def effective_acquisition(self) -> Acquisition:
        if self.acquisition is not None:
            return self.acquisition
        by_predictor: dict[Predictor, Acquisition] = {
            "gps": "yield",
            "gps-paper": "paper",
            "mopps": "thompson",
            "uniform": "uniform",
        }
        return by_predictor[self.predictor]

    def reprobe_share_under(self, acquisition: Acquisition) -> float:
        """Chance needs no floor, and Thompson sampling is left as published unless a share is set."""
        if self.reprobe_share is not None:
            return self.reprobe_share
        return REPROBE_SHARE if acquisition in ("yield", "paper") else 0.0


class SharesConflict(ValueError):
    """A group's least share of a batch is above its largest."""


def check_shares(least: Mapping[str, float], most: Mapping[str, float]) -> None:
    """Raises SharesConflict."""
    for group in least.keys() & most.keys():
        if least[group] > most[group]:
            raise SharesConflict(
                f"group {group!r} is to get at least {least[group]:g} of a batch (groups) and at most {most[group]:g} "
                "(groups_at_most): lower the one or raise the other"
            )


def text_key(text: str) -> str:
    """A hash of the text that does not change with Unicode form or white space: 32 hexadecimal digits."""
    normalised = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.sha256(normalised.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class NewPrompt:
    """A prompt on its way into a pool. `text_key` is None without a text; `vector_key` names the embedding."""

    prompt_id: str
    text: str | None = None
    text_key: str | None = None
    group: str | None = None
    features: Mapping[str, float] | None = None
    prior_rate: float | None = None
    vector_key: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt(NewPrompt):
    """A prompt of a pool. `index` counts from 0 without gaps in the order of arrival."""

    index: int = field(default=-1, kw_only=True)


@dataclass(frozen=True, slots=True)
class Vector:
    """A feature vector of one text: float array of shape [D], stored once per (embedder, key)."""

    embedder: str
    key: str
    values: FloatArray


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Raw features of the consecutive prompts `first .. first + n - 1` of a pool.

    Attributes:
        first: Index of the first prompt.
        prompt_ids: n ids.
        groups: n group names or None.
        numeric: n mappings of the caller's numeric features, or None.
        prior_rates_N: float32 [n]; NaN where the caller knew none.
        surface_N_S: float32 [n, S]; a row of NaN where the prompt has no text. S may be 0.
        embedding_N_D: float32 [n, D]; a row of NaN where the prompt has no vector. D may be 0.
    """

    first: int
    prompt_ids: tuple[str, ...]
    groups: tuple[str | None, ...]
    numeric: tuple[Mapping[str, float] | None, ...]
    prior_rates_N: FloatArray
    surface_N_S: FloatArray
    embedding_N_D: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class FittedPrior:
    """What a fitted shared prior says about the first n prompts of a pool, or about prompts outside it.

    Attributes:
        means_N: Success rates, float32 [n] in (0, 1). Those of observed prompts come from a fit that left their own
            outcomes out.
        concentrations_N: How sure the prior is of each, in pseudo-attempts, float32 [n], positive.
    """

    means_N: FloatArray
    concentrations_N: FloatArray


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """Log entry: the pool grew to `n_prompts` prompts."""

    position: int
    n_prompts: int


@dataclass(frozen=True, slots=True)
class ObserveEntry:
    """Log entry: outcomes of attempts, made by the policy of `step`.

    Attributes:
        prompts: int64 [n] prompt indices; one prompt may stand in several rows.
        successes: float64 [n], 0 <= successes <= attempts; fractional rewards sum to fractional successes.
        attempts: float64 [n], at least 1.
        informative: bool [n]; whether the rewards of the group were not all equal.
        selection_id, selection_step: The selection whose outcomes these are, and the step that it was for.
    """

    position: int
    step: int
    prompts: IntArray
    successes: FloatArray
    attempts: FloatArray
    informative: BoolArray
    selection_id: str | None = None
    selection_step: int | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.prompts), len(self.successes), len(self.attempts), len(self.informative)}
        if len(sizes) != 1:
            raise ValueError(f"log entry {self.position}: arrays of different lengths {sorted(sizes)}")
        if not (np.isfinite(self.successes).all() and np.isfinite(self.attempts).all()):
            raise ValueError(f"log entry {self.position}: successes and attempts must be finite")
        if ((self.successes < 0) | (self.successes > self.attempts) | (self.attempts < 1)).any():
            raise ValueError(f"log entry {self.position}: successes must lie in [0, attempts], attempts >= 1")


@dataclass(frozen=True, slots=True)
class SelectEntry:
    """Log entry: the batch chosen for `step`.

    Attributes:
        prompts: int64 [B] prompt indices.
        control_share: The share that was asked for; .1 of 5 prompts is one in every other batch.
        control: bool [B], which of them were chosen uniformly; None: none.
        a, b: Parameters of the belief about each when it was chosen, [B]; None where they were not recorded.
    """

    position: int
    step: int
    prompts: IntArray
    selection_id: str | None = None
    control_share: float = 0.0
    control: BoolArray | None = None
    a: FloatArray | None = None
    b: FloatArray | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.control_share <= MAX_CONTROL_SHARE:
            raise ValueError(f"log entry {self.position}: control_share {self.control_share} is not in [0, 0.5]")
        for name in ("control", "a", "b"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(
                    f"log entry {self.position}: {len(self.prompts)} prompts, {len(values)} values of {name}"
                )
        for values in (self.a, self.b):
            if values is not None and not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(f"log entry {self.position}: a and b must be finite and above 0")


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """Log entry: from this position on, every replica uses snapshot `version`."""

    position: int
    version: int


@dataclass(frozen=True, slots=True)
class VoidEntry:
    """Log entry that changes nothing: one that was voided since, or the rewind or retract that voids others."""

    position: int


Entry = PoolEntry | ObserveEntry | SelectEntry | SnapshotEntry | VoidEntry


@dataclass(frozen=True, slots=True)
class NewObservation:
    """One observation on its way into the log.

    `prompt` is the index of a prompt in the pool, or the id of a prompt that the same call adds.
    """

    prompt: int | str
    successes: float
    attempts: int
    informative: bool

    @staticmethod
    def of_counts(prompt: int | str, successes: float, attempts: int) -> NewObservation:
        return NewObservation(prompt, successes, attempts, attempts > 1 and 0 < successes < attempts)

    @staticmethod
    def of_rewards(prompt: int | str, rewards: Sequence[float]) -> NewObservation:
        """Fractional rewards count as fractional successes; equal rewards carry no group-relative signal."""
        return NewObservation(prompt, math.fsum(rewards), len(rewards), max(rewards) > min(rewards))
