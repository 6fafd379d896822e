from __future__ import annotations

import numpy as np
import pytest
from benchmarks.contenders import Gps, GpsPaper, Parts
from benchmarks.worlds import World

from evenodds_service.domain.learning.mixture import MEMORIES, PRIORS, STRENGTHS


def tell(method: Gps | GpsPaper, step: int, prompts: range) -> None:
    indices = np.array(prompts, dtype=np.int64)
    successes = np.repeat([0.0, 4.0, 8.0], 20)[indices]
    method.observe(step, indices, successes, np.full(len(indices), 8.0))


def test_gps_learns_what_it_is_told(world: World) -> None:
    method = Gps(world)
    for step in range(4):
        tell(method, step, range(60))

    means = method.predict().mean_N

    assert means[:20].max() < means[20:40].min() < means[20:40].max() < means[40:].min()


def test_a_refit_brings_the_fitted_priors_into_the_mixture(world: World) -> None:
    streaming, refitted = Gps(world), Gps(world, Parts(refit_every=1))
    for method in (streaming, refitted):
        tell(method, 0, range(0, 60))

    fitted = [PRIORS.index("ngrams"), PRIORS.index("latent")]
    assert streaming.weights()[fitted].sum() == 0.0
    assert (refitted.weights()[fitted].sum(axis=(1, 2)) > 0.0).all()


@pytest.mark.parametrize("refit_every", [0, 1])
def test_parts_taken_away_stay_away(world: World, refit_every: int) -> None:
    parts = Parts(
        priors=("embedding", "latent"),
        strengths=(2.0,),
        memories=(MEMORIES.index(0.8),),
        guard=False,
        refit_every=refit_every,
    )
    method = Gps(world, parts)
    tell(method, 0, range(60))
    tell(method, 1, range(60))

    weights = method.weights()

    kept = np.zeros(weights.shape, dtype=bool)
    kept[np.ix_([PRIORS.index("embedding"), PRIORS.index("latent")], [STRENGTHS.index(2.0)], [MEMORIES.index(0.8)])] = 1
    assert weights[~kept].max() < 1e-12
    assert weights[kept].sum() == pytest.approx(1.0)


def test_gps_and_gps_paper_choose_among_the_candidates(world: World) -> None:
    candidates = np.arange(10, 50)
    for method in (Gps(world), Gps(world, Parts(diversity=0.0, rest=False, quota=False)), GpsPaper(world, seed=0)):
        tell(method, 0, range(0, 60, 3))

        chosen = method.select(candidates, 8, step=1, generator=np.random.default_rng(0))

        assert len(set(chosen.tolist())) == 8
        assert set(chosen.tolist()) <= set(candidates.tolist())


def test_gps_paper_forecasts_probabilities_without_conditioning(world: World) -> None:
    method = GpsPaper(world, seed=0, conditioned=False)
    tell(method, 0, range(0, 30))
    forecast = method.predict()

    assert ((forecast.mean_N > 0.0) & (forecast.mean_N < 1.0)).all()
    assert ((forecast.informative_N >= 0.0) & (forecast.informative_N <= 1.0)).all()
