"""What another process does with a selector that it was given. It imports the client alone: a test's own module takes
seconds to import."""

from __future__ import annotations

from evenodds import PromptSelector


def observe_in_child(selector: PromptSelector, step: int) -> None:
    """Choose four prompts, report one success of each, and see the report delivered."""
    selector.observe(step, {prompt_id: [1] for prompt_id in selector.select(step, 4)})
    selector.flush()
