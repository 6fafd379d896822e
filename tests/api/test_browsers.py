"""What a page of another site can make a browser do here: nothing. Requests carry the headers that Chromium sends, and
where there is a Chromium it sends them itself.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
from benchmarks.browser import browser
from tests.api.test_hostile import raw_status, sound
from tests.api.test_page import in_a_browser

from evenodds import Problem

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

pytestmark = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""

PROMPTS = b'{"prompts": [{"prompt_id": "planted", "text": "x"}]}'
FOREIGN = {
    "fetch(url, {mode: 'no-cors', method: 'POST', body}) from another port": {
        "Content-Type": "text/plain;charset=UTF-8",
        "Origin": "http://localhost:9000",
        "Referer": "http://localhost:9000/",
        "Sec-Fetch-Site": "same-site",
        "Sec-Fetch-Mode": "no-cors",
        "Sec-Fetch-Dest": "empty",
    },
    "navigator.sendBeacon(url, new Blob([body])), which has no type": {
        "Origin": "https://attacker.example",
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "no-cors",
        "Sec-Fetch-Dest": "empty",
    },
    "a form with enctype=text/plain": {
        "Content-Type": "text/plain",
        "Origin": "https://attacker.example",
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
        "Sec-Fetch-User": "?1",
        "Upgrade-Insecure-Requests": "1",
    },
    "a form in a sandboxed frame, of a browser without Sec-Fetch": {
        "Content-Type": "text/plain",
        "Origin": "null",
    },
    "a browser without Sec-Fetch": {
        "Content-Type": "text/plain;charset=UTF-8",
        "Origin": "http://attacker.example",
    },
}


def post(caller: Caller, headers: dict[str, str], content: bytes = PROMPTS) -> httpx.Response:
    request = caller.http.build_request("POST", f"/runs/{caller.run}/prompts", content=content, headers=headers)
    return caller.http.send(request)


def problem_of(reply: httpx.Response) -> tuple[int, str]:
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    problem = Problem.model_validate_json(reply.content)
    assert problem.request_id == reply.headers["x-request-id"]
    return problem.status, problem.code


@pytest.mark.parametrize("way", FOREIGN)
def test_a_page_of_another_site_changes_nothing(caller: Caller, way: str) -> None:
    headers = FOREIGN[way]
    before = caller.state()

    refused = {
        problem_of(post(caller, headers)) for headers in (headers, {**headers, "Content-Type": "application/json"})
    }

    assert refused == {(403, "origin_refused")}
    assert caller.state() == before


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_no_operation_takes_a_body_of_a_type_that_needs_no_permission(caller: Caller, media_type: str) -> None:
    """Even where a browser said nothing of the page: other types make it ask first, and it is told no."""
    for method, path, body in sound(caller.run):
        reply = caller.http.request(method, path, content=str(body).encode(), headers={"Content-Type": media_type})
        assert problem_of(reply) == (415, "media_type")
    preflight = {"Origin": "https://attacker.example", "Access-Control-Request-Method": "POST"}
    assert not [name for name in caller.http.options("/observe", headers=preflight).headers if "allow-origin" in name]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_no_method_that_changes_something_is_open_to_other_sites(caller: Caller, method: str) -> None:
    reply = caller.http.request(method, f"/runs/{caller.run}", headers={"Origin": "https://attacker.example"})

    assert problem_of(reply) == (403, "origin_refused")


def test_the_services_own_page_and_programs_may_call(caller: Caller) -> None:
    own = f"http://{urlsplit(str(caller.http.base_url)).netloc}"
    json = {"Content-Type": "application/json"}

    replies = [
        post(caller, json),
        post(caller, {**json, "Origin": own}),
        post(caller, {**json, "Origin": own, "Sec-Fetch-Site": "same-origin"}),
        post(caller, {**json, "Sec-Fetch-Site": "none"}),
        caller.http.get("/runs", headers=FOREIGN["a browser without Sec-Fetch"]),  # its page cannot read the reply
    ]

    assert [reply.status_code for reply in replies] == [200] * 5


def test_an_origin_that_is_allowed_may_call(
    start_service: Callable[..., Service], tmp_path: Any, service: Service
) -> None:
    origin = "https://lab.example:8443"
    allowing = start_service(f"sqlite:///{tmp_path}/evenodds.db", allowed_origins=f"https://other.example, {origin}")
    headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}

    asked = allowing.http.options(
        "/runs/math",
        headers={**headers, "Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type"},
    )
    made = allowing.http.put("/runs/math", json={"embedder": "none"}, headers=headers)
    refused = allowing.http.put("/runs/math", json={}, headers={**headers, "Origin": "https://lab.example"})

    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, origin)
    assert (made.status_code, made.headers["access-control-allow-origin"]) == (201, origin)
    assert problem_of(refused) == (403, "origin_refused")


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:8000", "127.0.0.1.attacker.example", "[::2]", "", "0.0.0.0"]
)
@pytest.mark.parametrize("path", ["/", "/runs", "/healthz", "/docs", "/openapi.json"])
def test_on_loopback_no_foreign_name_is_answered(caller: Caller, host: str, path: str) -> None:
    reply = caller.http.get(path, headers={"Host": host, "Sec-Fetch-Site": "same-origin"})

    assert problem_of(reply) == (421, "host_refused")


def test_two_hosts_or_none_are_refused(caller: Caller) -> None:
    for hosts in (b"", b"Host: localhost\r\nHost: localhost\r\n"):
        status, _ = raw_status(caller.http, b"GET /runs HTTP/1.1\r\nConnection: close\r\n" + hosts + b"\r\n")
        assert status in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.1.2.3:80", "[::1]:8000"])
def test_every_name_of_loopback_is_answered(caller: Caller, host: str) -> None:
    assert caller.http.get("/runs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "answered"),
    [
        ({"allowed_hosts": "odds.example, other.example"}, {"odds.example", "ODDS.example:443", "localhost"}),
        ({"allowed_hosts": "*"}, {"odds.example", "ODDS.example:443", "localhost", "attacker.example"}),
        ({"host": "0.0.0.0"}, {"odds.example", "ODDS.example:443", "localhost", "attacker.example"}),
        ({"host": "0.0.0.0", "allowed_hosts": "odds.example"}, {"odds.example", "ODDS.example:443", "localhost"}),
    ],
)
def test_names_are_allowed_by_setting(
    start_service: Callable[..., Service], tmp_path: Any, settings: dict[str, str], answered: set[str], service: Service
) -> None:
    running = start_service(f"sqlite:///{tmp_path}/evenodds.db", **settings)
    hosts = ("odds.example", "ODDS.example:443", "localhost", "attacker.example")

    assert {h for h in hosts if running.http.get("/runs", headers={"Host": h}).status_code == 200} == answered


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_and_scrapes_call_a_pod_by_its_address(
    start_service: Callable[..., Service], tmp_path: Any, path: str, service: Service
) -> None:
    address = {"Host": "10.1.2.3:8000"}
    pod = start_service(f"sqlite:///{tmp_path}/evenodds.db", host="0.0.0.0", allowed_hosts="odds.example")

    assert pod.http.get(path, headers=address).status_code == 200
    assert problem_of(pod.http.get("/runs", headers=address)) == (421, "host_refused")
    assert problem_of(service.http.get(path, headers=address)) == (421, "host_refused"), "on loopback nobody does"


def test_who_is_refused_for_the_name_is_told_the_name_and_where_to_list_it(
    start_service: Callable[..., Service], tmp_path: Any, service: Service
) -> None:
    elsewhere = start_service(f"sqlite:///{tmp_path}/evenodds.db", host="0.0.0.0", allowed_hosts="odds.example")

    for each in (service, elsewhere):
        detail = each.http.get("/runs", headers={"Host": "Dash.example:8443"}).json()["detail"]
        assert detail == (
            "Host: 'dash.example' is not a name of this service, which answers as 127.0.0.1, as localhost and as what "
            "EVENODDS_ALLOWED_HOSTS of the service lists: call it by one of these, or list the name there"
        )


def test_forwarded_headers_are_not_believed(caller: Caller) -> None:
    forwarded = {"X-Forwarded-Host": "localhost", "X-Forwarded-For": "127.0.0.1", "Forwarded": "host=localhost"}

    reply = caller.http.get("/runs", headers={"Host": "attacker.example", **forwarded})

    assert problem_of(reply) == (421, "host_refused")


def test_replies_are_kept_nowhere_and_read_as_what_they_are(caller: Caller) -> None:
    for path in ("/runs", f"/runs/{caller.run}", "/nowhere", "/metrics", "/openapi.json", "/healthz"):
        headers = caller.http.get(path).headers
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    for path in ("/", "/docs"):
        policy = caller.http.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy


ATTACK = """<!doctype html><title>attack</title><pre id="said">unfinished</pre><iframe name="hidden"></iframe>
<form id="form" method="post" enctype="text/plain" target="hidden"><input name="body"></form>
<script type="module">
const service = "SERVICE", run = "RUN", said = {page: location.origin};
const body = JSON.stringify({prompts: [{prompt_id: "planted", text: "x"}]});
async function attempt(name, work) {
  try { said[name] = await work(); } catch (error) { said[name] = error.name; }
}
const prompts = `${service}/runs/${run}/prompts`;
const json = {"Content-Type": "application/json"};
const seen = async (reply) => `${reply.type} ${reply.status} ${(await reply.text()).length}`;
await attempt("read", async () => seen(await fetch(`${service}/runs/${run}`)));
await attempt("read without cors", async () => seen(await fetch(`${service}/runs/${run}`, {mode: "no-cors"})));
await attempt("write as text", async () => seen(await fetch(prompts, {method: "POST", mode: "no-cors", body})));
await attempt("write as json", async () => seen(await fetch(prompts, {method: "POST", headers: json, body})));
await attempt("write as nothing", async () => String(navigator.sendBeacon(prompts, new Blob([body]))));
const own = `${service}/runs/${run}`;
await attempt("put", async () => seen(await fetch(own, {method: "PUT", headers: json, body: "{}"})));
await attempt("delete", async () => seen(await fetch(own, {method: "DELETE"})));
const form = document.getElementById("form");
form.action = prompts;
form.elements.body.name = body.slice(0, -1) + ', "x": "';
form.elements[0].value = '"}';
form.submit();
await new Promise((done) => setTimeout(done, 2000));
await attempt("read the frame", async () => String(frames.hidden.document.body.innerText.length));
document.getElementById("said").textContent = JSON.stringify(said);
</script>
"""
"""Everything that a page of another port can try without being asked about, and what it may try only when it was."""


@contextmanager
def served_from_another_port(folder: Path) -> Iterator[str]:
    """Origin of a web server over the files of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_real_browser_lets_a_page_of_another_port_neither_write_nor_read(
    caller: Caller, service: Service, tmp_path: Path, host: str
) -> None:
    def refused() -> float:
        found = re.findall(r'^evenodds_requests_total{.*status="403".*} (.*)', caller.http.get("/metrics").text, re.M)
        return sum(map(float, found))

    caller.load_texts("a")
    before, refused_before = caller.state(), refused()
    address = service.base_url.replace("127.0.0.1", host)
    (tmp_path / "attack.html").write_text(ATTACK.replace("SERVICE", address).replace("RUN", caller.run))
    with served_from_another_port(tmp_path) as origin, browser() as tab:  # which ends first, with its connections
        # The service's own page may read: what is refused below is refused for its origin.
        tab.open(f"{address}/#/runs/{caller.run}")
        tab.until("document.body?.innerText.includes('No data')")
        tab.open(f"{origin}/attack.html")
        tab.until("document.getElementById('said')?.textContent.startsWith('{')")
        said = json.loads(tab.run("document.getElementById('said').textContent"))

    assert said.pop("page") == origin
    assert len(said) == 8
    # Nothing that can be read: what was sent without being asked about is opaque, or not shown at all.
    assert set(said.values()) <= {"TypeError", "SecurityError", "opaque 0 0", "true"}
    assert (said["read"], said["write as nothing"]) == ("TypeError", "true")
    assert refused() - refused_before >= 3, "text, beacon and form came, and were refused"
    assert caller.state() == before
