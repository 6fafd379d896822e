"""Other methods of choosing prompts, written from their published formulas, behind one small interface.

Each method is told outcomes (`observe`), says what it believes of every prompt (`predict`) and chooses a batch
(`select`). All of them treat prompts as independent of one another; the methods that read the text are in
`contenders`. Knows no data and no service.

Where a publication leaves something open, the choice made here is the kinder one to the method, and is stated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.distributions import informative_moments

UNSOLVED, PARTLY, SOLVED = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """What a method believes of each prompt of the pool.

    Attributes:
        mean_N: Success rate, [N] in [0, 1].
        informative_N: Probability that a group of G attempts is informative, [N] in [0, 1].
    """

    mean_N: FloatArray
    informative_N: FloatArray


class Method(Protocol):
    """A method in the course of one run."""

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        """Outcomes of distinct prompts under the policy of `step`, [n] each."""

    def predict(self) -> Forecast:
        """Beliefs about the whole pool, before the next step's outcomes."""

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        """`batch_size` distinct ones of the candidates, at most as many as there are."""


class Uniform:
    """Chance. Its forecast is the running mean of all outcomes, the same for every prompt.

    Dynamic sampling chooses like this too, and pays for the groups it throws away: see `quality`.
    """

    def __init__(self, n_prompts: int) -> None:
        self._n_prompts = n_prompts
        self._rates, self._informative, self._groups = 0.0, 0.0, 0.0

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        self._rates += float((successes / attempts).sum())
        self._informative += float(((successes > 0) & (successes < attempts)).sum())
        self._groups += len(prompts)

    def predict(self) -> Forecast:
        means = [(total + 1.0) / (self._groups + 2.0) for total in (self._rates, self._informative)]
        return Forecast(*(np.full(self._n_prompts, mean) for mean in means))

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        return generator.choice(candidates, batch_size, replace=False)


class MoPPS:
    """A Beta posterior for each prompt (arXiv 2507.04632): a <- l a + (1 - l) + k, b <- l b + (1 - l) + n - k.

    Applied to the prompts that were trained on only, from Beta(1, 1).

    Args:
        decay: l; the published math scripts leave 1, the others .5.
        score: `thompson`, as published: nearest to .5 of one draw of each posterior. `yield`: the probability of an
            informative group under the posterior (MaPP's score), without chance.
    """

    def __init__(
        self,
        n_prompts: int,
        group_size: int,
        *,
        decay: float = 1.0,
        score: Literal["thompson", "yield"] = "thompson",
    ) -> None:
        self.a_N, self.b_N = np.ones(n_prompts), np.ones(n_prompts)
        self._group_size, self._decay, self._score = group_size, decay, score

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        keep = self._decay
        self.a_N[prompts] = keep * self.a_N[prompts] + (1.0 - keep) + successes
        self.b_N[prompts] = keep * self.b_N[prompts] + (1.0 - keep) + (attempts - successes)

    def predict(self) -> Forecast:
        informative_N, _ = informative_moments(self.a_N, self.b_N, self._group_size)
        return Forecast(self.a_N / (self.a_N + self.b_N), informative_N)

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        a, b = self.a_N[candidates], self.b_N[candidates]
        if self._score == "thompson":
            return best(candidates, -np.abs(generator.beta(a, b) - 0.5), batch_size, generator)
        return best(candidates, informative_moments(a, b, self._group_size)[0], batch_size, generator)


class Bots:
    """A Beta posterior for each prompt with evidence for all prompts at every step (BOTS, arXiv 2510.26374).

    a <- (1 - l) a + l + (1 - r) k + r m p, b <- (1 - l) b + l + (1 - r) (n - k) + r m (1 - p), from Beta(1, 1), where
    k = n = 0 for prompts that were not trained on. The implicit rate p = clip(weak + (strong - weak) mu, 0, 1) lies
    between the rates of two reference models; mu is where the batch's mean outcome lies between their means on the
    batch, smoothed over steps. The choice is nearest to .5 of one draw of each posterior.

    Args:
        weak_N, strong_N: Success rates of the two reference models, [N] in [0, 1].
        forgetting, implicit: l and r, .1 as published.
        weight: m, the attempts that the implicit evidence counts as; 16 as published.
        momentum: Of mu, .9 as published.
    """

    def __init__(
        self,
        weak_N: FloatArray,
        strong_N: FloatArray,
        group_size: int,
        *,
        forgetting: float = 0.1,
        implicit: float = 0.1,
        weight: float = 16.0,
        momentum: float = 0.9,
    ) -> None:
        self.a_N, self.b_N = np.ones(len(weak_N)), np.ones(len(weak_N))
        self.place: float | None = None  # mu
        self._weak_N, self._gap_N = weak_N, strong_N - weak_N
        self._group_size = group_size
        self._forgetting, self._implicit = forgetting, implicit
        self._weight, self._momentum = weight, momentum

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        gap = float(self._gap_N[prompts].mean())
        if gap != 0.0:
            place = float((successes / attempts).mean() - self._weak_N[prompts].mean()) / gap
            before = place if self.place is None else self.place
            self.place = self._momentum * before + (1.0 - self._momentum) * place
        rate_N = np.clip(self._weak_N + self._gap_N * (self.place or 0.0), 0.0, 1.0)
        for posterior, seen, believed_N in (
            (self.a_N, successes, rate_N),
            (self.b_N, attempts - successes, 1.0 - rate_N),
        ):
            posterior *= 1.0 - self._forgetting
            posterior += self._forgetting + self._implicit * self._weight * believed_N
            posterior[prompts] += (1.0 - self._implicit) * seen

    def predict(self) -> Forecast:
        informative_N, _ = informative_moments(self.a_N, self.b_N, self._group_size)
        return Forecast(self.a_N / (self.a_N + self.b_N), informative_N)

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        drawn = generator.beta(self.a_N[candidates], self.b_N[candidates])
        return best(candidates, -np.abs(drawn - 0.5), batch_size, generator)


