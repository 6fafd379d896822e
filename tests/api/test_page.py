"""The operator's page: what it is made of, and what a real browser makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pytest
from benchmarks.browser import CHROMIUM, Browser, browser
from tests.waiting import PATIENCE_SECONDS, until

from evenodds_service.api.middleware.access import hash_of, new_secret
from evenodds_service.api.page import FILES
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.prompts import NewPrompt
from evenodds_service.domain.report.alarms import Alarm
from evenodds_service.domain.report.summary import Estimate, SharePoint, Summary
from evenodds_service.domain.settings import RunSettings
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import NewSelection, Store

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> & \"quotes\" \u202e"
PAGE = Path(__file__).parents[2] / "service/evenodds_service/api/page"

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
one_backend = pytest.mark.parametrize("service", ["sqlite"], indirect=True)


@one_backend
@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html"),
        ("/page/page.js", "text/javascript"),
        ("/page/uplot/uPlot.min.css", "text/css"),
        ("/docs", "text/html"),
    ],
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
    for script in PAGE.glob("*.js"):
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|outerHTML", script.read_text()), script


def test_the_page_is_made_of_what_it_names_and_ships_with_the_licence_of_its_library() -> None:
    named = {
        name
        for path in ("index.html", *FILES)
        for name in re.findall(r"""["'](?:page/|\./)([\w./]+)""", (PAGE / path).read_text())
    }

    assert named == FILES.keys() - {"index.html"}
    assert "MIT License" in (PAGE / "uplot/LICENSE").read_text()


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_texts_lines_and_fields_stand_out_from_their_ground(theme: int) -> None:
    """WCAG 2.2: 4.5 for texts (1.4.3), 3 for charts and the edges of fields (1.4.11)."""
    block = re.findall(r":root[^{]*\{[^}]*--ground[^}]*\}", (PAGE / "page.css").read_text())[theme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", block))

    for name, least in [("text", 4.5), ("quiet", 4.5), ("alarm", 4.5), ("edge", 3.0)]:
        for ground in ("ground", "panel"):
            assert contrast(colours[name], colours[ground]) >= least, (name, ground)
    assert contrast(colours["alarm"], colours["alarm-ground"]) >= 4.5
    for name in ("policy", "control", "forecast", "fourth", "fifth"):
        assert contrast(colours[name], colours["panel"]) >= 3.0, name


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


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


@pytest.fixture(scope="module")
def opened_tab() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def tab(opened_tab: Browser) -> Browser:
    """As a test before may not have left it."""
    opened_tab.call("Network.setBlockedURLs", urls=[])
    opened_tab.theme("light")
    opened_tab.size(1440, 900)
    opened_tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
    return opened_tab


@pytest.fixture
def page(tab: Browser, service: Service) -> Page:
    return Page(tab, service.base_url)


@contextmanager
def at_each_start(tab: Browser, script: str) -> Iterator[None]:
    """Pages that are opened in the block run this before their own scripts."""
    added = tab.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    try:
        yield
    finally:
        tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added)


@dataclass(frozen=True)
class Page:
    tab: Browser
    base_url: str

    def open(self, hash: str) -> str:
        """The text of a view once it stands there."""
        self.tab.open("about:blank")
        self.tab.open(f"{self.base_url}/{hash}")
        self.tab.until("document.getElementById('view')?.children.length")
        return self.tab.text()

    def until_shown(self, text: str) -> None:
        self.tab.until(f"document.body.innerText.includes({json.dumps(text)})")

    def choose(self, label: str, value: str) -> None:
        self.tab.run(
            f"(() => {{ const s = document.querySelector('select[name=\"{label}\"]'); s.value = {json.dumps(value)}; "
            "s.dispatchEvent(new Event('change')); })()"
        )

    def names(self) -> list[str]:
        """Of the runs or prompts in the list."""
        found: list[str] = self.tab.run("[...document.querySelectorAll('td.id a')].map((link) => link.textContent)")
        return found

    def address(self) -> str:
        return str(self.tab.run("location.hash"))


def filled(caller: Caller) -> None:
    prompts: list[dict[str, Any]] = [
        {"prompt_id": f"p{i}", "text": f"What is {i} + {i}?", "category": "sums" if i % 2 else "doubles"}
        for i in range(40)
    ]
    odd = [{"prompt_id": name, "text": HOSTILE, "category": HOSTILE} for name in (HOSTILE, ".", "..")]
    caller.load([*prompts, *odd])
    caller.create(control_share=0.25)
    for step in range(6):
        stepped(caller, step)


