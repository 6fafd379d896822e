"""API keys: who gets in, to which runs, with which scope and how often; and what nobody learns."""

from __future__ import annotations

import asyncio
import gzip
import logging
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi.testclient import TestClient
from tests.waiting import PATIENCE_SECONDS

from evenodds import Client, ConfigurationError, Forbidden, PromptSelector, Unauthorized
from evenodds.schemas import Problem
from evenodds_service.api.app import create_app
from evenodds_service.api.middleware.access import KEYS_SECONDS, KeyRing, hash_of, new_secret, scope_of
from evenodds_service.errors import KeyInvalid, StoreUnavailable
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import ApiKey, Scope, Store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Service

NOW = datetime(2026, 11, 1, tzinfo=timezone.utc)
ALL: frozenset[Scope] = frozenset({"read", "write", "admin"})


@dataclass
class Guarded:
    """A service that asks for keys."""

    store: Store
    http: httpx.Client

    def key(self, name: str = "somebody", scopes: frozenset[Scope] = ALL, runs: str = "*", **limits: int) -> str:
        secret = new_secret()
        self.store.create_key(
            name,
            secret_hash=hash_of(secret),
            scopes=scopes,
            runs=runs,
            requests_per_minute=limits.get("requests_per_minute"),
            max_body_bytes=limits.get("max_body_bytes"),
            now=NOW,
        )
        return secret

    def call(self, secret: str | None, method: str, path: str, **request: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {secret}"} if secret is not None else {}
        return self.http.request(method, path, headers={**headers, **request.pop("headers", {})}, **request)


@pytest.fixture
def guard(database_url: str, start_service: Callable[..., Service]) -> Iterator[Callable[..., Guarded]]:
    """Starts a service that asks for keys; `clock` counts the seconds of its limits."""
    with ExitStack() as stack:

        def start(**options: Any) -> Guarded:
            running = start_service(database_url, asks_for_keys=True, **options)
            store = Store(open_engine(database_url, timeout_seconds=PATIENCE_SECONDS))
            stack.callback(store.close)
            return Guarded(store, running.http)

        yield start


@pytest.fixture
def guarded(guard: Callable[..., Guarded]) -> Guarded:
    return guard()


def refusal(reply: httpx.Response) -> tuple[int, str, str]:
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert problem["request_id"] == reply.headers["x-request-id"]
    return reply.status_code, problem["code"], problem["detail"]


@pytest.mark.parametrize("path", ["/runs", "/runs/math", "/metrics", "/no-such-path"])
def test_without_a_key_nothing_is_answered(guarded: Guarded, path: str) -> None:
    reply = guarded.call(None, "GET", path)

    status, code, detail = refusal(reply)
    assert (status, code) == (401, "key_missing")
    assert "Authorization: Bearer" in detail
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
def test_health_and_documentation_ask_for_no_key(guarded: Guarded, path: str) -> None:
    assert guarded.call(None, "GET", path).status_code == 200


@pytest.mark.parametrize("header", ["Basic c29tZWJvZHk6cGFzcw==", "Bearer", "eo_x"])
def test_other_ways_to_authorise_are_no_key(guarded: Guarded, header: str) -> None:
    guarded.key()

    reply = guarded.http.get("/runs", headers={"Authorization": header})

    assert refusal(reply)[:2] == (401, "key_missing")


def test_a_wrong_key_is_refused_and_neither_shown_nor_logged(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    guarded.key()
    wrong = new_secret()

    with caplog.at_level(logging.DEBUG):
        reply = guarded.call(wrong, "GET", "/runs")

    assert refusal(reply)[:2] == (401, "key_invalid")
    assert wrong not in reply.text
    assert wrong not in caplog.text


def test_the_database_holds_no_secret(guarded: Guarded) -> None:
    secret = guarded.key()

    (key,) = guarded.store.api_keys()

    assert secret not in repr(key)
    assert key.secret_hash == hash_of(secret)


CALLS = {
    "read": [("GET", "/runs"), ("POST", "/predict")],
    "write": [("PUT", "/runs/math"), ("POST", "/observe"), ("POST", "/select_batch"), ("POST", "/runs/math/prompts")],
    "admin": [("DELETE", "/runs/math")],
}


@pytest.mark.parametrize(("needed", "method", "path"), [(s, m, p) for s, calls in CALLS.items() for m, p in calls])
def test_a_call_needs_its_scope_and_no_other(guarded: Guarded, needed: Scope, method: str, path: str) -> None:
    assert scope_of(method, path) == needed
    lacking = guarded.key("lacking", ALL - {needed})
    having = guarded.key("having", frozenset({needed}))

    refused = guarded.call(lacking, method, path, json={})
    allowed = guarded.call(having, method, path, json={})

    assert refusal(refused)[:2] == (403, "scope_missing")
    assert f"{method} {path} needs the scope {needed!r}, key 'lacking' has" in refusal(refused)[2]
    assert allowed.status_code not in (401, 403)


def test_a_key_that_is_bound_to_runs_may_name_no_other(guarded: Guarded) -> None:
    bound, free = guarded.key("bound", runs="math-*"), guarded.key("free")
    for run in ("math-1", "code-1"):
        assert guarded.call(free, "PUT", f"/runs/{run}", json={}).status_code == 201

    inside = guarded.call(bound, "GET", "/runs/math-1")
    others = [
        guarded.call(bound, "GET", "/runs/code-1"),
        guarded.call(bound, "PUT", "/runs/code-2", json={}),
        guarded.call(bound, "DELETE", "/runs/code-1"),
        guarded.call(bound, "POST", "/runs/code-1/prompts", json={"prompts": [{"text": "a"}]}),
        guarded.call(bound, "POST", "/runs/code-1/refit", json={}),
        guarded.call(bound, "POST", "/predict", json={"run": "code-1", "prompts": [{"text": "a"}]}),
        guarded.call(bound, "POST", "/select_batch", json={"run": "code-1", "step": 0, "batch_size": 1}),
        guarded.call(
            bound,
            "POST",
            "/observe",
            json={"run": "code-1", "step": 0, "observations": [{"prompt_id": "a", "rewards": [1]}]},
        ),
        guarded.call(bound, "GET", "/metrics"),
    ]

    assert inside.status_code == 200
    assert {refusal(reply)[:2] for reply in others} == {(403, "run_forbidden")}
    assert [run["run"] for run in guarded.call(bound, "GET", "/runs").json()["runs"]] == ["math-1"]
    assert guarded.store.run("code-1").n_prompts == 0


def test_a_bound_key_learns_of_no_other_run_by_paging(guarded: Guarded) -> None:
    everybody, bound, stranger = (
        guarded.key("everybody"),
        guarded.key("bound", runs="math-*"),
        guarded.key("x", runs="x*"),
    )
    names = ["alpha", "beta", "math-1", "math-2", "math-3", "middle", "zeta"]
    for name in names:
        guarded.call(everybody, "PUT", f"/runs/{name}", json={"embedder": "none"})

    def pages(secret: str, limit: int) -> tuple[list[list[str]], str]:
        found, said, cursor = [], "", None
        while True:
            asked = {"limit": str(limit), **({"cursor": cursor} if cursor else {})}
            reply = guarded.call(secret, "GET", "/runs", params=asked)
            found.append([run["run"] for run in reply.json()["runs"]])
            said += reply.text + str(urlsafe_b64decode((reply.json()["next_cursor"] or "") + "=="))
            cursor = reply.json()["next_cursor"]
            if cursor is None:
                return found, said

    for limit in (1, 2, 3, 100):
        found, said = pages(bound, limit)
        assert [name for page in found for name in page] == ["math-1", "math-2", "math-3"]
        assert all(len(page) == limit for page in found[:-1])
        assert found[-1]
        assert not [name for name in ("alpha", "beta", "middle", "zeta") if name in said]
    assert pages(stranger, 1)[0] == [[]]
    assert [name for page in pages(everybody, 2)[0] for name in page] == names


def test_a_cursor_is_good_for_its_listing_and_its_key(guarded: Guarded) -> None:
    first, second = guarded.key("first"), guarded.key("second")
    for name in ("a", "b", "c"):
        guarded.call(first, "PUT", f"/runs/{name}", json={"embedder": "none"})
        guarded.call(first, "POST", f"/runs/{name}/prompts", json={"prompts": [{"prompt_id": i} for i in "xyz"]})
    of_runs = guarded.call(first, "GET", "/runs?limit=1").json()["next_cursor"]
    of_a = guarded.call(first, "GET", "/runs/a/prompts?limit=1").json()["next_cursor"]

    def status(secret: str, path: str, cursor: str) -> int:
        return guarded.call(secret, "GET", path, params={"cursor": cursor}).status_code

    assert (status(first, "/runs", of_runs), status(first, "/runs/a/prompts", of_a)) == (200, 200)
    assert {
        status(second, "/runs", of_runs),
        status(first, "/runs/b/prompts", of_a),
        status(first, "/runs/a/prompts", of_runs),
        status(first, "/runs", "b"),
        status(first, "/runs", of_runs[:-2] + "AA"),
        status(first, "/runs", "\u00e9\x00"),
        status(first, "/runs/a/prompts", "1"),
    } == {422}


@pytest.mark.parametrize("content", [b"{bad", b"\xff", b"[" * 100_000, b""])
def test_what_cannot_be_read_is_refused_under_a_bound_key_too(guard: Callable[..., Guarded], content: bytes) -> None:
    guarded = guard()
    bound = guarded.key("bound", runs="math-*")
    headers = {"Authorization": f"Bearer {bound}", "Content-Type": "application/json"}

    for method, path in (("POST", "/observe"), ("POST", "/v1/chat/completions"), ("PUT", "/runs/math-1")):
        reply = guarded.http.request(method, path, content=content, headers=headers)

        assert refusal(reply)[:2] == (422, "malformed")


def test_a_key_may_only_call_so_often(guard: Callable[..., Guarded]) -> None:
    now = [0.0]
    guarded = guard(clock=lambda: now[0])
    secret, other = guarded.key("limited", requests_per_minute=3), guarded.key("other")

    replies = [guarded.call(secret, "GET", "/runs") for _ in range(4)]
    elsewhere = guarded.call(other, "GET", "/runs")
    now[0] = 20.0
    after = [guarded.call(secret, "GET", "/runs").status_code for _ in range(2)]

    assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
    assert refusal(replies[3])[1:] == (
        "rate_limited",
        "key 'limited' may make 3 requests a minute, and has made them: wait 20 s",
    )
    assert replies[3].headers["retry-after"] == "20"
    assert elsewhere.status_code == 200
    assert after == [200, 429]


def test_a_key_may_only_send_so_much(guarded: Guarded) -> None:
    secret = guarded.key("small", max_body_bytes=200)
    guarded.call(secret, "PUT", "/runs/math", json={"embedder": "none"})

    small = guarded.call(secret, "POST", "/runs/math/prompts", json={"prompts": [{"text": "a"}]})
    large = guarded.call(secret, "POST", "/runs/math/prompts", json={"prompts": [{"text": "a" * 300}]})
    lines = guarded.call(
        secret,
        "POST",
        "/runs/math/prompts",
        content=b'{"text": "b"}\n' * 100,
        headers={"Content-Type": "application/x-ndjson"},
    )

    packed = guarded.call(
        secret,
        "POST",
        "/runs/math/prompts",
        content=gzip.compress(b'{"text": "b"}\n' * 10_000),
        headers={"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"},
    )

    assert small.status_code == 200
    assert refusal(packed)[:2] == (413, "too_large")
    assert "when unpacked" in refusal(packed)[2]
    assert refusal(large)[:2] == refusal(lines)[:2] == (413, "too_large")
    assert "key 'small' may send bodies of up to 200 bytes" in refusal(large)[2]
    assert guarded.store.run("math").n_prompts == 1


def test_a_revoked_key_is_refused_within_two_seconds(guard: Callable[..., Guarded]) -> None:
    now = [0.0]
    guarded = guard(clock=lambda: now[0])
    secret = guarded.key("gone")
    before = guarded.call(secret, "GET", "/runs").status_code
    guarded.store.revoke_key("gone", now=NOW)
    now[0] = KEYS_SECONDS + 0.1

    after = guarded.call(secret, "GET", "/runs")

    assert before == 200
    assert refusal(after)[:2] == (401, "key_invalid")


def test_no_other_site_may_call_from_a_browser(guarded: Guarded) -> None:
    reply = guarded.http.options(
        "/runs", headers={"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "GET"}
    )

    assert not [name for name in reply.headers if name.startswith("access-control-")]


def test_the_client_sends_its_key_and_tells_refusals_apart(tmp_path: Path, start_service: Callable[..., Any]) -> None:
    url = f"sqlite:///{tmp_path}/evenodds.db"
    running = start_service(url, asks_for_keys=True)
    store = Store(open_engine(url, timeout_seconds=PATIENCE_SECONDS))
    secret = Guarded(store, running.http).key("reader", frozenset({"read"}))
    store.close()

    with Client(running.base_url, api_key=secret) as client:
        assert client.runs_page().runs == ()
        with pytest.raises(Forbidden, match="needs the scope 'write'"):
            client.put_run("math")
    with Client(running.base_url) as client, pytest.raises(Unauthorized, match="requires an API key"):
        client.runs_page()


def test_whoever_builds_a_client_of_its_own_takes_the_key_from_the_environment(
    tmp_path: Path, start_service: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/evenodds.db"
    running = start_service(url, asks_for_keys=True)
    store = Store(open_engine(url, timeout_seconds=PATIENCE_SECONDS))
    monkeypatch.setenv("EVENODDS_API_KEY", Guarded(store, running.http).key("trainer"))
    prompts = [{"prompt_id": f"p{i}", "text": f"What is {i}?"} for i in range(8)]

    with PromptSelector(
        running.base_url, "math", prompts, deadline_seconds=PATIENCE_SECONDS, outbox=tmp_path / "outbox"
    ) as selector:
        selector.wait_until_ready()
        batch = selector.select(0, 4)
        selector.observe(0, {prompt_id: [1.0, 0.0] for prompt_id in batch})
        assert selector.flush()

    assert store.run("math").n_observations == 4
    store.close()


def test_a_trainer_that_names_runs_of_others_trains_without_what_they_showed(
    tmp_path: Path,
    start_service: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"sqlite:///{tmp_path}/evenodds.db"
    running = start_service(url, asks_for_keys=True)
    store = Store(open_engine(url, timeout_seconds=PATIENCE_SECONDS))
    monkeypatch.setenv("EVENODDS_API_KEY", Guarded(store, running.http).key("team", runs="team-*"))
    options: dict[str, Any] = {"deadline_seconds": PATIENCE_SECONDS, "outbox": tmp_path / "outbox"}

    with PromptSelector(
        running.base_url, "team-b", [{"prompt_id": "p"}], run_settings={"learn_from": ["other"]}, **options
    ) as selector:
        assert selector.wait_until_ready()
        batch = selector.select(0, 1)

    assert batch.source == "service"
    assert "learn_from: key 'team' is bound to runs 'team-*', not to 'other'" in caplog.text
    store.close()


@pytest.mark.parametrize("api_key", ["", "two words", "eo_\n", "eo_ä"])
def test_the_client_refuses_a_key_that_no_header_holds_and_does_not_show_it(api_key: str) -> None:
    with pytest.raises(ConfigurationError, match="api_key must be printable ASCII") as caught:
        Client(api_key=api_key)

    assert not api_key or api_key not in str(caught.value)


def test_keys_are_kept_through_an_outage_of_the_database(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/evenodds.db")
    upgrade(engine)
    store = Store(engine)
    now = [0.0]
    ring = KeyRing(store, clock=lambda: now[0])
    secret = Guarded(store, httpx.Client()).key("kept")

    assert asyncio.run(ring.check(secret, "GET", "/runs")).name == "kept"
    store.close()
    (tmp_path / "evenodds.db").rename(tmp_path / "away.db")
    (tmp_path / "evenodds.db").mkdir()
    now[0] = 60.0

    assert asyncio.run(ring.check(secret, "GET", "/runs")).name == "kept"


def test_a_key_revoked_while_a_slow_database_reads_the_keys_does_not_live_longer_for_it(tmp_path: Path) -> None:
    now = [0.0]

    class Slow(Store):
        def api_keys(self) -> tuple[ApiKey, ...]:
            keys = super().api_keys()
            if now[0] == 0.0:
                self.revoke_key("leaked", now=datetime(2026, 1, 2, tzinfo=timezone.utc))
                now[0] += KEYS_SECONDS + 1
            return keys

    engine = open_engine(f"sqlite:///{tmp_path}/evenodds.db")
    upgrade(engine)
    store = Slow(engine)
    ring = KeyRing(store, clock=lambda: now[0])
    secret = Guarded(store, httpx.Client()).key("leaked")
    asyncio.run(ring.check(secret, "GET", "/runs"))

    with pytest.raises(KeyInvalid, match="was revoked"):
        asyncio.run(ring.check(secret, "GET", "/runs"))
    store.close()


def test_a_read_of_the_keys_that_comes_late_undoes_no_newer_one(tmp_path: Path) -> None:
    now, is_late = [0.0], [True]

    class Late(Store):
        def api_keys(self) -> tuple[ApiKey, ...]:
            keys = super().api_keys()
            if is_late:
                is_late.clear()
                self.revoke_key("leaked", now=datetime(2026, 1, 2, tzinfo=timezone.utc))
                now[0] += KEYS_SECONDS + 1
                asyncio.run(ring.check(kept, "GET", "/runs"))  # another request reads the keys meanwhile
            return keys

    engine = open_engine(f"sqlite:///{tmp_path}/evenodds.db")
    upgrade(engine)
    store = Late(engine)
    ring = KeyRing(store, clock=lambda: now[0])
    guarded = Guarded(store, httpx.Client())
    leaked, kept = guarded.key("leaked"), guarded.key("kept")

    with pytest.raises(KeyInvalid, match="was revoked"):
        asyncio.run(ring.check(leaked, "GET", "/runs"))
    store.close()


def test_a_database_that_is_away_before_the_keys_were_ever_read_is_told_as_everywhere(tmp_path: Path) -> None:
    class Away(Store):
        def api_keys(self) -> tuple[ApiKey, ...]:
            raise StoreUnavailable("the database is away")

    engine = open_engine(f"sqlite:///{tmp_path}/evenodds.db")
    app = create_app(Away(engine), asks_for_keys=True)

    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as http:
        reply = http.get("/runs", headers={"Authorization": "Bearer eo_any"})

    engine.dispose()
    problem = Problem.model_validate_json(reply.content)
    assert (reply.status_code, problem.code, problem.detail) == (503, "store_unavailable", "the database is away")
    assert reply.headers["retry-after"] == "1"


def test_a_key_ends_on_its_day(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/evenodds.db")
    upgrade(engine)
    store = Store(engine)
    today = [datetime(2026, 1, 2, tzinfo=timezone.utc)]
    secret = new_secret()
    store.create_key(
        "short",
        secret_hash=hash_of(secret),
        scopes=frozenset({"read"}),
        runs="*",
        requests_per_minute=None,
        max_body_bytes=None,
        now=today[0],
        expires_at=today[0] + timedelta(days=1),
    )
    ring = KeyRing(store, now=lambda: today[0])

    async def used() -> ApiKey:
        return await ring.check(secret, "GET", "/runs")

    assert asyncio.run(used()).name == "short"
    today[0] += timedelta(days=1)
    with pytest.raises(KeyInvalid, match="key 'short' expired on 2026-01-03: ask for a new one"):
        asyncio.run(used())
    store.close()


def test_a_run_learns_only_from_runs_that_its_creators_key_may_read(guarded: Guarded) -> None:
    everywhere, team = guarded.key("lead"), guarded.key("team", runs="team-*")
    writes = guarded.key("trainer", scopes=frozenset({"write"}))
    for name in ("team-a", "other"):
        assert guarded.call(everywhere, "PUT", f"/runs/{name}", json={}).status_code == 201

    def asked(secret: str, *sources: str, run: str = "team-b", **more: Any) -> httpx.Response:
        return guarded.call(secret, "PUT", f"/runs/{run}", json={"learn_from": sources, **more})

    def within(run: str) -> tuple[str, ...]:
        return guarded.store.run(run).settings.learn_within

    status, code, detail = refusal(asked(team, "team-a", "other"))
    assert (status, code) == (403, "run_forbidden")
    assert "learn_from: key 'team' is bound to runs 'team-*', not to 'other'" in detail
    status, code, detail = refusal(asked(team, "team-nobody"))
    assert (status, code) == (404, "run_unknown")
    assert detail.startswith("learn_from: run 'team-nobody' does not exist: correct the name, leave it out, or create")
    assert refusal(asked(writes, "other", run="new"))[:2] == (403, "scope_missing")

    assert asked(team, "team-a", "*").json()["learn_from"] == ["team-a", "*"]
    settings = guarded.store.run("team-b").settings
    assert [settings.learns_from(name) for name in ("team-a", "team-later", "other")] == [True, True, False]

    assert guarded.call(everywhere, "DELETE", "/runs/team-a").status_code == 204
    assert asked(team, "team-a", "*").status_code == 200  # as the trainer sends it at each of its starts
    assert asked(everywhere, "*", run="lead").json()["learn_from"] == ["*"]
    assert within("lead") == ()
    assert guarded.call(everywhere, "PUT", "/runs/team-c", json={"fork_of": "lead"}).status_code == 201
    assert guarded.call(team, "PUT", "/runs/team-d", json={"fork_of": "team-c"}).status_code == 201
    assert (within("team-c"), within("team-d")) == ((), ("team-*",))
    assert asked(team, run="team-b").json()["learn_from"] is None


def test_a_key_that_may_not_read_never_gets_an_answer_back_and_no_log_line_has_one(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    writes, reads = guarded.key("writer", frozenset({"write"})), guarded.key("reader", frozenset({"read"}))
    secret = "the reference answer"
    prompt = {"prompt_id": "a", "text": "A?", "answer": [secret]}
    observed = {"run": "math", "step": 0, "observations": [{**prompt, "rewards": [1]}]}

    with caplog.at_level(logging.DEBUG):
        replies = [
            guarded.call(writes, "PUT", "/runs/math", json={"embedder": "none"}),
            guarded.call(writes, "POST", "/runs/math/prompts", json={"prompts": [prompt]}),
            guarded.call(writes, "POST", "/runs/math/prompts", json={"prompts": [{**prompt, "answer": "x"}]}),
            guarded.call(writes, "POST", "/runs/math/prompts", json={"prompts": [{**prompt, "category": [1]}]}),
            guarded.call(writes, "POST", "/runs/math/prompts?keep_existing=true", json={"prompts": [prompt]}),
            guarded.call(writes, "POST", "/observe", json=observed),
            guarded.call(writes, "POST", "/select_batch", json={"run": "math", "step": 1, "batch_size": 1}),
            guarded.call(writes, "GET", "/runs/math/prompts"),
            guarded.call(writes, "GET", "/runs/math/prompts/a"),
        ]

    assert [reply.status_code for reply in replies] == [201, 200, 409, 422, 200, 200, 200, 403, 403]
    assert all(secret not in reply.text for reply in replies)
    assert secret not in caplog.text
    assert guarded.call(reads, "GET", "/runs/math/prompts/a").json()["answer"] == [secret]
