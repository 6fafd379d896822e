// The operator's page: which view the address asks for, what it reads, and how it stays up to date. It reads the service's
// own HTTP interface and nothing else, by relative paths, so that it works under any prefix.

import { clear, recolour, refocus } from "./charts.js";
import { element } from "./elements.js";
import { follow } from "./live.js";
import { showPrompt } from "./prompt.js";
import { showRun } from "./run.js";
import { showComparison, showRuns } from "./runs.js";

const view = document.getElementById("view");
const statusLine = document.getElementById("status"); // is read out, so the time of each look stands beside it
const asOf = document.getElementById("as-of");
let shown = { path: null }; // the view that is shown; what comes for an older one is dropped

export const link = (run) => `#/runs/${encodeURIComponent(run)}`;
export const promptLink = (run, id) => `${link(run)}/prompts/${encodeURIComponent(id)}`;
export const here = (current) => current === shown;

/** The address with other parameters: a list is one that is repeated, null takes one out. */
export function hashWith(changes) {
  const [path, query] = location.hash.split("?");
  const asked = new URLSearchParams(query);
  for (const [name, value] of Object.entries(changes)) {
    asked.delete(name);
    for (const each of value === null ? [] : [value].flat()) asked.append(name, each);
  }
  return `${path || "#/"}${String(asked) ? `?${asked}` : ""}`;
}

/** Change parameters of the address. The browser's Back undoes it. */
export const setQuery = (changes) => (location.hash = hashWith(changes));

function routeOf(hash) {
  const [path, query] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const current = { path, query: new URLSearchParams(query), isNew: true, events: "events", view: (view) => showRuns(view) };
  try {
    const [kind, run, sub, ...id] = path.split("/").map(decodeURIComponent);
    if (kind === "compare") return { ...current, view: showComparison };
    if (kind !== "runs" || !run) return current;
    current.events = `runs/${encodeURIComponent(run)}/events`;
    return { ...current, view: sub === "prompts" && id[0] ? (view) => showPrompt(run, id.join("/"), view) : (view) => showRun(run, view) };
  } catch {
    return { ...current, view: () => Promise.reject(new Refused(404, `the address ${hash} cannot be read`)) };
  }
}

function show() {
  const before = shown;
  const current = (shown = routeOf(location.hash));
  if (before.path === current.path) {
    // The same view, asked for other things: what follows it goes on.
    current.isNew = before.isNew;
    current.leave = before.leave;
    refresh(current);
    return;
  }
  before.leave?.abort();
  statusLine.textContent = "Loading …";
  asOf.textContent = "";
  view.replaceChildren();
  clear();
  current.leave = new AbortController();
  const { signal } = current.leave;
  refresh(current).then(() => signal.aborted || follow(current.events, authorization(), () => refresh(shown), signal, current.event));
}

async function refresh(current) {
  if (!here(current)) return;
  try {
    await current.view(current);
    if (!here(current)) return;
    current.isNew = false;
    statusLine.textContent = "";
    asOf.textContent = `As of ${new Date().toLocaleTimeString()}`;
    // When the view first stood on the screen, in milliseconds since the navigation: benchmarks/page.py reads it.
    requestAnimationFrame(() => setTimeout(() => (view.dataset.drawnMs ??= Math.round(performance.now()))));
  } catch (error) {
    if (!here(current)) return;
    statusLine.textContent = error.message;
    if (error.status === 401) askForKey(current);
    else if (error.status === 404) replace(element("h1", {}, "Not found"), element("p", {}, element("a", { href: "#/" }, "All runs")));
    else if (error.status === 422 && current.query.get("cursor")) setQuery({ cursor: null });
  }
}

