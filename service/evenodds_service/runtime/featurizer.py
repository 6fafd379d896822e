"""From wire prompts to features: which vectors a prompt needs, and where they come from.

Embeds only what the store has not kept yet. Holds the opened embedders; knows the names of models, no SQL, no HTTP.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.prompts import (
    NO_ANSWERS,
    Answer,
    KnownRate,
    NamedRates,
    NewPrompt,
    NewPrompts,
    RawBlock,
    Vector,
    answer_text,
    text_key,
)
from evenodds_service.domain.settings import BUILTIN, CALLER, NO_EMBEDDER, RunSettings
from evenodds_service.errors import EmbedderNotAllowed, EmbeddingRefused
from evenodds_service.model.answers import ANSWER_NAMES, answer_features
from evenodds_service.model.embedder import Embedder, open_embedder
from evenodds_service.model.surface import SURFACE, SURFACE_NAMES, surface_features
from evenodds_service.storage.store import Run, Store

MOST_EMBEDDERS = 8
"""Models kept open, with each instruction another one; all of the built-in model share its weights."""
CACHED_TEXTS = 8_192
"""Texts outside of pools whose features are kept in memory: some 10 MB with the built-in embedder."""
_FEW_TEXTS = 64


class CountsLike(Protocol):
    """Successes of attempts."""

    @property
    def successes(self) -> float: ...
    @property
    def attempts(self) -> int: ...


class PromptLike(Protocol):
    """What `PromptIn`, `PromptRef` and `Observation` have in common."""

    @property
    def prompt_id(self) -> str | None: ...
    @property
    def text(self) -> str | None: ...
    @property
    def category(self) -> str | None: ...
    @property
    def embedding(self) -> tuple[float, ...] | None: ...
    @property
    def features(self) -> Mapping[str, float] | None: ...
    @property
    def prior_rate(self) -> float | None: ...
    @property
    def prior_rates(self) -> Mapping[str, float | CountsLike] | None: ...
    @property
    def answer(self) -> Answer: ...


class Featurizer:
    """Computes features once per (embedder, text), as far as the store or the memory of this process has them.

    Args:
        allowed: Models that runs may name besides the built-in one. Opening one may download it.
    """

    def __init__(
        self,
        store: Store,
        *,
        allowed: Collection[str] = (),
        opener: Callable[[str, str | None], Embedder] = open_embedder,
    ) -> None:
        self._store, self._allowed, self._open = store, frozenset(allowed), opener
        self._lock = threading.Lock()
        self._embedders: OrderedDict[tuple[str, str | None], Embedder] = OrderedDict()
        self._rows: OrderedDict[tuple[str, str], tuple[FloatArray, FloatArray]] = OrderedDict()

    def embedder(self, settings: RunSettings) -> Embedder | None:
        """The run's text embedder; None where vectors come from the caller or there are none.

        Raises:
            EmbedderNotAllowed: the run names a model that is not among those allowed.
            EmbedderUnavailable: the model cannot be loaded.
        """
        setting = settings.embedder or BUILTIN
        if setting in (CALLER, NO_EMBEDDER):
            return None
        if setting != BUILTIN and setting not in self._allowed:
            listed = ", ".join(repr(name) for name in sorted(self._allowed)) or "none"
            raise EmbedderNotAllowed(
                f"embedder {setting!r} is not allowed here: take {BUILTIN!r}, {CALLER!r} or {NO_EMBEDDER!r}, or ask "
                f"the service's operator to list it in EVENODDS_EMBEDDERS (listed at present: {listed})"
            )
        key = (setting, settings.embedder_prompt)
        with self._lock:
            if key not in self._embedders:
                self._embedders[key] = self._open(setting, settings.embedder_prompt)
            self._embedders.move_to_end(key)
            while len(self._embedders) > MOST_EMBEDDERS:  # any caller may name another instruction
                self._embedders.popitem(last=False)
            return self._embedders[key]

    def prepare(
        self, run: Run, items: Sequence[PromptLike], *, names: Sequence[str], known: Container[str] = ()
    ) -> NewPrompts:
        """Prompts with ids and keys, and those of their vectors that the store lacks.

        Args:
            names: Where each item stands in the request, for error messages.
            known: Ids of prompts that the pool has, and so their vectors.

        Raises:
            EmbeddingRefused: a vector of the wrong length, or in a run whose vectors come from a model.
        """
        settings, width = _resolved(run, items)
        _check_vectors(run, settings, width, items, names)
        prompts: list[NewPrompt] = []
        vectors: list[Vector] = []
        texts: dict[str, str] = {}
        answers_n_A = _answers(items).astype(np.float16)  # as a pool keeps them: the same however often they are stored
        for row, item in enumerate(items):
            prompt = new_prompt(item)
            if item.answer is not None:
                prompt = replace(prompt, answer_features=tuple(answers_n_A[row].tolist()))
            if prompt.prompt_id in known:
                prompts.append(prompt)
                continue
            if item.text is not None and prompt.text_key is not None:
                texts[prompt.text_key] = item.text
            if item.embedding is not None:
                prompt = replace(prompt, vector_key=f"prompt:{prompt.prompt_id}")
                vectors.append(Vector(CALLER, f"prompt:{prompt.prompt_id}", _unit(item.embedding)))
            elif settings.embedder not in (CALLER, NO_EMBEDDER):
                prompt = replace(prompt, vector_key=prompt.text_key)
            prompts.append(prompt)
        embedder = self.embedder(settings)
        ways = [SURFACE]
        if embedder is not None:
            ways.append(embedder.name)
            width = embedder.width
        missing = self._store.missing_vectors(tuple(ways), tuple(texts)) if texts else frozenset()
        stored = tuple((name, key) for name in ways for key in texts if (name, key) not in missing)
        vectors += self._computed(missing, texts, embedder)
        return NewPrompts(tuple(prompts), tuple(vectors), settings.embedder or BUILTIN, width, stored=stored)

    def block(self, run: Run, items: Sequence[PromptLike], *, names: Sequence[str]) -> RawBlock:
        """Raw features of prompts outside the pool. Nothing is stored. `names` as in `prepare`.

        Raises:
            EmbeddingRefused: as in `prepare`.
        """
        settings, width = _resolved(run, items)
        _check_vectors(run, settings, width, items, names)
        embedder = self.embedder(settings)
        n, width = len(items), embedder.width if embedder is not None else width or 0
        surface = np.full((n, len(SURFACE_NAMES)), np.nan, dtype=np.float32)
        embedding = np.full((n, width), np.nan, dtype=np.float32)
        rows = [i for i, item in enumerate(items) if item.text is not None]
        if rows:
            surface[rows], embedding_n_D = self._cached([items[i].text or "" for i in rows], embedder)
            if embedder is not None:
                embedding[rows] = embedding_n_D
        for i, item in enumerate(items):
            if item.embedding is not None:
                embedding[i] = _unit(item.embedding)
        return RawBlock(
            first=0,
            prompt_ids=tuple(str(i) for i in range(n)),
            groups=tuple(item.category for item in items),
            numeric=tuple(item.features for item in items),
            prior_rates_N=np.array([np.nan if i.prior_rate is None else i.prior_rate for i in items], np.float32),
            surface_N_S=surface,
            embedding_N_D=embedding,
            named_rates=NamedRates.of([_known_rates(item.prior_rates) for item in items]),
            answers_N_A=_answers(items),
        )

    def _cached(self, texts: Sequence[str], embedder: Embedder | None) -> tuple[FloatArray, FloatArray]:
        """Surface features [n, S] and vectors [n, D] of these texts, computed for those that were not asked lately."""
        owner = embedder.name if embedder is not None else ""
        keys = [(owner, text_key(text)) for text in texts]
        with self._lock:
            found = {key: self._rows[key] for key in keys if key in self._rows}
            for key in found:
                self._rows.move_to_end(key)
        fresh = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if fresh:
            surface = surface_features(list(fresh.values()))
            width = embedder.width if embedder is not None else 0
            vectors = embedder.embed(list(fresh.values())) if embedder is not None else np.zeros((len(fresh), width))
            # Copies: a view of one row would keep the arrays of its whole request for as long as it is cached.
            found |= {key: (surface[i].copy(), vectors[i].copy()) for i, key in enumerate(fresh)}
            with self._lock:
                self._rows.update((key, found[key]) for key in fresh)
                while len(self._rows) > CACHED_TEXTS:
                    self._rows.popitem(last=False)
        return np.stack([found[key][0] for key in keys]), np.stack([found[key][1] for key in keys])

    def _computed(
        self, missing: Collection[tuple[str, str]], texts: Mapping[str, str], embedder: Embedder | None
    ) -> list[Vector]:
        """The vectors (embedder, key) of these texts. Few texts are those of requests, and asked about before."""
        keys = sorted({key for _, key in missing})
        if 0 < len(keys) <= _FEW_TEXTS:
            surface, embedding = self._cached([texts[key] for key in keys], embedder)
            told = {SURFACE: surface} | ({embedder.name: embedding} if embedder is not None else {})
            return [
                Vector(name, key, told[name][i])
                for name in told
                for i, key in enumerate(keys)
                if (name, key) in missing
            ]
        vectors = []
        for name, embed in ((SURFACE, surface_features), *(((embedder.name, embedder.embed),) if embedder else ())):
            wanted = [key for key in keys if (name, key) in missing]
            rows = embed([texts[key] for key in wanted]) if wanted else ()
            vectors += [Vector(name, key, row) for key, row in zip(wanted, rows, strict=True)]
        return vectors


def new_prompt(item: PromptLike) -> NewPrompt:
    """The prompt with its id: the caller's, else a hash of the normalised text."""
    key = text_key(item.text) if item.text is not None else None
    prompt_id = item.prompt_id if item.prompt_id is not None else f"text:{key}"
    return NewPrompt(
        prompt_id=prompt_id,
        text=item.text,
        text_key=key,
        group=item.category,
        features=item.features or None,
        prior_rate=item.prior_rate,
        prior_rates=_known_rates(item.prior_rates),
        answer=item.answer,
    )


