"""Several services over one database, and one service after another: all answer alike, from what was acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from evenodds import NotFound

if TYPE_CHECKING:
    from tests.conftest import Service

    from evenodds import Client

TEXTS = {f"p{i}": f"{'Prove' if i % 2 else 'Compute'} something about the number {i}." for i in range(12)}


def learn(client: Client, run: str, *, steps: range) -> None:
    for step in steps:
        batch = client.select_batch(run, step, 4)
        client.observe(
            run,
            step,
            [
                {"prompt_id": p.prompt_id, "successes": (int(p.prompt_id[1:]) + step) % 5, "attempts": 4}
                for p in batch.prompts
            ],
            selection_id=batch.selection_id,
        )


def create(client: Client, run: str) -> None:
    client.put_run(run)
    client.add_prompts(run, [{"prompt_id": i, "text": text} for i, text in TEXTS.items()])


def test_a_replica_answers_with_what_the_other_acknowledged(
    database_url: str, start_service: Callable[[str], Service]
) -> None:
    one, two = start_service(database_url).client, start_service(database_url).client
    create(one, "math")
    two.predict("math", list(TEXTS))

    learn(one, "math", steps=range(3))
    asked: list[str | dict[str, object]] = [*TEXTS, {"text": "Compute something else."}]
    ours, theirs = one.predict("math", asked), two.predict("math", asked)

    assert theirs == ours
    assert sum(p.attempts_seen for p in theirs.predictions) == 3 * 4 * 4
    states = [
        client.run("math").model_copy(update={"active_at": None}) for client in (one, two)
    ]  # saved behind the calls
    assert states[0] == states[1]
    assert two.select_batch("math", 2, 4).replayed


def test_replicas_that_take_turns_fold_the_same_history(
    database_url: str, start_service: Callable[[str], Service]
) -> None:
    clients = [start_service(database_url).client for _ in range(2)]
    create(clients[0], "math")

    for step in range(6):
        learn(clients[step % 2], "math", steps=range(step, step + 1))
    clients[1].add_prompts("math", [{"prompt_id": "late", "text": "A prompt that came late."}])

    one, two = (client.predict("math", [*TEXTS, "late"]) for client in clients)
    assert one == two


def test_a_restarted_service_predicts_the_same_and_keeps_its_selections(
    database_url: str, start_service: Callable[[str], Service]
) -> None:
    before = start_service(database_url)
    create(before.client, "math")
    learn(before.client, "math", steps=range(4))
    chosen = before.client.select_batch("math", 4, 5)
    predicted = before.client.predict("math", list(TEXTS))
    before.stop()

    after = start_service(database_url).client

    assert after.predict("math", list(TEXTS)) == predicted
    assert after.select_batch("math", 4, 5) == chosen.model_copy(update={"replayed": True})


def test_a_run_deleted_and_created_again_elsewhere_starts_empty(
    database_url: str, start_service: Callable[[str], Service]
) -> None:
    one, two = start_service(database_url).client, start_service(database_url).client
    create(one, "math")
    learn(two, "math", steps=range(2))

    one.delete_run("math")
    assert_unknown(two, "math")
    create(one, "math")

    assert [p.attempts_seen for p in two.predict("math", list(TEXTS)).predictions] == [0] * len(TEXTS)
    assert two.predict("math", ["p1"]).log_position == 1


def assert_unknown(client: Client, run: str) -> None:
    with pytest.raises(NotFound, match="run_unknown"):
        client.predict(run, ["p1"])
