"""The mixture of Beta beliefs: shared priors and a prompt's own evidence, averaged instead of tuned.

One expert believes  p_i ~ Beta( m_i s + S_i, (1 - m_i) s + F_i )  for a shared prior mean m_i, a strength s
(pseudo-attempts) and own successes and failures S, F discounted with a memory (algorithm section 3). (m = .5, s = 2,
nothing forgotten) is MoPPS, S = F = 0 is a shared model only. The experts' weights follow their Beta-binomial
likelihoods. Pure functions on arrays; where the prior means and the evidence come from is `fold`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray
from evenodds_service.domain.distributions import beta_from_moments, log_rising_ratio

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
MEMORIES = (1.0, 0.8, 0.5, 1.0, 1.0)
"""What a prompt's evidence is multiplied with at its next visit."""
AGEING = (1.0, 1.0, 1.0, 0.95, 0.85)
"""The same for each step that the policy has moved on since the last visit, be there another visit or not."""
PRIORS = ("flat", "running mean", "surface", "quick", "embedding", "caller", "ngrams", "latent", "stacked", "runs")
"""`quick` is the regression on surface features and categories that forgets within some steps: a policy that learns
fast, or that another one was merged into, leaves the other priors behind."""
FITTED = ("ngrams", "latent")
"""Priors that a snapshot brings. They have a shape: their strengths are relative to a concentration for each prompt."""
STACKED = "stacked"
"""The online regression's and the fitted priors' log-odds, weighed and shifted by what was observed since."""
RUNS = "runs"
"""What others showed on the same prompts, weighed and shifted to this policy by what was observed."""
SHAPED = (*FITTED, STACKED)
"""Priors whose strengths have a scale for each prompt."""
_IS_SHAPED_C = np.array([prior in SHAPED for prior in PRIORS])
MATCHED = 2.0
"""The strength at which a shaped prior has its matched concentration."""
WEIGHT_KEEP = 0.97
NEGLIGIBLE = 1e-3

_FEW = 64
_MOPPS = (PRIORS.index("flat"), STRENGTHS.index(2.0), MEMORIES.index(1.0))
_PRIOR_RANGE = (1e-3, 1.0 - 1e-3)
N_EXPERTS = len(PRIORS) * len(STRENGTHS) * len(MEMORIES)


