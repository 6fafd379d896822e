"""Limits and types of fields that several requests and replies share."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, SkipValidation, WithJsonSchema

from evenodds.schemas.base import older

MAX_ITEMS = 10_000
"""Most items in one list. Larger pools are sent as NDJSON."""
MAX_TEXT = 200_000
"""Most characters in one prompt's text."""
MAX_ANSWER = 20_000
"""Most characters in one prompt's answer, as JSON."""
MAX_ID = 256
MAX_VECTOR = 8_192
MAX_FEATURES = 64
MAX_RATE_NAMES = 64
"""Most others whose rates a prompt may have, and most that a run knows."""
MAX_GROUP_SIZE = 1_024
MAX_STEP = 2**53
"""Any larger whole number is not exact in JSON as most programs read it."""
MAX_ATTEMPTS = 1_024
"""Most attempts for one prompt."""
MAX_ALLOCATION = 2_000_000
"""Most attempts to choose among in one allocation: prompts times the most attempts for one of them."""
MAX_TIERS = 16

INCARNATION_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
RUN_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


RUN_NAMES_PATTERN = r"^[A-Za-z0-9*?][A-Za-z0-9._*?-]{0,127}$"
MAX_SOURCES = 100
"""Most names and patterns of runs that one run learns from."""


def storable(value: str) -> str:
    """Refuse what no database column or UTF-8 reply can hold: NUL characters and lone surrogates."""
    if "\x00" in value:
        raise ValueError("a NUL character (\\u0000) cannot be stored: remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair cannot be stored: send valid Unicode") from error
    return value


def storable_answer(value: JsonValue) -> JsonValue:
    """Refuse what is too long, and what no JSON in UTF-8 can hold: NaN, infinity and lone surrogates."""
    try:
        content = json.dumps(value, ensure_ascii=False, allow_nan=False)
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair cannot be stored: send valid Unicode") from error
    except ValueError as error:
        raise ValueError("an answer is JSON, which has no NaN, no infinity and no number of thousands of digits") from (
            error
        )
    if len(content) > MAX_ANSWER:
        raise ValueError(f"{len(content)} characters as JSON, the limit is {MAX_ANSWER}: send the short answer alone")
    return value


RunName = Annotated[str, Field(pattern=RUN_PATTERN, examples=["math-7b"])]
RunNames = Annotated[
    str,
    Field(pattern=RUN_NAMES_PATTERN, examples=["math-*"], description="a run's name, or a pattern with * and ?"),
]
Key = Annotated[str, Field(min_length=1, max_length=MAX_ID), AfterValidator(storable)]
PromptId = Annotated[Key, Field(description="stable inside a run", examples=["gsm8k-00017"])]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(storable)]
Answer = Annotated[JsonValue, AfterValidator(storable_answer)]
Step = Annotated[int, Field(ge=0, le=MAX_STEP, description="the policy version", examples=[12])]
Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Reward = Annotated[
    Rate, WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "boolean"}]})
]
Finite = Annotated[float, Field(allow_inf_nan=False)]
GroupSize = Annotated[int, Field(ge=1, le=MAX_GROUP_SIZE, description="attempts per prompt in training")]
TargetRate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
CategoryShares = Annotated[dict[Key, Rate], Field(min_length=1, max_length=1_000)]
# Of requests: checked, and sent on, under their newer names.
OlderGroup = Annotated[SkipValidation[Key | None], older("group", is_sent=False)]
OlderGroups = Annotated[SkipValidation[CategoryShares | None], older("groups", is_sent=False)]
OlderGroupsAtMost = Annotated[SkipValidation[CategoryShares | None], older("groups_at_most", is_sent=False)]
Vector = Annotated[tuple[Finite, ...], Field(min_length=1, max_length=MAX_VECTOR)]
Features = Annotated[dict[Key, Finite], Field(max_length=MAX_FEATURES)]

Predictor = Literal["gps", "gps-paper", "mopps", "uniform"]
Acquisition = Literal["yield", "paper", "thompson", "uniform"]
ModelSize = Literal["small", "published"]
RefitStatus = Literal["pending", "running", "done", "failed"]
Verdict = Literal["broken", "not_helping", "helping", "learning", "no_data"]
RunSort = Literal["name", "alarms", "activity", "lift", "informative", "created"]
Objective = Literal["solve", "signal"]
AllocationMethod = Literal["greedy", "bins"]
BudgetMode = Literal["parallel", "sequential"]
Attempts = Annotated[int, Field(ge=0, le=MAX_ATTEMPTS)]
PolicyName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of a budget policy", examples=["default"])
]
Label = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(storable)]


def check_shares(least: dict[str, float] | None, most: dict[str, float] | None) -> None:
    """Raises ValueError: least shares that sum to more than 1, or one that is above its category's largest."""
    least, most = least or {}, most or {}
    if sum(least.values()) > 1 + 1e-9:
        raise ValueError(f"categories: the shares sum to {sum(least.values()):g}, the limit is 1")
    for name in sorted(least.keys() & most.keys()):
        if least[name] > most[name]:
            raise ValueError(
                f"categories.{name}: {least[name]:g} is more than categories_at_most allows, {most[name]:g}: lower "
                "the first or raise the second"
            )
