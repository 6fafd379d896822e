"""A policy that answers to the choice, made from a recorded run: what is learned from moves, and the rest a little.

Recorded rates move with time alone, whatever is chosen, and so reward to choose the same prompts again and again. Here
a prompt stands where the recorded run stood after as many visits as the prompt was learned from. Knows no method.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from evenodds_service.commands.replay.recordings import Recording
from evenodds_service.domain.arrays import FloatArray, IntArray

SMOOTHED_VISITS = 2.0
"""Standard deviation of the kernel over visits: a visit's eight attempts alone would give each rate noise of .17."""
_ANSWER = 5


@dataclass(frozen=True, slots=True, eq=False)
class AnsweringPolicy:
    """Success rates as a function of what was learned from. Outcomes are keyed by seed and step, never by the method.

    The recorded run visited all prompts alike, so that it cannot tell what a visit does to its own prompt from what all
    visits do to every prompt. `own` is the share of the prompt's own; look at several. A group moves the policy only if
    it is informative: such a group counts as a visit of its prompt, and all of them together as so many epochs of the
    recorded run as had as many informative groups.

    Attributes:
        rates_V_N: Smoothed success rates after each visit of the recorded run.
        informative_share: Of the recorded groups.
        own: In [0, 1].
    """

    rates_V_N: FloatArray
    informative_share: float
    own: float

    @staticmethod
    def of(recording: Recording, *, own: float) -> AnsweringPolicy:
        """From a recorded run with one count of attempts a visit."""
        k, n = recording.successes_V_N.astype(np.float64), recording.attempts_V_N.astype(np.float64)
        visits = np.arange(len(k))
        kernel = np.exp(-0.5 * ((visits[:, None] - visits) / SMOOTHED_VISITS) ** 2)
        return AnsweringPolicy((kernel @ k) / (kernel @ n), float(((k > 0) & (k < n)).mean()), own)

    def rates(self, learned_N: IntArray) -> FloatArray:
        """Success rates after so many groups of each prompt were learned from, [N]."""
        last = len(self.rates_V_N) - 1
        epochs = learned_N.sum() / (len(learned_N) * self.informative_share)
        time_N = np.minimum(self.own * learned_N + (1.0 - self.own) * epochs, last)
        before_N = np.minimum(time_N.astype(np.int64), last - 1)
        share_N, each = time_N - before_N, np.arange(len(learned_N))
        before, after = self.rates_V_N[before_N, each], self.rates_V_N[before_N + 1, each]
        return np.asarray((1.0 - share_N) * before + share_N * after)

    def outcomes(self, learned_N: IntArray, *, seed: int, step: int, group_size: int) -> IntArray:
        """Successes out of `group_size` attempts at each prompt, [N]: the same chance, read at the rate as it is."""
        chance_N = np.random.default_rng([seed, step, _ANSWER]).random(len(learned_N))
        return np.asarray(binom.ppf(chance_N, group_size, self.rates(learned_N)), dtype=np.int64)
