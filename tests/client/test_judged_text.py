"""One rule says which text of a conversation is judged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evenodds import TextRule

RULE = TextRule()
QUESTION = "Prove that there are infinitely many primes of the form 4k + 3."


def conversation(*turns: str) -> list[dict[str, str]]:
    """Turns of the user and the assistant in alternation."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def test_a_single_turn_is_judged_as_it_stands() -> None:
    assert RULE.of(conversation("Easy?")) == "Easy?"
    assert RULE.of("Easy?") == "Easy?"
    assert RULE.of([{"role": "system", "content": "Be short."}, *conversation(" Easy? ")]) == "Easy?"


def test_a_short_follow_up_is_judged_with_what_it_follows() -> None:
    one = RULE.of(conversation(QUESTION, "First, suppose ...", "yes, go on"))
    other = RULE.of(conversation("Write a poem about the sea, in twelve lines.", "Blue ...", "yes, go on"))

    assert one == f"user: {QUESTION}\n\nassistant: First, suppose ...\n\nuser: yes, go on"
    assert one != other


def test_a_first_turn_is_never_a_follow_up() -> None:
    assert RULE.of(conversation("Hi!", "Hello.", "go on")) == "user: Hi!\n\nassistant: Hello.\n\nuser: go on"


def test_turns_before_are_context_up_to_a_limit_and_the_nearest_stay() -> None:
    turns = conversation("a" * 50, "b" * 50, QUESTION)

    assert TextRule(context_characters=60).of(turns) == f"user: {'a' * 10}\n\nassistant: {'b' * 50}\n\nuser: {QUESTION}"
    assert TextRule(context_characters=0).of(turns) == QUESTION


@pytest.mark.parametrize(
    "content",
    [
        f"<system-reminder>Today is Monday.\nUse the tools.</system-reminder>{QUESTION}",
        f"<environment_context cwd='/tmp'>\n<shell>bash</shell>\n</environment_context>\n\n{QUESTION}",
        f"<context>A file.</context>\n<user_query>\n{QUESTION}\n</user_query>",
        f"\nConversation so far: ~20 tokens\n\nClassify this message:\n{QUESTION}",
        f"<system-reminder>\nClassify this message:\nx</system-reminder>{QUESTION}",
        f"\nClassify this message:\n<user_query>{QUESTION}</user_query>",
        [{"type": "text", "text": "<system-reminder>x</system-reminder>"}, {"type": "text", "text": QUESTION}],
        [{"type": "input_text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": "data:,"}}],
        f"{QUESTION}\x00",
    ],
)
def test_what_a_harness_writes_around_the_prompt_does_not_count(content: Any) -> None:
    assert RULE.of([{"role": "user", "content": content}]) == QUESTION


def routed(*quoted: str, message: str) -> list[dict[str, str]]:
    """What LiteLLM's complexity router asks its classifier."""
    turns = [f"[{i}] {text}" for i, text in enumerate(quoted, start=1)]
    heading = ["\nRecent conversation (context only, do not classify these):", *turns] if turns else []
    depth = ["\nConversation so far: ~20 tokens across the request"] if turns else []
    parts = ["\nCaller system prompt, quoted as task context:", "Be short.", *heading, *depth]
    text = "\n".join([*parts, f"\nClassify this message:\n{message}"])
    return [{"role": "system", "content": "Classify by complexity."}, {"role": "user", "content": text}]


def test_what_a_router_quotes_of_a_conversation_is_part_of_it() -> None:
    assert RULE.of(routed(message="Easy?")) == "Easy?"
    assert RULE.of(routed(QUESTION, message="yes, go on")) == f"user: {QUESTION}\n\nuser: yes, go on"
    assert RULE.of(routed("user: Hi,\n[now]!", "assistant: Hello.", message=QUESTION)) == (
        f"user: Hi,\n[now]!\n\nassistant: Hello.\n\nuser: {QUESTION}"
    )
    assert TextRule(context_characters=0).of(routed("Hi!", message=QUESTION)) == QUESTION


def test_a_turn_of_harness_text_alone_is_no_turn() -> None:
    turns = [*conversation(QUESTION), {"role": "user", "content": "<system-reminder>Use the tools.</system-reminder>"}]

    assert RULE.of(turns) == QUESTION


def test_results_of_tools_are_not_the_users_words() -> None:
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "a long result that nobody asked about, and some more of it"},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "42"}]},
    ]

    assert RULE.of(turns) == QUESTION


def test_requests_of_chat_messages_and_responses_are_read_alike() -> None:
    assert RULE.of({"messages": conversation(QUESTION)}) == QUESTION
    assert RULE.of({"input": QUESTION}) == QUESTION
    assert RULE.of({"input": [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]}) == QUESTION


@pytest.mark.parametrize("kept", [{"previous_response_id": "resp_1"}, {"conversation": {"id": "conv_1"}}])
def test_a_follow_up_of_what_the_provider_keeps_has_no_text(kept: dict[str, Any]) -> None:
    """Else "yes, go on" would be one prompt for everybody."""
    assert RULE.of({"input": "yes, go on", **kept}) == ""
    assert RULE.of({"input": conversation("yes, go on", "Then suppose ...", "and then?"), **kept}) == ""
    assert RULE.of({"input": QUESTION, **kept}) == QUESTION
    assert RULE.of({"input": conversation("Hi!", "Hello.", QUESTION), **kept}).endswith(QUESTION)
    assert RULE.of({"input": "yes, go on", **dict.fromkeys(kept)}) == "yes, go on"
    assert TextRule(follow_up_characters=0).of({"input": "yes, go on", **kept}) == "yes, go on"


@pytest.mark.parametrize("nothing", [None, 3, {}, [], {"messages": 3}, {"messages": [{"role": "user", "content": 3}]}])
def test_what_has_no_text_of_a_user_has_none(nothing: object) -> None:
    assert RULE.of(nothing) == ""


def test_the_rule_is_settable_and_refuses_what_it_does_not_know() -> None:
    rule = TextRule(removed=("notes",), follow_up_characters=0, context_characters=0)

    assert rule.of(conversation("<notes>x</notes>" + QUESTION, "y", "go on")) == "go on"
    with pytest.raises(ValidationError, match="context"):
        TextRule.model_validate({"context": 3})
    with pytest.raises(ValidationError, match="removed"):
        TextRule(removed=("a b",))


@given(st.lists(st.text(max_size=80), max_size=6), st.integers(0, 200), st.integers(0, 60))
def test_the_text_ends_with_the_users_last_words(turns: list[str], context: int, follow_up: int) -> None:
    rule = TextRule(context_characters=context, follow_up_characters=follow_up, removed=(), unwrapped=(), markers=())
    said = [text.replace("\x00", "").strip() for text in turns[::2]]
    spoken = [text for text in said if text]

    text = rule.of(conversation(*turns))

    assert text.endswith(spoken[-1] if spoken else "")
    assert bool(text) == bool(spoken)
