"""Fitting the latent-context model of `network` on a run's history, and predicting a pool with it.

The batches in their order, each conditioned on the batch before it, a few updates each. The likelihood of a history is
a product over all of its steps, p(H_0:T), so each update takes pairs of the past (a batch, and the one before it) along
with the newest. Reads and writes nothing; weights are plain arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.model.history import History
from evenodds_service.model.paper_network import SMALL, NetworkSize, PaperModel

LEARNING_RATE = 1e-3
UPDATES_PER_STEP = 10
PAST_PAIRS = 4
"""Pairs of the past in each update, drawn anew for it (ours). With none the model forgets what it knew of prompts that
the newest batches do not have."""
DRAWS = 32
MAX_BATCHES = 128
"""A fit on a long history has updates for its newest so many batches; older ones come along as pairs of the past."""


@dataclass(frozen=True, slots=True, eq=False)
class FittedPaper:
    """What a fit on a sequence of batches gives.

    Attributes:
        weights: For `predict_paper`, and for the next fit's warm start.
        elbo_per_attempt: Eq. 8 of each batch, divided by its attempts, after its last update; one per batch.
    """

    weights: dict[str, NDArray[np.float32]]
    elbo_per_attempt: tuple[float, ...]


def paper_inputs(embeddings_N_D: FloatArray, features_N_S: FloatArray) -> NDArray[np.float32]:
    """What stands for the prompts in this model, float32 [N, D + S]: the embedding, and features of the text beside it.

    The publication embeds prompts by a language model; a small embedding says less of them, so that what is known of a
    prompt otherwise is given too (ours). Scaled so that after the networks' own scaling every entry is of the order of
    one.

    Args:
        embeddings_N_D: Unit vectors; rows of NaN count as zeros. D may be 0.
        features_N_S: Standardised; S may be 0.
    """
    n_d, width = embeddings_N_D.shape[1], embeddings_N_D.shape[1] + features_N_S.shape[1]
    embeddings = np.nan_to_num(embeddings_N_D.astype(np.float32)) * math.sqrt(n_d / max(width, 1))
    return np.hstack([embeddings, features_N_S.astype(np.float32) / math.sqrt(max(width, 1))]).astype(np.float32)


def fit_paper(
    batches: Sequence[History],
    embeddings_N_D: FloatArray,
    *,
    seed: int,
    device: torch.device,
    size: NetworkSize = SMALL,
    earlier: Sequence[History] = (),
    warm_start: Mapping[str, NDArray[np.float32]] | None = None,
    max_batches: int = MAX_BATCHES,
    past_pairs: int = PAST_PAIRS,
    is_conditioned: bool = True,
) -> FittedPaper:
    """Ten updates of Adam on the ELBO (Eq. 8) for each batch in order, conditioned on the batch before it.

    Each update maximises the sum of the ELBOs of the newest pair and of `past_pairs` others that were drawn from all
    before it. Deterministic in its arguments on a CPU. Weights carry over from batch to batch and from the warm start;
    Adam's moments start anew with each call. Its parameters are what a fit depends on, more than eight.

    Args:
        batches: One history per step, in the order of the steps (`History.batches`); may be empty.
        embeddings_N_D: Of the pool, a row per prompt; rows of NaN count as zeros.
        seed: Of the starting weights and of the draws.
        size: Sizes of a model without a warm start; a warm start brings its own.
        earlier: The batches before the first one, in their order, which the warm start was fitted on.
        warm_start: Weights of an earlier fit on embeddings of the same width.
        max_batches: Older batches than the newest so many, at least 1, get no updates of their own.
        past_pairs: At least 0: the newest pair alone.
        is_conditioned: Whether the prior of z_t knows the batch before; else it is the same at every step.

    Raises:
        ValueError: the warm start is not of this model or of another embedding width.
    """
    width = embeddings_N_D.shape[1]
    model = _open(warm_start, width, device) if warm_start else PaperModel(width, size, seed=seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    histories = [History.empty(), *earlier, *batches]
    pairs = [
        _pair(before if is_conditioned else History.empty(), batch, embeddings_N_D, device)
        for before, batch in pairwise(histories)
    ]
    elbos = []
    for newest in range(max(len(earlier), len(pairs) - max_batches), len(pairs)):
        elbo = torch.zeros(())
        for _ in range(UPDATES_PER_STEP):
            past = torch.randperm(newest, generator=generator)[:past_pairs].tolist()
            elbo, *others = (_elbo(model, pairs[i], generator, device) for i in (newest, *past))
            optimiser.zero_grad()
            (-sum(others, elbo)).backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
            optimiser.step()
        elbos.append(float(elbo.detach()) / pairs[newest].n_attempts)
    return FittedPaper(model.to_weights(), tuple(elbos))


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """A batch H_t, and the batch H_t-1 before it as embeddings [C', D] and rates [C']."""

    before: tuple[Tensor, Tensor]
    embeddings_C_D: Tensor
    successes_C: Tensor
    attempts_C: Tensor
    n_attempts: float


def _pair(before: History, batch: History, embeddings_N_D: FloatArray, device: torch.device) -> _Pair:
    return _Pair(
        _context(before, embeddings_N_D, device),
        _rows(embeddings_N_D, batch.prompts, device),
        _tensor(batch.successes, device),
        _tensor(batch.attempts, device),
        float(batch.attempts.sum()),
    )


def _elbo(model: PaperModel, pair: _Pair, generator: torch.Generator, device: torch.device) -> Tensor:
    noise_Z = torch.randn(model.size.latent_width, generator=generator).to(device)
    return model.elbo(pair.before, pair.embeddings_C_D, pair.successes_C, pair.attempts_C, noise_Z=noise_Z)


def predict_paper(
    weights: Mapping[str, NDArray[np.float32]],
    last_batch: History | None,
    embeddings_N_D: FloatArray,
    pool_embeddings_N_D: FloatArray,
    *,
    seed: int,
    device: torch.device,
    draws: int = DRAWS,
) -> NDArray[np.float32]:
    """Success rates by Monte Carlo over z ~ p_eta(. | last batch), Eq. 10.

    Args:
        last_batch: H_{t-1}; None before the first batch.
        embeddings_N_D: Of the prompts to predict, [N, D]; rows of NaN count as zeros.
        pool_embeddings_N_D: Of the pool that `last_batch.prompts` indexes.
        draws: S, at least 1. The same draws serve all prompts.

    Returns:
        float32 [N] in (0, 1).

    Raises:
        ValueError: the weights are not of this model or of another embedding width.
    """
    model = _open(weights, embeddings_N_D.shape[1], device)
    noise_S_Z = torch.randn(draws, model.size.latent_width, generator=torch.Generator().manual_seed(seed))
    context = _context(last_batch or History.empty(), pool_embeddings_N_D, device)
    rates_N = model.rates(context, _rows(embeddings_N_D, slice(None), device), noise_S_Z=noise_S_Z.to(device))
    return np.asarray(rates_N.cpu().numpy(), dtype=np.float32)


def _open(weights: Mapping[str, NDArray[np.float32]], width: int, device: torch.device) -> PaperModel:
    model = PaperModel.from_weights(weights, device)
    if model.embedding_width != width:
        raise ValueError(
            f"the model was fitted on embeddings of {model.embedding_width} numbers, these have {width}: "
            "fit it anew, without a warm start"
        )
    return model


def _context(batch: History, embeddings_N_D: FloatArray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings [C, D] and rates [C] of a batch."""
    rates_C = batch.successes / np.maximum(batch.attempts, 1.0)
    return _rows(embeddings_N_D, batch.prompts, device), _tensor(rates_C, device)


def _rows(embeddings_N_D: FloatArray, rows: IntArray | slice, device: torch.device) -> Tensor:
    return _tensor(np.nan_to_num(embeddings_N_D[rows].astype(np.float32)), device)


def _tensor(values: FloatArray, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).to(device)
