"""The text by which a prompt is judged, out of what trainers keep as a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def text_of(prompt: object) -> str | None:
    """The text of a prompt: of a string, or of chat messages; None where it has none.

    Of messages all contents count, in their order, with an empty line between them; of a content in parts (text and
    images, say) those that are text.

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
