from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.model.history import History
from evenodds_service.model.latent import LatentPrior
from evenodds_service.model.latent_fit import FittedLatent, fit_latent
from evenodds_service.model.paper_fit import FittedPaper, fit_paper, paper_inputs, predict_paper
from evenodds_service.model.paper_network import NetworkSize

TINY = NetworkSize(width=32, layers=1, heads=2, latent_width=4)
WIDTH = 8
N_SURFACE = 6
N_INPUTS = 10
N_BATCHES = 24
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CPU = torch.device("cpu")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def outcomes(rates_N: FloatArray, prompts: IntArray, steps: IntArray, *, seed: int, attempts: int = 8) -> History:
    """Groups of attempts on prompts of these rates."""
    k = np.random.default_rng(seed).binomial(attempts, rates_N[prompts]).astype(np.float64)
    counts = np.full(len(prompts), float(attempts))
    return History(prompts, steps, k, counts, (k > 0) & (k < counts))


def gather(one: History, other: History) -> History:
    return History(
        np.concatenate([one.prompts, other.prompts]),
        np.concatenate([one.steps, other.steps]),
        np.concatenate([one.successes, other.successes]),
        np.concatenate([one.attempts, other.attempts]),
        np.concatenate([one.informative, other.informative]),
    )


def sigmoid(z: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-z)))


def correlation(one: FloatArray, other: FloatArray) -> float:
    return float(np.corrcoef(one, other)[0, 1])


