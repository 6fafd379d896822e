"""Fitting the latent-context model of `network` on a run's history, and predicting a pool with it.

As the paper does: the batches in their order, each conditioned on the batch before it, a few updates each. Reads and
writes nothing; weights are plain arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.model.history import History
from evenodds_service.model.paper_network import SMALL, NetworkSize, PaperModel

LEARNING_RATE = 1e-3
UPDATES_PER_STEP = 10
DRAWS = 32
MAX_BATCHES = 128
"""A fit on a long history starts with its newest so many batches; the model conditions on the last one only."""


@dataclass(frozen=True, slots=True, eq=False)
class FittedPaper:
    """What a fit on a sequence of batches gives.

    Attributes:
        weights: For `predict_paper`, and for the next fit's warm start.
        elbo_per_attempt: Eq. 8 of each batch, divided by its attempts, after its last update; one per batch.
    """

    weights: dict[str, NDArray[np.float32]]
    elbo_per_attempt: tuple[float, ...]


def fit_paper(
    batches: Sequence[History],
    embeddings_N_D: FloatArray,
    *,
    seed: int,
    device: torch.device,
    size: NetworkSize = SMALL,
    before: History | None = None,
    warm_start: Mapping[str, NDArray[np.float32]] | None = None,
    max_batches: int = MAX_BATCHES,
) -> FittedPaper:
    """Ten updates of Adam on the ELBO (Eq. 8) for each batch in order, conditioned on the batch before it.

    Deterministic in its arguments on a CPU. Weights carry over from batch to batch and from the warm start; Adam's
    moments start anew with each call.

    Args:
        batches: One history per step, in the order of the steps (`History.batches`); may be empty.
        embeddings_N_D: Of the pool, a row per prompt; rows of NaN count as zeros.
        seed: Of the starting weights and of the draws.
        size: Sizes of a model without a warm start; a warm start brings its own.
        before: The batch before the first one; None if there was none.
        warm_start: Weights of an earlier fit on embeddings of the same width.
        max_batches: Older batches than the newest so many, at least 1, are left out.

    Raises:
        ValueError: the warm start is not of this model or of another embedding width.
    """
    width = embeddings_N_D.shape[1]
    model = _open(warm_start, width, device) if warm_start else PaperModel(width, size, seed=seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    if len(batches) > max_batches:
        before, batches = batches[-max_batches - 1], batches[-max_batches:]
    last = before or History.empty()
    elbos = []
    for batch in batches:
        context = _context(last, embeddings_N_D, device)
        embeddings_C_D = _rows(embeddings_N_D, batch.prompts, device)
        successes_C, attempts_C = _tensor(batch.successes, device), _tensor(batch.attempts, device)
        elbo = torch.zeros(())
        for _ in range(UPDATES_PER_STEP):
            noise_Z = torch.randn(model.size.latent_width, generator=generator).to(device)
            elbo = model.elbo(context, embeddings_C_D, successes_C, attempts_C, noise_Z=noise_Z)
            optimiser.zero_grad()
            (-elbo).backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
            optimiser.step()
        elbos.append(float(elbo.detach()) / float(batch.attempts.sum()))
        last = batch
    return FittedPaper(model.to_weights(), tuple(elbos))


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
