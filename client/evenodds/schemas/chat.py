"""The classifier that speaks OpenAI's chat completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from evenodds.schemas.base import Reply, example
from evenodds.schemas.budgets import BUDGET, BudgetReply
from evenodds.schemas.fields import MAX_ITEMS


class Lenient(BaseModel):
    """A part of a request in another party's protocol: what we do not know we do not look at."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ChatPart(Lenient):
    text: str | None = None


class ChatTurn(Lenient):
    role: str
    content: str | tuple[ChatPart, ...] | None = None


class ChatRequest(Lenient):
    """As much of OpenAI's chat completion request as a classifier needs."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "math-7b",
                    "messages": [
                        {"role": "system", "content": "Answer with the difficulty of the request."},
                        {"role": "user", "content": "What is 19 + 23?"},
                    ],
                }
            ]
        }
    )

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(:[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")] = (
        Field(description="a run, or run:policy", examples=["math-7b", "math-7b:cheap"])
    )
    messages: Annotated[tuple[ChatTurn, ...], Field(min_length=1, max_length=MAX_ITEMS)]
    stream: bool | None = None
    response_format: dict[str, Any] | None = None


class ChatMessage(Reply):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Reply):
    index: int = 0
    message: ChatMessage
    finish_reason: Literal["stop"] = "stop"


class ChatUsage(Reply):
    """Nothing is generated."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class ChatReply(Reply):
    model_config = example(
        id="chatcmpl-0f9d3a5c8a7e4a5e9d6b1c2f3a4b5c6d",
        object="chat.completion",
        created=1_764_345_600,
        model="math-7b",
        choices=[{"index": 0, "message": {"role": "assistant", "content": "high"}, "finish_reason": "stop"}],
        usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        budget=BUDGET,
    )

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: ChatUsage
    budget: BudgetReply = Field(description="what the label rests on; not part of OpenAI's reply")
