"""Which groups of a batch a trainer updates on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds.training.kept import Group, informative_ids, kept


def groups(*kinds: str) -> list[Group]:
    """Of `a+` (category a, informative) and `b-` (category b, silent) and the like, with their places as names."""
    return [Group(str(i), kind[0], kind[1] == "+") for i, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("observations", "informative"),
    [
        ([{"prompt_id": "a", "rewards": [0.0, 1.0]}], {"a"}),
        ([{"prompt_id": "a", "rewards": [1.0, 1.0]}], set()),
        ([{"prompt_id": "a", "rewards": [0.5, 0.5]}], set()),
        ([{"prompt_id": "a", "rewards": [0.0]}, {"prompt_id": "a", "rewards": [1.0]}], {"a"}),
        ([{"prompt_id": "a", "successes": 3, "attempts": 8}], {"a"}),
        ([{"prompt_id": "a", "successes": 8, "attempts": 8}], set()),
        ([{"prompt_id": "a", "rewards": [0.3, 0.30000001192092896]}], set()),
        ([{"prompt_id": "a", "successes": 8 - 1e-7, "attempts": 8}], set()),
        ([{"prompt_id": "a", "successes": 0.5, "attempts": 1}], set()),
    ],
)
def test_a_group_is_informative_where_its_attempts_were_not_all_rewarded_alike(
    observations: list[dict[str, object]], informative: set[str]
) -> None:
    assert informative_ids(observations) == informative


def test_without_a_size_all_informative_groups_are_kept() -> None:
    assert kept(groups("a+", "a-", "b+", "a+"), None) == ("0", "2", "3")


def test_each_category_keeps_its_part_of_the_batch() -> None:
    batch = groups(*["a+"] * 6, *["b+"] * 6, *["c+"] * 4)

    chosen = kept(batch, 8)

    assert Counter(batch[int(i)].category for i in chosen) == {"a": 3, "b": 3, "c": 2}


def test_no_silent_group_is_kept_while_an_informative_one_is_left() -> None:
    assert kept(groups("a+", "a+", "a+", "b-", "b-", "b-"), 3) == ("0", "1", "2")


def test_a_category_that_lacks_the_most_is_refilled_with_its_own() -> None:
    assert kept(groups("a+", "a+", "a-", "b-", "b-", "b-"), 4) == ("0", "1", "3", "4")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30), st.integers(1, 40))
def test_a_size_is_kept_to_and_signal_comes_first(kinds: list[tuple[str, bool]], size: int) -> None:
    batch = [Group(str(i), category, good) for i, (category, good) in enumerate(kinds)]

    chosen = kept(batch, size)

    n_good = sum(group.is_informative for group in batch)
    assert len(set(chosen)) == len(chosen) == min(size, len(batch))
    assert sum(batch[int(i)].is_informative for i in chosen) == min(size, n_good)
    assert list(chosen) == sorted(chosen, key=int)
