"""The latent-context model of Generalizable Predictive Prompt Selection (arXiv 2602.01970): networks, ELBO, prediction.

Our implementation: layer sizes, learning rate, KL weight and number of draws are not published. Knows nothing
of runs, batches in order or optimisers (see `fitting`). Axes: C context points (the batch's tokens), N prompts,
S draws, D embedding width, Z latent width, W layer width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from evenodds_service.errors import DeviceUnavailable

KL_WEIGHT = 0.01
"""beta of Eq. 8: ours, as in the authors' earlier open code."""

_MIN_SIGMA = 0.1
_DECODED_AT_ONCE = 1 << 22  # floats of one hidden layer
_SIZE_KEY = "size"


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """Sizes of the networks.

    Attributes:
        width: W, of every hidden layer, a multiple of `heads`.
        layers: Transformer layers of the encoder, and hidden layers of the decoder.
        heads: Attention heads.
        latent_width: Z.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    latent_width: int = 16

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads, self.latent_width) < 1:
            raise ValueError(f"every size must be at least 1, not {self}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} attention heads")


SMALL = NetworkSize()
"""For a CPU: about 0.15 million parameters."""

PUBLISHED = NetworkSize(width=512, layers=6, heads=8, latent_width=64)
"""About 20 million parameters, the size that the paper names."""


class SetEncoder(nn.Module):
    """A set of (prompt embedding, rate) tokens becomes one vector.

    A Transformer without positions, read at one learned token of its own: the order of the set does not matter, and the
    empty set has an answer too.
    """

    def __init__(self, embedding_width: int, size: NetworkSize) -> None:
        super().__init__()
        w = size.width
        # The first layer on the concatenation, split so that a rate starts with the weight of a whole embedding.
        self.from_embedding = nn.Linear(embedding_width, w)
        self.from_rate = nn.Linear(1, w, bias=False)
        self.reader = nn.Parameter(torch.zeros(1, w))
        layer = nn.TransformerEncoderLayer(
            w, size.heads, 4 * w, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, size.layers, nn.LayerNorm(w), enable_nested_tensor=False)

    def forward(self, embeddings_C_D: Tensor, rates_C: Tensor) -> Tensor:
        """The set's vector [W]; C may be 0."""
        by_prompt, by_rate = self.from_embedding(embeddings_C_D), self.from_rate(2.0 * rates_C[:, None] - 1.0)
        tokens = torch.cat([self.reader, by_prompt + by_rate])  # [1 + C, W]
        read: Tensor = self.layers(tokens[None])[0, 0]  # [W]
        return read