@dataclass(slots=True)
class Mixture:
    """Weights of the experts, axes prior C x strength S x memory L (of `MEMORIES` and `AGEING` together).

    Attributes:
        log_weights: [C, S, L], normalised; -inf where a prior is absent.
        log_guard: log odds of MoPPS, the corner (flat, 2, first memory), against the mixture. Unlike `log_weights` it
            never forgets: this is what bounds the total log-loss by MoPPS's plus log K (K experts).
    """

    log_weights: FloatArray
    log_guard: float
    _kept: FloatArray | None = field(default=None, init=False, repr=False, compare=False)

    @staticmethod
    def new(present: BoolArray) -> Mixture:
        """Equal weights over the priors that are present, bool [C]; MoPPS must be among them (flat always is)."""
        shape = (len(PRIORS), len(STRENGTHS), len(MEMORIES))
        weights = np.where(present[:, None, None], 0.0, -np.inf) + np.zeros(shape)
        n_experts = float(present.sum()) * len(STRENGTHS) * len(MEMORIES)
        return Mixture(weights - exact.log_sum(weights), -float(exact.log(n_experts - 1.0)))

    def present(self) -> BoolArray:
        """Which priors take part, bool [C]."""
        return np.asarray(np.isfinite(self.log_weights).any(axis=(1, 2)))

    def admit(self, present: BoolArray) -> None:
        """Let priors that appeared since take part, with the share that an equal start would give each of them."""
        fresh = present & ~self.present()
        if fresh.any():
            self._kept = None
            share = float(fresh.sum()) / float(present.sum())
            each = float(exact.log(share / (float(fresh.sum()) * len(STRENGTHS) * len(MEMORIES))))
            self.log_weights = self.log_weights + float(exact.log(1.0 - share))
            self.log_weights[fresh] = each

    def forget(self, keep: float = WEIGHT_KEEP) -> None:
        """w <- w^keep, normalised: an expert that was poor long ago may return."""
        self._kept = None
        present = np.isfinite(self.log_weights)
        self.log_weights = np.where(present, keep * np.where(present, self.log_weights, 0.0), -np.inf)
        self.log_weights -= exact.log_sum(self.log_weights)

    def weights(self) -> FloatArray:
        """Effective weights [C, S, L] with the guard's share in MoPPS's corner; they sum to 1."""
        powers = exact.exp(np.append(self.log_weights, min(-self.log_guard, 700.0)))
        guard = 1.0 / (1.0 + float(powers[-1]))
        weights = np.asarray(powers[:-1].reshape(self.log_weights.shape) * (1.0 - guard))
        weights[_MOPPS] += guard
        return weights

    def kept(self) -> FloatArray:
        """Effective weights [C, S, L] without the negligible ones; they sum to 1. Computed once between two updates."""
        if self._kept is None:
            weights = self.weights()
            kept = np.where(weights >= NEGLIGIBLE * weights.max(), weights, 0.0)
            self._kept = np.asarray(kept / kept.sum())
            self._kept.flags.writeable = False
        return self._kept

    def gain(self, log_likelihoods: FloatArray, among: BoolArray) -> float:
        """By how much the mixture foresees a batch better than it would without these priors, bool [C], in nats.

        Args:
            log_likelihoods: As in `update`; call before it.
        """
        weights, others = self.log_weights, self.log_weights[~among]
        alone = exact.log_sum(others + log_likelihoods[~among]) - exact.log_sum(others)
        return exact.log_sum(weights + log_likelihoods) - alone

    def update(self, log_likelihoods: FloatArray) -> tuple[float, float]:
        """Condition on a batch; call before its evidence is folded in.

        Args:
            log_likelihoods: Of the whole batch under each expert, [C, S, L].

        Returns:
            Log likelihood of the batch under these weights, and under MoPPS.
        """
        self._kept = None
        mixture = exact.log_sum(self.log_weights + log_likelihoods)
        mopps = float(log_likelihoods[_MOPPS])
        guarded = exact.log_sum(np.array([self.log_guard + mopps, mixture]))
        guarded -= exact.log_sum(np.array([self.log_guard, 0.0]))
        self.log_guard += mopps - mixture
        self.log_weights = self.log_weights + log_likelihoods - mixture
        return guarded, mopps


def batch_log_likelihoods(
    means_C_n: FloatArray,
    successes_L_n: FloatArray,
    failures_L_n: FloatArray,
    k_n: FloatArray,
    counts_n: FloatArray,
    scales_C_n: FloatArray | None = None,
) -> FloatArray:
    """Log likelihood of k successes of counts under each expert, summed over the n prompts: [C, S, L].

    Args:
        means_C_n: Prior means under each shared prior, in (0, 1).
        successes_L_n, failures_L_n: The prompts' own evidence before this batch, under each memory.
        k_n, counts_n: Outcomes, 0 <= k <= counts.
        scales_C_n: What each prior's strengths are multiplied with; 1 without it.
    """
    unseen_n = ~(successes_L_n.any(axis=0) | failures_L_n.any(axis=0))
    total = np.zeros((len(means_C_n), len(STRENGTHS), len(MEMORIES)))
    # Without evidence of its own a prompt is the same under every memory.
    for rows_n, memories in ((unseen_n, slice(0, 1)), (~unseen_n, slice(None))):
        if not rows_n.any():
            continue
        s = np.asarray(STRENGTHS)[None, :, None, None]
        if scales_C_n is not None:
            s = s * scales_C_n[:, None, None, rows_n]
        m = np.clip(means_C_n[:, rows_n], *_PRIOR_RANGE)[:, None, None, :].astype(np.float64)
        own, lost = successes_L_n[None, None, memories, rows_n], failures_L_n[None, None, memories, rows_n]
        k, n = k_n[rows_n], counts_n[rows_n]
        total += log_rising_ratio(m * s + own, (1.0 - m) * s + lost, k, n).sum(axis=-1)  # of [C, S, L, n]
    return total


