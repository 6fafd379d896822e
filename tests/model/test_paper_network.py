from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from torch import Tensor

from evenodds_service.model.paper_network import PUBLISHED, SMALL, NetworkSize, PaperModel, gaussian_kl

TINY = NetworkSize(width=16, layers=2, heads=2, latent_width=4)
WIDTH = 12
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def tiny(device: torch.device, seed: int = 0) -> PaperModel:
    return PaperModel(WIDTH, TINY, seed=seed).to(device)


def batch(device: torch.device, n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Unit embeddings [n, D] and rates [n]."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, WIDTH))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return tensor(rows, device), tensor(rng.integers(0, 9, n) / 8, device)


def tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).to(device)


def noise(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(device)


def test_a_set_becomes_a_gaussian_of_the_latent_width(device: torch.device) -> None:
    mean_Z, sigma_Z = tiny(device).prior(*batch(device, 7))

    assert mean_Z.shape == sigma_Z.shape == (TINY.latent_width,)
    assert bool(((sigma_Z > 0.1) & (sigma_Z < 1.0)).all())


def test_the_order_of_the_set_does_not_matter(device: torch.device) -> None:
    model = tiny(device)
    embeddings, rates = batch(device, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3)).to(device)

    one = model.posterior(embeddings, rates)
    other = model.posterior(embeddings[order], rates[order])

    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_the_outcomes_of_the_set_do_matter(device: torch.device) -> None:
    model = tiny(device)
    embeddings, rates = batch(device, 9)

    assert not torch.allclose(model.prior(embeddings, rates)[0], model.prior(embeddings, 1 - rates)[0])


def test_an_empty_context_is_a_context_too(device: torch.device) -> None:
    model = tiny(device)
    embeddings, _ = batch(device, 5)

    rates_N = model.rates(batch(device, 0), embeddings, noise_S_Z=noise(device, 8, TINY.latent_width))

    assert rates_N.shape == (5,)
    assert bool(((rates_N > 0) & (rates_N < 1)).all())


def test_prompts_are_predicted_alike_alone_and_together(device: torch.device) -> None:
    model = tiny(device)
    before, (embeddings, _) = batch(device, 6), batch(device, 11, seed=2)
    draws = noise(device, 8, TINY.latent_width)

    together = model.rates(before, embeddings, noise_S_Z=draws)
    alone = torch.cat([model.rates(before, row[None], noise_S_Z=draws) for row in embeddings])

    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_the_prediction_is_the_mean_over_the_draws(device: torch.device) -> None:
    model = tiny(device)
    before, (embeddings, _) = batch(device, 6), batch(device, 4, seed=2)
    draws = noise(device, 3, TINY.latent_width)

    single = [model.rates(before, embeddings, noise_S_Z=draw[None]) for draw in draws]

    expected = torch.stack(single).mean(dim=0)
    torch.testing.assert_close(model.rates(before, embeddings, noise_S_Z=draws), expected)


def test_gradients_of_the_elbo_reach_every_parameter(device: torch.device) -> None:
    model = tiny(device)
    embeddings, rates = batch(device, 6)

    elbo = model.elbo(
        batch(device, 5, seed=2),
        embeddings,
        8 * rates,
        torch.full_like(rates, 8.0),
        noise_Z=noise(device, TINY.latent_width),
    )
    (-elbo).backward()  # type: ignore[no-untyped-call]  # torch leaves it without types

    still = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert still == []


def test_the_elbo_is_the_binomial_likelihood_less_the_weighted_divergence() -> None:
    model = tiny(torch.device("cpu"))
    before, (embeddings, rates) = batch(torch.device("cpu"), 5, seed=2), batch(torch.device("cpu"), 6)
    successes, attempts = 8 * rates, torch.full_like(rates, 8.0)
    draw = noise(torch.device("cpu"), TINY.latent_width)

    free, weighted = (
        model.elbo(before, embeddings, successes, attempts, noise_Z=draw, kl_weight=weight) for weight in (0.0, 0.5)
    )

    mean, sigma = model.posterior(embeddings, rates)
    p = torch.sigmoid(model.decoder((mean + sigma * draw)[None], embeddings * WIDTH**0.5)[0])
    likelihood = (successes * p.log() + (attempts - successes) * (1 - p).log()).sum()
    divergence = gaussian_kl(mean, sigma, *model.prior(*before))
    torch.testing.assert_close(free, likelihood, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(free - weighted, 0.5 * divergence, rtol=1e-3, atol=1e-3)


def test_the_divergence_of_gaussians_agrees_with_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, other_mean = torch.randn(2, 5, generator=generator)
    sigma, other_sigma = 0.1 + torch.rand(2, 5, generator=generator)

    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, sigma), torch.distributions.Normal(other_mean, other_sigma)
    ).sum()

    torch.testing.assert_close(gaussian_kl(mean, sigma, other_mean, other_sigma), expected)
    assert float(gaussian_kl(mean, sigma, mean, sigma)) == pytest.approx(0, abs=1e-6)


def test_the_same_seed_gives_the_same_start_whoever_else_draws() -> None:
    first = PaperModel(WIDTH, TINY, seed=3).to_weights()
    torch.randn(100)
    again, other = PaperModel(WIDTH, TINY, seed=3).to_weights(), PaperModel(WIDTH, TINY, seed=4).to_weights()

    for name in first:
        np.testing.assert_array_equal(again[name], first[name])
    assert any((other[name] != first[name]).any() for name in first)


def test_a_model_survives_the_round_trip_through_bytes(device: torch.device) -> None:
    model = tiny(device, seed=6)
    before, (embeddings, _) = batch(device, 6), batch(device, 4, seed=2)
    draws = noise(device, 3, TINY.latent_width)

    opened = PaperModel.from_weights(load(save(model.to_weights())), device)

    assert opened.size == TINY
    torch.testing.assert_close(
        opened.rates(before, embeddings, noise_S_Z=draws), model.rates(before, embeddings, noise_S_Z=draws)
    )


def test_weights_of_another_model_are_refused() -> None:
    weights = PaperModel(WIDTH, TINY, seed=0).to_weights()
    del weights["encoder.reader"]

    with pytest.raises(ValueError, match="do not fit the size they name"):
        PaperModel.from_weights(weights, torch.device("cpu"))
    with pytest.raises(ValueError, match="without the array 'size'"):
        PaperModel.from_weights({}, torch.device("cpu"))


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of the 4 attention heads"):
        NetworkSize(width=10, heads=4)


def test_the_published_size_has_about_twenty_million_parameters() -> None:
    def n_parameters(size: NetworkSize) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in PaperModel(256, size, seed=0).parameters())

    assert 19e6 < n_parameters(PUBLISHED) < 21e6
    assert n_parameters(SMALL) < 0.3e6
