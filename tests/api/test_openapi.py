"""The committed description of the interface: what is served, whole, and with examples that the service accepts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from evenodds import schemas
from evenodds.schemas import (
    AllocateRequest,
    BudgetRequest,
    ChatRequest,
    ObserveRequest,
    PolicyUpdate,
    PredictRequest,
    PromptIn,
    PromptsIn,
    RefitRequest,
    RetractRequest,
    RewindRequest,
    RunUpdate,
    SelectRequest,
)
from evenodds_service.api.app import create_app
from evenodds_service.api.problems import MEDIA_TYPE, STATUS_OF
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store

if TYPE_CHECKING:
    from tests.api.conftest import Caller

COMMITTED = Path(__file__).parents[2] / "openapi.json"
BODIES: dict[str, type[BaseModel]] = {
    "POST /allocate": AllocateRequest,
    "POST /budget": BudgetRequest,
    "POST /v1/chat/completions": ChatRequest,
    "PUT /runs/{run}/budget_policies/{policy}": PolicyUpdate,
    "POST /observe": ObserveRequest,
    "POST /predict": PredictRequest,
    "POST /select_batch": SelectRequest,
    "PUT /runs/{run}": RunUpdate,
    "POST /runs/{run}/prompts": PromptsIn,
    "POST /runs/{run}/refit": RefitRequest,
    "POST /runs/{run}/rewind": RewindRequest,
    "POST /runs/{run}/retract": RetractRequest,
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """As the application describes itself, through JSON and back."""
    app = create_app(Store(open_engine("sqlite:///never-opened.db")))
    document: dict[str, Any] = json.loads(json.dumps(app.openapi()))
    return document


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def json_schema(document: dict[str, Any], operation: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = operation["requestBody"]["content"]["application/json"]["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def test_the_committed_description_is_what_is_served(document: dict[str, Any]) -> None:
    committed = json.loads(COMMITTED.read_text())
    for description in (committed, document):
        description["info"].pop("version")  # of the installed distribution

    assert committed == document, "openapi.json is not what the service describes: run `make openapi`, read its diff"


def test_the_interface_is_the_contract(operations: dict[str, dict[str, Any]]) -> None:
    assert set(operations) == {
        *BODIES,
        "GET /runs",
        "GET /runs/{run}",
        "DELETE /runs/{run}",
        "DELETE /runs/{run}/prompts/{prompt_id}",
        "DELETE /runs/{run}/prompt",
        "GET /runs/{run}/prompts",
        "GET /runs/{run}/prompts/{prompt_id}",
        "GET /runs/{run}/prompt",
        "GET /runs/{run}/events",
        "GET /events",
        "GET /runs/{run}/refits",
        "GET /runs/{run}/beliefs",
        "GET /runs/{run}/report",
        "GET /runs/{run}/budget_policies",
        "GET /healthz",
        "GET /readyz",
        "GET /metrics",
    }


def test_every_operation_has_a_tag_that_is_described_a_summary_and_a_name(
    document: dict[str, Any], operations: dict[str, dict[str, Any]]
) -> None:
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}

    for name, operation in operations.items():
        assert set(operation["tags"]) <= tags, name
        assert len(operation["tags"]) == 1, name
        assert operation["summary"], name
        assert operation["description"], name
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)


def test_every_request_body_has_an_example_that_keeps_to_the_contract(
    document: dict[str, Any], operations: dict[str, dict[str, Any]]
) -> None:
    assert {name for name, operation in operations.items() if "requestBody" in operation} == set(BODIES)
    for name, model in BODIES.items():
        examples = json_schema(document, operations[name])["examples"]

        assert examples, name
        for example in examples:
            model.model_validate(example)


def test_every_reply_has_an_example_that_keeps_to_the_contract(
    document: dict[str, Any], operations: dict[str, dict[str, Any]]
) -> None:
    replies: dict[str, type[schemas.Reply]] = {
        name: model for name, model in vars(schemas).items() if isinstance(model, type)
    }
    for name, operation in operations.items():
        for status, reply in operation["responses"].items():
            for content in reply.get("content", {}).values():
                if content.get("schema", {}).get("type") == "string" or not content.get("schema"):
                    assert content["example"], name
                    continue
                model = content["schema"]["$ref"].rpartition("/")[2]
                (example,) = [content["example"]] if "example" in content else examples_of(document, model)
                read = replies[model].model_validate(example)
                told = json.loads(read.model_dump_json())
                assert is_part(example, told), (name, status)


def is_part(example: Any, whole: Any) -> bool:
    """Whether the whole holds all that the example does: a reply has fields under their older names in addition."""
    if isinstance(example, dict):
        return all(name in whole and is_part(value, whole[name]) for name, value in example.items())
    if isinstance(example, list):
        return len(example) == len(whole) and all(map(is_part, example, whole))
    return bool(example == whole)


def examples_of(document: dict[str, Any], model: str) -> list[dict[str, Any]]:
    examples: list[dict[str, Any]] = document["components"]["schemas"][model].get("examples", [])
    return examples


def test_errors_of_keys_and_of_the_service_are_described_wherever_they_are_given(
    operations: dict[str, dict[str, Any]],
) -> None:
    for name, operation in operations.items():
        expected = {"500"} if name in ("GET /healthz", "GET /readyz") else {"401", "403", "429", "500", "503"}
        for status in expected:
            described = operation["responses"][status]["content"][MEDIA_TYPE]
            assert described["example"]["status"] == int(status), name
            assert STATUS_OF.get(described["example"]["code"], 500) == int(status), name


def test_the_example_of_lines_holds_prompts(operations: dict[str, dict[str, Any]]) -> None:
    lines = operations["POST /runs/{run}/prompts"]["requestBody"]["content"]["application/x-ndjson"]["example"]

    for line in lines.splitlines():
        PromptIn.model_validate_json(line)


def test_the_examples_work_one_after_the_other(
    caller: Caller, document: dict[str, Any], operations: dict[str, dict[str, Any]]
) -> None:
    """As they stand in the documentation, on one run."""
    order = (
        "PUT /runs/{run}",
        "POST /runs/{run}/prompts",
        "POST /observe",
        "POST /predict",
        "POST /select_batch",
        "POST /runs/{run}/retract",
        "POST /runs/{run}/rewind",
        "POST /allocate",
        "PUT /runs/{run}/budget_policies/{policy}",
        "POST /budget",
        "POST /v1/chat/completions",
    )
    for name in order:
        method, path = name.split()
        (example,) = json_schema(document, operations[name])["examples"]
        body = {**example, **{name: caller.run for name in ("run", "model") if name in example}}

        caller.ok(method, path.format(run=caller.run, policy="default"), json=body)


def test_every_reference_in_the_description_leads_somewhere(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))

    assert references
    assert references <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


def test_errors_are_described_as_problems(operations: dict[str, dict[str, Any]]) -> None:
    for name in BODIES:
        for status in ("404", "409", "413", "422", "503"):
            described = json.dumps(operations[name]["responses"][status])
            assert "#/components/schemas/Problem" in described, (name, status)