class DPS:
    """A hidden Markov model of three states for each prompt (arXiv 2603.10887): unsolved, partly solved, solved.

    k = 0, 0 < k < n and k = n reveal the state. Transition counts xi_ab ~ post_a Phi_ab prior_b are added to
    alpha <- l alpha + (1 - l) + xi; Phi is their column mean, the prediction mu' = Phi post, the score mu'(partly).
    The chain of a prompt moves when the prompt is visited: at every step, the little that is known of a prompt would
    be forgotten before its next visit. The mean rate counts a partly solved prompt as one half.

    Args:
        decay: l; .7 is published for mathematics, .5 for the other tasks.
    """

    def __init__(self, n_prompts: int, *, decay: float = 0.7) -> None:
        self.counts_N_3_3 = np.ones((n_prompts, 3, 3))  # [prompt, to, from]
        self.state_N_3 = np.full((n_prompts, 3), 1.0 / 3.0)
        self._decay = decay

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        seen_n = np.where(successes <= 0, UNSOLVED, np.where(successes >= attempts, SOLVED, PARTLY))
        post_n_3 = np.eye(3)[seen_n]
        joint_n_3_3 = post_n_3[:, :, None] * self._transitions(prompts) * self.state_N_3[prompts][:, None, :]
        joint_n_3_3 /= joint_n_3_3.sum(axis=(1, 2), keepdims=True)
        keep = self._decay
        self.counts_N_3_3[prompts] = keep * self.counts_N_3_3[prompts] + (1.0 - keep) + joint_n_3_3
        self.state_N_3[prompts] = post_n_3

    def states(self) -> FloatArray:
        """Predicted probabilities of the three states at the next visit, [N, 3]."""
        return np.asarray((self._transitions(slice(None)) @ self.state_N_3[:, :, None])[..., 0])

    def predict(self) -> Forecast:
        states_N_3 = self.states()
        return Forecast(0.5 * states_N_3[:, PARTLY] + states_N_3[:, SOLVED], states_N_3[:, PARTLY])

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        return best(candidates, self.states()[candidates, PARTLY], batch_size, generator)

    def _transitions(self, rows: IntArray | slice) -> FloatArray:
        counts = self.counts_N_3_3[rows]
        return np.asarray(counts / counts.sum(axis=1, keepdims=True))


