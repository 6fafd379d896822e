"""Recorded worlds with their features, in process: what `quality` replays. No HTTP, no store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy import sparse

from evenodds_service.commands.replay.recordings import Recording, read_recording
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.prompts import NO_RATES, NamedRates, RawBlock, SourceColumns, join_key
from evenodds_service.domain.settings import BUILTIN
from evenodds_service.model.embedder import open_embedder
from evenodds_service.model.history import History
from evenodds_service.model.ngrams import ngram_matrix
from evenodds_service.model.sources import Joined, Source, fit_sources, joined
from evenodds_service.model.surface import surface_features

GROUP_SIZE = 8
TRAJECTORY = "dsr_sub_rl_trajectory"
LARGE = "deepscaler_qwen25math7b_k128"
MATH = "math_qwen_multisample"
TASKS = "reasoning_gym_models"


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """A recording and the features of its prompts.

    Attributes:
        texts: N texts.
        embeddings_N_D: float32 unit vectors of the built-in embedder.
        ngrams: Of `ngram_matrix`.
        prior_rates_N: What the caller knows of the prompts beforehand, NaN where nothing; None: nothing of any.
        named_rates: What other models showed on them.
        sources: What the runs showed that are learned from.
        shown: What a refit makes of it, where that does not depend on the run's own outcomes: few columns.
    """

    recording: Recording
    texts: tuple[str, ...]
    surface_N_S: FloatArray
    embeddings_N_D: FloatArray
    ngrams: sparse.csr_matrix
    group_size: int = field(default=GROUP_SIZE)
    prior_rates_N: FloatArray | None = None
    named_rates: NamedRates = NO_RATES
    sources: Joined | None = None
    shown: SourceColumns | None = None

    @property
    def n_prompts(self) -> int:
        return len(self.texts)

    def pool(self) -> Pool:
        """The prompts as the service holds them."""
        n = self.n_prompts
        known = self.prior_rates_N
        pool = Pool(surface_width=self.surface_N_S.shape[1], embedding_width=self.embeddings_N_D.shape[1])
        pool.append(
            RawBlock(
                first=0,
                prompt_ids=tuple(str(prompt.prompt_id) for prompt in self.recording.prompts),
                groups=tuple(prompt.category for prompt in self.recording.prompts),
                numeric=(None,) * n,
                prior_rates_N=np.full(n, np.nan, dtype=np.float32) if known is None else known.astype(np.float32),
                surface_N_S=self.surface_N_S,
                embedding_N_D=self.embeddings_N_D,
                named_rates=self.named_rates,
            )
        )
        return pool

    def held_out(self, seed: int, share: float) -> BoolArray:
        """The prompts of a random share of the groups, bool [N]; none without groups."""
        groups = [prompt.category for prompt in self.recording.prompts]
        names = sorted({group for group in groups if group is not None})
        n = round(share * len(names))
        out = set(np.random.default_rng([seed, len(names)]).permutation(names)[:n]) if n else set()
        return np.array([group in out for group in groups], dtype=bool)


def open_world(folder: Path, *, models: str = "") -> World:
    """Read a data set and compute its features.

    Raises:
        RecordingError: a file is missing or malformed.
    """
    return world_of(read_recording(folder, models=models))


def world_of(recording: Recording) -> World:
    """The recording with the features of its prompts."""
    texts = tuple(prompt.text or "" for prompt in recording.prompts)
    return World(recording, texts, surface_features(texts), open_embedder(BUILTIN).embed(texts), ngram_matrix(texts))


def learning_from(world: World, other: Recording, *, attempts: int, in_common: bool, seed: int) -> World:
    """The world of a run that learns from one that was evaluated on another pool, with so many attempts a prompt.

    Args:
        in_common: Whether what it showed on this world's own prompts is used too, or on the others alone.
    """
    own = _keys(world.texts)
    texts = tuple(prompt.text or "" for prompt in other.prompts)
    keys, chance = _keys(texts), np.random.default_rng([seed, len(texts)])
    good, n = other.successes_V_N[0], other.attempts_V_N[0]
    k = chance.hypergeometric(good, n - good, np.minimum(attempts, n)).astype(np.float64)
    counts = np.minimum(attempts, n).astype(np.float64)
    history = History(np.arange(len(keys)), np.zeros(len(keys), np.int64), k, counts, (k > 0) & (k < counts))
    if not in_common:
        history = history.rows(~np.isin(keys, own))
    data = joined(own, [], [Source(other.name, keys, history)])
    assert data is not None  # the other pool is not empty
    place = {key: i for i, key in enumerate(keys.tolist())}
    theirs = ngram_matrix([texts[place[key]] for key in data.others_F.tolist()])
    ngrams = sparse.vstack([world.ngrams, theirs], format="csr")
    fitted = fit_sources(data, ngrams, History.empty(), group_size=world.group_size, seed=seed)
    return replace(world, shown=fitted.columns)


def _keys(texts: Sequence[str]) -> IntArray:
    return np.array([int(join_key(text)[:15], 16) for text in texts], dtype=np.int64)
