"""Where a run's vectors come from: the built-in embedder, the caller, or nowhere; decided once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from evenodds import Invalid, Problem

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service


@pytest.fixture
def own(caller: Caller) -> Caller:
    """A run whose vectors come from the caller, with one of length 3."""
    caller.create(embedder="caller")
    caller.load([{"prompt_id": "a", "embedding": [1, 0, 0]}])
    return caller


def path(caller: Caller) -> str:
    return f"/runs/{caller.run}/prompts"


def test_a_prompt_without_a_vector_is_fine_where_vectors_come_from_the_caller(own: Caller) -> None:
    reply = own.load([{"prompt_id": "bare"}, {"prompt_id": "b", "text": "What is b?", "embedding": [0, 1, 0]}])

    assert reply["added"] == 2
    assert [p["attempts_seen"] for p in own.predict("a", "bare", "b")] == [0, 0, 0]


def test_the_first_vector_decides_that_vectors_come_from_the_caller(caller: Caller) -> None:
    run = f"{caller.run}.open"
    caller.client.put_run(run)

    caller.client.add_prompts(run, [{"prompt_id": "a", "embedding": [0.5, 0.5]}])

    assert caller.client.run(run).embedder == "caller"


def test_a_first_prompt_without_a_vector_decides_for_the_built_in_embedder(caller: Caller) -> None:
    run = f"{caller.run}.open"
    caller.client.put_run(run)

    caller.client.add_prompts(run, [{"prompt_id": "a", "text": "What is a?"}])

    problem = caller.refused("POST", f"/runs/{run}/prompts", json={"prompts": [{"prompt_id": "b", "embedding": [1]}]})
    assert (problem.status, problem.code) == (409, "embedding_refused")
    assert problem.detail == (
        f"prompts[0].embedding (prompt_id 'b'): run {run!r} computes its vectors with embedder 'builtin'; "
        "leave the vector out, or create a run with embedder 'caller'"
    )


def test_a_vector_of_another_length_is_named_and_none_is_added(own: Caller) -> None:
    prompts: list[dict[str, Any]] = [
        {"prompt_id": "b", "embedding": [0, 1, 0]},
        {"prompt_id": "c", "embedding": [0, 1]},
    ]

    problem = own.refused("POST", path(own), json={"prompts": prompts})

    assert (problem.status, problem.code) == (409, "embedding_refused")
    assert problem.detail == (
        f"prompts[1].embedding (prompt_id 'c'): 2 numbers, run {own.run!r} takes vectors of 3; "
        "send vectors of one model only"
    )


def test_vectors_of_two_lengths_in_the_first_call_are_refused(caller: Caller) -> None:
    caller.create(embedder="caller")
    prompts = [{"prompt_id": "a", "embedding": [0, 1, 0]}, {"prompt_id": "b", "embedding": [0, 1]}]

    problem = caller.refused("POST", path(caller), json={"prompts": prompts})

    assert problem.detail.startswith("prompts[1].embedding (prompt_id 'b'): 2 numbers, ")


def test_a_vector_of_another_length_cannot_be_predicted(own: Caller) -> None:
    prompts = [{"prompt_id": "a"}, {"text": "New?", "embedding": [1, 2]}]

    problem = own.refused("POST", "/predict", json={"run": own.run, "prompts": prompts})

    assert (problem.status, problem.code) == (409, "embedding_refused")
    assert problem.detail.startswith("prompts[1].embedding (prompt_id 'text:")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_a_vector_that_is_not_finite_is_refused(own: Caller, value: str) -> None:
    content = '{"prompts": [{"prompt_id": "b", "embedding": [0, VALUE, 0]}]}'.replace("VALUE", value)

    problem = own.refused("POST", path(own), content=content, headers={"Content-Type": "application/json"})

    assert (problem.status, problem.code) == (422, "malformed")
    got = "nan" if value == "NaN" else "inf"
    assert problem.detail == f"prompts[0].embedding[1]: Input should be a finite number, got {got}"


def test_vectors_of_any_size_are_taken_by_their_direction(own: Caller) -> None:
    reply = own.load(
        [
            {"prompt_id": "huge", "embedding": [1e300, 0, 1e300]},
            {"prompt_id": "tiny", "embedding": [1e-300, 0, 1e-300]},
            {"prompt_id": "zero", "embedding": [0, 0, 0]},
        ]
    )

    assert reply["added"] == 3
    assert len(own.predict("huge", "tiny", "zero")) == 3


def test_similar_vectors_are_predicted_alike(caller: Caller) -> None:
    """A made world: the sign of the first number decides whether a prompt is solved."""
    caller.create(embedder="caller")
    vectors = {f"p{i}": [1 if i % 2 else -1, (i % 7) / 7, (i % 5) / 5] for i in range(60)}
    caller.load([{"prompt_id": name, "embedding": vector} for name, vector in vectors.items()])
    seen = list(vectors)[:40]
    for step in range(4):
        names = seen[step * 10 : step * 10 + 10]
        caller.observe(step, *({"prompt_id": n, "successes": 7 if int(n[1:]) % 2 else 1, "attempts": 8} for n in names))

    rates = {p["prompt_id"]: p["success_rate"] for p in caller.predict(*list(vectors)[40:])}

    odd, even = ([rate for name, rate in rates.items() if int(name[1:]) % 2 == bit] for bit in (1, 0))
    assert min(odd) > max(even) + 0.2


def test_the_embedder_is_fixed_once_prompts_exist(own: Caller) -> None:
    problem = own.refused("PUT", f"/runs/{own.run}", json={"embedder": "builtin"})

    assert (problem.status, problem.code) == (409, "embedder_fixed")
    assert problem.detail == (
        f"run {own.run!r}: its pool has vectors of embedder 'caller' (prompt None), "
        "and the call asks for 'builtin' (prompt None): create another run for that embedder"
    )


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "/etc", "Builtin"])
def test_a_model_that_the_operator_has_not_listed_is_refused_before_it_is_looked_for(caller: Caller, name: str) -> None:
    problem = caller.refused("PUT", f"/runs/{caller.run}", json={"embedder": name})

    assert (problem.status, problem.code) == (422, "embedder_not_allowed")
    assert problem.detail == (
        f"embedder {name!r} is not allowed here: take 'builtin', 'caller' or 'none', or ask the service's operator to "
        "list it in EVENODDS_EMBEDDERS (listed at present: none)"
    )


@pytest.mark.slow  # the library takes seconds to load
def test_a_listed_model_makes_the_vectors_of_a_run_while_it_is_listed(
    start_service: Callable[..., Service], tmp_path: Path, minilm_folder: str
) -> None:
    listing = start_service(f"sqlite:///{tmp_path}/evenodds.db", embedders=minilm_folder)

    assert listing.client.put_run("named", embedder=minilm_folder).embedder == minilm_folder
    assert listing.client.add_prompts("named", [{"text": "What is 2 + 2?"}]).added == 1
    with pytest.raises(Invalid) as other:
        listing.client.put_run("other", embedder="some/model")
    assert other.value.detail.endswith(f"(listed at present: {minilm_folder!r})")

    listing.stop()
    client = start_service(f"sqlite:///{tmp_path}/evenodds.db").client
    with pytest.raises(Invalid, match="embedder_not_allowed"):
        client.add_prompts("named", [{"text": "What is 3 + 3?"}])
    assert len(client.select_batch("named", 0, 1).prompts) == 1


@pytest.mark.slow  # the library takes seconds to load
def test_a_listed_model_that_cannot_be_opened_is_refused_at_once(
    start_service: Callable[..., Service], tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "model")
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db", embedders=nowhere)

    reply = service.http.put("/runs/math", json={"embedder": nowhere})

    problem = Problem.model_validate_json(reply.content)
    assert (problem.status, problem.code) == (409, "embedder_unavailable")
    assert problem.detail.startswith(f"embedder {nowhere!r} cannot be opened (")
    assert problem.detail.endswith(
        "name a sentence-transformers model on the hub that this machine can reach, "
        "the path of a folder that holds one, or 'builtin'"
    )
