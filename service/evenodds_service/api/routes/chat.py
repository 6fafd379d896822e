"""An OpenAI-compatible chat model that answers a tier label, for routers that ask a language model about requests.

Only as much of the protocol as a classifier needs: one short answer, whole. Errors are problem+json as everywhere.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from evenodds import TextRule
from evenodds.schemas import (
    BudgetRequest,
    ChatChoice,
    ChatMessage,
    ChatReply,
    ChatRequest,
    ChatUsage,
    PromptRef,
)
from evenodds_service.api.dependencies import PROBLEMS, Dependencies
from evenodds_service.api.routes.budgets import budget_reply
from evenodds_service.api.wire import now
from evenodds_service.errors import ChatRefused
from evenodds_service.runtime.budgets import DEFAULT_POLICY

router = APIRouter(responses=PROBLEMS, tags=["budgets"])


@router.post("/v1/chat/completions", summary="A tier label, as an OpenAI chat model answers it")
async def chat_completions(body: ChatRequest, services: Dependencies) -> ChatReply:
    """The label of the tier that the conversation falls into, by a budget policy of a run.

    The text that is judged is the user's last substantial message, with what follows it and a limited context before
    it; `EVENODDS_TEXT_RULE` sets the rule. `model` is the run's name, or `run:policy`. With a `response_format` the
    label comes as JSON: under the one property of the schema that takes it, else under `tier`. What else a chat request
    holds is not looked at.
    """
    run, _, policy = body.model.partition(":")
    prompt = PromptRef(text=_text(body, services.text_rule))
    budget = await budget_reply(BudgetRequest(run=run, prompt=prompt, policy=policy or DEFAULT_POLICY), services)
    return ChatReply(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(now().timestamp()),
        model=body.model,
        choices=(ChatChoice(message=ChatMessage(content=_answer(body.response_format, budget.effort))),),
        usage=ChatUsage(),
        budget=budget,
    )


def _text(body: ChatRequest, rule: TextRule) -> str:
    if body.stream:
        raise ChatRefused(
            "stream: the answer is one short label and is not streamed: send stream false, or leave it out"
        )
    text = rule.of(body.model_dump(include={"messages"}))
    if text:
        return text
    raise ChatRefused("messages: no user message has a text: send the request that is to be judged as a user message")


def _answer(response_format: Mapping[str, Any] | None, label: str) -> str:
    if not response_format or response_format.get("type") not in ("json_object", "json_schema"):
        return label
    schema = _part(_part(response_format, "json_schema"), "schema")
    properties = _part(schema, "properties") or {"tier": {}}
    allowed = {name: _part(properties, name).get("enum", [label]) for name in properties}
    fitting = [name for name, values in allowed.items() if isinstance(values, list) and label in values]
    if not fitting:
        first = next(iter(allowed.values()))
        labels = ", ".join(map(repr, first)) if isinstance(first, list) else repr(first)
        raise ChatRefused(
            f"response_format: the budget policy's tier {label!r} is none of {labels[:500]}; give the "
            "policy tiers with these labels (PUT /runs/{run}/budget_policies/{policy})"
        )
    return json.dumps({fitting[0]: label})


def _part(whole: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object in an object, empty where it is missing."""
    part = whole.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise ChatRefused(f"response_format: {name!r} is {json.dumps(part)[:100]}; send a JSON schema, or leave it out")
    return part
