"""The names that categories had before: taken with a warning where they are arguments, and read from older services."""

from __future__ import annotations

import asyncio
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from evenodds import AsyncClient, Client, Observation, PromptIn, PromptInfo, PromptRef, PromptSelector, SelectReply

if TYPE_CHECKING:
    from tests.conftest import Service

FORECAST = {"informative_share": 0.5, "informative_groups": 0.5, "pad_to": 1}
CHOSEN: dict[str, Any] = {
    **{"run": "r", "step": 1, "selection_id": "s", "model_version": 0, "log_position": 1, "replayed": False},
    "forecast": FORECAST,
    "prompts": [
        {"prompt_id": "a", "group": "g", "success_rate": 0.5, "std": 0.1, "informative_probability": 0.9},
    ],
}
"""The reply of a service that knows the older name only."""


def test_the_older_keywords_are_sent_under_the_newer_names_and_the_callers_line_is_warned_of() -> None:
    sent: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, json=CHOSEN)

    with (
        Client(transport=httpx.MockTransport(answer)) as client,
        pytest.warns(DeprecationWarning, match=r"^select_batch: groups is now categories; .* release 1\.0$") as warned,
    ):
        client.select_batch("r", 1, 1, groups={"a": 0.5})

    async def choose() -> None:
        async with AsyncClient(transport=httpx.MockTransport(answer)) as asynchronous:
            await asynchronous.select_batch("r", 1, 1, groups={"a": 0.5}, groups_at_most={"a": 0.75})

    with pytest.warns(DeprecationWarning, match="goes with release 1.0") as warned_later:
        asyncio.run(choose())

    assert [(Path(each.filename).name, str(each.message).split()[1]) for each in (*warned, *warned_later)] == [
        ("test_older_names.py", "groups"),
        ("test_older_names.py", "groups"),
        ("test_older_names.py", "groups_at_most"),
    ]
    shares = {"categories": {"a": 0.5}}
    assert [{name: body[name] for name in body if name.startswith(("g", "c"))} for body in sent] == [
        shares,
        {**shares, "categories_at_most": {"a": 0.75}},
    ]


def test_a_selector_takes_the_older_keywords_with_a_warning(service: Service, tmp_path: Path) -> None:
    prompts = [{"prompt_id": f"p{i}", "group": "even" if i % 2 == 0 else "odd"} for i in range(8)]
    settings = {"predictor": "mopps", "embedder": "none", "groups": {"even": 0.25}}

    with pytest.warns(DeprecationWarning, match="^run_settings: groups is now categories") as first:
        selector = PromptSelector(
            service.base_url,
            f"older-{tmp_path.name}",
            prompts,
            run_settings=settings,
            outbox=tmp_path,
            deadline_seconds=30,
        )
    with selector:
        assert selector.wait_until_ready()
        with pytest.warns(DeprecationWarning, match="^prefetch: groups is now categories") as second:
            selector.prefetch(1, 4, groups={"odd": 1.0})
        with pytest.warns(DeprecationWarning, match="^select: groups is now categories") as third:
            batch = selector.select(1, 4, groups={"odd": 1.0})
        again = selector.select(1, 4, categories={"odd": 1.0})

    assert {Path(each.filename).name for each in (*first, *second, *third)} == {"test_older_names.py"}
    assert batch.source == "service"
    assert again == batch
    assert sorted(batch) == ["p1", "p3", "p5", "p7"]
    assert service.client.run(selector.run).categories == {"even": 0.25}


def test_the_reply_of_an_older_service_has_categories() -> None:
    reply = SelectReply.model_validate(CHOSEN)

    assert reply.prompts[0].category == "g"


def test_reading_an_older_attribute_gives_a_warning_and_the_value() -> None:
    told = PromptInfo.model_validate(
        {"prompt_id": "a", "text": None, "category": "g", "features": None, "prior_rate": None}
    )
    made = PromptIn(prompt_id="a", group="g")

    for prompt in (told, made):
        assert prompt.category == "g"
        with pytest.warns(DeprecationWarning, match="the older name of category, until 1.0"):
            assert prompt.group == "g"


@pytest.mark.parametrize("model", [PromptIn, PromptRef])
def test_a_prompt_is_the_same_under_either_name_and_is_sent_under_the_newer(model: type[PromptIn]) -> None:
    older, newer = model(prompt_id="a", group="g"), model(prompt_id="a", category="g")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sent = [prompt.model_dump(exclude_none=True) for prompt in (older, newer)]
    assert older == newer
    assert sent == [{"prompt_id": "a", "category": "g"}] * 2


def test_an_observation_that_waits_in_an_outbox_since_the_release_before_is_understood() -> None:
    observation = Observation.model_validate({"prompt_id": "a", "text": "A?", "group": "g", "rewards": [1.0]})

    assert observation.category == "g"
