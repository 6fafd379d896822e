"""What several endpoints ask alike: the beliefs about prompts of a pool and about new texts. Nothing is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.mixture import Experts
from evenodds_service.errors import UnknownPrompts
from evenodds_service.runtime.featurizer import Featurizer, PromptLike, new_prompt
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.store import Run

UNKNOWN_HINT = "send its text instead, or load it with POST /runs/{run}/prompts"


@dataclass(frozen=True, slots=True, eq=False)
class Beliefs:
    """Beliefs Beta(a, b) about n prompts in the order asked, and the state that they come from.

    Attributes:
        experts: Tells whose mixture each belief sums up.
        seen: Attempts observed of each, [n].
        n_observations: Observations of the whole run.
    """

    ids: tuple[str, ...]
    a: FloatArray
    b: FloatArray
    experts: Callable[[], Experts]
    seen: FloatArray
    log_position: int
    model_version: int
    n_observations: int


def beliefs_about(
    featurizer: Featurizer,
    run: Run,
    live: LiveRun,
    items: Sequence[PromptLike],
    *,
    names: Sequence[str],
    step: int | None = None,
) -> Beliefs:
    """The beliefs in the present state of `live`.

    Args:
        names: Where each item stands in the request, for error messages.
        step: Which own evidence has aged to, the head step without it.

    Raises:
        UnknownPrompts: some have no text and are not in the pool.
        EmbeddingRefused: as in `Featurizer.block`.
    """
    ids = tuple(new_prompt(item).prompt_id for item in items)
    with live.lock:
        n_retired = live.state.n_retired
        known = [live.pool.index.get(prompt_id) for prompt_id in ids]
    outside = [i for i, index in enumerate(known) if index is None]
    unknown = [ids[i] for i in outside if items[i].text is None]
    if unknown:
        raise UnknownPrompts(run.name, unknown, path=names[0].partition("[")[0], hint=UNKNOWN_HINT)
    block = None
    if outside:
        block = featurizer.block(run, [items[i] for i in outside], names=[names[i] for i in outside])
    inside = [i for i, index in enumerate(known) if index is not None]
    rows = np.array([index for index in known if index is not None], dtype=np.int64)
    n = len(ids)
    a, b, seen = np.ones(n), np.ones(n), np.zeros(n)
    parts: list[tuple[list[int], Callable[[], Experts]]] = []
    predictor = run.settings.predictor
    with live.lock:
        if live.state.n_retired != n_retired:  # while features were computed: prompts stand elsewhere now
            return beliefs_about(featurizer, run, live, items, names=names, step=step)
        if inside:
            steps = None if step is None else np.full(len(rows), step)
            a[inside], b[inside], experts = live.mixed_beliefs(predictor, rows, steps_n=steps)
            parts.append((inside, experts))
            seen[inside] = live.state.attempts_N[rows]
        if block is not None:
            texts = [items[i].text for i in outside]
            a[outside], b[outside], experts = live.new_beliefs(predictor, texts, block)
            parts.append((outside, experts))
        return Beliefs(
            ids,
            a,
            b,
            partial(_together, parts, n),
            seen,
            live.state.position,
            live.state.model_version,
            live.state.n_observations,
        )


def _together(parts: Sequence[tuple[Sequence[int], Callable[[], Experts]]], n: int) -> Experts:
    """The experts of n prompts, from those of some at a time: the state, and so their weights, are the same."""
    told = [(places, experts()) for places, experts in parts]
    weights_K = told[0][1].weights_K
    a_K_n, b_K_n = np.empty((len(weights_K), n)), np.empty((len(weights_K), n))
    for places, experts in told:
        a_K_n[:, places], b_K_n[:, places] = experts.a_K_n, experts.b_K_n
    return Experts(weights_K, a_K_n, b_K_n)