def stepped(caller: Caller, step: int) -> None:
    batch = caller.select(step, 16)
    outcomes = [
        {"prompt_id": p["prompt_id"], "successes": i % 9, "attempts": 8} for i, p in enumerate(batch["prompts"])
    ]
    caller.observe(step, *outcomes, selection_id=batch["selection_id"])


@pytest.mark.slow
@in_a_browser
@one_backend
def test_a_run_is_shown_as_it_changes_and_hostile_texts_are_only_shown(caller: Caller, page: Page) -> None:
    filled(caller)

    page.open(f"#/runs/{caller.run}")
    page.tab.until("document.querySelectorAll('canvas').length >= 5")

    shown = page.tab.text()
    assert page.tab.run("document.title") == f"{caller.run} · Even Odds"
    for heading in (
        "Informative share over steps",
        "Reliability",
        "Forecast against outcome",
        "Beliefs about the pool now",
        "Beliefs over the run",
        "Coverage",
        "Refits",
        "Categories",
        "Search",
    ):
        assert heading in shown
    assert page.tab.run("document.querySelectorAll('#view img, #view script').length") == 0
    assert "<img src=x" in shown
    page.tab.run("document.querySelector('details').open = true")
    stepped(caller, 6)
    page.tab.until("document.querySelector('details').innerText.includes('step 6')")
    assert page.tab.run("document.querySelector('details').open"), "what was opened stays open"
    assert page.tab.faults == []


@pytest.mark.slow
@in_a_browser
@one_backend
def test_where_events_do_not_get_through_the_page_asks_again(caller: Caller, page: Page) -> None:
    filled(caller)
    page.tab.call("Network.enable")
    page.tab.call("Network.setBlockedURLs", urls=["*/events*"])
    page.open(f"#/runs/{caller.run}")
    page.until_shown("96\n")

    stepped(caller, 6)

    page.until_shown("112\n")


FOLLOWED = """(async () => {
  const { follow } = await import("/page/live.js");
  window.streams = 0; window.looks = 0; window.atOnce = 0; window.mostAtOnce = 0; window.rested = 0;
  window.fetch = async (path, { signal }) => {
    ++streams;
    const body = new ReadableStream({ start(events) {
      window.tell = (id) => events.enqueue(new TextEncoder().encode(`id: ${id}\\ndata: {}\\n\\n`));
      signal.addEventListener("abort", () => events.error(new Error("left")));
    } });
    return new Response(body, { headers: { "content-type": "text/event-stream" } });
  };
  const plain = setTimeout;
  window.setTimeout = (done, after) => plain(() => { done(); rested += after === 500; }, after);
  window.hide = (hidden) => {
    Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
  };
  const look = async () => {
    ++looks;
    mostAtOnce = Math.max(mostAtOnce, ++atOnce);
    await new Promise((done) => (window.end = done));
    --atOnce;
  };
  follow("events", {}, look, new AbortController().signal);
})()"""
"""The page's own module, with a stream that `tell` feeds and looks that last until `end`."""


@pytest.mark.slow
@in_a_browser
@one_backend
def test_looks_follow_one_another_and_a_hidden_page_makes_none(page: Page) -> None:
    tab = page.tab
    tab.open(f"{page.base_url}/healthz")
    tab.until("document.readyState === 'complete'")
    tab.run(FOLLOWED)
    tab.until("streams === 1")

    for event in range(1, 4):
        tab.run(f"tell({event})")
    tab.until("looks === 1")
    tab.run("end()")
    tab.until("looks === 2")
    tab.run("end()")
    tab.until("atOnce === 0")
    tab.run("hide(true)")
    tab.until("rested === 1")
    hidden = (tab.run("looks"), tab.run("streams"))
    tab.run("hide(false)")
    tab.until("streams === 2")
    tab.run("tell(4)")
    tab.until("looks === 3")

    assert tab.run("mostAtOnce") == 1
    assert hidden == (2, 1), "three changes are one look and one more, and none while nobody sees it"
    assert tab.faults == []


