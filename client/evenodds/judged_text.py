"""Which text of a conversation is judged: one rule for every gateway, the chat facade and the client.

A request is a whole conversation, wrapped by whatever harness sent it. Judged by its last user message alone, "yes, go
on" would be one prompt for everybody, and a harness's reminder would be taken for the question. Pure functions; knows
no HTTP and no service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from evenodds.schemas.fields import MAX_TEXT

_STORED_NOWHERE = re.compile("[\x00\ud800-\udfff]")
"""NUL characters and halves of surrogate pairs say nothing about how hard a request is, and no service keeps them."""

_QUOTED_BY_LITELLM = "\nRecent conversation (context only, do not classify these):\n"
"""With this its complexity router begins the turns that it quotes before the message, "[1] text", oldest first."""
_AFTER_THE_QUOTED = "\nConversation so far: "
_QUOTED_TURN = re.compile(r"^\[\d+\] (?:(user|assistant): )?", flags=re.MULTILINE)

_KEPT_ELSEWHERE = ("previous_response_id", "conversation")
"""By these a request to `/v1/responses` names what was said before and is not in it."""

_Tag = Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]{0,63}$")]


class TextRule(BaseModel):
    """How the text that is judged is taken from a conversation.

    1. Of each turn only the text counts. Elements named in `removed` go with what is in them; where there is one of
       `unwrapped`, only what is in it counts; so does only what follows one of `markers`. The turns that LiteLLM's
       router quotes before that are turns of the conversation.
    2. The judged turn is the last turn of the user with more than `follow_up_characters`, or the first one. Shorter
       ones after it ("yes, go on") are judged with it and with all that lies between.
    3. Before it stand the turns that came before, up to `context_characters`, the nearest last.

    A conversation of one turn is judged by that turn's text as it stands. Otherwise each turn begins with its role.
    System, developer and tool turns never count. A request that goes on with a conversation that the provider keeps
    (`previous_response_id`, `conversation`) has no text where it holds nothing but follow-ups: what they follow is
    not in it.

    Attributes:
        follow_up_characters: A later turn of the user of at most so many characters is a follow-up; 0: none is.
        context_characters: Most characters of the turns before the judged one; 0: none.
        removed: Elements that harnesses add, by name: `<name ...>...</name>`.
        unwrapped: Elements that harnesses put around the user's own words.
        markers: What routers put between their own words and the message.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    follow_up_characters: Annotated[int, Field(ge=0, le=MAX_TEXT)] = 40
    context_characters: Annotated[int, Field(ge=0, le=MAX_TEXT)] = 1_000
    removed: tuple[_Tag, ...] = (
        "system-reminder",
        "system_reminder",
        "environment_context",
        "environment_details",
        "user_instructions",
        "user_info",
        "command-name",
        "command-message",
        "local-command-stdout",
        "local-command-caveat",
        "ide_opened_file",
        "ide_selection",
        "attached_files",
        "attachments",
    )
    unwrapped: tuple[_Tag, ...] = ("user_query", "userRequest", "user_message")
    markers: tuple[Annotated[str, Field(min_length=1)], ...] = ("\nClassify this message:\n",)

    def of(self, conversation: object) -> str:
        """The text of a conversation that is judged; empty where no turn of the user has any.

        Args:
            conversation: A text, a list of messages of a chat, of Anthropic's messages, or of the `input` of OpenAI's
                responses; or a whole request with one of these under `messages` or `input`. What has another form has
                no text, and neither have follow-ups of what the provider keeps.
        """
        spoken = [turn for role, text in _turns(conversation) for turn in self._spoken(role, text)]
        turns = [(role, text) for role, text in spoken if text]
        of_user = [number for number, (role, _) in enumerate(turns) if role == "user"]
        if not of_user:
            return ""
        substantial = [number for number in of_user if len(turns[number][1]) > self.follow_up_characters]
        if not substantial and _goes_on(conversation):
            return ""
        first = substantial[-1] if substantial else of_user[0]
        judged = turns[first : of_user[-1] + 1]
        context: list[tuple[str, str]] = []
        room = self.context_characters
        for role, text in reversed(turns[:first]):
            if room <= 0:
                break
            context.insert(0, (role, text[-room:]))
            room -= len(text)
        if len(judged) == 1 and not context:
            return judged[0][1][:MAX_TEXT]
        return "\n\n".join(f"{role}: {text}" for role, text in (*context, *judged))[-MAX_TEXT:]

    def _spoken(self, role: str, text: str) -> list[tuple[str, str]]:
        """What a router's message wraps: the turns that it quotes, and the message. Any other text is one turn."""
        text = _STORED_NOWHERE.sub("", text)
        for name in self.removed:
            text = _parted(text, name)[0]
        quoted: list[tuple[str, str]] = []
        for marker in self.markers:
            before, is_there, message = text.rpartition(marker)
            if is_there and message:
                text, quoted = message, _quoted(before)
        return [(role, self._unwrapped(text)) for role, text in (*quoted, (role, text))]

    def _unwrapped(self, text: str) -> str:
        for name in self.unwrapped:
            outside, inside = _parted(text, name)
            text = "\n".join(inside) if inside else outside
        return text.strip()


DEFAULT_RULE = TextRule()


def _parted(text: str, name: str) -> tuple[str, list[str]]:
    """What stands outside of the elements of this name, and in each of them. Linear in the text, whatever it holds."""
    opening = re.compile(rf"<{re.escape(name)}(?:\s[^<>]*)?>")
    outside: list[str] = []
    inside: list[str] = []
    end = 0
    while (start := opening.search(text, end)) is not None:
        close = text.find(f"</{name}>", start.end())
        if close < 0:
            break
        outside.append(text[end : start.start()])
        inside.append(text[start.end() : close])
        end = close + len(name) + 3
    return "".join([*outside, text[end:]]), inside


def _quoted(before: str) -> list[tuple[str, str]]:
    """(role, text) of each turn that LiteLLM's router quotes, in the words before its marker."""
    block = before.rpartition(_QUOTED_BY_LITELLM)[2] if _QUOTED_BY_LITELLM in before else ""
    block = block.rpartition(_AFTER_THE_QUOTED)[0] or block
    _, *parts = _QUOTED_TURN.split(block)
    return [(role or "user", text) for role, text in zip(parts[::2], parts[1::2], strict=True)]


def _goes_on(conversation: object) -> bool:
    """Whether a request continues a conversation that the provider keeps."""
    return isinstance(conversation, Mapping) and any(conversation.get(name) is not None for name in _KEPT_ELSEWHERE)


def _turns(conversation: object) -> list[tuple[str, str]]:
    """(role, text) of each turn of the user or the assistant."""
    if isinstance(conversation, Mapping):
        messages = conversation.get("messages")
        return _turns(conversation.get("input") if messages is None else messages)
    if isinstance(conversation, str):
        return [("user", conversation)]
    return [
        (str(message["role"]), _text(message.get("content")))
        for message in (conversation if isinstance(conversation, Sequence) else ())
        if isinstance(message, Mapping) and message.get("role") in ("user", "assistant")
    ]


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "\n".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))