class GaussianHead(nn.Module):
    """A set's vector becomes a diagonal Gaussian over the difficulty context z."""

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        self.linear = nn.Linear(size.width, 2 * size.latent_width)

    def forward(self, read_W: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [Z] and standard deviation [Z] in (0.1, 1), sigma = 0.1 + 0.9 sigmoid(.)."""
        mean, raw = self.linear(read_W).chunk(2)  # [Z], [Z]
        return mean, _MIN_SIGMA + (1.0 - _MIN_SIGMA) * torch.sigmoid(raw)


class Decoder(nn.Module):
    """A context and a prompt become the log-odds of its success rate: an MLP on (z, embedding)."""

    def __init__(self, embedding_width: int, size: NetworkSize) -> None:
        super().__init__()
        # The first layer of an MLP on the concatenation, split so that a prompt is not projected anew for each draw.
        self.from_embedding = nn.Linear(embedding_width, size.width)
        self.from_latent = nn.Linear(size.latent_width, size.width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(size.width, size.width) for _ in range(size.layers - 1))
        self.head = nn.Linear(size.width, 1)

    def forward(self, z_S_Z: Tensor, embeddings_N_D: Tensor) -> Tensor:
        """Log-odds [S, N]; a row of the embeddings decides its own column alone."""
        by_draw, by_prompt = self.from_latent(z_S_Z), self.from_embedding(embeddings_N_D)  # [S, W], [N, W]
        hidden = functional.gelu(by_draw[:, None] + by_prompt[None])  # [S, N, W]
        for layer in self.hidden:
            hidden = functional.gelu(layer(hidden))  # [S, N, W]
        logits: Tensor = self.head(hidden)[..., 0]  # [S, N]
        return logits


class PaperModel(nn.Module):
    """Prior p_eta(z_t | H_{t-1}), posterior q_phi(z_t | H_t) and decoder p_psi(rate | prompt, z_t), Eq. 6 to 10.

    Prior and posterior have one encoder and a head each (ours): with an encoder of its own, the prior, which learns
    from the small divergence term alone, hardly came to follow the outcomes of the last batch.
    Embeddings are unit vectors; they are scaled by sqrt(D) inside, so that their entries are of the order of one.
    """

    def __init__(self, embedding_width: int, size: NetworkSize, *, seed: int) -> None:
        """Networks with the starting weights of this seed."""
        super().__init__()
        self.embedding_width = embedding_width
        self.size = size
        self.encoder = SetEncoder(embedding_width, size)
        self.prior_head = GaussianHead(size)
        self.posterior_head = GaussianHead(size)
        self.decoder = Decoder(embedding_width, size)
        _initialise(self, torch.Generator().manual_seed(seed))

    def prior(self, embeddings_C_D: Tensor, rates_C: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [Z] and standard deviation [Z] of p_eta(z_t | H_{t-1}); C may be 0."""
        gaussian: tuple[Tensor, Tensor] = self.prior_head(self.encoder(self._scaled(embeddings_C_D), rates_C))
        return gaussian

    def posterior(self, embeddings_C_D: Tensor, rates_C: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [Z] and standard deviation [Z] of q_phi(z_t | H_t)."""
        gaussian: tuple[Tensor, Tensor] = self.posterior_head(self.encoder(self._scaled(embeddings_C_D), rates_C))
        return gaussian

    def elbo(
        self,
        before: tuple[Tensor, Tensor],
        embeddings_C_D: Tensor,
        successes_C: Tensor,
        attempts_C: Tensor,
        *,
        noise_Z: Tensor,
        kl_weight: float = KL_WEIGHT,
    ) -> Tensor:
        """Eq. 8 with one draw z = mean + sigma * noise of the posterior, a scalar.

        sum_i [k_i log p_i + (n_i - k_i) log(1 - p_i)] - beta KL( q_phi(z | H_t) || p_eta(z | H_{t-1}) ),
        a binomial likelihood without its coefficient.

        Args:
            before: H_{t-1} as embeddings [C', D] and rates [C']; C' may be 0.
            embeddings_C_D, successes_C, attempts_C: H_t, 0 <= successes <= attempts.
            noise_Z: A standard normal draw.
        """
        prior_mean, prior_sigma = self.prior(*before)
        mean, sigma = self.posterior(embeddings_C_D, successes_C / attempts_C)
        logits_C = self.decoder((mean + sigma * noise_Z)[None], self._scaled(embeddings_C_D))[0]
        log_p, log_q = functional.logsigmoid(logits_C), functional.logsigmoid(-logits_C)
        likelihood = (successes_C * log_p + (attempts_C - successes_C) * log_q).sum()
        elbo: Tensor = likelihood - kl_weight * gaussian_kl(mean, sigma, prior_mean, prior_sigma)
        return elbo

    def rates(self, before: tuple[Tensor, Tensor], embeddings_N_D: Tensor, *, noise_S_Z: Tensor) -> Tensor:
        """Eq. 10: the decoded rate averaged over S draws z ~ p_eta(. | H_{t-1}), [N] in (0, 1).

        Args:
            before: H_{t-1} as in `elbo`.
            noise_S_Z: Standard normal draws.
        """
        with torch.no_grad():
            mean, sigma = self.prior(*before)
            z_S_Z = mean + sigma * noise_S_Z
            n_rows = max(1, _DECODED_AT_ONCE // (len(noise_S_Z) * self.size.width))
            parts = [
                torch.sigmoid(self.decoder(z_S_Z, self._scaled(embeddings_N_D[first : first + n_rows]))).mean(dim=0)
                for first in range(0, len(embeddings_N_D), n_rows)
            ]
        rates_N: Tensor = torch.cat([embeddings_N_D.new_zeros(0), *parts])
        return rates_N

    def _scaled(self, embeddings_N_D: Tensor) -> Tensor:
        return embeddings_N_D * math.sqrt(self.embedding_width)

    def to_weights(self) -> dict[str, NDArray[np.float32]]:
        """Everything that `from_weights` needs, as arrays that safetensors can save."""
        weights = {name: value.detach().cpu().numpy().copy() for name, value in self.state_dict().items()}
        size = self.size
        weights[_SIZE_KEY] = np.array(
            [self.embedding_width, size.width, size.layers, size.heads, size.latent_width], dtype=np.float32
        )
        return weights

    @staticmethod
    def from_weights(weights: Mapping[str, NDArray[np.float32]], device: torch.device) -> PaperModel:
        """The model that `to_weights` described, on this device.

        Raises:
            ValueError: the arrays are not those of such a model.
        """
        if _SIZE_KEY not in weights:
            raise ValueError(f"weights without the array {_SIZE_KEY!r} are not those of the latent-context model")
        embedding_width, *sizes = (int(value) for value in weights[_SIZE_KEY])
        model = PaperModel(embedding_width, NetworkSize(*sizes), seed=0)
        arrays = {name: torch.from_numpy(np.array(value)) for name, value in weights.items() if name != _SIZE_KEY}
        try:
            model.load_state_dict(arrays)
        except RuntimeError as error:
            raise ValueError(f"weights do not fit the size they name, {model.size}: {error}") from error
        return model.to(device)


def gaussian_kl(mean_Z: Tensor, sigma_Z: Tensor, other_mean_Z: Tensor, other_sigma_Z: Tensor) -> Tensor:
    """KL( N(mean, sigma^2) || N(other mean, other sigma^2) ) of diagonal Gaussians, a scalar >= 0."""
    ratio = (sigma_Z / other_sigma_Z) ** 2
    shift = ((mean_Z - other_mean_Z) / other_sigma_Z) ** 2
    return 0.5 * (ratio + shift - 1.0 - ratio.log()).sum()


def size_of(weights: Mapping[str, NDArray[np.float32]]) -> NetworkSize:
    """Sizes of the model that these weights are of."""
    _, *sizes = (int(value) for value in weights[_SIZE_KEY])
    return NetworkSize(*sizes)


def width_of(weights: Mapping[str, NDArray[np.float32]]) -> int:
    """Numbers for each prompt that the model of these weights takes."""
    return int(weights[_SIZE_KEY][0])


def open_device(name: str | None) -> torch.device:
    """The device of this name; without one, CUDA if there is one, else the CPU.

    Raises:
        DeviceUnavailable: torch knows no such device, or cannot use it here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceUnavailable(f"device {name!r} cannot be used here ({reason}): use cpu or cuda") from error
    return device


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every matrix anew, normal with variance 1 / fan-in; vectors keep 0 (biases) and 1 (norms).

    From our own generator, on the CPU: the same seed gives the same start on every device, whoever else draws.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                start = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                parameter.copy_(start)
            elif name.endswith("bias"):
                parameter.zero_()