@pytest.mark.slow
@in_a_browser
@one_backend
def test_a_dark_page_is_dark_before_its_modules_run(page: Page) -> None:
    page.tab.theme("dark")
    page.tab.call("Network.enable")
    page.tab.call("Network.setBlockedURLs", urls=["*/page.js"])

    page.tab.open(f"{page.base_url}/")
    page.tab.until("document.querySelector('footer')")

    assert page.tab.run("document.documentElement.dataset.theme") == "dark"


@pytest.mark.slow
@in_a_browser
@one_backend
def test_a_run_says_that_no_worker_takes_a_refit_that_is_due(caller: Caller, page: Page) -> None:
    caller.load([{"prompt_id": f"p{i}"} for i in range(128)])
    page.open(f"#/runs/{caller.run}")
    page.until_shown("fits the shared model once enough was observed")

    caller.observe(0, *({"prompt_id": f"p{i}", "successes": i % 9, "attempts": 8} for i in range(128)))

    page.until_shown("A refit is due, and no worker has taken it.")
    assert page.tab.faults == []


@pytest.mark.slow
@in_a_browser
@one_backend
def test_what_is_focused_and_scrolled_stays_when_figures_move(caller: Caller, page: Page) -> None:
    """And figures are not asked for again where other steps of them are shown."""
    caller.load([{"prompt_id": f"p{i}", "category": f"c{i % 60}"} for i in range(120)])
    stepped(caller, 0)
    address = f"#/runs/{caller.run}"
    page.open(address)
    page.tab.until("document.querySelectorAll('canvas').length")
    categories = "[...document.querySelectorAll('.scroll')].find((box) => box.closest('.tall'))"

    page.tab.run("document.querySelector('.skip').click()")
    assert page.tab.run("document.activeElement.id") == "main"
    assert page.address() == address
    page.tab.run(f"{categories}.focus(); document.querySelector('.tall').scrollTop = 150")
    page.tab.run("window.before = document.querySelector('#view h1'); true")
    stepped(caller, 1)
    page.tab.until("!window.before.isConnected")
    assert page.tab.run("document.querySelector('.tall').scrollTop") == 150
    assert page.tab.run(f"document.activeElement === {categories}")
    assert page.tab.run("document.getElementById('status').textContent") == "", "only what is wrong is read out"
    assert page.tab.run("document.getElementById('as-of').textContent").startswith("As of ")

    until(
        lambda: [share.last_step for share in caller.client.run(caller.run).informative_shares][-1:] == [1],
        "how the run stands is saved behind the reply",
    )
    asked = "performance.getEntriesByType('resource').filter((each) => each.name.endsWith('/report')).length"
    n_asked = []
    for first in (0, 1):
        page.tab.run(f"window.before = document.querySelector('#view h1'); location.hash = '{address}?from={first}'")
        page.tab.until("!window.before.isConnected")
        n_asked.append(page.tab.run(asked))
    assert page.tab.run("document.querySelector('input[name=from]').value") == "1"
    assert n_asked[0] == n_asked[1], "other steps of the same figures"
    assert page.tab.faults == []


ASKED = "performance.getEntriesByType('resource').filter((each) => each.name.includes({})).length"


@pytest.mark.slow
@in_a_browser
@one_backend
def test_beliefs_about_the_whole_pool_are_asked_for_where_they_are_seen(caller: Caller, page: Page) -> None:
    filled(caller)
    page.tab.size(1440, 300)
    page.open(f"#/runs/{caller.run}")
    page.tab.until("document.querySelectorAll('canvas').length === 5")
    stepped(caller, 6)
    page.until_shown("112\n")
    unseen = page.tab.run(ASKED.format("'/beliefs'"))

    page.tab.run("document.getElementById('ends').scrollIntoView({ behavior: 'instant' })")
    page.tab.until("document.querySelectorAll('canvas').length === 6")

    assert unseen == 0
    assert "As of step 6." in page.tab.text()
    assert page.tab.run("document.querySelectorAll('#ends td.id a').length") == 24
    stepped(caller, 7)
    page.until_shown("As of step 7.")
    assert page.tab.run(ASKED.format("'/beliefs'")) == 2, "once for each state that was seen"
    assert page.tab.faults == []