/** Show these elements. What was typed, opened, chosen, focused and scrolled stays while the figures move. */
export function replace(...children) {
  const focused = document.activeElement;
  const typed = new Map([...view.querySelectorAll("input")].filter((input) => input.checked || (input.type !== "checkbox" && input.value !== input.defaultValue)).map((input) => [fieldOf(input), input]));
  const opened = new Set([...view.querySelectorAll("details[open]")].map(detailsName));
  const scrolled = new Map([...view.querySelectorAll(".scroll, .tall")].filter((box) => box.scrollLeft || box.scrollTop).map((box) => [boxName(box), { left: box.scrollLeft, top: box.scrollTop }]));
  const key = focused && view.contains(focused) ? fieldOf(focused) : null;
  place(children.flat().filter((child) => child !== null));
  for (const details of view.querySelectorAll("details")) {
    details.open = opened.has(detailsName(details));
    details.fill();
  }
  for (const input of view.querySelectorAll("input")) {
    const before = typed.get(fieldOf(input));
    if (!before) continue;
    if (input.type === "checkbox") {
      input.checked = before.checked;
      input.dispatchEvent(new Event("change"));
    } else input.value = before.value;
  }
  for (const box of scrolled.size ? view.querySelectorAll(".scroll, .tall") : []) box.scrollTo({ ...scrolled.get(boxName(box)), behavior: "instant" });
  refocus();
  if (key && !focused.isConnected) [...view.querySelectorAll("input, select, button, a, summary, .scroll")].find((each) => fieldOf(each) === key)?.focus({ preventScroll: true });
}

/** Let the view hold these elements alone. Those that it holds already are not taken out: an open select would close. */
function place(children) {
  for (const old of [...view.childNodes]) if (!children.includes(old)) old.remove();
  children.forEach((child, i) => view.childNodes[i] !== child && view.insertBefore(child, view.childNodes[i] ?? null));
}

const fieldOf = (each) => `${each.tagName} ${each.name ?? ""} ${each.type === "checkbox" ? each.value : (each.getAttribute("href") ?? each.getAttribute("aria-label") ?? (each.tagName === "BUTTON" ? each.textContent : ""))}`;
const boxName = (box) => `${box.className} ${(box.matches("[aria-label]") ? box : box.querySelector("[aria-label]")).getAttribute("aria-label")}`;
const detailsName = (details) => details.closest(".panel")?.querySelector("h2").textContent;

function askForKey(current) {
  const input = element("input", { name: "key", type: "password", required: true, autocomplete: "off" });
  current.leave.abort();
  replace(
    element("h1", {}, "This service requires an API key"),
    element("form", {
      onsubmit: (event) => {
        event.preventDefault();
        keep("sessionStorage", "evenodds-key", input.value.trim());
        shown = { path: null };
        show();
      },
    }, element("label", {}, "Key with the scope read; kept in this tab only", input), element("button", {}, "Open")),
  );
}

// Talking to the service.

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The body of a reply. A view that is given remembers which event the reply shows, if it says so. */
export async function ask(path, { view: asking, ...more } = {}) {
  const asked = early.get(path); // is the answer to one question
  early.delete(path);
  const reply = await (asked ?? fetch(path, { ...more, headers: { Accept: "application/json", ...authorization(), ...more.headers } }));
  const body = await reply.json().catch(() => null);
  if (!reply.ok) throw new Refused(reply.status, `${body?.detail ?? `the service answered ${reply.status}`}${body?.request_id ? ` (request ${body.request_id})` : ""}`);
  if (asking) asking.event = reply.headers.get("X-EvenOdds-Event");
  return body;
}

/** Change something, and show what came of it. */
export async function send(path, body) {
  const current = shown;
  try {
    await ask(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
    await refresh(current);
  } catch (error) {
    if (here(current)) statusLine.textContent = error.message;
  }
}

// The button of the theme, which theme.js has applied.

const themeButton = document.getElementById("theme");
function theme() {
  themeButton.textContent = applyTheme() ? "Light" : "Dark"; // what a click changes to
  recolour();
}
themeButton.addEventListener("click", () => {
  keep("localStorage", "evenodds-theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  theme();
});
systemDark.addEventListener("change", theme);
theme();

// The address names the view: a link to #main would leave it.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});

addEventListener("hashchange", (event) => {
  const moved = new URL(event.oldURL).hash.split("?")[0] !== location.hash.split("?")[0];
  show();
  if (moved) document.getElementById("main").focus();
});
show();
