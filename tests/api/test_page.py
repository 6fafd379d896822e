"""The operator's page: what it is made of, and what a real browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> & \"quotes\" \u202e"
PAGE = Path(__file__).parents[2] / "service/evenodds_service/api/page"

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
one_backend = pytest.mark.parametrize("service", ["sqlite"], indirect=True)


@one_backend
@pytest.mark.parametrize(
    ("path", "media_type"),
    [("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css"), ("/docs", "text/html")],
)
def test_the_page_and_the_documentation_are_served(service: Service, path: str, media_type: str) -> None:
    reply = service.http.get(path)

    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith(media_type)
    assert not re.findall(r"""(?:src|href)=["']https?://""", reply.text), "works without the internet"


@one_backend
def test_what_stands_in_a_prompt_may_not_run(service: Service) -> None:
    policy = service.http.get("/").headers["content-security-policy"]

    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|outerHTML", (PAGE / "page.js").read_text())


def test_beliefs_are_spread_over_the_pool_and_name_the_hardest_and_easiest(caller: Caller) -> None:
    caller.load_texts("a", "b", "c")
    caller.observe(
        0,
        {"prompt_id": "a", "successes": 8, "attempts": 8},
        {"prompt_id": "b", "successes": 0, "attempts": 8},
    )

    beliefs = caller.ok("GET", f"/runs/{caller.run}/beliefs?shown=2")

    assert beliefs["pool_size"] == sum(beliefs["success_rate_counts"]) == sum(beliefs["informative_counts"]) == 3
    assert len(beliefs["success_rate_counts"]) == 20
    assert [prompt["prompt_id"] for prompt in beliefs["hardest"]] == ["b", "c"]
    assert [prompt["prompt_id"] for prompt in beliefs["easiest"]] == ["a", "c"]
    assert beliefs["hardest"][0]["text"] == "What is b?"
    assert beliefs["hardest"][0]["attempts_seen"] == 8


def test_beliefs_of_an_empty_pool_are_empty(caller: Caller) -> None:
    beliefs = caller.ok("GET", f"/runs/{caller.run}/beliefs")

    assert (beliefs["pool_size"], beliefs["hardest"], beliefs["easiest"]) == (0, [], [])


@pytest.mark.parametrize(
    ("search", "found"),
    [("IS B", ["b"]), ("a%", []), ("_", []), ("what", ["a", "b"]), ("\\", []), ("'; DROP TABLE prompts; --", [])],
)
def test_prompts_are_found_by_a_part_of_their_id_or_text(caller: Caller, search: str, found: list[str]) -> None:
    caller.load_texts("a", "b")

    page = caller.http.get(f"/runs/{caller.run}/prompts", params={"search": search}).json()

    assert [prompt["prompt_id"] for prompt in page["prompts"]] == found


def rendered(address: str, tmp_path: Path) -> str:
    """The page as the browser has it after its scripts ran for ten seconds of its own time."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path}/browser",
            "--virtual-time-budget=10000",
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_SECONDS,
        check=True,
    )
    return done.stdout


def filled(caller: Caller) -> None:
    prompts: list[dict[str, Any]] = [
        {"prompt_id": f"p{i}", "text": f"What is {i} + {i}?", "category": "sums" if i % 2 else "doubles"}
        for i in range(40)
    ]
    caller.load([*prompts, {"prompt_id": HOSTILE, "text": HOSTILE, "category": HOSTILE}])
    caller.create(control_share=0.25)
    for step in range(6):
        batch = caller.select(step, 16)
        caller.observe(
            step,
            *({"prompt_id": p["prompt_id"], "successes": i % 9, "attempts": 8} for i, p in enumerate(batch["prompts"])),
            selection_id=batch["selection_id"],
        )


@pytest.mark.slow
@in_a_browser
@one_backend
def test_a_run_is_shown_live_and_hostile_texts_are_only_shown(caller: Caller, service: Service, tmp_path: Path) -> None:
    filled(caller)

    page = rendered(f"{service.base_url}/#/runs/{caller.run}", tmp_path)

    assert f"<title>{caller.run} · Even Odds</title>" in page
    for heading in (
        "Informative share over steps",
        "Reliability",
        "Forecast against outcome",
        "Beliefs about the pool now",
        "Beliefs over the run",
        "Coverage",
        "Refits",
        "Search",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 6
    assert page.count('class="cell"') >= 6, "the beliefs before each of the six steps"
    assert "owned" not in re.sub(r"document\.title(=|%3D)'owned'", "", page)
    assert "<img" not in page
    assert "&lt;img src=x" in page


@pytest.mark.slow
@in_a_browser
@one_backend
def test_a_prompt_has_a_page_with_its_history(caller: Caller, service: Service, tmp_path: Path) -> None:
    filled(caller)

    page = rendered(f"{service.base_url}/#/runs/{caller.run}/prompts/p1", tmp_path)

    assert "What is 1 + 1?" in page
    assert "<h2>History</h2>" in page


@pytest.mark.slow
@in_a_browser
@one_backend
def test_an_empty_run_and_an_unknown_one_are_explained(caller: Caller, service: Service, tmp_path: Path) -> None:
    empty = rendered(f"{service.base_url}/#/runs/{caller.run}", tmp_path)
    unknown = rendered(f"{service.base_url}/#/runs/no-such-run", tmp_path)

    assert "No outcomes yet." in empty
    assert "<h1>Not found</h1>" in unknown
    assert "run 'no-such-run' does not exist" in unknown
