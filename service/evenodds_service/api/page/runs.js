// The list of runs, and up to five of them side by side.

import { ask, hashWith, here, link, replace, setQuery } from "./page.js";
import { chart } from "./charts.js";
import { ago, between, choice, count, element, number, panel, percent, points, quiet, sparkline, steps, table, verdictLine, verdictOf, wordsOf } from "./elements.js";

const MOST_COMPARED = 5;
const COLOURS = ["policy", "control", "forecast", "fourth", "fifth"];
const VERDICTS = ["broken", "not_helping", "helping", "learning", "no_data"];
const SORTS = [["alarms", "alarms first"], ["activity", "last active first"], ["lift", "largest lift first"], ["informative", "most informative first"], ["created", "newest first"], ["name", "name"]];
const FILTERS = ["state", "alarm", "sort", "search", "cursor"];
const SHOWN = 50;
let filters = { asked: null, form: null }; // what stands on the page is kept, so that a list that is open stays so
let compared = null; // the states of the runs that stand on the page

export async function showRuns(current) {
  const asked = new URLSearchParams({ limit: SHOWN, sort: "alarms" });
  for (const name of FILTERS) if (current.query.get(name)) asked.set(name, current.query.get(name));
  const page = await ask(`runs?${asked}`, { view: current });
  if (!here(current)) return;
  document.title = "Even Odds";
  const isFiltered = FILTERS.some((name) => current.query.get(name));
  replace(
    element("h1", {}, "Runs"),
    page.runs.length || isFiltered ? filterForm(asked) : null,
    page.runs.length ? runList(page, asked)
      : isFiltered ? panel("No such run", element("p", {}, "No run fits. ", element("a", { href: "#/" }, "Show all runs")))
      : panel("No runs yet", element("p", {}, "A run appears here as soon as a trainer connects, or you call ", element("code", {}, "PUT /runs/NAME"), ": see the ", element("a", { href: "docs" }, "API"), ".")),
  );
}

function filterForm(asked) {
  if (filters.form?.isConnected && filters.asked === String(asked)) return filters.form;
  const search = element("input", { type: "search", name: "search", maxlength: 128, autocomplete: "off", value: asked.get("search") ?? "" });
  const set = (name) => (value) => setQuery({ [name]: value || null, cursor: null });
  const form = element("form", {
    role: "search",
    onsubmit: (event) => {
      event.preventDefault();
      set("search")(search.value);
    },
  }, element("label", {}, "Part of the name", search), element("button", {}, "Find"),
  choice("state", [["", "any"], ...VERDICTS.map((verdict) => [verdict, wordsOf(verdict)])], asked.get("state") ?? "", set("state")),
  choice("alarms", [["", "any or none"], ["any", "with alarms"], ...(![null, "any"].includes(asked.get("alarm")) ? [[asked.get("alarm"), wordsOf(asked.get("alarm"))]] : [])], asked.get("alarm") ?? "", set("alarm")),
  choice("order", SORTS, asked.get("sort"), set("sort")));
  filters = { asked: String(asked), form };
  return form;
}

