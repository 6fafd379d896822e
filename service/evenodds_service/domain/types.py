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

BUILTIN, CALLER, NO_EMBEDDER = "builtin", "caller", "none"


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
        diversity: Spread of the diversity terms, in units of the scores' spread.
        cooldown_steps: Steps that a chosen prompt rests.
        max_visits: A prompt is chosen at most so often; 0 sets no limit.
        refit_every_observations: A refit is due after so many new observations (sooner while there are few).
        refit_every_seconds: A refit is due so long after the one before, if anything was observed since.
    """

    predictor: Predictor = "gps"
    group_size: int = 8
    target_rate: float | None = None
    embedder: str | None = None
    embedder_prompt: str | None = None
    acquisition: Acquisition | None = None
    optimism: float = 0.5
    diversity: float = 0.1
    cooldown_steps: int = 0
    max_visits: int = 0
    refit_every_observations: int = 2_048
    refit_every_seconds: int = 600

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
    """

    position: int
    step: int
    prompts: IntArray
    successes: FloatArray
    attempts: FloatArray
    informative: BoolArray
    selection_id: str | None = None

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
    """Log entry: the batch chosen for `step`, int64 [B] prompt indices."""

    position: int
    step: int
    prompts: IntArray


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """Log entry: from this position on, every replica uses snapshot `version`."""

    position: int
    version: int


Entry = PoolEntry | ObserveEntry | SelectEntry | SnapshotEntry


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
