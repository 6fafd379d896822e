"""What a program of this folder and the tests both ask of the service."""

from __future__ import annotations

from evenodds import Client


def observed(client: Client, run: str) -> list[tuple[str, int, float, int]]:
    """All that the service has observed of a run: (prompt, step, successes, attempts), sorted."""
    return sorted(
        (prompt.prompt_id, visit.step, visit.successes, visit.attempts)
        for prompt in list(client.prompts(run))
        for visit in client.prompt(run, prompt.prompt_id).history
    )
