"""The answers in a model's reply, and which of them say something about the model.

An answer that was cut off, filtered, aborted or left empty, or that asks the caller to run a tool, is neither a success
nor a failure: whoever counted it as one would teach the service that long answers are wrong ones. Pure functions over
the replies of OpenAI's chat completions and responses and of Anthropic's messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LENGTH, FILTERED, TOOLS, ABORTED, EMPTY = "length", "content_filter", "tool_calls", "aborted", "empty"
"""Why an answer is left out."""

_REASONS = {
    # of chat completions
    "stop": None,
    "length": LENGTH,
    "content_filter": FILTERED,
    "tool_calls": TOOLS,
    "function_call": TOOLS,
    # of messages
    "end_turn": None,
    "stop_sequence": None,
    "max_tokens": LENGTH,
    "model_context_window_exceeded": LENGTH,
    "refusal": FILTERED,
    "tool_use": TOOLS,
    "pause_turn": TOOLS,
    # of responses
    "completed": None,
    "max_output_tokens": LENGTH,
}

_CALLERS_CALLS = {
    *("function_call", "custom_tool_call", "computer_call", "local_shell_call", "shell_call", "apply_patch_call"),
    "mcp_approval_request",
}
"""Items of a response that wait for the caller. Other calls (`web_search_call`) the provider makes on its own."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a reply.

    Attributes:
        text: What it says.
        left_out: Why it is no outcome: `length`, `content_filter`, `tool_calls`, `aborted` or `empty`; None where it
            is one.
    """

    text: str
    left_out: str | None


def answers_of(reply: Mapping[str, Any]) -> tuple[Answer, ...]:
    """Every answer of a reply, in its order; a reply of another form has none."""
    if isinstance(reply.get("choices"), Sequence):
        return tuple(_of_choice(choice) for choice in reply["choices"])
    if isinstance(reply.get("output"), Sequence):
        return (_of_response(reply),)
    if isinstance(reply.get("content"), Sequence):
        parts = [part for part in reply["content"] if isinstance(part, Mapping)]
        return (_answer(_texts(parts), reply.get("stop_reason"), has_tools=_has(parts, "tool_use")),)
    return ()


def _of_choice(choice: Mapping[str, Any]) -> Answer:
    message = choice.get("message") or {}
    content = message.get("content")
    text = content if isinstance(content, str) else _texts(content or ())
    has_tools = bool(message.get("tool_calls") or message.get("function_call"))
    return _answer(text, choice.get("finish_reason"), has_tools=has_tools)


def _of_response(reply: Mapping[str, Any]) -> Answer:
    items = [item for item in reply["output"] if isinstance(item, Mapping)]
    text = "\n".join(_texts(item.get("content") or ()) for item in items if item.get("type") == "message")
    reason = (reply.get("incomplete_details") or {}).get("reason") or reply.get("status")
    done = {item.get("call_id") for item in items if str(item.get("type")).endswith("_call_output")}
    waits = any(item.get("type") in _CALLERS_CALLS and item.get("call_id") not in done for item in items)
    only_calls = not text and any(str(item.get("type")).endswith("_call") for item in items)
    return _answer(text, reason, has_tools=waits or only_calls)


def _answer(text: str, reason: object, *, has_tools: bool) -> Answer:
    left_out = _REASONS.get(reason, ABORTED) if isinstance(reason, str) else ABORTED
    if left_out is None and has_tools:
        left_out = TOOLS
    if left_out is None and not text.strip():
        left_out = EMPTY
    return Answer(text, left_out)


def _texts(parts: Sequence[Any]) -> str:
    return "".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))


def _has(parts: Sequence[Mapping[str, Any]], kind: str) -> bool:
    return any(part.get("type") == kind for part in parts)