@pytest.mark.slow
@in_a_browser
@one_backend
def test_a_prompt_is_asked_for_once_and_a_list_keeps_what_is_open(caller: Caller, page: Page) -> None:
    filled(caller)
    page.open(f"#/runs/{caller.run}/prompts/p1")
    caller.observe(6, {"prompt_id": "p1", "successes": 3, "attempts": 8})
    page.tab.until("document.querySelector('.tiles').textContent.includes('last step6')")
    n_asked = page.tab.run(ASKED.format("'/prompt?'"))
    page.open("#/")
    page.tab.run(
        "new MutationObserver((all) => { window.removed = all.flatMap((each) => [...each.removedNodes]); })"
        ".observe(document.getElementById('view'), { childList: true }); document.querySelector('select').focus()"
    )

    stepped(caller, 7)
    page.until_shown("113")

    assert n_asked == 2, "when it was opened, and after the change"
    assert page.tab.run("window.removed.map((each) => each.tagName).includes('SECTION')")
    assert not page.tab.run("window.removed.map((each) => each.tagName).includes('FORM')"), "an open list would close"
    assert page.tab.run("document.activeElement.tagName") == "SELECT"
    page.choose("order", "name")
    page.tab.until("location.hash === '#/?sort=name'")
    page.tab.until("document.querySelector('select[name=order]').value === 'name'")
    assert page.tab.faults == []


@pytest.mark.slow
@in_a_browser
@one_backend
def test_charts_are_read_and_narrowed_by_keys_and_mouse(caller: Caller, page: Page) -> None:
    filled(caller)
    page.open(f"#/runs/{caller.run}")
    page.tab.until("document.querySelectorAll('canvas').length >= 5")

    page.tab.run("document.querySelector('.chart').focus()")
    page.tab.press("Home")
    page.tab.until("document.querySelector('.told').textContent.includes('step step 0, policy arm .')")
    page.tab.press("ArrowRight", shift=True)
    page.tab.press("ArrowRight", shift=True)
    page.tab.press("Enter")
    page.tab.until("location.hash.endsWith('?from=0&to=2')")
    assert page.tab.run("document.activeElement.className") == "chart", "keys go on where they were"
    page.tab.press("Escape")
    page.tab.until("document.querySelector('input[name=to]').value === '5'")  # drawn anew: a drag would end with it
    left, top, width, height = page.tab.run(
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('.u-over').getBoundingClientRect())"
    )
    middle = top + height / 2
    page.tab.drag((left + 0.42 * width, middle), (left + 0.6 * width, middle), (left + 0.78 * width, middle))
    page.tab.until("location.hash.endsWith('?from=2&to=4')")
    page.tab.run("history.back()")
    page.tab.until("document.querySelector('input[name=from]').value === '0'")
    coverage = "[...document.querySelectorAll('.chart')].find((box) => box.ariaLabel.startsWith('Coverage'))"
    page.tab.run(f"{coverage}.focus()")
    page.tab.press("End")
    page.tab.press("ArrowLeft")
    page.tab.until(f"{coverage}.textContent.includes('visits of a prompt 9\u201316, prompts 0')")


BLOCKED = """for (const storage of ["localStorage", "sessionStorage"])
  Object.defineProperty(window, storage, { get() { throw new DOMException("denied", "SecurityError"); } });"""
"""What Chromium does where site data is blocked."""


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("is_blocked", [False, True])
def test_a_key_and_a_theme_are_taken_also_where_the_browser_keeps_nothing(
    start_service: Callable[..., Service], tab: Browser, tmp_path: Path, is_blocked: bool
) -> None:
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db", asks_for_keys=True)
    store, now = Store(open_engine(service.database_url, timeout_seconds=PATIENCE_SECONDS)), datetime.now(timezone.utc)
    secret = new_secret()
    limits: dict[str, Any] = {"runs": "*", "requests_per_minute": None, "max_body_bytes": None}
    store.create_key("reader", secret_hash=hash_of(secret), scopes=frozenset({"read"}), now=now, **limits)
    store.put_run("math", RunSettings(embedder="none"), now=now)
    store.close()
    page = Page(tab, service.base_url)

    with at_each_start(tab, BLOCKED if is_blocked else ""):
        page.open("#/")
        page.until_shown("This service requires an API key")
        tab.run(f"document.querySelector('input[name=key]').value = {json.dumps(secret)}")
        tab.run("document.querySelector('form button').click()")
        page.until_shown("math")
        tab.run("document.getElementById('theme').click()")
        assert tab.run("document.documentElement.dataset.theme") == "dark"
        tab.run("document.getElementById('theme').click()")
        assert tab.run("document.documentElement.dataset.theme") == "light"
        tab.run("try { localStorage.clear(); } catch {}")


