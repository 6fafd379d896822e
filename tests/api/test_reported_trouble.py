"""What people reported of other trainers, as calls of this service with the right answer."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from evenodds import Conflict

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import Caller
    from tests.conftest import Service

pytestmark = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""The parts that differ between databases have tests of their own."""

IDS = [f"p{i}" for i in range(60)]


def seen(*prompt_ids: str, successes: float = 1, attempts: int = 2) -> list[dict[str, object]]:
    return [{"prompt_id": i, "successes": successes, "attempts": attempts} for i in prompt_ids]


def test_of_twice_as_many_as_were_trained_on_the_others_come_back_after_the_lease(caller: Caller) -> None:
    caller.create(lease_steps=3, embedder="none")
    caller.load_texts(*IDS[:8])
    oversampled = caller.chosen(0, 8)
    caller.observe(0, *seen(*oversampled[:4]))

    assert caller.select(2, 4, allow_outstanding=True)["outstanding"] >= 1
    again = caller.select(4, 4, candidates=oversampled[4:])

    assert {p["prompt_id"] for p in again["prompts"]} == set(oversampled[4:])


def test_one_outcome_in_three_posts_counts_once_under_one_key_and_three_times_under_three(caller: Caller) -> None:
    caller.create(embedder="none")
    caller.load_texts("a", "b")

    for n in range(3):
        caller.client.observe(caller.run, 0, seen("a"), request_id="trajectory-1")
        caller.client.observe(caller.run, 0, seen("b"), request_id=f"update-{n}")

    assert [p["attempts_seen"] for p in caller.predict("a", "b")] == [2, 6]


def test_forty_replacements_of_one_to_three_prompts_repeat_none_and_keep_to_their_category(caller: Caller) -> None:
    caller.create(embedder="none", lease_steps=50)  # as long as the rollouts of one step are under way
    caller.load(
        [{"prompt_id": f"{of}{i}", "text": f"{of} {i}?", "category": of} for of in ("a", "b") for i in range(90)]
    )

    chosen = [i for call in range(40) for i in caller.chosen(call, 1 + call % 3, categories={"a": 1.0})]

    assert len(chosen) == len(set(chosen)) == 79
    assert {i[0] for i in chosen} == {"a"}


def test_attempts_without_a_verdict_take_no_part_in_a_belief(caller: Caller) -> None:
    caller.create(predictor="mopps", embedder="none")
    caller.load_texts(*IDS[:40])
    chance = random.Random(0)
    judged = 0
    for prompt_id in IDS[:40]:
        attempts = [float(chance.random() < 0.5) for _ in range(16)]
        kept = [reward for reward in attempts if chance.random() >= 0.3]  # the verifier timed out on the others
        judged += len(kept)
        caller.observe(0, {"prompt_id": prompt_id, "rewards": kept})

    beliefs = caller.predict(*IDS[:40])

    assert sum(belief["attempts_seen"] for belief in beliefs) == judged < 0.8 * 40 * 16
    assert sum(belief["success_rate"] for belief in beliefs) / 40 == pytest.approx(0.5, abs=0.05)


def test_a_chooser_that_never_reports_takes_prompts_for_the_lease_only_and_others_get_whole_batches(
    caller: Caller,
) -> None:
    caller.create(lease_steps=4, embedder="none")
    caller.load_texts(*IDS[:24])
    lost: set[str] = set()

    for step in range(12):
        if step < 3:
            lost.update(caller.chosen(2 * step, 4))  # a worker that never returns
        batch = caller.chosen(2 * step + 1, 4)
        assert len(batch) == 4
        caller.observe(2 * step + 1, *seen(*batch))

    assert len(lost) > 4
    assert caller.select(40, 24)["outstanding"] == 0


def test_one_id_for_two_texts_is_a_conflict_and_two_ids_for_one_text_are_two_prompts(caller: Caller) -> None:
    caller.create(embedder="none")
    caller.load([{"prompt_id": "a", "text": "What is one?"}, {"prompt_id": "b", "text": "What is one?"}])

    with pytest.raises(Conflict, match="prompt_conflict"):
        caller.client.add_prompts(caller.run, [{"prompt_id": "a", "text": "What is two?"}])
    caller.observe(0, *seen("a"))

    assert [p["attempts_seen"] for p in caller.predict("a", "b")] == [2, 0]


def test_a_trainer_that_names_its_candidates_or_leaves_prompts_out_has_no_stalled_coverage(
    caller: Caller, service: Service, start_service: Callable[[str], Service]
) -> None:
    """All that it lets the service choose was chosen. Also where the log is read anew."""
    caller.load_texts(*IDS)
    caller.create(cooldown_steps=0)
    for step in range(32):
        part = {"candidates": IDS[:16]} if step % 2 else {"exclude": IDS[16:]}
        batch = caller.select(step, 8, **part)
        own = [{"prompt_id": p["prompt_id"], "successes": 4, "attempts": 8} for p in batch["prompts"]]
        caller.observe(step, *own, selection_id=batch["selection_id"])
    replica = start_service(service.database_url)

    for each in (service, replica):
        assert each.client.run(caller.run).alarms == ()