def predict(
    weights: FloatArray,
    means_C_N: FloatArray,
    successes_L_N: FloatArray,
    failures_L_N: FloatArray,
    scales_C_N: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray]:
    """The mixture's belief about each prompt, summarised as one Beta by total variance.

    A prompt's belief is a function of its own columns, to the last bit: sums go over the experts in their order.

    Args:
        weights: From `Mixture.kept`, [C, S, L]. Priors without weight need no means.
        means_C_N: Prior means in (0, 1), any float dtype.
        successes_L_N, failures_L_N: Own evidence under each memory.
        scales_C_N: What the strengths of the priors in `SHAPED` are multiplied with; 1 without it.

    Returns:
        Parameters a and b, float64 [N].
    """
    means_C_N = np.clip(means_C_N, *_PRIOR_RANGE).astype(np.float64)
    with_weight = [c for c in range(len(PRIORS)) if weights[c].any()]
    # Priors of one scale are taken together.
    blocks: list[tuple[list[int], FloatArray | None]] = []
    if scales_C_N is None:
        blocks = [(with_weight, None)]
    else:
        blocks = [([c for c in with_weight if PRIORS[c] not in SHAPED], None)]
        blocks += [([c], scales_C_N[c].astype(np.float64)) for c in with_weight if PRIORS[c] in SHAPED]
    first, second = _unseen_moments(weights, means_C_N, blocks)
    seen = np.flatnonzero(successes_L_N.any(axis=0) | failures_L_N.any(axis=0))
    if len(seen):
        own, lost = successes_L_N[:, seen].astype(np.float64), failures_L_N[:, seen].astype(np.float64)
        of_seen = [(priors, None if scale is None else scale[seen]) for priors, scale in blocks]
        moments = _seen_moments if len(seen) > _FEW else _few_seen_moments
        first[seen], second[seen] = moments(weights, means_C_N[:, seen], own, lost, of_seen)
    mean = np.clip(first, 1e-6, 1.0 - 1e-6)
    return beta_from_moments(mean, second - first * first)


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """What the experts with weight believe, one by one: the mixture itself, of which `predict` gives a summary.

    Attributes:
        weights_K: They sum to 1; the same for all prompts.
        a_K_n, b_K_n: Parameters of each expert's Beta.
    """

    weights_K: FloatArray
    a_K_n: FloatArray
    b_K_n: FloatArray

    @staticmethod
    def alone(a_n: FloatArray, b_n: FloatArray) -> Experts:
        """One expert."""
        return Experts(np.ones(1), a_n[None], b_n[None])


def experts(
    weights: FloatArray,
    means_C_n: FloatArray,
    successes_L_n: FloatArray,
    failures_L_n: FloatArray,
    scales_C_n: FloatArray | None = None,
) -> Experts:
    """The beliefs that `predict` averages, with its arguments, in the order of the weights."""
    means_C_n = np.clip(means_C_n, *_PRIOR_RANGE).astype(np.float64)
    own, lost = successes_L_n.astype(np.float64), failures_L_n.astype(np.float64)
    c_K, s_K, memory_K = np.nonzero(weights)
    strengths_K_n: FloatArray = np.asarray(STRENGTHS)[s_K, None]
    if scales_C_n is not None:
        strengths_K_n = strengths_K_n * np.where(_IS_SHAPED_C[:, None], scales_C_n, 1.0)[c_K]
    a_K_n = means_C_n[c_K] * strengths_K_n + own[memory_K]
    b_K_n = (1.0 - means_C_n[c_K]) * strengths_K_n + lost[memory_K]
    return Experts(weights[weights > 0.0], a_K_n, b_K_n)


_Blocks = Sequence[tuple[list[int], "FloatArray | None"]]
"""Priors with a scale in common, [n]; None: 1."""


