"""The shared model that a refit fits and a snapshot holds: the fitted priors of one run, as values and as bytes.

Bytes are safetensors, never pickle. A model says what it was fitted on (embedder, basis), and is refused elsewhere.
Knows no store and no clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning.features import Basis
from evenodds_service.domain.learning.predictors import PAPER
from evenodds_service.domain.matched_prior import MOST_SECTIONS, matched_concentration
from evenodds_service.domain.prompts import FittedPrior, RawBlock, SourceColumns
from evenodds_service.errors import SnapshotUnusable, TorchMissing
from evenodds_service.model import latent, ngrams, sources

if TYPE_CHECKING:
    from scipy import sparse

FORMAT = 1
PAPER_CONCENTRATION = 4.0
"""The published model gives a rate and not how sure it is; its belief is worth so many pseudo-attempts (our choice)."""

PAPER_CONTEXT = "paper context"
SOURCES = "sources"
_HEADER = "header"
Weights = dict[str, FloatArray]
Texts: TypeAlias = "Sequence[str | None] | sparse.csr_matrix"
"""Texts, of which None counts as empty, or their n-grams."""


@dataclass(frozen=True, eq=False)
class SharedModel:
    """Fitted priors of a run.

    Attributes:
        embedder: Under which name the vectors were stored that it was fitted on; empty without vectors.
        group_size: G of the informative probabilities that it was fitted to.
        basis: How raw features became its inputs.
        priors: What each prior says about the pool's prompts, by name.
        weights: What each prior says about other prompts, by name.
        report: Figures of the fit, by name.
        last_step: Newest step that the published model was fitted on, where the next fit goes on; -1 without.
        sources: What the runs that are learned from showed on the pool's prompts, if there are any.
        in_common: The names of these runs, with how many of the pool's prompts each has tried.
        serials_N: Indices in the log of the prompts that `priors` speak of; None: 0, 1, 2, ...
    """

    embedder: str
    group_size: int
    basis: Basis
    priors: Mapping[str, FittedPrior]
    weights: Mapping[str, Weights]
    report: Mapping[str, float]
    last_step: int = -1
    sources: SourceColumns | None = None
    in_common: Mapping[str, int] = field(default_factory=dict)
    serials_N: IntArray | None = None

    def to_bytes(self) -> bytes:
        """The model as safetensors."""
        basis, basis_arrays = self.basis.to_arrays()
        header: dict[str, Any] = {
            "format": FORMAT,
            "embedder": self.embedder,
            "ngrams": ngrams.NGRAMS,
            "group_size": self.group_size,
            "report": dict(self.report),
            "last_step": self.last_step,
            "basis": basis,
        }
        if self.sources is not None:
            told = self.sources
            header[SOURCES] = {"names": told.names, "levels": told.levels_C.tolist(), "has_mean": told.has_mean}
            header["in_common"] = dict(self.in_common)
        arrays: dict[str, NDArray[np.generic]] = {_HEADER: np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
        arrays |= {f"basis/{name}": array for name, array in basis_arrays.items()}
        for name, prior in self.priors.items():
            arrays[f"prior/{name}/means"] = prior.means_N.astype(np.float16)
            arrays[f"prior/{name}/concentrations"] = prior.concentrations_N.astype(np.float16)
        if self.sources is not None:
            arrays[f"{SOURCES}/log_odds"] = self.sources.log_odds_N_C
        if self.serials_N is not None:
            arrays["pool/serials"] = self.serials_N
        for name, weights in self.weights.items():
            arrays |= {f"weights/{name}/{part}": array for part, array in weights.items()}
        return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})

    @staticmethod
    def from_bytes(content: bytes, *, embedder: str) -> SharedModel:
        """The model that `to_bytes` took.

        Args:
            embedder: Under which name the vectors are stored that it is to be used with.

        Raises:
            SnapshotUnusable: no snapshot, one of another format, or one that was fitted on another embedder or on other
                columns of n-grams.
        """
        try:
            arrays = load(content)
            header = json.loads(arrays.pop(_HEADER).tobytes())
            found, fitted_on = header["format"], header["embedder"]
        except Exception as error:  # bytes that were damaged may hold anything
            raise SnapshotUnusable(f"{len(content)} bytes are no snapshot ({error!r:.200}): refit the run") from error
        if found != FORMAT:
            raise SnapshotUnusable(f"the snapshot has format {found}, this release reads {FORMAT}: refit the run")
        if fitted_on != embedder:
            raise SnapshotUnusable(
                f"the snapshot was fitted on embedder {fitted_on!r}, the run's vectors come from "
                f"{embedder!r}: refit the run"
            )
        columns = header.get("ngrams", "ngrams/1")  # snapshots that do not say were fitted on the first ones
        if columns != ngrams.NGRAMS:
            raise SnapshotUnusable(
                f"the snapshot was fitted on columns {columns!r}, this release has {ngrams.NGRAMS!r}: refit the run"
            )
        try:
            return SharedModel._of(header, arrays, embedder)
        except Exception as error:  # bytes that were damaged may hold anything
            raise SnapshotUnusable(f"{len(content)} bytes are no snapshot ({error!r:.200}): refit the run") from error

    @staticmethod
    def _of(header: Mapping[str, Any], arrays: Mapping[str, Any], embedder: str) -> SharedModel:
        parts: dict[str, dict[str, Weights]] = {}
        for path, array in arrays.items():
            room, *rest = path.split("/", 2)
            owner, part = rest if len(rest) == 2 else ("", rest[0])
            parts.setdefault(room, {}).setdefault(owner, {})[part] = array
        return SharedModel(
            embedder=embedder,
            group_size=header["group_size"],
            basis=Basis.from_arrays(header["basis"], parts["basis"][""]),
            priors={
                name: FittedPrior(part["means"].astype(np.float32), part["concentrations"].astype(np.float32))
                for name, part in parts.get("prior", {}).items()
            },
            weights=parts.get("weights", {}),
            report=header["report"],
            # Snapshots that do not say it in a field of its own have it among the figures.
            last_step=header.get("last_step", int(header["report"].get("paper.last_step", -1))),
            sources=_sources_of(header.get(SOURCES), parts),
            in_common=header.get("in_common", {}),
            serials_N=parts["pool"][""]["serials"].astype(np.int64) if "pool" in parts else None,
        )

    def priors_of(self, serials_N: IntArray) -> Mapping[str, FittedPrior]:
        """What each prior says about the pool's prompts of these indices; NaN for those that it was not fitted on."""
        return {name: _aligned(prior, self.serials_N, serials_N) for name, prior in self.priors.items()}

    def sources_of(self, serials_N: IntArray) -> SourceColumns | None:
        """What other runs showed on the pool's prompts of these indices; rows of NaN for those that were not known."""
        shown = self.sources
        places = None if shown is None else _places(len(shown.log_odds_N_C), self.serials_N, serials_N)
        if shown is None or places is None:
            return shown
        place, known = places
        log_odds_N_C = np.full((len(serials_N), len(shown.names)), np.nan, dtype=np.float16)
        log_odds_N_C[known] = shown.log_odds_N_C[place[known]]
        return replace(shown, log_odds_N_C=log_odds_N_C)

    def forgetting(self, block: RawBlock) -> SharedModel | None:
        """The same without what it holds of these prompts' features; None where it holds nothing.

        That is the published model's newest batch, which goes whole, and the landmarks of the latent prior: where one
        of these prompts is one, the nearest other landmark takes its place.
        """
        weights = dict(self.weights)
        if len(self.weights.get(PAPER_CONTEXT, {}).get("successes_C", ())):
            weights[PAPER_CONTEXT] = {name: rows[:0] for name, rows in self.weights[PAPER_CONTEXT].items()}
        if "latent" in self.weights:
            landmarks = self.weights["latent"]["landmarks"]
            x_n_d = self.basis.project(block)[:, -landmarks.shape[1] :]
            is_erased_M = (landmarks[:, None] == x_n_d[None]).all(axis=2).any(axis=1)
            if is_erased_M.any() and not is_erased_M.all():
                others = landmarks[~is_erased_M]
                moved = landmarks.copy()
                for m in np.flatnonzero(is_erased_M):
                    moved[m] = others[((others - landmarks[m]) ** 2).sum(axis=1).argmin()]
                weights["latent"] = {**self.weights["latent"], "landmarks": moved}
        return (
            replace(self, weights=weights) if any(weights[name] is not self.weights[name] for name in weights) else None
        )

    def on(self, basis: Basis | None) -> SharedModel:
        """The same model with this very basis where it is equal to its own, so that nothing is projected twice."""
        return replace(self, basis=basis) if basis is not None and basis.equals(self.basis) else self

    def read(self, texts: Sequence[str | None]) -> Texts:
        """The texts as `predict` and `shown` take them, n-grams where both ask for those: they are made once."""
        return texts if self.sources is None else ngrams.ngram_matrix([text or "" for text in texts])

    def predict(self, texts: Texts, block: RawBlock, x_n_d: FloatArray | None = None) -> dict[str, FittedPrior]:
        """What each prior says about n prompts outside the pool.

        Args:
            texts: n of them; `read` spares work where `shown` is asked too.
            block: Their raw features.
            x_n_d: These as `basis` projects them, where the caller has done that.
        """
        x_n_d = self.basis.project(block) if x_n_d is None else x_n_d
        told: dict[str, tuple[FloatArray, FloatArray]] = {}
        if "ngrams" in self.weights:
            words = [text or "" for text in texts] if isinstance(texts, Sequence) else texts
            told["ngrams"] = self._ngrams.predict(words, x_n_d[:, 1:])
        if "latent" in self.weights:
            told["latent"] = self._latent.predict(x_n_d)
        fitted: dict[str, FittedPrior] = {}
        if told:  # all priors in one pass, which for few texts costs no more than one
            means, informative = (np.stack([pair[i] for pair in told.values()]) for i in (0, 1))
            concentrations = matched_concentration(means, informative, self.group_size, sections=MOST_SECTIONS).astype(
                np.float32
            )
            fitted |= {name: FittedPrior(means[i], concentrations[i]) for i, name in enumerate(told)}
        if PAPER in self.weights:
            fitted[PAPER] = self._published(block, x_n_d)
        return fitted

    def shown(self, texts: Texts) -> FloatArray | None:
        """What the runs that are learned from would show on n prompts outside the pool, log-odds [n, C]; None without
        such runs.
        """
        if self.sources is None:
            return None
        words = self.read(texts) if isinstance(texts, Sequence) else texts
        return sources.predict(self.weights[SOURCES], words)

    @cached_property
    def _ngrams(self) -> ngrams.NgramPrior:
        return ngrams.NgramPrior(self.weights["ngrams"])

    @cached_property
    def _latent(self) -> latent.LatentPrior:
        return latent.LatentPrior(self.weights["latent"])

    def _published(self, block: RawBlock, x_n_d: FloatArray) -> FittedPrior:
        """The published model's predictions. Imports torch, which no other prior needs."""
        try:
            import torch
        except ModuleNotFoundError as error:
            raise TorchMissing(
                "gps-paper predicts prompts outside of the pool with torch, which is not installed where the service "
                "runs; install evenodds[service] there, or load the prompts into the pool first"
            ) from error

        from evenodds_service.model.history import History
        from evenodds_service.model.paper_fit import paper_inputs, predict_paper
        from evenodds_service.model.paper_network import width_of

        context = self.weights[PAPER_CONTEXT]
        n = len(context["successes_C"])
        batch = History(
            prompts=np.arange(n),
            steps=np.zeros(n, dtype=np.int64),
            successes=context["successes_C"],
            attempts=context["attempts_C"],
            informative=np.zeros(n, dtype=bool),
        )
        inputs_n_D: FloatArray = paper_inputs(block.embedding_N_D, x_n_d[:, 1 : self.basis.n_surface])
        if width_of(self.weights[PAPER]) == block.embedding_N_D.shape[1]:
            inputs_n_D = block.embedding_N_D  # earlier releases fitted the model on the embedding alone
        means_n = predict_paper(
            self.weights[PAPER],
            batch,
            inputs_n_D,
            context["embeddings_C_D"],
            seed=0,
            device=torch.device("cpu"),
        )
        return FittedPrior(means_n, np.full(len(means_n), PAPER_CONCENTRATION, dtype=np.float32))


