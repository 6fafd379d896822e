"""The methods that read the text, behind the interface of `rivals`: `gps` and `gps-paper` of this project.

`gps` is driven through the service's own fold and choice, `gps-paper` through its own fit, so that what is measured is
what is served. `Parts` takes parts of `gps` away, for the ablations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from benchmarks.rivals import Forecast
from benchmarks.worlds import World
from numpy.typing import NDArray

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.learning.features import Basis, directions
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.mixture import MEMORIES, PRIORS, STRENGTHS, WEIGHT_KEEP, Mixture
from evenodds_service.domain.learning.prediction import beliefs_of
from evenodds_service.domain.learning.regression import OnlineLogistic
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry, SnapshotEntry
from evenodds_service.domain.selection import part as part_of_pool
from evenodds_service.domain.selection.batch import Candidates, Shares, choose
from evenodds_service.domain.selection.eligibility import held_back, rest_steps, resting
from evenodds_service.domain.selection.selection import (
    REPROBE_SHARE,
    Forecasts,
    SelectionRequest,
    choose_batch,
    picker_of,
)
from evenodds_service.domain.settings import RunSettings
from evenodds_service.model.embedder import BUILTIN_NAME
from evenodds_service.model.history import History
from evenodds_service.model.paper_fit import PAST_PAIRS, fit_paper, paper_inputs, predict_paper
from evenodds_service.model.paper_network import SMALL, NetworkSize
from evenodds_service.model.refit import TrainingData, fit_shared_model

PAPER_DIVERSITY = 0.1
"""Lambda of the paper's acquisition (Eq. 13). Not published; ours."""

_NO_GUARD = -700.0  # log odds


@dataclass(frozen=True, slots=True)
class Parts:
    """Which parts of `gps` take part; all by default.

    Attributes:
        priors, strengths, memories: The experts that exist; memories by their place in `MEMORIES`.
        weights_forget, regressions_forget, guard: The forgetting of the experts' weights, that of the online
            regressions, and the guard that bounds the loss by MoPPS's.
        refit_every: Steps between two refits of the n-gram and the latent prior, the first after the first step that
            observes enough prompts; 0 never refits.
        optimism, diversity, rest, quota: Of the choice: weight of the standard deviation, how much of the score may be
            given up for diversity, and whether a chosen prompt rests and the least recently seen have their quota.
    """

    priors: tuple[str, ...] = PRIORS
    strengths: tuple[float, ...] = STRENGTHS
    memories: tuple[int, ...] = tuple(range(len(MEMORIES)))
    weights_forget: bool = True
    regressions_forget: bool = True
    guard: bool = True
    refit_every: int = 0
    optimism: float = 0.5
    diversity: float = 0.1
    rest: bool = True
    quota: bool = True


