"""The predictors that a run may answer with: what each believes of prompts, and how it chooses where nothing is set.

A predictor reads a state and a pool and never changes them. What needs a snapshot's model takes its answers as an
argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Protocol, TypeAlias

import numpy as np

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.learning.features import Pool, as_kept
from evenodds_service.domain.learning.mixture import MEMORIES, Experts
from evenodds_service.domain.learning.prediction import (
    EachBlock,
    beliefs_of,
    mixed_beliefs_of,
    new_prompt_beliefs,
    rows_of,
)
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.prompts import FittedPrior, RawBlock
from evenodds_service.domain.settings import Acquisition, PredictorName, RunSettings

PAPER = "paper"
"""Name of the published model's predictions among a snapshot's."""

Beliefs: TypeAlias = tuple[FloatArray, FloatArray]
"""Parameters a and b of Beta distributions of success rates, float64 [n] each."""


MixedBeliefs: TypeAlias = tuple[FloatArray, FloatArray, Callable[[], Experts]]
"""Beliefs, and a call that tells the mixture that they sum up."""

Fitted: TypeAlias = Callable[[FloatArray | None], Mapping[str, FittedPrior]]


class Predictor(Protocol):
    """What a run believes.

    Attributes:
        acquisition: By which it chooses where the run sets none.
        is_mixed: Whether it answers with the mixture, whose skill the guardrails measure.
        is_published: Whether it is the published model: the worker fits that alone for it, without a worker it knows
            nothing, and prompts outside of the pool take it torch and time.
    """

    acquisition: ClassVar[Acquisition]
    is_mixed: ClassVar[bool] = False
    is_published: ClassVar[bool] = False

    def beliefs(
        self,
        state: State,
        pool: Pool,
        indices: IntArray | None = None,
        *,
        steps_n: IntArray | None = None,
        each_block: EachBlock = map,
    ) -> Beliefs:
        """About these prompts of the pool, or about all.

        Args:
            steps_n: The policy's step that each belief is for, as in `beliefs_of`; ignored where nothing ages.
        """

    def mixed_beliefs(
        self, state: State, pool: Pool, indices: IntArray, *, steps_n: IntArray | None = None
    ) -> MixedBeliefs:
        """As `beliefs`, with the experts behind them: one, where nothing is mixed."""
        a, b = self.beliefs(state, pool, indices, steps_n=steps_n)
        return a, b, partial(Experts.alone, a, b)

    def new_beliefs(
        self, state: State, block: RawBlock, fitted: Fitted, shown_n_S: FloatArray | None = None
    ) -> MixedBeliefs:
        """About the prompts of a block, which the pool does not hold: flat, unless something is shared with them.

        Args:
            fitted: What the state's snapshot says about them; called only where it is read, with their projected
                features under the state's basis where they are known.
            shown_n_S: As in `new_prompt_beliefs`.
        """
        a, b = _flat(len(block.prompt_ids))
        return a, b, partial(Experts.alone, a, b)


class Gps(Predictor):
    """The mixture of shared priors and own evidence (algorithm section 3)."""

    acquisition: ClassVar[Acquisition] = "yield"
    is_mixed: ClassVar[bool] = True

    def beliefs(
        self,
        state: State,
        pool: Pool,
        indices: IntArray | None = None,
        *,
        steps_n: IntArray | None = None,
        each_block: EachBlock = map,
    ) -> Beliefs:
        return beliefs_of(state, pool, indices, steps_n=steps_n, each_block=each_block)

    def mixed_beliefs(
        self, state: State, pool: Pool, indices: IntArray, *, steps_n: IntArray | None = None
    ) -> MixedBeliefs:
        return mixed_beliefs_of(state, pool, indices, steps_n=steps_n)

    def new_beliefs(
        self, state: State, block: RawBlock, fitted: Fitted, shown_n_S: FloatArray | None = None
    ) -> MixedBeliefs:
        x_n_d = state.basis.project(as_kept(block)) if state.basis is not None else None
        return new_prompt_beliefs(state, x_n_d, block.told, fitted(x_n_d), shown_n_S)


class GpsPaper(Predictor):
    """The published model alone (arXiv 2602.01970); flat before its first fit. Own evidence has no part in it."""

    acquisition: ClassVar[Acquisition] = "paper"
    is_published: ClassVar[bool] = True

    def beliefs(self, state: State, pool: Pool, indices: IntArray | None = None, **_: object) -> Beliefs:
        prior = pool.fitted(state.model_version).get(PAPER)
        rows = slice(0, state.n_prompts) if indices is None else indices
        return _flat(_count(state, indices)) if prior is None else self._of(rows_of(prior, rows))

    def new_beliefs(
        self, state: State, block: RawBlock, fitted: Fitted, shown_n_S: FloatArray | None = None
    ) -> MixedBeliefs:
        prior = fitted(None).get(PAPER)
        a, b = _flat(len(block.prompt_ids)) if prior is None else self._of(prior)
        return a, b, partial(Experts.alone, a, b)

    @staticmethod
    def _of(prior: FittedPrior) -> Beliefs:
        # A rate that was rounded to 0 or 1 would leave no Beta.
        means_n = np.clip(np.nan_to_num(prior.means_N.astype(np.float64), nan=0.5), 1e-3, 1.0 - 1e-3)
        return means_n * prior.concentrations_N, (1.0 - means_n) * prior.concentrations_N


class Mopps(Predictor):
    """Beta(1 + S, 1 + F) of a prompt's own outcomes (arXiv 2507.04632): nothing shared, nothing discounted."""

    acquisition: ClassVar[Acquisition] = "thompson"

    def beliefs(self, state: State, pool: Pool, indices: IntArray | None = None, **_: object) -> Beliefs:
        rows = slice(0, state.n_prompts) if indices is None else indices
        all_L = MEMORIES.index(1.0)
        return 1.0 + state.successes_L_N[all_L, rows].astype(float), 1.0 + state.failures_L_N[all_L, rows].astype(float)


class Uniform(Predictor):
    """Nothing is known of any prompt."""

    acquisition: ClassVar[Acquisition] = "uniform"

    def beliefs(self, state: State, pool: Pool, indices: IntArray | None = None, **_: object) -> Beliefs:
        return _flat(_count(state, indices))


PREDICTORS: Mapping[PredictorName, Predictor] = {
    "gps": Gps(),
    "gps-paper": GpsPaper(),
    "mopps": Mopps(),
    "uniform": Uniform(),
}


def acquisition_of(settings: RunSettings) -> Acquisition:
    """By which the run chooses: as set, else as its predictor does."""
    return settings.acquisition or PREDICTORS[settings.predictor].acquisition


def _count(state: State, indices: IntArray | None) -> int:
    return state.n_prompts if indices is None else len(indices)


def _flat(n: int) -> Beliefs:
    return np.ones(n), np.ones(n)