def _sources_of(header: Mapping[str, Any] | None, parts: Mapping[str, Mapping[str, Weights]]) -> SourceColumns | None:
    if header is None:
        return None
    levels_C = np.asarray(header["levels"], dtype=np.float64)
    return SourceColumns(tuple(header["names"]), parts[SOURCES][""]["log_odds"], levels_C, header["has_mean"])


def _places(n: int, fitted_N: IntArray | None, serials_N: IntArray) -> tuple[IntArray, BoolArray] | None:
    """Where each of the prompts `serials_N` stands among the n `fitted_N` (None: 0, 1, 2, ...), and whether it does.

    Both rise. None where nobody has left the pool: the first n stand where they are.
    """
    if fitted_N is None and (not len(serials_N) or serials_N[-1] == len(serials_N) - 1):
        return None
    fitted = np.arange(n) if fitted_N is None else fitted_N
    place = np.minimum(np.searchsorted(fitted, serials_N), max(n - 1, 0))
    return place, fitted[place] == serials_N if n else np.zeros(len(serials_N), dtype=np.bool_)


def _aligned(prior: FittedPrior, fitted_N: IntArray | None, serials_N: IntArray) -> FittedPrior:
    """The prior of the prompts `fitted_N` as one of the prompts `serials_N`."""
    places = _places(len(prior.means_N), fitted_N, serials_N)
    if places is None:
        return prior
    place, known = places
    means_N = np.full(len(serials_N), np.nan, dtype=np.float32)
    concentrations_N = np.ones(len(serials_N), dtype=np.float32)
    means_N[known] = prior.means_N[place[known]]
    concentrations_N[known] = prior.concentrations_N[place[known]]
    return FittedPrior(means_N, concentrations_N)


def shaped(means_N: FloatArray, informative_N: FloatArray, group_size: int) -> FittedPrior:
    """The prior whose mean and whose chance of an informative group are these."""
    concentrations_N = matched_concentration(means_N, informative_N, group_size)
    return FittedPrior(means_N.astype(np.float32), concentrations_N.astype(np.float32))
