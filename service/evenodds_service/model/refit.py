"""One refit: a run's history and pool in, its shared model out. The only entrance of the worker to what is learned.

Deterministic in its arguments on a CPU. Knows no store, no clock and no lease. torch is imported by the first fit:
whoever only gathers its data starts sooner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.learning.features import Basis
from evenodds_service.domain.learning.predictors import PAPER, PREDICTORS
from evenodds_service.domain.prompts import FittedPrior
from evenodds_service.domain.settings import ModelSize, PredictorName
from evenodds_service.model import ngrams
from evenodds_service.model.history import History
from evenodds_service.model.snapshot import PAPER_CONCENTRATION, PAPER_CONTEXT, SOURCES, SharedModel, Weights, shaped
from evenodds_service.model.sources import Joined, fit_sources

if TYPE_CHECKING:
    import torch

MEMORY_STEPS = 100.0
"""An outcome counts exp(-age / memory) in the labels of the n-gram prior."""

_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """What a refit works on.

    Attributes:
        embedder: Under which name the pool's vectors are stored; empty without vectors.
        predictor: Which predictor the run answers with: the published one has a model of its own, all others share one.
        group_size: G, attempts per prompt in training.
        basis: Under which x_N_d was projected.
        x_N_d: Inputs of the pool's N prompts.
        embeddings_N_D: Their vectors; D may be 0.
        ngrams: Their n-grams, from `ngrams.ngram_matrix`.
        history: Observations of these prompts.
        model_size: Of the networks of `gps-paper`.
        warm_start: The model that is in use, if any.
        sources: Outcomes of the runs that are learned from, if there are any.
        source_ngrams: Of the pool's prompts and of the other prompts of these runs.
    """

    embedder: str
    predictor: PredictorName
    group_size: int
    basis: Basis
    x_N_d: FloatArray
    embeddings_N_D: FloatArray
    ngrams: sparse.csr_matrix
    history: History
    model_size: ModelSize = "small"
    warm_start: SharedModel | None = None
    sources: Joined | None = None
    source_ngrams: sparse.csr_matrix | None = None


def fit_shared_model(data: TrainingData, *, device: torch.device) -> SharedModel:
    """Fit every prior that has enough to learn from.

    A prior of an observed prompt never contains the prompt's own outcomes: those come in as its evidence.
    """
    if PREDICTORS[data.predictor].is_published:
        return _fit_published(data, device)
    from evenodds_service.model.latent_fit import fit_latent

    priors: dict[str, FittedPrior] = {}
    weights: dict[str, Weights] = {}
    report: dict[str, float] = {}
    labels = _labels(data.history)
    if len(labels.prompts) >= ngrams.MIN_LABELS:
        sparse_fit = ngrams.fit(
            data.ngrams,
            data.x_N_d[:, 1:],
            labelled=labels.prompts,
            successes=labels.successes,
            attempts=labels.attempts,
            informative_share=labels.informative_share,
            group_size=data.group_size,
            seed=_SEED,
        )
        priors["ngrams"] = shaped(sparse_fit.mean_N, sparse_fit.informative_N, data.group_size)
        weights["ngrams"] = sparse_fit.weights
        report |= {f"ngrams.{name}": float(value) for name, value in sparse_fit.report.items()}
        latent_fit = fit_latent(
            data.history,
            data.x_N_d,
            n_surface=data.basis.n_surface,
            group_size=data.group_size,
            seed=_SEED,
            device=device,
        )
        priors["latent"] = shaped(latent_fit.mean_N, latent_fit.informative_N, data.group_size)
        weights["latent"] = dict(latent_fit.weights)
        report |= {f"latent.{name}": float(value) for name, value in latent_fit.report.items()}
    model = SharedModel(
        embedder=data.embedder,
        group_size=data.group_size,
        basis=data.basis,
        priors=priors,
        weights=weights,
        report=report,
    )
    return model if data.sources is None else _beside_sources(model, data, data.sources)


def _beside_sources(model: SharedModel, data: TrainingData, joined: Joined) -> SharedModel:
    """The model with what the runs that are learned from showed."""
    texts = data.ngrams if data.source_ngrams is None else data.source_ngrams
    fitted = fit_sources(joined, texts, data.history, group_size=data.group_size, seed=_SEED)
    return replace(
        model,
        weights={**model.weights, SOURCES: fitted.weights},
        report={**model.report, **{f"{SOURCES}.{name}": value for name, value in fitted.report.items()}},
        sources=fitted.columns,
        in_common=dict(joined.in_common),
    )


def _fit_published(data: TrainingData, device: torch.device) -> SharedModel:
    """The published model: fitted on the batches since its last fit, with those before, predicting from the newest."""
    from evenodds_service.model.paper_fit import fit_paper, paper_inputs, predict_paper
    from evenodds_service.model.paper_network import PUBLISHED, SMALL, size_of, width_of

    before = data.warm_start
    size = PUBLISHED if data.model_size == "published" else SMALL
    inputs_N_D = paper_inputs(data.embeddings_N_D, data.x_N_d[:, 1 : data.basis.n_surface])
    warm = before.weights.get(PAPER) if before is not None else None
    if warm is not None and (size_of(warm), width_of(warm)) != (size, inputs_N_D.shape[1]):
        warm = None  # a setting or the pool's features were changed: the model starts anew, on the whole history
    last_step = before.last_step if before is not None and warm is not None else -1
    batches = data.history.batches()
    fresh = [batch for batch in batches if int(batch.steps[0]) > last_step]
    earlier = [batch for batch in batches if int(batch.steps[0]) <= last_step]
    fitted = fit_paper(
        fresh,
        inputs_N_D,
        seed=_SEED,
        device=device,
        size=size,
        earlier=earlier,
        warm_start=warm,
    )
    newest = batches[-1] if batches else None
    means_N = predict_paper(fitted.weights, newest, inputs_N_D, inputs_N_D, seed=_SEED, device=device)
    newest_step = int(newest.steps[0]) if newest is not None else -1
    report = {"paper.last_step": float(newest_step)}
    if fitted.elbo_per_attempt:
        report["paper.elbo_per_attempt"] = fitted.elbo_per_attempt[-1]
    concentrations_N = np.full(len(means_N), PAPER_CONCENTRATION, dtype=np.float32)
    return SharedModel(
        embedder=data.embedder,
        group_size=data.group_size,
        basis=data.basis,
        priors={PAPER: FittedPrior(means_N, concentrations_N)},
        weights={PAPER: dict(fitted.weights), PAPER_CONTEXT: _context(newest, inputs_N_D)},
        report=report,
        last_step=newest_step,
    )


def _context(newest: History | None, inputs_N_D: FloatArray) -> Weights:
    """The batch that predictions are conditioned on, for prompts outside the pool."""
    batch = newest if newest is not None else History.empty()
    return {
        "embeddings_C_D": inputs_N_D[batch.prompts].astype(np.float32),
        "successes_C": batch.successes,
        "attempts_C": batch.attempts,
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """Per observed prompt: discounted successes and attempts, and the discounted share of informative groups."""

    prompts: IntArray
    successes: FloatArray
    attempts: FloatArray
    informative_share: FloatArray


def _labels(history: History) -> _Labels:
    prompts, row_n = np.unique(history.prompts, return_inverse=True)
    age_n = (history.steps.max(initial=0) - history.steps) / MEMORY_STEPS
    worth_n = np.exp(-age_n)
    successes, attempts, informative, worth = (np.zeros(len(prompts)) for _ in range(4))
    np.add.at(successes, row_n, worth_n * history.successes)
    np.add.at(attempts, row_n, worth_n * history.attempts)
    np.add.at(informative, row_n, worth_n * history.informative)
    np.add.at(worth, row_n, worth_n)
    # A single attempt shows no group: it says nothing of informativeness.
    groups = np.bincount(row_n, weights=history.attempts > 1, minlength=len(prompts)) > 0
    share = np.where(groups, informative / np.maximum(worth, 1e-300), np.nan)
    return _Labels(prompts, successes, attempts, share)