def _answers(items: Sequence[PromptLike]) -> FloatArray:
    rows = [i for i, item in enumerate(items) if item.answer is not None]
    if not rows:
        return NO_ANSWERS
    answers_n_A = np.full((len(items), len(ANSWER_NAMES)), np.nan, dtype=np.float32)
    answers_n_A[rows] = answer_features([answer_text(items[i].answer) for i in rows])
    return answers_n_A


def _known_rates(told: Mapping[str, float | CountsLike] | None) -> Mapping[str, KnownRate] | None:
    if not told:
        return None
    return {
        name: rate if isinstance(rate, (int, float)) else (rate.successes, rate.attempts) for name, rate in told.items()
    }


def _resolved(run: Run, items: Sequence[PromptLike]) -> tuple[RunSettings, int | None]:
    """The run's settings with the embedder decided (by the first vector, if need be), and its vector length."""
    sent = next((item.embedding for item in items if item.embedding is not None), None)
    settings = run.settings
    if settings.embedder is None:
        settings = replace(settings, embedder=BUILTIN if sent is None else CALLER)
    width = run.embedding_width
    if width is None and settings.embedder == CALLER and sent is not None:
        width = len(sent)
    return settings, width


def _check_vectors(
    run: Run, settings: RunSettings, width: int | None, items: Sequence[PromptLike], names: Sequence[str]
) -> None:
    for place, item in zip(names, items, strict=True):
        if item.embedding is None:
            continue
        name = f"{place}.embedding (prompt_id {new_prompt(item).prompt_id!r})"
        if settings.embedder != CALLER:
            raise EmbeddingRefused(
                f"{name}: run {run.name!r} computes its vectors with embedder {settings.embedder!r}; leave the vector "
                f"out, or create a run with embedder 'caller'"
            )
        if len(item.embedding) != width:
            raise EmbeddingRefused(
                f"{name}: {len(item.embedding)} numbers, run {run.name!r} takes vectors of {width}; "
                f"send vectors of one model only"
            )


def _unit(values: Sequence[float]) -> FloatArray:
    """The vector at length 1, so that half precision holds it; a zero vector stays zero."""
    vector = np.asarray(values, dtype=np.float64)
    largest = float(np.abs(vector).max())
    if largest == 0.0:
        return vector.astype(np.float32)
    vector = vector / largest
    return np.asarray(vector / np.sqrt((vector * vector).sum()), dtype=np.float32)