class Arcus:
    """A Kalman filter for psi = arcsin sqrt(p) of each prompt, in the manner of ARCUS.

    Start N(pi/4, pi^2/48), after 100 observed groups the moments of the first visits (empirical Bayes). Over D steps
    psi drifts by v D sin(2 psi) and gains variance D Q; v and Q follow the innovations of all prompts. A group shows
    z = arcsin sqrt((k + 3/8) / (n + 3/4)) with variance 1 / (4n + 2); k = 0 shows 0 and k = n pi/2, variance 1 / (2n).
    The score is yield times a band around a target psi*, which moves to the hardest value whose best batch is forecast
    within .03 of the best yield, by at most .005 a step.

    Left out are the warm-up of one uniform epoch, which in a run of about one epoch would be all of it, and the surplus
    of a quarter of the batch. The published temperature .3 is read as sampling in proportion to score^(1 / .3).

    Args:
        temperature: 0 takes the best scores without chance.
    """

    def __init__(self, n_prompts: int, group_size: int, *, temperature: float = 0.3) -> None:
        self.mean_N, self.variance_N = np.full(n_prompts, math.pi / 4), np.full(n_prompts, math.pi**2 / 48)
        self.last_step_N = np.full(n_prompts, -1)
        self.drift, self.noise = 0.0, 1e-5
        self.target = math.pi / 4
        self._group_size, self._temperature = group_size, temperature
        self._step = 0
        self._first_visits: list[FloatArray] | None = []

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        self._step = step
        seen, noise = arcsine(successes, attempts)
        mean, variance = self._ahead(prompts)
        gap = self._gap(prompts)
        innovation = seen - mean
        gain = variance / (variance + noise)
        fresh = self.last_step_N[prompts] < 0
        self.mean_N[prompts] = np.clip(mean + gain * innovation, 0.0, math.pi / 2)
        self.variance_N[prompts] = (1.0 - gain) * variance
        self.last_step_N[prompts] = step
        if (~fresh).any():
            moved = gap[~fresh] @ np.maximum(np.sin(2.0 * mean[~fresh]), 0.05)
            self.drift += 0.1 * float(innovation[~fresh].sum() / max(moved, 1e-9))
            surplus = innovation[~fresh] ** 2 - (variance + noise)[~fresh] + gap[~fresh] * self.noise
            self.noise = max(1e-5, 0.9 * self.noise + 0.1 * float(surplus.sum() / gap[~fresh].sum()))
        self._start_from(seen[fresh])

    def predict(self) -> Forecast:
        mean, variance = self._ahead(slice(None))
        return Forecast(0.5 * (1.0 - np.cos(2.0 * mean) * np.exp(-2.0 * variance)), self._yield(mean, variance))

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        self._step = step
        mean, variance = self._ahead(candidates)
        worth = self._yield(mean, variance)
        self._pace(mean, variance, worth, batch_size)
        scores = worth * _band(mean, variance, self.target)
        if self._temperature > 0:
            scores = np.log(np.maximum(scores, 1e-12)) / self._temperature + generator.gumbel(size=len(scores))
        return best(candidates, scores, batch_size, generator)

    def _gap(self, rows: IntArray | slice) -> FloatArray:
        """Steps since the last visit, at least 1; 0 for a prompt that was never visited."""
        last = self.last_step_N[rows]
        return np.where(last < 0, 0.0, np.maximum(self._step - last, 1.0))

    def _ahead(self, rows: IntArray | slice) -> tuple[FloatArray, FloatArray]:
        """Mean and variance of psi at the present step."""
        mean, gap = self.mean_N[rows], self._gap(rows)
        moved = mean + self.drift * gap * np.sin(2.0 * mean)
        return np.clip(moved, 0.0, math.pi / 2), self.variance_N[rows] + gap * self.noise

    def _yield(self, mean: FloatArray, variance: FloatArray) -> FloatArray:
        """1 - [exp(-G mu^2 / a) + exp(-G (pi/2 - mu)^2 / a)] / sqrt(a) with a = 1 + 2 G P, in [0, 1]."""
        g = self._group_size
        a = 1.0 + 2.0 * g * variance
        silent = np.exp(-g * mean**2 / a) + np.exp(-g * (math.pi / 2 - mean) ** 2 / a)
        return np.asarray(np.clip(1.0 - silent / np.sqrt(a), 0.0, 1.0))

    def _pace(self, mean: FloatArray, variance: FloatArray, worth: FloatArray, batch_size: int) -> None:
        grid = np.linspace(0.1, math.pi / 2 - 0.1, 41)
        n = min(batch_size, len(worth))
        forecast = []
        for target in grid:
            scores = worth * _band(mean, variance, target)
            forecast.append(worth[np.argpartition(-scores, n - 1)[:n]].mean())
        hardest = grid[np.argmax(np.asarray(forecast) >= max(forecast) - 0.03)]
        self.target += float(np.clip(hardest - self.target, -0.005, 0.005))

    def _start_from(self, first_n: FloatArray) -> None:
        """Collect first visits; at 100 of them, give the prompts not visited yet their moments."""
        if self._first_visits is None:
            return
        self._first_visits.append(first_n)
        seen = np.concatenate(self._first_visits)
        if len(seen) >= 100:
            unseen = self.last_step_N < 0
            self.mean_N[unseen] = seen.mean()
            self.variance_N[unseen] = max(float(seen.var()) - 1.0 / (4.0 * self._group_size + 2.0), 1e-3)
            self._first_visits = None


def arcsine(successes: FloatArray, attempts: FloatArray) -> tuple[FloatArray, FloatArray]:
    """What a group shows of psi = arcsin sqrt(p), and the variance of that: [n] each."""
    inner = np.arcsin(np.sqrt((successes + 0.375) / (attempts + 0.75)))
    none, every = successes <= 0, successes >= attempts
    seen = np.where(none, 0.0, np.where(every, math.pi / 2, inner))
    return seen, np.where(none | every, 1.0 / (2.0 * attempts), 1.0 / (4.0 * attempts + 2.0))


def best(candidates: IntArray, scores: FloatArray, n: int, generator: np.random.Generator) -> IntArray:
    """The n candidates of the highest scores, best first; ties by chance."""
    ties = generator.random(len(candidates))
    rows = np.arange(len(candidates))
    if 0 < n < len(rows):  # sorting the others would take most of the time of a large pool
        rows = np.flatnonzero(scores >= np.partition(scores, len(rows) - n)[len(rows) - n])
    return candidates[rows[np.lexsort((ties[rows], -scores[rows]))[:n]]]


def _band(mean: FloatArray, variance: FloatArray, target: float) -> FloatArray:
    """sqrt(s^2 / (s^2 + P)) exp(-(mu - target)^2 / (2 (s^2 + P))) with s = min(sin target, cos target) / sqrt 2."""
    width = min(math.sin(target), math.cos(target)) ** 2 / 2.0
    total = width + variance
    return np.asarray(np.sqrt(width / total) * np.exp(-((mean - target) ** 2) / (2.0 * total)))
