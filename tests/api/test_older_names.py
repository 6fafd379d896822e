"""A category was called a group before: both names are taken until 1.0, one is stored, and replies carry both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, update
from tests.waiting import PATIENCE_SECONDS

from evenodds.schemas import OLDER_NAMES
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.tables import log, selections

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

NDJSON = {"Content-Type": "application/x-ndjson"}
OBSERVED = (
    '{"step":3,"observations":[{"prompt_id":"a","rewards":[1.0,0.25],"text":"What is a?","group":"g",'
    '"features":{"category":2.0,"tiny":1e-7},"prior_rate":0.5},{"prompt_id":"b","successes":1.0,"attempts":2}]}'
)
"""What the release before hashed of a report, byte for byte."""
SELECTED = (
    '{"step":4,"batch_size":1,"seed":0,"candidates":null,"exclude":null,"groups":{"g":0.5},"groups_at_most":null,'
    '"target_rate":null,"group_size":null,"acquisition":null,"optimism":null,"diversity":null,"cooldown_steps":null,'
    '"max_visits":null,"allow_outstanding":false}'
)
"""Likewise of a choice."""


def both(name: str | None) -> dict[str, str | None]:
    return {"category": name, "group": name}


@pytest.mark.parametrize("name", ["group", "category"])
def test_a_prompt_is_of_its_category_under_either_name(caller: Caller, name: str) -> None:
    caller.load([{"prompt_id": "json", name: "g"}])
    caller.ok("POST", f"/runs/{caller.run}/prompts", content=f'{{"prompt_id": "line", "{name}": "g"}}', headers=NDJSON)
    caller.observe(1, {"prompt_id": "new", "text": "New?", name: "g", "rewards": [1, 0]})

    listed = caller.ok("GET", f"/runs/{caller.run}/prompts")["prompts"]
    assert [(each["prompt_id"], each["category"], each["group"]) for each in listed] == [
        ("json", "g", "g"),
        ("line", "g", "g"),
        ("new", "g", "g"),
    ]
    one = caller.ok("GET", f"/runs/{caller.run}/prompts/new")
    assert one.items() >= both("g").items()
    assert all(prompt.items() >= both("g").items() for prompt in caller.select(2, 3)["prompts"])
    believed = caller.ok("GET", f"/runs/{caller.run}/beliefs")
    assert all(prompt.items() >= both("g").items() for prompt in believed["hardest"])
    report = caller.ok("GET", f"/runs/{caller.run}/report")
    assert report["categories"] == report["groups"]
    assert [row.items() >= {"prompts": 3, **both("g")}.items() for row in report["categories"]] == [True]
    assert report["other_categories"] is report["other_groups"] is None


def test_a_prompt_as_the_service_told_it_may_be_sent_again(caller: Caller) -> None:
    caller.load([{"prompt_id": "a", "text": "A?", "category": "g"}, {"prompt_id": "b"}])
    told = caller.ok("GET", f"/runs/{caller.run}/prompts")["prompts"]

    assert caller.load(told)["existing"] == 2


@pytest.mark.parametrize("name", ["group", "category"])
def test_questions_take_either_name(caller: Caller, name: str) -> None:
    asked = {"text": "What is this?", name: "g"}

    caller.ok("POST", "/predict", json={"run": caller.run, "prompts": [asked]})
    caller.ok("POST", "/allocate", json={"run": caller.run, "prompts": [asked], "budget": 8})
    caller.ok("POST", "/budget", json={"run": caller.run, "prompt": asked})


@pytest.mark.parametrize(("least", "most"), [("groups", "groups_at_most"), ("categories", "categories_at_most")])
def test_the_shares_of_a_run_are_one_setting_under_two_names(caller: Caller, least: str, most: str) -> None:
    state = caller.create(**{least: {"a": 0.25}, most: {"b": 0.5}})

    assert state["categories"] == state["groups"] == {"a": 0.25}
    assert state["categories_at_most"] == state["groups_at_most"] == {"b": 0.5}
    assert caller.create(**{least: None})["categories"] is None
    assert caller.create(diversity=0.5)["categories_at_most"] == {"b": 0.5}


DIFFER = "differ, and are one field: send"


@pytest.mark.parametrize(
    ("method", "path", "body", "detail"),
    [
        (
            "POST",
            "/runs/{run}/prompts",
            {"prompts": [{"prompt_id": "a", "group": "g", "category": "h"}]},
            f"prompts[0]: category 'h' and group 'g' {DIFFER} category alone",
        ),
        (
            "POST",
            "/observe",
            {
                "run": "{run}",
                "step": 1,
                "observations": [{"text": "A?", "group": "g", "category": "h", "rewards": [1]}],
            },
            f"observations[0]: category 'h' and group 'g' {DIFFER} category alone",
        ),
        (
            "POST",
            "/budget",
            {"run": "{run}", "prompt": {"text": "A?", "group": "g", "category": "h"}},
            f"prompt: category 'h' and group 'g' {DIFFER} category alone",
        ),
        (
            "PUT",
            "/runs/{run}",
            {"groups": {"a": 0.5}, "categories": {"a": 0.25}},
            f"categories {{'a': 0.25}} and groups {{'a': 0.5}} {DIFFER} categories alone",
        ),
        (
            "POST",
            "/select_batch",
            {
                **{"run": "{run}", "step": 1, "batch_size": 1},
                **{"groups_at_most": {"a": 0.5}, "categories_at_most": {"b": 0.5}},
            },
            f"categories_at_most {{'b': 0.5}} and groups_at_most {{'a': 0.5}} {DIFFER} categories_at_most alone",
        ),
    ],
)
def test_two_names_with_different_values_are_refused_and_both_are_named(
    caller: Caller, method: str, path: str, body: dict[str, Any], detail: str
) -> None:
    sent = {**body, "run": caller.run} if "run" in body else body

    problem = caller.refused(method, path.replace("{run}", caller.run), json=sent)

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


def test_a_line_with_two_different_names_is_refused(caller: Caller) -> None:
    line = '{"prompt_id": "a", "group": "g", "category": "h"}'

    problem = caller.refused("POST", f"/runs/{caller.run}/prompts", content=line, headers=NDJSON)

    assert problem.detail.startswith(f"line 1: category 'h' and group 'g' {DIFFER} category alone")


@pytest.mark.parametrize(("first", "then"), [("group", "category"), ("category", "group")])
def test_a_report_may_be_repeated_under_the_other_name(caller: Caller, first: str, then: str) -> None:
    def observe(name: str) -> dict[str, Any]:
        return caller.observe(1, {"prompt_id": "a", "text": "A?", name: "g", "rewards": [1, 0]}, request_id="once")

    assert observe(first)["replayed"] is False
    assert observe(then)["replayed"] is True


@pytest.mark.parametrize(("first", "then"), [("groups", "categories"), ("categories", "groups")])
def test_a_choice_may_be_repeated_under_the_other_name(caller: Caller, first: str, then: str) -> None:
    caller.load([{"prompt_id": f"p{i}", "category": "ab"[i % 2]} for i in range(8)])

    chosen = caller.select(1, 4, **{first: {"a": 0.5}, f"{first}_at_most": {"b": 0.5}})
    again = caller.select(1, 4, **{then: {"a": 0.5}, f"{then}_at_most": {"b": 0.5}})

    assert again == {**chosen, "replayed": True}


def test_what_the_release_before_has_recorded_is_repeated(service: Service, caller: Caller) -> None:
    """A trainer repeats a call that it made before the service was upgraded: the hashes are in the database."""
    caller.load([{"prompt_id": "b"}])
    report = {"run": caller.run, "request_id": f"{caller.run}-1", **json.loads(OBSERVED)}
    choice = {"run": caller.run, **{name: value for name, value in json.loads(SELECTED).items() if value is not None}}
    observed = caller.ok("POST", "/observe", json=report)
    chosen = caller.ok("POST", "/select_batch", json=choice)
    older = {name: value for name, value in chosen.items() if name not in ("run", "replayed")}
    older["prompts"] = [{k: v for k, v in prompt.items() if k != "category"} for prompt in older["prompts"]]
    is_report = log.c.request_id == report["request_id"]
    is_choice = selections.c.selection_id == chosen["selection_id"]
    engine = open_engine(service.database_url, timeout_seconds=PATIENCE_SECONDS)
    with engine.begin() as database:
        hashes = [
            database.execute(select(log.c.request_hash).where(is_report)).scalar_one(),
            database.execute(select(selections.c.arguments_hash).where(is_choice)).scalar_one(),
        ]
        database.execute(update(selections).where(is_choice).values(reply=json.dumps(older)))
    engine.dispose()

    assert hashes == [hashlib.sha256(content.encode()).hexdigest() for content in (OBSERVED, SELECTED)]
    assert caller.ok("POST", "/observe", json=report) == {**observed, "replayed": True}
    assert caller.ok("POST", "/select_batch", json=choice) == {**chosen, "replayed": True}


def test_the_description_calls_the_older_names_deprecated() -> None:
    document = json.loads((Path(__file__).parents[2] / "openapi.json").read_text())
    found = {
        name: properties[name]
        for schema in document["components"]["schemas"].values()
        for name in OLDER_NAMES
        if name in (properties := schema.get("properties", {}))
    }

    assert set(found) == set(OLDER_NAMES)
    for name, described in found.items():
        assert described["deprecated"] is True
        assert described["description"] == f"the older name of {OLDER_NAMES[name]}, until 1.0"
