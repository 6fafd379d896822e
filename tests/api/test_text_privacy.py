"""A run may keep no texts: they are embedded and forgotten, and everything else goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

SECRET = "The patient's name is a secret of three words."


def texts(caller: Caller) -> list[str | None]:
    return [prompt["text"] for prompt in caller.ok("GET", f"/runs/{caller.run}/prompts")["prompts"]]


def test_texts_are_not_stored_and_prompts_are_known_again(caller: Caller, service: Service) -> None:
    run = f"{caller.run}.private"
    private = type(caller)(caller.http, caller.client, run)
    private.create(keep_text=False)
    private.load([{"prompt_id": "a", "text": SECRET}, {"text": SECRET + " Again."}])

    again = private.load([{"prompt_id": "a", "text": SECRET}])
    other = private.refused("POST", f"/runs/{run}/prompts", json={"prompts": [{"prompt_id": "a", "text": "Another."}]})
    private.observe(0, {"prompt_id": "b", "text": SECRET + " Third.", "successes": 1, "attempts": 8})

    assert texts(private) == [None, None, None]
    assert again["existing"] == 1
    assert other.code == "prompt_conflict"
    (known,) = private.predict("b")
    (new,) = private.ok("POST", "/predict", json={"run": run, "prompts": [{"text": SECRET + " Third. "}]})[
        "predictions"
    ]
    assert known["attempts_seen"] == 8
    assert new["success_rate"] > 0
    assert len(private.chosen(1, 3)) == 3


def test_taking_back_the_permission_erases_what_is_stored(caller: Caller) -> None:
    caller.load_texts("a", "b")

    caller.create(keep_text=False)
    caller.load_texts("c")
    caller.create(keep_text=True)
    caller.load_texts("d")

    assert texts(caller) == [None, None, None, "What is d?"]
