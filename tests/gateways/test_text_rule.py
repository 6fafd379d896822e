"""The rule that says which text is judged is the operator's to set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from evenodds import TextRule

if TYPE_CHECKING:
    from tests.conftest import Service


def test_the_operator_sets_the_rule(start_service: Callable[..., Service], tmp_path: Path) -> None:
    rule = TextRule(follow_up_characters=0, context_characters=0)
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db", text_rule=rule)
    service.client.put_run("served", predictor="mopps")
    service.client.observe("served", 0, [{"text": "Easy?", "successes": 8, "attempts": 8}])
    turns = [{"role": role, "content": text} for role, text in (("user", "Hard?"), ("user", "Easy?"))]

    reply = httpx.post(f"{service.base_url}/v1/chat/completions", json={"model": "served", "messages": turns})

    assert reply.json()["choices"][0]["message"]["content"] == "low"