def _unseen_moments(weights: FloatArray, means_C_N: FloatArray, blocks: _Blocks) -> tuple[FloatArray, FloatArray]:
    """E[p] and E[p^2] without own evidence, where memories do not differ: Beta(m s, (1 - m) s).

    E[p^2] = m (m s + 1) / (s + 1) = m (1 - h) + m^2 h with h = s / (s + 1), averaged over the strengths first.
    """
    share_C_S = weights.sum(axis=2)
    first, second = np.zeros(means_C_N.shape[1]), np.zeros(means_C_N.shape[1])
    for priors, scale in blocks:
        for c in priors:
            h: FloatArray | float = 0.0
            for strength, share in zip(STRENGTHS, share_C_S[c].tolist(), strict=True):
                if share:
                    s = strength if scale is None else strength * scale
                    h = h + share * (s / (s + 1.0))
            mean = means_C_N[c]
            weighted = share_C_S[c].sum() * mean
            first += weighted
            second += weighted - h * mean * (1.0 - mean)
    return first, second


def _seen_moments(
    weights: FloatArray, means_C_N: FloatArray, successes_L_N: FloatArray, failures_L_N: FloatArray, blocks: _Blocks
) -> tuple[FloatArray, FloatArray]:
    """E[p] and E[p^2] with own evidence, all in float64: E[p^2] - E[p]^2 cancels with many attempts.

    With a = m s + S, E[p] = a / total and E[p^2] = a (a + 1) / (total (total + 1)), whose sums over priors of one scale
    need only the weighted sums of m and of m^2.
    """
    n = means_C_N.shape[1]
    first, second = np.zeros(n), np.zeros(n)
    for priors, scale in blocks:
        squares_C_N = {c: means_C_N[c] ** 2 for c in priors}
        share_S_L = _added(weights[priors])
        for i, strength in enumerate(STRENGTHS):
            s = strength if scale is None else strength * scale
            for j in range(len(MEMORIES)):
                share = float(share_S_L[i, j])
                if share == 0.0:
                    continue
                own, total = successes_L_N[j], successes_L_N[j] + failures_L_N[j] + s
                m1, m2 = np.zeros(n), np.zeros(n)
                for c in priors:
                    if weights[c, i, j]:
                        m1 += weights[c, i, j] * means_C_N[c]
                        m2 += weights[c, i, j] * squares_C_N[c]
                a = s * m1 + share * own
                first += a / total
                second += (s * s * m2 + 2.0 * s * own * m1 + share * own * own + a) / (total * (total + 1.0))
    return first, second


def _few_seen_moments(
    weights: FloatArray, means_C_n: FloatArray, successes_L_n: FloatArray, failures_L_n: FloatArray, blocks: _Blocks
) -> tuple[FloatArray, FloatArray]:
    """The same, to the last bit, with all strengths and memories at once.

    For few prompts the number of array operations is what costs, and not their size.
    """
    n = means_C_n.shape[1]
    first: FloatArray = np.zeros(n)
    second: FloatArray = np.zeros(n)
    own, lost = successes_L_n, failures_L_n  # [L, n]
    for priors, scale in blocks:
        if not priors:
            continue
        share = _added(weights[priors])[:, :, None]  # [S, L, 1]
        m1, m2 = np.zeros((len(STRENGTHS), len(MEMORIES), n)), np.zeros((len(STRENGTHS), len(MEMORIES), n))
        for c in priors:
            m1 += weights[c, :, :, None] * means_C_n[c]
            m2 += weights[c, :, :, None] * means_C_n[c] ** 2
        strengths = np.asarray(STRENGTHS)[:, None, None]
        s = strengths if scale is None else strengths * scale  # [S, 1, n]
        total = own + lost + s  # [S, L, n]
        a = s * m1 + share * own
        squares = (s * s * m2 + 2.0 * s * own * m1 + share * own * own + a) / (total * (total + 1.0))
        n_experts = len(STRENGTHS) * len(MEMORIES)
        first = exact.in_order(np.concatenate((first[None], (a / total).reshape(n_experts, n))))
        second = exact.in_order(np.concatenate((second[None], squares.reshape(n_experts, n))))
    return first, second


def _added(weights_c_S_L: FloatArray) -> FloatArray:
    """The priors' weights together, [S, L]."""
    return np.asarray(weights_c_S_L.sum(axis=0))