WRITTEN = """window.written = new Set();
const write = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const title = this.canvas.closest(".panel").querySelector("h2").textContent;
  if (this.textAlign === "right") written.add(JSON.stringify([title, text, Math.round(y)]));
  write.call(this, text, x, y);
};"""
"""Keeps what stands beside the y axes of charts."""


@pytest.mark.slow
@in_a_browser
@one_backend
def test_bars_of_few_prompts_are_counted_in_whole_ones(caller: Caller, page: Page) -> None:
    caller.load([{"prompt_id": f"p{i}"} for i in range(2)])
    with at_each_start(page.tab, WRITTEN):
        page.open(f"#/runs/{caller.run}")
        page.tab.until("[...written].some((each) => each.includes('Coverage'))")
        written = [json.loads(each) for each in page.tab.run("[...written]")]

    assert sorted(text for title, text, _ in written if title == "Coverage") == ["0", "1", "2"]
    assert page.tab.faults == []


@pytest.mark.slow
@in_a_browser
@one_backend
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_runs_over_the_edge(caller: Caller, page: Page, theme: str, width: int) -> None:
    filled(caller)
    page.tab.theme(theme)
    page.tab.size(width, 900)
    link = quote(HOSTILE, safe="")

    for view in ("#/", f"#/runs/{caller.run}", f"#/runs/{caller.run}/prompts/{link}", f"#/compare?run={caller.run}"):
        page.open(view)
        assert page.tab.run("document.documentElement.scrollWidth <= innerWidth"), view
        assert page.tab.run("document.documentElement.dataset.theme") == theme
        assert page.tab.faults == []


@pytest.mark.slow
@in_a_browser
@one_backend
@pytest.mark.parametrize("prompt_id", ["p1", ".", "..", HOSTILE])
def test_a_prompt_of_any_id_has_a_page_with_its_history(caller: Caller, page: Page, prompt_id: str) -> None:
    filled(caller)
    caller.observe(6, {"prompt_id": prompt_id, "successes": 3, "attempts": 8})
    page.open(f"#/runs/{caller.run}?search={quote(prompt_id, safe='')}")

    page.tab.run(
        f"[...document.querySelectorAll('td.id a')].find((a) => a.textContent === {json.dumps(prompt_id)}).click()"
    )

    page.tab.until(f"document.querySelector('h1')?.textContent === {json.dumps(prompt_id)}")
    page.tab.until("document.querySelector('.chart canvas')")
    page.tab.run("document.querySelector('.chart').focus()")
    page.tab.press("End")
    page.tab.until("document.querySelector('.told').textContent.includes('now, belief before .')")
    page.tab.press("ArrowLeft")
    page.tab.until("document.querySelector('.told').textContent.includes('(3 of 8)')")
    page.tab.run("history.back()")
    page.until_shown("Easiest prompts")
    assert page.tab.run("document.querySelector('input[name=search]').value") == prompt_id, "Back keeps the search"


@pytest.mark.slow
@in_a_browser
@one_backend
def test_an_empty_run_and_an_unknown_one_are_explained(caller: Caller, page: Page) -> None:
    empty, unknown = page.open(f"#/runs/{caller.run}"), page.open("#/runs/no-such-run")

    assert "No data: the pool is empty" in empty
    assert "No outcomes yet." in empty
    assert "Not found" in unknown
    assert "run 'no-such-run' does not exist" in unknown


