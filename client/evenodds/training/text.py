"""The text by which a prompt is judged, and its answer, out of what trainers keep of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from evenodds.schemas.fields import Answer

_ANSWER: TypeAdapter[Any] = TypeAdapter(Answer)


def text_of(prompt: object) -> str | None:
    """The text of a prompt: of a string, or of chat messages; None where it has none.

    Of messages all contents count, in their order, with an empty line between them; of a content in parts (such as text
    and images) those that are text.

    Args:
        prompt: A string, or a sequence of mappings with `content`: a string, or a sequence of mappings with `text`.
    """
    if isinstance(prompt, str):
        return prompt or None
    if not isinstance(prompt, Sequence):
        return None
    texts: list[str] = []
    for message in prompt:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, Sequence):
            texts += [
                part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            ]
    return "\n\n".join(text for text in texts if text) or None


def answer_of(answer: object) -> Any:
    """A reference answer as JSON; None where there is none, and where it cannot be sent: too long, or no JSON.

    An answer is a hint: without it a prompt is judged by its text.

    Args:
        answer: Whatever a data set has: a text, a number, a list, an array, a mapping.
    """
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if answer is None or answer == "" or (isinstance(answer, float) and math.isnan(answer)):
        return None
    try:
        return _ANSWER.validate_python(list(answer) if isinstance(answer, tuple) else answer)
    except ValidationError:
        return None


def described(prompt: object, answer: object = None) -> dict[str, Any]:
    """What is sent of a prompt besides its id: its text and its answer, each where there is one."""
    known = {"text": text_of(prompt), "answer": answer_of(answer)}
    return {name: value for name, value in known.items() if value is not None}


def ground_truth_of(row: Mapping[str, Any]) -> object:
    """The answer of a row as verl's data sets have it: `ground_truth` of `reward_model`, or of `reward_spec`."""
    of_verifier = row.get("reward_model") or row.get("reward_spec")
    return of_verifier.get("ground_truth") if isinstance(of_verifier, Mapping) else None
