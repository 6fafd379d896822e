"""What a selector warns of: outcomes that do not fit what the run was set up for. And the text of a prompt."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from tests.waiting import PATIENCE_SECONDS

from evenodds import PromptSelector, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Service

IDS = [f"p{i}" for i in range(8)]


@pytest.fixture
def selector(service: Service, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[PromptSelector]:
    prompts = [{"prompt_id": i, "text": f"{i}?"} for i in IDS]
    options: Any = {"run_settings": {"embedder": "none", "group_size": 4}, "outbox": tmp_path}
    with PromptSelector(
        service.base_url,
        f"watched-{request.node.name[:60]}".replace("[", "-").replace("]", ""),
        prompts,
        deadline_seconds=PATIENCE_SECONDS,
        **options,
    ) as made:
        assert made.wait_until_ready()
        yield made


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_group_size_unlike_the_attempts_is_said_after_three_steps(
    selector: PromptSelector, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(3):
        selector.observe(step, {"p0": [1, 0]})  # a group may come in pieces
        selector.observe(step, {"p0": [1, 0], "p1": [1, 0, 0, 1, 1, 1, 0, 1], "p2": [1]})
    before = warnings(caplog)
    selector.observe(3, {"p0": [1]})
    selector.observe(4, {"p0": [1]})

    assert before == []
    (warning,) = warnings(caplog)
    assert "prompts get 8 attempts each, but the run's group_size is 4" in warning
    assert "set run_settings={'group_size': 8}" in warning


def test_whole_groups_of_which_some_attempts_were_lost_are_as_they_should_be(
    selector: PromptSelector, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: dict[str, list[float | None]] = {"p0": [1, 0, None, None], "p1": [1, 0, 0, 1]}
    for step in range(6):
        selector.observe(step, outcomes)

    assert warnings(caplog) == []


def test_outcomes_of_prompts_that_were_not_chosen_for_their_step_are_said(
    selector: PromptSelector, caplog: pytest.LogCaptureFixture
) -> None:
    batch = selector.select(0, 4)
    others = [prompt_id for prompt_id in IDS if prompt_id not in batch.prompt_ids]
    selector.observe(0, {prompt_id: [1, 0, 1, 1] for prompt_id in batch})
    before = warnings(caplog)

    selector.observe(0, {prompt_id: [1, 0, 1, 1] for prompt_id in others})

    assert before == []
    (warning,) = warnings(caplog)
    assert "4 of 4 outcomes of step 0 are of prompts that were not chosen for it" in warning
    assert "do not report evaluation sets" in warning


def test_a_group_size_that_is_learned_later_reaches_the_run(
    service: Service, selector: PromptSelector, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.waiting import until

    selector.set_group_size(4)
    assert warnings(caplog) == []

    selector.set_group_size(16)

    until(lambda: service.client.run(selector.run).group_size == 16, "the group size")
    assert "group_size is 16, as many attempts as the trainer makes, and not 4" in warnings(caplog)[0]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("What?", "What?"),
        ("", None),
        (None, None),
        (7, None),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}], "Be brief.\n\nWhat?"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}], "What is it?"),
        ([{"role": "user", "content": None}], None),
    ],
)
def test_the_text_of_a_prompt(prompt: object, text: str | None) -> None:
    assert text_of(prompt) == text
