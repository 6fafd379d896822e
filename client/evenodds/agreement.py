"""Rewards without a verifier: whether an answer is the one that most attempts at the request gave.

Self-consistency (Wang et al., arXiv 2203.11171) takes the majority's answer for the right one. It is biased: where a
model is wrong in the same way every time, wrong answers agree, and the hardest requests look easy. Where wrong answers
scatter, agreement ranks requests nearly as verified outcomes do. Measure on some verified requests before you rely on
it (`python -m benchmarks.agreement`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def agreement(answers: Sequence[Hashable | None]) -> tuple[float, ...]:
    """A reward for each attempt at one request: 1 where its answer is the most frequent one, 0 where it is another.

    Answers that are as frequent as each other share the reward. Where no two agree all rewards are 0. Less than two
    answers say nothing: there are no rewards then.

    Args:
        answers: The final answer of each attempt in one form, so that equal ones are equal ("42", not the text that
            leads to it). None where an attempt has none: it agrees with nobody and counts as an attempt.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if len(answers) < 2:
        return ()
    most = max(counts.values(), default=0)
    if most < 2:
        return (0.0,) * len(answers)
    reward = 1.0 / sum(count == most for count in counts.values())
    return tuple(reward if answer is not None and counts[answer] == most else 0.0 for answer in answers)
