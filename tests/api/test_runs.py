"""Runs as resources: created, changed in part, listed and deleted."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
from tests.waiting import PATIENCE_SECONDS

from evenodds import NotFound
from evenodds_service.domain.report.alarms import Alarm
from evenodds_service.domain.report.summary import Estimate, SharePoint, Summary
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import Caller
    from tests.conftest import Service

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""

DEFAULTS = {
    "predictor": "gps",
    "group_size": 8,
    "target_rate": None,
    "verdict": "no_data",
    "lift": None,
    "rollouts_saved": None,
    "informative_shares": [],
    "active_at": None,
    "began_at": None,
    "embedder": "builtin",
    "embedder_prompt": None,
    "acquisition": "yield",
    "optimism": 0.5,
    "diversity": 0.1,
    "cooldown_steps": None,
    "lease_steps": 8,
    "max_visits": 0,
    "keep_text": True,
    "model_size": "small",
    "refit": {"every_observations": 2_048, "every_seconds": 600},
    "control_share": 0.0,
    "reprobe_share": 0.05,
    "categories": None,
    "categories_at_most": None,
    "groups": None,
    "groups_at_most": None,
    "fallback": True,
    "learn_from": None,
    "data_set": None,
    "retention": None,
    "base_step": None,
    "last_refit": None,
    "pool_size": 0,
    "log_position": 0,
    "head_step": None,
    "model_version": 0,
    "observations": 0,
    "alarms": [],
    "fork_of": None,
    "at_step": None,
}
CHANGED = {
    "predictor": "mopps",
    "group_size": 4,
    "target_rate": 0.4,
    "embedder": "none",
    "embedder_prompt": "Solve: ",
    "acquisition": "uniform",
    "optimism": 0.0,
    "diversity": 1.0,
    "cooldown_steps": 3,
    "lease_steps": 5,
    "max_visits": 2,
    "keep_text": False,
    "model_size": "published",
    "control_share": 0.25,
    "reprobe_share": 0.125,
    "categories": {"a": 0.5},
    "categories_at_most": {"a": 0.75, "b": 0.25},
    "fallback": False,
}


def test_put_creates_a_run_with_defaults(caller: Caller) -> None:
    reply = caller.http.put(f"/runs/{caller.run}.new", json={})

    assert reply.status_code == 201
    state = reply.json()
    created_at = state.pop("created_at")
    assert state == {"run": f"{caller.run}.new", **DEFAULTS}
    assert created_at.endswith("Z")


def test_put_again_is_200_and_changes_nothing(caller: Caller) -> None:
    path = f"/runs/{caller.run}.new"
    first = caller.http.put(path, json=CHANGED)

    again = caller.http.put(path, json=CHANGED)

    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json() == caller.http.get(path).json()
    assert again.json().items() >= CHANGED.items()


def test_a_field_that_is_left_out_keeps_its_value(caller: Caller) -> None:
    before = caller.create(**CHANGED)

    after = caller.create(cooldown_steps=5)

    assert after == {**before, "cooldown_steps": 5}


@pytest.mark.parametrize("field", CHANGED)
def test_null_resets_a_field(caller: Caller, field: str) -> None:
    caller.create(**CHANGED)

    after = caller.create(**{field: None})

    defaults = {**DEFAULTS, "acquisition": "thompson", "reprobe_share": 0.0}  # under mopps; of uniform choice
    assert after.items() >= {**CHANGED, field: defaults[field]}.items()


@pytest.mark.parametrize(
    ("predictor", "acquisition"),
    [("gps", "yield"), ("gps-paper", "paper"), ("mopps", "thompson"), ("uniform", "uniform")],
)
def test_acquisition_follows_the_predictor(caller: Caller, predictor: str, acquisition: str) -> None:
    assert caller.create(predictor=predictor)["acquisition"] == acquisition


def test_settings_apply_to_selections_that_state_none(caller: Caller) -> None:
    caller.load_texts("a", "b")
    caller.create(group_size=2)
    small = caller.select(0, 2)["forecast"]["informative_share"]
    caller.create(group_size=64)

    assert caller.select(1, 2)["forecast"]["informative_share"] > small


def test_the_embedder_may_change_while_the_pool_is_empty(caller: Caller) -> None:
    assert caller.create(embedder="caller")["embedder"] == "caller"
    assert caller.create(embedder="builtin")["embedder"] == "builtin"


def test_settings_but_the_embedder_may_change_with_a_full_pool(caller: Caller) -> None:
    caller.load_texts("a")

    after = caller.create(predictor="mopps", embedder="none")

    assert (after["predictor"], after["embedder"], after["pool_size"]) == ("mopps", "none", 1)


@pytest.mark.parametrize(
    ("change", "asked"),
    [({"embedder": "builtin"}, "'builtin' (prompt None)"), ({"embedder_prompt": "Q: "}, "'none' (prompt 'Q: ')")],
)
def test_the_embedder_is_fixed_once_prompts_exist(caller: Caller, change: dict[str, Any], asked: str) -> None:
    caller.load_texts("a")

    problem = caller.refused("PUT", f"/runs/{caller.run}", json={"group_size": 2, **change})

    assert (problem.status, problem.code) == (409, "embedder_fixed")
    assert problem.detail == (
        f"run {caller.run!r}: its pool has vectors of embedder 'none' (prompt None), "
        f"and the call asks for {asked}: create another run for that embedder"
    )


def test_shares_that_conflict_with_what_stands_are_refused(caller: Caller) -> None:
    caller.create(categories={"math": 0.5})

    problem = caller.refused("PUT", f"/runs/{caller.run}", json={"categories_at_most": {"math": 0.25}})

    assert (problem.status, problem.code) == (409, "shares_conflict")
    assert problem.detail == (
        "category 'math' has a least share of 0.5 (categories) above its largest share of 0.25 (categories_at_most): "
        "lower the first or raise the second"
    )


@pytest.mark.parametrize(
    ("acquisition", "share"), [("yield", 0.05), ("paper", 0.05), ("thompson", 0.0), ("uniform", 0.0)]
)
def test_the_floor_follows_the_acquisition_until_it_is_set(caller: Caller, acquisition: str, share: float) -> None:
    assert caller.create(acquisition=acquisition)["reprobe_share"] == share
    assert caller.create(reprobe_share=0.5)["reprobe_share"] == 0.5


@without_the_database
@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"predictor": "best"}, "predictor: Input should be 'gps', 'gps-paper', 'mopps' or 'uniform', got 'best'"),
        ({"group_size": 0}, "group_size: Input should be greater than or equal to 1, got 0"),
        ({"target_rate": 0}, "target_rate: Input should be greater than 0, got 0"),
        ({"optimism": -1}, "optimism: Input should be greater than or equal to 0, got -1"),
        ({"cooldown_steps": -1}, "cooldown_steps: Input should be greater than or equal to 0, got -1"),
        ({"control_share": 0.6}, "control_share: Input should be less than or equal to 0.5, got 0.6"),
        ({"reprobe_share": 1.1}, "reprobe_share: Input should be less than or equal to 1, got 1.1"),
        ({"categories": {"a": 0.7, "b": 0.4}}, "categories: the shares sum to 1.1, the limit is 1"),
        ({"categories": {}}, "categories: Dictionary should have at least 1 item after validation, not 0"),
        (
            {"categories": {"a": 0.5}, "categories_at_most": {"a": 0.25}},
            "categories.a: 0.5 is more than categories_at_most allows, 0.25: lower the first or raise the second",
        ),
        ({"fallback": "no"}, "fallback: Input should be a truth value, got 'no'"),
        ({"keep_text": 0}, "keep_text: Input should be a truth value, got 0"),
        ({"categories": {"a": "0.5"}}, "categories: a should be a number, got '0.5'"),
        ({"embedder": ""}, "embedder: String should have at least 1 character, got ''"),
        ({"embeder": "none"}, "embeder: there is no field of this name, got 'none'"),
        ([], "body: Input should be a valid dictionary or object to extract fields from"),
    ],
)
def test_faulty_settings_are_named_and_none_changes(caller: Caller, body: Any, detail: str) -> None:
    problem = caller.refused("PUT", f"/runs/{caller.run}", json=body)

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


@without_the_database
@pytest.mark.parametrize("name", ["bad name", ".hidden", "-x", "a" * 129, "ünicode", "a\n"])
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_a_bad_run_name_is_refused(caller: Caller, method: str, name: str) -> None:
    path = "/runs/" + "".join(f"%{byte:02X}" for byte in name.encode())

    problem = caller.refused(method, path, **({"json": {}} if method == "PUT" else {}))

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail.startswith("run: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$', got '")


@without_the_database
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_a_run_name_with_a_nul_character_is_refused(caller: Caller, method: str) -> None:
    problem = caller.refused(method, "/runs/a%00", **({"json": {}} if method == "PUT" else {}))

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail == r"run: a NUL character (\u0000) cannot be stored: remove it"


@pytest.mark.parametrize("name", ["a", "0", "Math-7B_v1.0", "a" * 128])
def test_letters_digits_dots_dashes_and_underscores_make_a_name(caller: Caller, name: str) -> None:
    assert caller.client.put_run(name, embedder="none").run == name
    caller.client.delete_run(name)


def test_a_deleted_run_is_gone(caller: Caller) -> None:
    caller.load_texts("a")
    caller.observe(0, {"prompt_id": "a", "rewards": [1]})

    reply = caller.http.delete(f"/runs/{caller.run}")

    assert (reply.status_code, reply.content) == (204, b"")
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/prompts"), ("GET", "/prompts/a")):
        problem = caller.refused(method, f"/runs/{caller.run}{path}")
        assert (problem.status, problem.code) == (404, "run_unknown")
        assert problem.detail == f"run {caller.run!r} does not exist: create it first"


def test_a_run_created_again_starts_empty(caller: Caller) -> None:
    caller.load_texts("a")
    caller.observe(0, {"prompt_id": "a", "successes": 8, "attempts": 8}, request_id="r")
    caller.select(0, 1)
    caller.client.delete_run(caller.run)

    state = caller.create(embedder="none")

    assert (state["pool_size"], state["log_position"], state["head_step"]) == (0, 0, None)
    caller.load_texts("a")
    assert caller.predict("a")[0]["attempts_seen"] == 0
    assert not caller.select(0, 1)["replayed"]
    assert not caller.observe(0, {"prompt_id": "a", "rewards": [1]}, request_id="r")["replayed"]


def test_an_unknown_run_cannot_be_deleted(caller: Caller) -> None:
    with pytest.raises(NotFound, match="run 'nowhere' does not exist: create it first"):
        caller.client.delete_run("nowhere")


def test_runs_are_listed_in_pages_without_gap_or_repetition(
    database_url: str, start_service: Callable[[str], Service]
) -> None:
    service = start_service(database_url)
    names = {f"run-{i}" for i in range(7)} | {"RUN-3", "a.b", "a_b"}
    for name in names:
        service.client.put_run(name, embedder="none")

    pages, cursor = [], ""
    while cursor is not None:
        page = service.http.get("/runs", params={"limit": 4, **({"cursor": cursor} if cursor else {})}).json()
        pages.append([run["run"] for run in page["runs"]])
        cursor = page["next_cursor"]

    assert [len(page) for page in pages] == [4, 4, 2]
    assert {name for page in pages for name in page} == names
    assert {run.run for run in service.client.runs()} == names


def test_runs_are_listed_by_how_they_stand(database_url: str, start_service: Callable[[str], Service]) -> None:
    service, now = start_service(database_url), datetime.now(timezone.utc)
    alarm = Alarm("forecast_off", "Outcomes are far off.", 20, 14.5, 9.2)
    states = {
        "a": Summary("helping", lift=Estimate(0.3, 0.1, None), informative_shares=(SharePoint(0, 1, 0.5),)),
        "b": Summary("broken", alarms=(alarm,)),
        "c": Summary("learning"),
        "d": Summary("helping", lift=Estimate(0.4, 0.1, 0.7)),
    }
    store = Store(open_engine(database_url, timeout_seconds=PATIENCE_SECONDS))
    for name, summary in states.items():
        service.client.put_run(name, embedder="none")
        store.save_run_states([(store.run(name).id, 1_000, summary)], now=now)  # newer than what it finds
    store.close()

    def listed(**asked: Any) -> list[str]:
        """Names on all pages of two runs."""
        names, cursor = [], None
        while True:
            page = service.http.get(
                "/runs", params={"limit": 2, **asked, **({"cursor": cursor} if cursor else {})}
            ).json()
            names += [run["run"] for run in page["runs"]]
            if (cursor := page["next_cursor"]) is None:
                return names

    assert listed(sort="alarms") == ["b", "a", "c", "d"]
    assert listed(sort="lift")[:2] == ["d", "a"]
    assert listed(state=["broken", "learning"], sort="created") == ["c", "b"]
    assert [run.run for run in service.client.runs(state=["broken", "learning"], sort="created")] == ["c", "b"]
    assert [run.run for run in service.client.runs(alarm="any", search="B")] == ["b"]
    page = service.client.runs_page(sort="lift", limit=1)
    assert [run.run for run in page.runs] == ["d"]
    assert service.client.runs_page(sort="lift", limit=1, cursor=page.next_cursor).runs[0].run == "a"
    assert listed(alarm="forecast_off") == listed(alarm="any", search="B") == ["b"]
    first, second = service.http.get("/runs?limit=2").json()["runs"]
    assert (first["verdict"], first["lift"]) == ("helping", {"value": 0.3, "low": 0.1, "high": None})
    assert first["informative_shares"] == [{"first_step": 0, "last_step": 1, "share": 0.5}]
    assert second["alarms"][0]["message"] == "Outcomes are far off."
    cursor = service.http.get("/runs?limit=1&sort=lift").json()["next_cursor"]
    assert service.http.get(f"/runs?limit=1&cursor={cursor}").status_code == 422, "good for its order alone"


@without_the_database
@pytest.mark.parametrize(
    ("query", "detail"),
    [
        (
            "state=fine",
            "state[0]: Input should be 'broken', 'not_helping', 'helping', 'learning' or 'no_data', got 'fine'",
        ),
        ("limit=0", "limit: Input should be greater than or equal to 1, got '0'"),
        ("limit=x", "limit: Input should be a valid integer, unable to parse string as an integer, got 'x'"),
        ("cursor=%00", r"cursor: a NUL character (\u0000) cannot be stored: remove it"),
        (
            "cursor=run-1",
            "cursor: it was not given as next_cursor by this listing to this caller: leave it out to start from the "
            "first page",
        ),
    ],
)
def test_a_bad_page_of_runs_is_refused(caller: Caller, query: str, detail: str) -> None:
    problem = caller.refused("GET", f"/runs?{query}")

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


def test_a_fork_starts_from_the_memory_of_another_run(caller: Caller) -> None:
    client, fork = caller.client, f"{caller.run}.fork"
    caller.create(predictor="mopps", group_size=4)
    caller.load_texts("a", "b", "c")
    first = caller.select(0, 2)
    caller.observe(0, {"prompt_id": "a", "rewards": [1, 1]}, selection_id=first["selection_id"])
    caller.observe(1, {"prompt_id": "a", "rewards": [0, 0]})

    created = caller.http.put(f"/runs/{fork}", json={"fork_of": caller.run, "at_step": 0, "max_visits": 3})
    again = client.put_run(fork, fork_of=caller.run, at_step=0)

    assert created.status_code == 201
    assert again.model_dump(mode="json") == created.json()
    assert (again.predictor, again.group_size, again.max_visits) == ("mopps", 4, 3)
    assert (again.fork_of, again.at_step, again.pool_size, again.observations) == (caller.run, 0, 3, 1)
    assert (client.predict(fork, ["a"]).predictions[0].success_rate, caller.predict("a")[0]["success_rate"]) == (
        3 / 4,
        1 / 2,
    )
    replayed = client.select_batch(fork, 0, 2)
    assert (replayed.run, replayed.replayed, replayed.selection_id) == (fork, True, first["selection_id"])
    client.observe(fork, 0, [{"prompt_id": "b", "rewards": [1]}], selection_id=replayed.selection_id)
    assert caller.client.run(caller.run).observations == 2


def test_what_cannot_be_forked_is_named(caller: Caller) -> None:
    exists = caller.refused("PUT", f"/runs/{caller.run}", json={"fork_of": caller.run})
    unknown = caller.refused("PUT", f"/runs/{caller.run}.x", json={"fork_of": "nowhere", "at_step": 1})
    step = caller.refused("PUT", f"/runs/{caller.run}.x", json={"at_step": 1})

    assert (exists.status, exists.code) == (409, "run_exists")
    assert exists.detail == (
        f"run {caller.run!r} exists already and is no fork of {caller.run!r}: fork under another name, "
        "or delete it first"
    )
    assert (unknown.status, unknown.code) == (404, "run_unknown")
    assert unknown.detail.startswith("run 'nowhere' does not exist")
    assert (step.status, step.detail) == (422, "at_step needs fork_of, the run to start from")
    assert caller.http.get(f"/runs/{caller.run}.x").status_code == 404