@pytest.mark.slow
@in_a_browser
def test_runs_are_found_sorted_and_compared(
    start_service: Callable[..., Service], tab: Browser, tmp_path: Path
) -> None:
    """The address holds what was asked for, and Back leads to what was there before."""
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db")
    store, now = Store(open_engine(service.database_url, timeout_seconds=PATIENCE_SECONDS)), datetime.now(timezone.utc)
    alarm = Alarm("forecast_off", "Outcomes came at .00: look at the verifier.", 20, 14.5, 9.2)
    for i in range(70):
        run, _ = store.put_run(f"run-{i:02d}", RunSettings(embedder="none"), now=now - timedelta(days=2))
        store.add_prompts(run.id, [NewPrompt("a")], now=now - timedelta(days=2))
        first = NewSelection(selection_id=f"s{i}", step=0, arguments_hash="h", prompts=np.array([0]), reply="{}")
        store.record_selection(run.id, first, now=now - timedelta(hours=12))
        store.append_observations(run.id, Outcomes(0, [NewObservation.of_counts(0, 1, 2)]), now=now)
        broken = Summary("broken", alarms=(alarm,), informative_shares=(SharePoint(0, 1, 0.2), SharePoint(2, 3, 0.1)))
        helping = Summary("helping", lift=Estimate(0.3, 0.1, 0.5), rollouts_saved=Estimate(1200.0, 300.0, None))
        store.save_run_states([(run.id, 0, broken if i == 42 else helping if i == 7 else Summary("learning"))], now=now)
    store.close()
    page = Page(tab, service.base_url)

    shown = page.open("#/")
    assert page.names()[0] == "run-42", "alarms first"
    assert len(page.names()) == 50
    assert "forecast off since step 20" in shown
    tab.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Next 50').click()")
    tab.until("document.querySelectorAll('td.id a').length === 20")
    tab.run("history.back()")
    tab.until("document.querySelectorAll('td.id a').length === 50")
    page.choose("state", "helping")
    tab.until("document.querySelectorAll('td.id a').length === 1")
    assert (page.names(), page.address()) == (["run-07"], "#/?state=helping")
    said = "Helping: lift 30.0\u00a0points (10.0 to 50.0); 1,200 rollouts saved so far (300 to no limit)"
    said += ", about 2,400 a day"
    assert said in tab.text(), "no pointer has to rest on anything"
    page.open("#/?search=run-0&sort=name")
    assert page.names() == [f"run-{i:02d}" for i in range(10)]
    tab.run("[...document.querySelectorAll('input[type=checkbox]')].slice(0, 6).forEach((box) => box.click())")
    assert tab.run("document.querySelectorAll('input:checked').length") == 5, "no more than five"
    tab.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Compare').click()")
    page.until_shown("Rank correlation of forecasts")
    assert page.address() == "#/compare?" + "&".join(f"run=run-{i:02d}" for i in range(5))
    page.open("#/?sort=name")
    tab.run("document.querySelector('input[value=run-03]').click()")
    tab.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Next 50').click()")
    tab.until("document.querySelectorAll('td.id a').length === 20")
    assert "Chosen, and not on this page:" in tab.text()
    tab.run("document.querySelector('input[value=run-60]').click()")
    tab.run("document.querySelector('input[name=search]').value = 'run-1'")
    tab.run("document.querySelector('form[role=search] button').click()")
    page.until_shown("run-15")
    tab.run("document.querySelector('input[value=run-60]').click()")
    tab.run("document.querySelector('input[value=run-15]').click()")
    tab.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Compare').click()")
    page.until_shown("Rank correlation of forecasts")
    assert page.address() == "#/compare?run=run-03&run=run-15", "other pages and searches keep what is chosen"
    assert tab.faults == []


@pytest.mark.slow
@in_a_browser
@one_backend
def test_one_click_takes_back_what_was_learned_from_a_dead_verifier(caller: Caller, page: Page) -> None:
    caller.load([{"prompt_id": f"p{i}"} for i in range(400)])
    for step in range(8):
        batch = caller.select(step, 32)["prompts"]
        caller.observe(
            step,
            *({"prompt_id": p["prompt_id"], "successes": 4 if step < 6 else 0, "attempts": 8} for p in batch),
        )
    page.open(f"#/runs/{caller.run}")
    page.until_shown("Take back what was learned of steps 6 to 7")
    button = "[...document.querySelectorAll('.alarms button')].at(-1)"

    page.tab.run(f"window.confirm = (asked) => {{ window.asked = asked; return false; }}; {button}.click()")
    refused = caller.client.run(caller.run).observations
    page.tab.run(f"window.confirm = () => true; {button}.click()")

    page.tab.until("!document.querySelector('.alarms')")
    assert "cannot be undone" in page.tab.run("window.asked")
    assert refused == 8 * 32
    assert caller.client.run(caller.run).observations == 6 * 32
    assert page.tab.faults == []