function runList(page, asked) {
  // What is chosen stands in the address, so that other pages and searches of the list keep it.
  const chosen = new Set(new URLSearchParams(location.hash.split("?")[1]).getAll("run").slice(0, MOST_COMPARED));
  const listed = page.runs.map((run) => run.run);
  const compare = element("button", { type: "button", onclick: () => (location.hash = `#/compare?${new URLSearchParams([...chosen].map((run) => ["run", run]))}`) }, "Compare");
  const boxOf = (run) => element("input", { type: "checkbox", value: run, checked: chosen.has(run), "aria-label": `Compare ${run}`, onchange: ({ target }) => {
    target.checked ? chosen.add(run) : chosen.delete(run);
    history.replaceState(null, "", hashWith({ run: [...chosen] }));
    limit();
  } });
  const boxes = listed.map(boxOf);
  const others = [...chosen].filter((run) => !listed.includes(run)).map(boxOf);
  const limit = () => {
    for (const box of [...boxes, ...others]) box.disabled = !box.checked && chosen.size >= MOST_COMPARED;
    compare.disabled = chosen.size < 2;
  };
  limit();
  const rows = page.runs.map((run, i) => [
    boxes[i],
    element("a", { href: link(run.run) }, run.run),
    element("div", { class: `verdict ${run.verdict ?? "unknown"}` }, verdictOf(run)),
    run.alarms?.length ? element("ul", { class: "codes" }, [...new Set(run.alarms.map((alarm) => alarm.code))].map((code) =>
      element("li", {}, element("a", { href: `#/?alarm=${encodeURIComponent(code)}` }, wordsOf(code)), ` since step ${count(Math.min(...run.alarms.filter((alarm) => alarm.code === code).map((alarm) => alarm.since_step)))}`))) : "none",
    run.lift ? [points(run.lift.value), element("small", {}, between(run.lift.low, run.lift.high, (end) => (100 * end).toFixed(1)))] : "–",
    sparkline(run.informative_shares), ago(run.active_at), count(run.head_step), count(run.observations), count(run.pool_size),
  ]);
  const made = panel("All runs",
    quiet(compare, ` Choose 2 to ${MOST_COMPARED} runs to compare.`),
    others.length ? element("p", { class: "chosen" }, "Chosen, and not on this page:", others.map((box) => element("label", {}, box, box.value))) : null,
    table("Runs", [["compare"], ["run", "id"], ["state"], ["alarms", "text"], ["lift", "number"], ["informative, newest", "number"], ["active", "time"], ["step", "number"], ["observations", "number"], ["pool", "number"]], rows),
    element("nav", { class: "pages", "aria-label": "Pages" },
      asked.get("cursor") ? element("button", { type: "button", onclick: () => setQuery({ cursor: null }) }, "First page") : null,
      page.next_cursor ? element("button", { type: "button", onclick: () => setQuery({ cursor: page.next_cursor }) }, `Next ${SHOWN}`) : null));
  made.classList.add("runs");
  return made;
}

export async function showComparison(current) {
  const names = [...new Set(current.query.getAll("run"))].slice(0, MOST_COMPARED);
  const path = (name) => `runs/${encodeURIComponent(name)}`;
  const states = await Promise.all(names.map((name) => ask(path(name))));
  const told = JSON.stringify(states);
  if (!current.isNew && told === compared) return; // nothing has happened since
  const reports = await Promise.all(names.map((name) => ask(`${path(name)}/report`)));
  if (!here(current)) return;
  compared = told;
  document.title = "Comparison · Even Odds";
  const runs = names.map((name, i) => ({ state: states[i], report: reports[i], name, colour: COLOURS[i] }));
  replace(
    quiet(element("a", { href: "#/" }, "Runs")),
    element("h1", {}, "Comparison"),
    runs.map(({ state, name, colour }) => element("section", { class: "compared" }, element("h2", {}, element("i", { class: `mark ${colour}`, "aria-hidden": "true" }), element("a", { href: link(name) }, name)), verdictLine(state))),
    element("div", { class: "grid" },
      lines("Informative share", "share of groups", runs, (w) => w.policy_informative_share?.value ?? w.informative_share),
      lines("Success rate", "success rate", runs, (w) => w.success_rate),
      lines("Rank correlation of forecasts", "rank correlation", runs, (w) => w.rank_correlation, [-1, 1])),
    panel("Figures", table("Comparison", [["run", "id"], ["lift", "number"], ["95\u00a0% interval"], ["rollouts saved", "number"], ["rank correlation", "number"], ["pool tried", "number"], ["observations", "number"]],
      runs.map(({ name, report: { lift, ...report } }) => [name, points(lift?.difference), lift ? between(...lift.difference_interval, points) : "–", percent(lift?.rollouts_saved_share), number(report.rank_correlation), percent(report.coverage.tried_share), count(report.observations)]))),
  );
}

function lines(title, yTitle, runs, valueOf, y = [0, 1]) {
  const drawn = runs.filter(({ report }) => report.windows.length);
  if (!drawn.length) return panel(title, quiet("No outcomes yet."));
  const middle = (w) => (w.first_step + w.last_step) / 2;
  const [x, ...values] = uPlot.join(drawn.map(({ report }) => [report.windows.map(middle), report.windows.map(valueOf)]));
  const series = drawn.map(({ name, colour }, i) => ({ name, colour, values: values[i].map((value) => value ?? null) }));
  return panel(title, chart(title, { x, series, xTitle: "step", yTitle, shown: (value) => number(value), tick: (value) => number(value, 2), at: (i) => steps({ first_step: x[i], last_step: x[i] }), y, steps: true }));
}