class ShiftingWorld:
    """Prompts in two topics, one of them harder; all of them turn hard and easy again as the steps go by."""

    def __init__(self, n: int = 120) -> None:
        rng = np.random.default_rng(0)
        self.topic_N = np.where(np.arange(n) % 2, 1.0, -1.0)
        rows = 0.5 * rng.standard_normal((n, WIDTH))
        rows[:, 0] += 2.0 * self.topic_N
        self.embeddings_N_D = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def rates(self, phase: int) -> FloatArray:
        return sigmoid(self.topic_N + (1.5 if phase else -1.5))

    def batches(self, n_steps: int, *, seed: int = 0) -> list[History]:
        """The phase holds for eight steps, then turns."""
        rng = np.random.default_rng(seed)
        return [
            outcomes(
                self.rates(step // 8 % 2),
                rng.permutation(len(self.topic_N))[:24],
                np.full(24, step),
                seed=seed * 1000 + step,
            )
            for step in range(n_steps)
        ]


@pytest.fixture(scope="module")
def shifting() -> ShiftingWorld:
    return ShiftingWorld()


@pytest.fixture(scope="module")
def fitted_paper(shifting: ShiftingWorld) -> FittedPaper:
    return fit_paper(shifting.batches(N_BATCHES), shifting.embeddings_N_D, seed=1, device=CPU, size=TINY)


def predict(weights: dict[str, np.ndarray], last: History | None, world: ShiftingWorld) -> FloatArray:
    rows = world.embeddings_N_D
    return predict_paper(weights, last, rows, rows, seed=3, device=CPU)


def test_batches_follow_the_steps_whatever_the_order_of_the_rows() -> None:
    steps = np.array([7, 2, 7, 2, 5])
    history = outcomes(np.full(5, 0.5), np.arange(5), steps, seed=0)

    batches = history.batches()

    assert [batch.steps[0] for batch in batches] == [2, 5, 7]
    assert [batch.prompts.tolist() for batch in batches] == [[1, 3], [4], [0, 2]]
    assert History.empty().batches() == []


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns of different lengths \[1, 2\]"):
        History(np.arange(2), np.arange(2), np.ones(2), np.ones(2), np.ones(1, dtype=bool))


def test_the_papers_model_follows_a_shift_of_difficulty(shifting: ShiftingWorld, fitted_paper: FittedPaper) -> None:
    """The same weights predict either phase: what changed is the last batch alone."""
    hard, easy = (
        predict(
            fitted_paper.weights,
            outcomes(shifting.rates(phase), np.arange(0, 120, 5), np.full(24, 48), seed=9),
            shifting,
        )
        for phase in (0, 1)
    )

    assert easy.mean() > hard.mean() + 0.2
    assert correlation(hard, shifting.rates(0)) > 0.8
    assert correlation(easy, shifting.rates(1)) > 0.8


def test_the_papers_model_learns_from_batch_to_batch(fitted_paper: FittedPaper) -> None:
    elbos = fitted_paper.elbo_per_attempt

    assert len(elbos) == N_BATCHES
    assert np.mean(elbos[-8:]) > np.mean(elbos[:4]) + 0.02


def test_the_papers_model_predicts_before_the_first_batch(shifting: ShiftingWorld) -> None:
    empty = fit_paper([], shifting.embeddings_N_D, seed=0, device=CPU, size=TINY)

    rates_N = predict(empty.weights, None, shifting)

    assert empty.elbo_per_attempt == ()
    assert rates_N.shape == (120,)
    assert ((rates_N > 0) & (rates_N < 1)).all()


def test_the_inputs_are_the_embedding_and_the_features_beside_it_of_the_order_of_one() -> None:
    chance = np.random.default_rng(0)
    embeddings = chance.standard_normal((500, 48))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings[0] = np.nan

    inputs = paper_inputs(embeddings, chance.standard_normal((500, 16)))

    assert inputs.shape == (500, 64)
    assert (inputs[0, :48] == 0).all()
    scaled = inputs[1:] * np.sqrt(64)
    np.testing.assert_allclose([scaled[:, :48].std(), scaled[:, 48:].std()], 1, atol=0.05)
    assert paper_inputs(np.zeros((3, 0)), np.zeros((3, 2))).shape == (3, 2)


def test_the_papers_model_takes_prompts_without_a_vector(shifting: ShiftingWorld) -> None:
    holes = shifting.embeddings_N_D.copy()
    holes[::3] = np.nan

    fitted = fit_paper(shifting.batches(2), holes, seed=0, device=CPU, size=TINY)

    assert np.isfinite(predict_paper(fitted.weights, None, holes, holes, seed=0, device=CPU)).all()


def test_the_same_seed_fits_the_same_paper_model(shifting: ShiftingWorld) -> None:
    one, again, other = (
        fit_paper(shifting.batches(2), shifting.embeddings_N_D, seed=seed, device=CPU, size=TINY).weights
        for seed in (4, 4, 5)
    )

    for name in one:
        np.testing.assert_array_equal(again[name], one[name])
    assert any((other[name] != one[name]).any() for name in one)


def test_a_warm_start_continues_from_its_weights(shifting: ShiftingWorld, fitted_paper: FittedPaper) -> None:
    batches = shifting.batches(N_BATCHES + 2)
    before, new = batches[:N_BATCHES], batches[N_BATCHES:]

    warm = fit_paper(
        new,
        shifting.embeddings_N_D,
        seed=2,
        device=CPU,
        earlier=before,
        warm_start=load(save(fitted_paper.weights)),
    )
    cold = fit_paper(new, shifting.embeddings_N_D, seed=2, device=CPU, size=TINY, earlier=before)

    assert warm.elbo_per_attempt[0] > cold.elbo_per_attempt[0] + 0.01


def test_a_long_history_is_cut_to_its_newest_batches(shifting: ShiftingWorld) -> None:
    batches, rows = shifting.batches(5), shifting.embeddings_N_D

    cut = fit_paper(batches, rows, seed=0, device=CPU, size=TINY, max_batches=2)
    newest = fit_paper(batches[3:], rows, seed=0, device=CPU, size=TINY, earlier=batches[:3])

    assert cut.elbo_per_attempt == newest.elbo_per_attempt
    assert len(cut.elbo_per_attempt) == 2


def test_what_only_the_past_has_is_remembered_with_pairs_of_the_past_and_forgotten_without(
    shifting: ShiftingWorld,
) -> None:
    """In the second half one topic is left, whose hard prompts have become easy and its easy ones hard."""
    chance = np.random.default_rng(0)
    first, second = (np.flatnonzero(shifting.topic_N == topic) for topic in (1.0, -1.0))
    rates_N = np.where(shifting.embeddings_N_D[:, 1] > 0, 0.9, 0.1)
    early = [outcomes(rates_N, chance.permutation(120)[:24], np.full(24, step), seed=step) for step in range(16)]
    late = [
        outcomes(1 - rates_N, second[chance.permutation(60)[:24]], np.full(24, step), seed=step)
        for step in range(16, 32)
    ]

    kept, forgotten = (
        fit_paper([*early, *late], shifting.embeddings_N_D, seed=0, device=CPU, size=TINY, past_pairs=past_pairs)
        for past_pairs in (2, 0)
    )

    assert correlation(predict(kept.weights, early[-1], shifting)[first], rates_N[first]) > 0.75
    assert correlation(predict(forgotten.weights, early[-1], shifting)[first], rates_N[first]) < 0.6


def test_embeddings_of_another_width_are_refused(shifting: ShiftingWorld, fitted_paper: FittedPaper) -> None:
    wide = np.ones((3, WIDTH + 1), dtype=np.float32)

    with pytest.raises(ValueError, match=f"embeddings of {WIDTH} numbers, these have {WIDTH + 1}"):
        predict_paper(fitted_paper.weights, None, wide, wide, seed=0, device=CPU)
    with pytest.raises(ValueError, match="fit it anew, without a warm start"):
        fit_paper([], wide, seed=0, device=CPU, warm_start=fitted_paper.weights)


def test_the_paper_model_fits_alike_on_every_device(shifting: ShiftingWorld, device: torch.device) -> None:
    rows = shifting.embeddings_N_D
    fitted = fit_paper(shifting.batches(4), rows, seed=1, device=device, size=TINY)
    reference = fit_paper(shifting.batches(4), rows, seed=1, device=CPU, size=TINY)

    np.testing.assert_allclose(fitted.elbo_per_attempt, reference.elbo_per_attempt, atol=0.02)


class TextWorld:
    """Prompts whose rate depends on their inputs, not linearly, and whose shape depends on one of them.

    Where input 3 is positive, a prompt is either always or never solved; elsewhere its rate is near its mean.
    """

    def __init__(self, n: int = 1_500) -> None:
        rng = np.random.default_rng(7)
        self.x_N_d = rng.standard_normal((n, N_INPUTS)).astype(np.float32)
        self.x_N_d[:, 0] = 1.0
        self.mean_N = sigmoid(1.5 * np.tanh(self.x_N_d[:, 1]) * np.sign(self.x_N_d[:, 2]) + self.x_N_d[:, 4])
        self.polar_N = self.x_N_d[:, 3] > 0
        self.rates_N = np.where(self.polar_N, (rng.random(n) < self.mean_N).astype(float), self.mean_N)

    def history(self, n_prompts: int, *, seed: int = 0) -> History:
        return outcomes(self.rates_N, np.arange(n_prompts), np.arange(n_prompts) // 32, seed=seed)

    def fit(self, history: History, *, device: torch.device = CPU, group_size: int = 8) -> FittedLatent:
        return fit_latent(history, self.x_N_d, n_surface=N_SURFACE, group_size=group_size, seed=0, device=device)


@pytest.fixture(scope="module")
def world() -> TextWorld:
    return TextWorld()


@pytest.fixture(scope="module")
def fitted(world: TextWorld) -> FittedLatent:
    return world.fit(world.history(1_000))


def test_new_prompts_get_their_rate_from_their_inputs(world: TextWorld, fitted: FittedLatent) -> None:
    new = slice(1_000, None)

    assert fitted.mean_N.shape == fitted.informative_N.shape == (1_500,)
    assert fitted.mean_N.dtype == fitted.informative_N.dtype == np.float32
    assert correlation(fitted.mean_N[new], world.mean_N[new]) > 0.85
    assert abs(fitted.mean_N[new].mean() - world.rates_N[new].mean()) < 0.05


def test_prompts_of_one_mean_differ_in_how_likely_they_are_informative(world: TextWorld, fitted: FittedLatent) -> None:
    middle = np.abs(fitted.mean_N - 0.5) < 0.15

    level = fitted.informative_N[middle & ~world.polar_N].mean()
    polar = fitted.informative_N[middle & world.polar_N].mean()

    assert level > polar + 0.4


def test_the_report_shows_a_gain_over_the_mean_rate(fitted: FittedLatent) -> None:
    report = fitted.report

    assert (report["observations"], report["prompts"]) == (1_000, 1_000)
    assert report["log_loss"] < report["level_log_loss"] - 0.03
    assert report["rate_correlation"] > 0.4
    assert report["informative_log_loss"] < np.log(2) - 0.1


def test_a_prompts_own_outcomes_hardly_move_its_own_prediction(world: TextWorld) -> None:
    """They do move what is predicted for a new prompt of the same text."""
    history = world.history(300)
    flipped = history.successes.copy()
    flipped[:5] = 8.0 - flipped[:5]
    other = History(history.prompts, history.steps, flipped, history.attempts, history.informative)

    before, after = world.fit(history), world.fit(other)

    own = np.abs(after.mean_N - before.mean_N)[:5].mean()
    twin = np.abs(
        LatentPrior(after.weights).predict(world.x_N_d[:5])[0] - LatentPrior(before.weights).predict(world.x_N_d[:5])[0]
    ).mean()
    assert own < 0.5 * twin


def test_single_attempts_do_not_blur_which_groups_are_informative(world: TextWorld) -> None:
    groups = world.history(1_000)
    singles = outcomes(world.rates_N, groups.prompts, groups.steps, seed=5, attempts=1)
    both = gather(groups, singles)

    assert correlation(world.fit(both).informative_N, world.fit(groups).informative_N) > 0.9


def test_new_prompts_are_predicted_alike_alone_and_with_the_pool(world: TextWorld, fitted: FittedLatent) -> None:
    prior = LatentPrior(load(save(fitted.weights)))

    alone = [prior.predict(world.x_N_d[i : i + 1]) for i in range(1_000, 1_020)]

    np.testing.assert_allclose(np.array(alone)[:, 0, 0], fitted.mean_N[1_000:1_020], atol=1e-4)
    np.testing.assert_allclose(np.array(alone)[:, 1, 0], fitted.informative_N[1_000:1_020], atol=1e-4)
    assert [len(part) for part in prior.predict(world.x_N_d[:0])] == [0, 0]


def test_the_order_of_the_observations_of_a_step_does_not_matter(world: TextWorld) -> None:
    history = world.history(400)
    history = History(
        history.prompts, np.zeros(400, dtype=np.int64), history.successes, history.attempts, history.informative
    )
    shuffled = history.rows(np.random.default_rng(1).permutation(400))

    one, other = world.fit(history), world.fit(shuffled)

    # The level of the moment reads the rows in their order.
    assert correlation(one.mean_N, other.mean_N) > 0.98


def test_the_level_of_the_policy_is_followed(world: TextWorld) -> None:
    early = outcomes(np.full(1_500, 0.2), np.arange(600), np.arange(600) // 32, seed=1)
    late = outcomes(np.full(1_500, 0.8), np.arange(600, 1_200), 40 + np.arange(600) // 32, seed=2)

    assert abs(world.fit(gather(early, late)).mean_N.mean() - 0.8) < 0.05


def test_larger_groups_are_more_likely_to_be_informative(world: TextWorld) -> None:
    pair, eight, many = (world.fit(world.history(200), group_size=size).informative_N.mean() for size in (1, 8, 32))

    assert pair < eight < many


@pytest.mark.parametrize("attempts", [1, 8])
def test_one_observation_is_enough_to_fit(world: TextWorld, attempts: int) -> None:
    fitted = world.fit(outcomes(world.rates_N, np.array([3]), np.array([0]), seed=0, attempts=attempts))

    for values in (fitted.mean_N, fitted.informative_N):
        assert np.isfinite(values).all()
        assert ((values > 0) & (values < 1)).all()
    assert fitted.mean_N.std() < 0.1


def test_single_attempts_teach_the_rate(world: TextWorld) -> None:
    prompts = np.arange(1_000)
    fitted = world.fit(outcomes(world.rates_N, prompts, prompts // 32, seed=0, attempts=1))

    assert correlation(fitted.mean_N[1_000:], world.mean_N[1_000:]) > 0.7


def test_inputs_without_information_give_the_mean_rate(world: TextWorld) -> None:
    blank = np.zeros((50, N_INPUTS), dtype=np.float32)
    blank[:, 0] = 1.0
    history = outcomes(np.full(50, 0.3), np.arange(40), np.arange(40) // 8, seed=0)

    fitted = fit_latent(history, blank, n_surface=N_INPUTS, group_size=8, seed=0, device=CPU)

    assert np.abs(fitted.mean_N - 0.3).max() < 0.1


def test_the_same_history_gives_the_same_fit(world: TextWorld) -> None:
    one, again = world.fit(world.history(200)), world.fit(world.history(200))

    np.testing.assert_array_equal(again.mean_N, one.mean_N)
    np.testing.assert_array_equal(again.weights["coefficients"], one.weights["coefficients"])


def test_the_fit_agrees_on_every_device(world: TextWorld, fitted: FittedLatent, device: torch.device) -> None:
    there = world.fit(world.history(1_000), device=device)

    np.testing.assert_allclose(there.mean_N, fitted.mean_N, atol=0.01)
    np.testing.assert_allclose(there.informative_N, fitted.informative_N, atol=0.01)


def test_a_history_that_does_not_fit_the_pool_is_refused(world: TextWorld, fitted: FittedLatent) -> None:
    with pytest.raises(ValueError, match="no observations to fit"):
        world.fit(History.empty())
    with pytest.raises(ValueError, match="names prompt 1400, the pool has 1000"):
        fit_latent(world.history(1_401), world.x_N_d[:1_000], n_surface=N_SURFACE, group_size=8, seed=0, device=CPU)
    with pytest.raises(ValueError, match=f"fitted on {N_INPUTS} inputs, these have {N_INPUTS - 1}"):
        LatentPrior(fitted.weights).predict(world.x_N_d[:, 1:])
