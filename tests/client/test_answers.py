"""Only an answer that was finished says something about the model."""

from __future__ import annotations

from typing import Any

import pytest

from evenodds import answers_of


def choice(reason: str | None, content: Any = "41", **more: Any) -> dict[str, Any]:
    return {"finish_reason": reason, "message": {"role": "assistant", "content": content, **more}}


@pytest.mark.parametrize(
    ("made", "left_out"),
    [
        (choice("stop"), None),
        (choice("length"), "length"),
        (choice("content_filter"), "content_filter"),
        (choice("tool_calls", None, tool_calls=[{"id": "1"}]), "tool_calls"),
        (choice("function_call", None), "tool_calls"),
        (choice("stop", "", tool_calls=[{"id": "1"}]), "tool_calls"),
        (choice("stop", " \n"), "empty"),
        (choice("stop", None), "empty"),
        (choice(None), "aborted"),
        (choice("error"), "aborted"),
    ],
)
def test_a_choice_of_a_chat_is_an_outcome_only_where_it_was_finished(made: dict[str, Any], left_out: str) -> None:
    first, second = answers_of({"choices": [choice("stop", "42"), made]})

    assert (first.text, first.left_out) == ("42", None)
    assert second.left_out == left_out


@pytest.mark.parametrize(
    ("reply", "left_out"),
    [
        ({"status": "completed"}, None),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "length"),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, "content_filter"),
        ({"status": "failed"}, "aborted"),
        ({"status": "completed", "output": [{"type": "function_call", "name": "f"}]}, "tool_calls"),
        ({"status": "completed", "output": [{"type": "web_search_call"}]}, "tool_calls"),
        ({"status": "completed", "output": []}, "empty"),
    ],
)
def test_a_response_is_an_outcome_only_where_it_was_completed(reply: dict[str, Any], left_out: str) -> None:
    output = [{"type": "reasoning"}, {"type": "message", "content": [{"type": "output_text", "text": "42"}]}]

    (answer,) = answers_of({"output": output, **reply})

    assert answer.left_out == left_out


@pytest.mark.parametrize(
    ("calls", "left_out"),
    [
        ([{"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}], "tool_calls"),
        ([{"type": "custom_tool_call", "call_id": "1"}], "tool_calls"),
        ([{"type": "computer_call", "call_id": "1"}], "tool_calls"),
        ([{"type": "local_shell_call", "call_id": "1"}], "tool_calls"),
        ([{"type": "shell_call", "call_id": "1"}], "tool_calls"),
        ([{"type": "apply_patch_call", "call_id": "1"}], "tool_calls"),
        ([{"type": "mcp_approval_request", "id": "1"}], "tool_calls"),
        ([{"type": "shell_call", "call_id": "1"}, {"type": "shell_call_output", "call_id": "1"}], None),
        ([{"type": "web_search_call"}, {"type": "file_search_call"}, {"type": "code_interpreter_call"}], None),
        ([{"type": "mcp_call"}, {"type": "mcp_list_tools"}, {"type": "image_generation_call"}], None),
    ],
)
def test_a_response_that_waits_for_the_caller_is_no_outcome_whatever_it_says(
    calls: list[dict[str, Any]], left_out: str
) -> None:
    said = {"type": "message", "content": [{"type": "output_text", "text": "Let me look that up."}]}

    (answer,) = answers_of({"status": "completed", "output": [said, *calls]})

    assert answer.left_out == left_out


@pytest.mark.parametrize(
    ("reason", "left_out"),
    [
        ("end_turn", None),
        ("stop_sequence", None),
        ("max_tokens", "length"),
        ("refusal", "content_filter"),
        ("tool_use", "tool_calls"),
        (None, "aborted"),
    ],
)
def test_a_message_is_an_outcome_only_where_its_turn_ended(reason: str | None, left_out: str) -> None:
    (answer,) = answers_of({"content": [{"type": "text", "text": "42"}], "stop_reason": reason})

    assert (answer.text, answer.left_out) == ("42", left_out)


def test_a_reply_of_another_form_has_no_answers() -> None:
    assert answers_of({"data": [{"embedding": [0.1]}]}) == ()
