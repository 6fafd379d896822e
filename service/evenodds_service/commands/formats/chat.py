"""The text of a prompt out of what a log has of it: chat messages, or a text with its chat template around it."""

from __future__ import annotations

import re

_ROLE = r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>)?{}(?:<\|end_header_id\|>)?"
_END = r"(?:<\|im_end\|>|<\|eot_id\|>|<end_of_turn>)?"
_USER = re.compile(rf"(?:\A|(?<=\n)|(?<=\|>))(?:<\|begin_of_text\|>)?{_ROLE.format('user')}\n+")
_ASSISTANT = re.compile(rf"{_END}\s*{_ROLE.format('(?:assistant|model)')}\s*(?:<think>\s*(?:</think>\s*)?)?\Z")


def plain_text(templated: str) -> str:
    """The user's turn of a prompt in the templates of Qwen, Llama or Gemma, with or without their special tokens.

    Anything else, and several turns, come back as they are, without white space around them.
    """
    end = _ASSISTANT.search(templated)
    starts = list(_USER.finditer(templated))
    if end is None or len(starts) != 1 or starts[0].end() > end.start():
        return templated.strip()
    return templated[starts[0].end() : end.start()].strip()


def text_of(prompt: object) -> str | None:
    """The text of a prompt: itself, or the user's turns of chat messages; None where there is none."""
    if isinstance(prompt, str):
        return prompt.strip() or None
    if not isinstance(prompt, list):
        return None
    turns = [turn for turn in prompt if isinstance(turn, dict)]
    users = [turn for turn in turns if turn.get("role", "user") == "user"] or turns
    parts = [_content(turn.get("content")) for turn in users]
    return "\n\n".join(part for part in parts if part) or None


def _content(content: object) -> str:
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, list):
        return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part).strip()
    return ""
