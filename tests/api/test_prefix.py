"""The service under a path of another one: by a setting, by a proxy's header, and behind a real nginx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from benchmarks.browser import CHROMIUM, browser
from benchmarks.nginx import NGINX, free_address, running_nginx
from pydantic import ValidationError
from tests.waiting import PATIENCE_SECONDS

from evenodds import Client, NotFound
from evenodds_service.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import Service

behind_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx on this machine")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/evenodds.db"


def test_a_prefix_is_taken_off_wherever_a_proxy_leaves_it(start_service: Callable[..., Service], url: str) -> None:
    http = start_service(url, root_path="/rl/odds").http

    for path in (
        "/healthz",
        "/rl/odds/healthz",
        "/rl/odds/",
        "/rl/odds/page/page.js",
        "/rl/odds/docs",
        "/rl/odds/runs",
    ):
        assert http.get(path).status_code == 200, path
    assert http.get("/rl/odds").headers["location"] == "/rl/odds/"
    assert http.get("/rl/odds/openapi.json").json()["servers"] == [{"url": "/rl/odds"}]
    assert http.get("/rl/oddsruns").status_code == 404


@pytest.mark.parametrize(
    ("trusted", "given", "taken"),
    [
        ("127.0.0.0/8", "/eo", True),
        ("10.0.0.1, 127.0.0.1", "/eo/", True),
        ("10.0.0.0/8", "/eo", False),
        (None, "/eo", False),
        ("127.0.0.1", "//evil.example", False),
        ("127.0.0.1", '/eo"><script>', False),
    ],
)
def test_only_a_trusted_proxy_names_the_prefix(
    start_service: Callable[..., Service], url: str, trusted: str | None, given: str, taken: bool
) -> None:
    http = start_service(url, trusted_proxies=trusted).http
    headers = {"X-Forwarded-Prefix": given}

    assert http.get("/openapi.json", headers=headers).json().get("servers") == ([{"url": "/eo"}] if taken else None)
    assert http.get("/eo/healthz", headers=headers).status_code == (200 if taken else 404)


def test_a_prefix_opens_nothing_that_asks_for_a_key(start_service: Callable[..., Service], url: str) -> None:
    http = start_service(url, trusted_proxies="127.0.0.1", asks_for_keys=True).http

    for prefix in ("/page", "/docs-files", "/docs", "/runs"):
        for path in ("/runs", f"{prefix}/runs", f"{prefix}{prefix}/runs"):
            assert http.get(path, headers={"X-Forwarded-Prefix": prefix}).status_code in (307, 401, 404), (prefix, path)


@pytest.mark.parametrize(
    "wrong", [{"root_path": "odds"}, {"root_path": "/odds/"}, {"root_path": "/a b"}, {"trusted_proxies": "proxy"}]
)
def test_a_setting_that_is_no_path_or_network_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Settings.model_validate(wrong)


@contextmanager
def nginx(service: Service, folder: Path) -> Iterator[str]:
    """A real nginx with its usual buffers: it takes the prefix /cut off, and leaves /kept."""
    address = free_address()
    config = f"""
        daemon off; master_process off; pid nginx.pid;
        events {{ worker_connections 64; }}
        http {{
            access_log off;
            client_body_temp_path 1; proxy_temp_path 2; fastcgi_temp_path 3; uwsgi_temp_path 4; scgi_temp_path 5;
            gzip on; gzip_types *;
            server {{
                listen {address};
                proxy_set_header Host $http_host;
                location /cut/ {{ proxy_pass {service.base_url}/; proxy_set_header X-Forwarded-Prefix /cut; }}
                location /kept {{ proxy_pass {service.base_url}; proxy_set_header X-Forwarded-Prefix /kept; }}
            }}
        }}
        """
    with running_nginx(config, folder, address):
        yield f"http://{address}"


@pytest.mark.slow
@behind_nginx
@pytest.mark.parametrize("prefix", ["/cut", "/kept"])
def test_client_and_events_pass_nginx(
    start_service: Callable[..., Service], url: str, tmp_path: Path, prefix: str
) -> None:
    service = start_service(url, trusted_proxies="127.0.0.1")
    with nginx(service, tmp_path) as address, Client(f"{address}{prefix}") as client:
        client.put_run("a", embedder="none")
        for prompt_id in ("a//b", "..", "a/../b", "50%2F", "ä b"):
            client.add_prompts("a", [{"prompt_id": prompt_id, "text": prompt_id}])
            assert client.prompt("a", prompt_id).prompt_id == prompt_id
        with pytest.raises(NotFound, match="run 'nowhere' does not exist"):
            client.run("nowhere")
        with httpx.stream("GET", f"{address}{prefix}/runs/a/events", timeout=PATIENCE_SECONDS) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith(":"), "nothing holds the stream back"
            assert any(line.startswith("id: ") for line in lines)
            client.observe("a", 0, [{"prompt_id": "..", "rewards": [1]}])
            assert any('"observations": 1' in line for line in lines)
        assert httpx.get(f"{address}{prefix}/openapi.json", timeout=PATIENCE_SECONDS).json()["servers"] == [
            {"url": prefix}
        ]


@pytest.mark.slow
@behind_nginx
@in_a_browser
@pytest.mark.parametrize("prefix", ["/cut", "/kept"])
def test_page_and_documentation_work_behind_nginx(
    start_service: Callable[..., Service], url: str, tmp_path: Path, prefix: str
) -> None:
    service = start_service(url, trusted_proxies="127.0.0.1")
    service.client.put_run("a", embedder="none")
    with nginx(service, tmp_path) as address, browser() as tab:
        tab.open(f"{address}{prefix}/#/runs/a")
        tab.until("document.body?.innerText.includes('No data: the pool is empty')")
        service.client.add_prompts("a", [{"prompt_id": "p", "text": "1 + 1 = ?"}])
        tab.until("document.body.innerText.includes('No data: no outcomes were reported yet')", seconds=3.5)
        tab.run("[...document.querySelectorAll('nav a')][0].click()")
        tab.until("document.body?.innerText.includes('Choose the prompts of a step')")
        assert tab.run("location.pathname") == f"{prefix}/docs"
        assert tab.faults == []
