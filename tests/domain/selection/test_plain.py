"""What is chosen from a large pool by shortcuts is what the plain computation chooses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.selection.eligibility import outstanding, resting
from evenodds_service.domain.selection.pickers import best

N = 40_000
STEPS = np.concatenate((np.arange(-1, 40), [2**53]))


def plainly_best(scores_N: FloatArray, ties_N: FloatArray, among_N: BoolArray, n: int) -> IntArray:
    perturbed_N = np.where(among_N, scores_N + 1e-9 * ties_N, -np.inf)
    first = np.lexsort((np.arange(len(scores_N)), -perturbed_N))[: min(n, int(among_N.sum()))]
    return first[np.lexsort((ties_N[first], -scores_N[first]))]


@pytest.mark.parametrize("n", [1, 256, 5_000, N])
@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
@pytest.mark.parametrize("distinct", [1, 3, N])
def test_the_best_of_many_are_those_of_a_plain_sort(n: int, share: float, distinct: int) -> None:
    """Also where nearly all scores are equal, and where few prompts may be picked."""
    chance = np.random.default_rng([n, distinct])
    scores_N = chance.integers(0, distinct, N) / distinct if distinct < N else chance.random(N)
    ties_N, among_N = chance.random(N), chance.random(N) < share

    picked = best(scores_N, ties_N, among_N, n)

    assert np.array_equal(picked, plainly_best(scores_N, ties_N, among_N, n))


@settings(max_examples=50)
@given(step=st.integers(0, 60), rest=st.integers(0, 30), lease_steps=st.integers(0, 30))
def test_who_rests_and_who_is_waited_for_are_those_of_the_plain_rules(step: int, rest: int, lease_steps: int) -> None:
    waited_for, lost = outstanding(STEPS, step=step, lease_steps=lease_steps)

    chosen = (STEPS >= 0) & (lease_steps > 0)
    assert np.array_equal(waited_for, chosen & (step - STEPS < lease_steps))
    assert np.array_equal(lost, chosen & (step - STEPS >= lease_steps))
    assert np.array_equal(
        resting(STEPS, step=step, rest=rest), (rest > 0) & (STEPS >= 0) & (np.abs(step - STEPS) <= rest)
    )
