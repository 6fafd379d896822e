"""What counts as an informative group of attempts."""

from __future__ import annotations

import pytest

from evenodds_service.domain.log_entries import NewObservation


@pytest.mark.parametrize(
    ("rewards", "informative"),
    [
        ([0.3, 0.1 + 0.2, 0.3, 0.1 + 0.2], False),  # they differ in the last bit
        ([0.5, 0.5 + 5e-7], False),
        ([0.5, 0.5 + 5e-6], True),
        ([0.0, 1.0], True),
        ([1.0], False),
    ],
)
def test_rewards_that_differ_by_rounding_alone_are_equal(rewards: list[float], informative: bool) -> None:
    assert NewObservation.of_rewards(0, rewards).informative is informative


@pytest.mark.parametrize(
    ("successes", "attempts", "informative"),
    [(0.0, 4, False), (1e-9, 4, False), (4 - 1e-9, 4, False), (4.0, 4, False), (1.0, 4, True), (0.5, 1, False)],
)
def test_counts_that_miss_none_or_all_by_rounding_are_none_or_all(
    successes: float, attempts: int, informative: bool
) -> None:
    assert NewObservation.of_counts(0, successes, attempts).informative is informative