class Gps:
    """The mixture of section 3, as the service folds it."""

    def __init__(self, world: World, parts: Parts | None = None) -> None:
        self._parts = parts or Parts()
        self._pool = world.pool()
        self._group_size = world.group_size
        self._state = fold(State(), PoolEntry(1, world.n_prompts), self._pool)
        self._state.mixture = _without(self._state.mixture, self._parts)
        if not self._parts.regressions_forget:
            self._state.surface = _unforgetting(self._state.surface)
            self._state.quick = _unforgetting(self._state.quick)
            self._state.embedding = _unforgetting(self._state.embedding)
        self._world, self._device = world, torch.device("cpu")
        self._history: list[History] = []
        self._next_refit = 0
        if world.sources is not None or world.shown is not None:
            self.refit(0)  # as the worker does when the run is created
            self._next_refit = 0

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        informative = (successes > 0) & (successes < attempts)
        entry = ObserveEntry(self._state.position + 1, step, prompts, successes, attempts, informative)
        fold(self._state, entry, self._pool)
        steps = np.full(len(prompts), step, dtype=np.int64)
        self._history.append(History(prompts, steps, successes, attempts, informative))
        if self._parts.refit_every and step >= self._next_refit:
            self.refit(step)

    def predict(self) -> Forecast:
        a, b = beliefs_of(self._state, self._pool)
        return Forecast(a / (a + b), informative_moments(a, b, self._group_size)[0])

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        state, parts = self._state, self._parts
        allowed = np.zeros(state.n_prompts, dtype=bool)
        allowed[candidates] = True
        a, b = beliefs_of(state, self._pool)
        informative, deviation = informative_moments(a, b, self._group_size)
        scores = informative + parts.optimism * deviation
        last_seen = np.maximum(state.last_selected_N, state.last_step_N)
        if parts.rest:
            held = resting(last_seen, step=step, rest=rest_steps(state.n_prompts, batch_size))
            allowed = held_back(
                allowed, held, last_seen, scores_N=scores, batch_size=batch_size, groups={}, caps={}, all_alike=True
            )
        if not parts.quota:  # the quota then takes the best, as the rest of the batch does
            last_seen = np.argsort(np.argsort(-scores))
        choice = choose(
            scores,
            informative,
            Candidates(allowed, allowed, last_seen),
            Shares(reprobe=REPROBE_SHARE),
            batch_size=batch_size,
            picker=picker_of("yield", parts.diversity, state.recent_batches, self._directions),
            generator=generator,
        )
        return self._fold_choice(step, choice.prompts)

    def _fold_choice(self, step: int, prompts: IntArray) -> IntArray:
        fold(self._state, SelectEntry(self._state.position + 1, step, prompts), self._pool)
        return prompts

    def weights(self) -> FloatArray:
        """Weights of the experts, prior x strength x memory, summing to 1."""
        return self._state.mixture.weights()

    def refit(self, step: int) -> None:
        """What the worker does: fit the shared model on the history and let its snapshot enter the log."""
        state = self._state
        assert state.basis is not None  # the pool is not empty
        data = TrainingData(
            embedder=BUILTIN_NAME,
            predictor="gps",
            group_size=self._group_size,
            basis=state.basis,
            x_N_d=self._pool.matrix(state.basis, state.n_prompts),
            embeddings_N_D=self._world.embeddings_N_D,
            ngrams=self._world.ngrams,
            history=History.gathered(self._history),
            sources=self._world.sources,
        )
        model = fit_shared_model(data, device=self._device)
        priors = {name: prior for name, prior in model.priors.items() if name in self._parts.priors}
        sources = self._world.shown or model.sources
        if not priors and sources is None:
            return
        version = state.model_version + 1
        self._pool.attach(version, priors, sources)
        fold(state, SnapshotEntry(state.position + 1, version), self._pool)
        self._next_refit = step + self._parts.refit_every

    def _directions(self, prompts: IntArray) -> FloatArray:
        assert self._state.basis is not None  # the pool is not empty
        return directions(self._pool.rows(self._state.basis, prompts))


class LookingAt(Gps):
    """`gps`, streaming, whose choices look at so many prompts, as those of the service do of larger pools."""

    def __init__(self, world: World, n: int) -> None:
        super().__init__(world)
        self._n = n

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        """Of the whole pool."""
        settings = RunSettings(group_size=self._group_size)
        request = SelectionRequest(step, batch_size, seed=int(generator.integers(2**31)))

        def forecasts_of(rows: IntArray | None) -> Forecasts:
            return Forecasts.of(*beliefs_of(self._state, self._pool, rows), self._group_size)

        with patch.multiple(part_of_pool, LOOKED_AT=self._n, FOR_EACH=0):
            choice = choose_batch(self._state, self._pool, settings, request, forecasts_of)
        return self._fold_choice(step, choice.choice.prompts)


