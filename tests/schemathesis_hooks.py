"""What the generator of requests must know to get past the doors: what is there to ask about, and how to write NDJSON.

Loaded by the schemathesis process, not by pytest. A name that is generated is exchanged for one that exists, where it
is well-formed: whether the request keeps to the description stays as it was.
"""

from __future__ import annotations

import re
from typing import Any

import schemathesis

RUN = "seeded"
PROMPTS = [f"seeded-{i}" for i in range(12)]
MOST_SECONDS = 0.5
"""To wait for a refit, as no worker runs here, or for changes."""
_LONGEST_SECONDS = 3_600

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_OWN_RUNS = {("PUT", "/runs/{run}"), ("DELETE", "/runs/{run}")}
"""Operations on runs of any name: the seeded one must stay as it is."""


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Ask about the seeded run always, and about its prompts every other time."""
    if (case.method, case.operation.path) in _OWN_RUNS:
        return
    path = case.path_parameters or {}
    if _is_run(path.get("run")):
        path["run"] = RUN
    if "prompt_id" in path and len(str(path["prompt_id"])) % 2:
        path["prompt_id"] = PROMPTS[len(str(path["prompt_id"])) % len(PROMPTS)]
    if case.operation.path.endswith("/events"):
        query = case.query or {}
        wait = query.get("wait_seconds", _LONGEST_SECONDS)
        if isinstance(wait, (int, float)) and not isinstance(wait, bool) and MOST_SECONDS < wait <= _LONGEST_SECONDS:
            case.query = {**query, "wait_seconds": MOST_SECONDS}
    body: Any = case.body
    if not isinstance(body, dict):
        return
    if _is_run(body.get("run")):
        body["run"] = RUN
    wait = body.get("wait_seconds")
    if isinstance(wait, (int, float)) and not isinstance(wait, bool) and MOST_SECONDS < wait <= 300:
        body["wait_seconds"] = MOST_SECONDS
    if not case.operation.path.endswith("/prompts"):  # those are new
        for items in (body.get("prompts"), body.get("observations"), [body.get("prompt")]):
            _name_known_prompts(items)
    for name in ("candidates", "exclude", "prompt_ids"):
        ids = body.get(name)
        if isinstance(ids, list) and len(ids) % 2:
            body[name] = [_known(each) for each in ids]


def _is_run(value: object) -> bool:
    return isinstance(value, str) and _RUN.fullmatch(value) is not None


def _name_known_prompts(items: object) -> None:
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and "prompt_id" in item and (item.get("text") is None or len(item) % 2):
            item["prompt_id"] = _known(item["prompt_id"])


def _known(prompt_id: object) -> object:
    """A prompt that exists, for a well-formed name; anything else as it is."""
    if isinstance(prompt_id, str) and 0 < len(prompt_id) <= 256 and "\x00" not in prompt_id and prompt_id.isascii():
        return PROMPTS[len(prompt_id) % len(PROMPTS)]
    return prompt_id


@schemathesis.serializer("application/x-ndjson")
def as_lines(context: schemathesis.SerializationContext, value: Any) -> bytes:
    """A string as it is; anything else is no string of lines, and must not become one by chance."""
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else repr(value).encode()