class GpsPaper:
    """The latent-context model alone, with the paper's acquisition (arXiv 2602.01970), as this project implements it.

    Ten updates at each step, on the newest batch and batches of the past; the batch maximises sum u(p) + lambda D with
    u = -(p - .5)^2 over all candidates, D = mean cosine distance within the batch + mean distance to the previous
    batch, by greedy max-sum.

    Args:
        diversity: lambda.
        conditioned: Whether z_t depends on the batch before, as published; else p_eta(z_t) is the same at every step.
        size: Of the networks.
        past_pairs: Of the past, in each update; 0 trains on the newest batch only.
        has_features: Whether it is given the features of the texts beside their embeddings.
    """

    def __init__(
        self,
        world: World,
        *,
        seed: int,
        diversity: float = PAPER_DIVERSITY,
        conditioned: bool = True,
        size: NetworkSize = SMALL,
        past_pairs: int = PAST_PAIRS,
        has_features: bool = True,
    ) -> None:
        self._embeddings_N_D = np.nan_to_num(world.embeddings_N_D)
        pool = world.pool()
        basis = Basis.of(pool.raw(0, world.n_prompts))
        features_N_S = pool.matrix(basis, world.n_prompts)[:, 1 : basis.n_surface if has_features else 1]
        self._inputs_N_D: FloatArray = paper_inputs(self._embeddings_N_D, features_N_S)
        self._group_size, self._seed, self._diversity = world.group_size, seed, diversity
        self._conditioned, self._size = conditioned, size
        self._device = torch.device("cpu")
        self._weights: Mapping[str, NDArray[np.float32]] | None = None
        self._past_pairs = past_pairs
        self._history: list[History] = []
        self._means: FloatArray | None = None

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        informative = (successes > 0) & (successes < attempts)
        steps = np.full(len(prompts), step, dtype=np.int64)
        batch = History(prompts, steps, successes.astype(np.float64), attempts.astype(np.float64), informative)
        fitted = fit_paper(
            [batch],
            self._inputs_N_D,
            seed=self._seed + step,
            device=self._device,
            size=self._size,
            earlier=self._history,
            warm_start=self._weights,
            past_pairs=self._past_pairs,
            is_conditioned=self._conditioned,
        )
        self._weights, self._means = fitted.weights, None
        self._history.append(batch)

    def predict(self) -> Forecast:
        p = self._rates()
        g = self._group_size
        return Forecast(p, 1.0 - p**g - (1.0 - p) ** g)

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        if self._weights is None:
            return generator.choice(candidates, batch_size, replace=False)
        rows = self._embeddings_N_D[candidates]
        worth = -((self._rates()[candidates] - 0.5) ** 2)
        previous = self._embeddings_N_D[self._history[-1].prompts].mean(axis=0)
        worth = worth + self._diversity * (1.0 - rows @ previous)
        near = np.zeros(len(candidates))  # sum of the cosines with the chosen
        chosen: list[int] = []
        for n in range(batch_size):
            gain = worth + self._diversity * (1.0 - near / n) if n else worth.copy()
            gain[chosen] = -np.inf
            chosen.append(int(np.argmax(gain)))
            near += rows @ rows[chosen[-1]]
        return candidates[chosen]

    def _rates(self) -> FloatArray:
        if self._weights is None:
            return np.full(len(self._inputs_N_D), 0.5)
        if self._means is None:
            rates = predict_paper(
                self._weights,
                self._history[-1] if self._conditioned else None,
                self._inputs_N_D,
                self._inputs_N_D,
                seed=self._seed,
                device=self._device,
            )
            self._means = rates.astype(np.float64)
        return self._means


class _Altered(Mixture):
    """A mixture of some experts only, without its forgetting or without its guard where `parts` say so."""

    parts: Parts = Parts()

    def admit(self, present: BoolArray) -> None:
        kept = _kept(self.parts)
        super().admit(present & kept.any(axis=(1, 2)))
        self.log_weights = np.where(kept, self.log_weights, -np.inf)
        self.log_weights -= np.log(np.exp(self.log_weights).sum())

    def forget(self, keep: float = WEIGHT_KEEP) -> None:
        if self.parts.weights_forget:
            super().forget(keep)

    def update(self, log_likelihoods: FloatArray) -> tuple[float, float]:
        result = super().update(log_likelihoods)
        if not self.parts.guard:
            self.log_guard = _NO_GUARD
        return result


def _without(mixture: Mixture, parts: Parts) -> Mixture:
    """The mixture of a new run, of the experts that `parts` keep."""
    log_weights = np.where(_kept(parts), mixture.log_weights, -np.inf)
    log_weights -= np.log(np.exp(log_weights).sum())
    altered = _Altered(log_weights, mixture.log_guard if parts.guard else _NO_GUARD)
    altered.parts = parts
    return altered


def _kept(parts: Parts) -> BoolArray:
    """Which experts exist, bool [C, S, L]."""
    priors, strengths, memories = (
        np.array([value in kept for value in every])
        for every, kept in (
            (PRIORS, parts.priors),
            (STRENGTHS, parts.strengths),
            (range(len(MEMORIES)), parts.memories),
        )
    )
    return np.asarray(priors[:, None, None] & strengths[:, None] & memories)


def _unforgetting(regression: OnlineLogistic | None) -> OnlineLogistic | None:
    if regression is None:
        return None
    return _Unforgetting(regression.weights, regression.precision, regression.prior_precision)


class _Unforgetting(OnlineLogistic):
    def forget(self, keep: float) -> None:
        """Nothing is forgotten."""
