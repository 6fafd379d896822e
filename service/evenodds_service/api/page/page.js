// The operator's page: runs, and the live picture of one. Reads the service's own HTTP interface and nothing else.
// Every text goes in as a text node: what stands in a prompt is shown, never run.

const POLL_MS = 4000;
const SHOWN_RUNS = 100;
const view = document.getElementById("view");
const statusLine = document.getElementById("status");
let lastShown = ""; // the state of the run that is drawn
let generation = 0; // of the route that is shown; what comes for an older one is dropped

// Building blocks.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const number = (value, digits = 3) =>
  value === null || value === undefined || !Number.isFinite(value) ? "–" : value.toFixed(digits).replace(/^(-?)0\./, "$1.");
const percent = (value) => (value === null || value === undefined || !Number.isFinite(value) ? "–" : `${(100 * value).toFixed(1)}\u00a0%`);
const count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));
const moment = (iso) => (iso ? new Date(iso).toISOString().slice(0, 19).replace("T", " ") : "–");

function table(caption, columns, rows) {
  const head = element("tr", {}, columns.map(([title, kind]) => element("th", { scope: "col", class: kind }, title)));
  const body = rows.map((cells) => element("tr", {}, cells.map((cell, i) => element("td", { class: columns[i][1] }, cell ?? "–"))));
  return element(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("thead", {}, head), element("tbody", {}, body)),
  );
}

function panel(title, ...children) {
  return element("section", { class: "panel" }, element("h2", {}, title), ...children);
}

// Charts. Each has its figures as a table beside it, for those who cannot see it.

const WIDTH = 480;
const HEIGHT = 230;
const MARGIN = { left: 36, right: 10, top: 10, bottom: 36 };
const TICKS_AT = HEIGHT - 21; // the axis title stands below

function frame(label, { x, y, xTicks, yTicks, xTitle }) {
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  for (const tick of yTicks) {
    svg.append(shape("line", { class: "axis", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y(tick), y2: y(tick) }));
    svg.append(shape("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick).replace(/^0\./, ".")));
  }
  xTicks.forEach((tick, i) => {
    const anchor = i && i === xTicks.length - 1 ? "end" : "middle"; // the last one would be cut off
    svg.append(shape("text", { x: x(tick), y: TICKS_AT, "text-anchor": anchor }, typeof tick === "number" && tick >= 1000 ? count(tick) : String(tick).replace(/^0\./, ".")));
  });
  if (xTitle) svg.append(shape("text", { x: WIDTH - MARGIN.right, y: HEIGHT - 5, "text-anchor": "end" }, xTitle));
  return svg;
}

const scale = (from, to, low, high) => (value) => low + ((value - from) / (to - from || 1)) * (high - low);

function line(points, x, y, colour, dash = "") {
  const drawn = points.filter(([, value]) => value !== null && value !== undefined);
  const path = drawn.map(([at, value], i) => `${i ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join(" ");
  const group = shape("g", {});
  group.append(shape("path", { d: path, fill: "none", stroke: `var(--${colour})`, "stroke-width": 2, "stroke-dasharray": dash }));
  if (drawn.length < 20) for (const [at, value] of drawn) group.append(shape("circle", { cx: x(at), cy: y(value), r: 2.5, fill: `var(--${colour})` }));
  return group;
}

function band(points, x, y, colour) {
  const drawn = points.filter((point) => point !== null);
  if (drawn.length < 2) return shape("g", {});
  const there = drawn.map(([at, , high]) => `${x(at).toFixed(1)} ${y(high).toFixed(1)}`);
  const back = drawn.map(([at, low]) => `${x(at).toFixed(1)} ${y(low).toFixed(1)}`).reverse();
  return shape("path", { d: `M${[...there, ...back].join("L")}Z`, fill: `var(--${colour})`, opacity: 0.15 });
}

function legend(entries) {
  return element(
    "ul",
    { class: "legend" },
    entries.map(([colour, text]) => {
      const mark = element("i", { "aria-hidden": "true" });
      mark.style.background = `var(--${colour})`;
      return element("li", {}, mark, text);
    }),
  );
}

function figures(caption, columns, rows) {
  return element("details", {}, element("summary", {}, "Figures"), table(caption, columns, rows));
}

function shareOverSteps(windows) {
  const rows = windows.filter((w) => w.informative_share !== null || w.policy_informative_share || w.control_informative_share);
  if (!rows.length) return panel("Informative share over steps", element("p", { class: "quiet" }, "No outcomes yet."));
  const middle = (w) => (w.first_step + w.last_step) / 2;
  const x = scale(rows[0].first_step, rows.at(-1).last_step, MARGIN.left, WIDTH - MARGIN.right);
  const y = scale(0, 1, HEIGHT - MARGIN.bottom, MARGIN.top);
  const svg = frame("Share of informative groups over steps, of the policy and the control arm, with the forecast", {
    x,
    y,
    xTicks: [rows[0].first_step, Math.round((rows[0].first_step + rows.at(-1).last_step) / 2), rows.at(-1).last_step],
    yTicks: [0, 0.25, 0.5, 0.75, 1],
    xTitle: "step",
  });
  const interval = (arm) => (w) => (w[arm] ? [middle(w), ...w[arm].interval] : null);
  svg.append(band(rows.map(interval("policy_informative_share")), x, y, "policy"));
  svg.append(band(rows.map(interval("control_informative_share")), x, y, "control"));
  svg.append(line(rows.map((w) => [middle(w), w.informative_forecast]), x, y, "forecast", "4 3"));
  svg.append(line(rows.map((w) => [middle(w), (w.policy_informative_share ?? { value: w.informative_share }).value]), x, y, "policy"));
  svg.append(line(rows.map((w) => [middle(w), w.control_informative_share?.value ?? null]), x, y, "control"));
  return panel(
    "Informative share over steps",
    svg,
    legend([["policy", "policy arm"], ["control", "control arm"], ["forecast", "forecast"]]),
    figures(
      "Informative share by steps",
      [["steps"], ["policy", "number"], ["control", "number"], ["forecast", "number"], ["rank correlation", "number"], ["observations", "number"]],
      rows.map((w) => [
        `${w.first_step}–${w.last_step}`,
        number(w.policy_informative_share?.value),
        number(w.control_informative_share?.value),
        number(w.informative_forecast),
        number(w.rank_correlation),
        count(w.observations),
      ]),
    ),
  );
}

function reliability(report) {
  const kinds = [["success rate", report.success_rate, "policy"], ["informative", report.informative, "forecast"]];
  if (!kinds.some(([, quality]) => quality.count)) return panel("Reliability", element("p", { class: "quiet" }, "No outcomes yet."));
  const x = scale(0, 1, MARGIN.left, WIDTH - MARGIN.right);
  const y = scale(0, 1, HEIGHT - MARGIN.bottom, MARGIN.top);
  const svg = frame("Reliability: mean outcome against mean forecast, in tenths of the forecast", {
    x, y, xTicks: [0, 0.25, 0.5, 0.75, 1], yTicks: [0, 0.25, 0.5, 0.75, 1], xTitle: "forecast",
  });
  svg.append(shape("line", { class: "axis", x1: x(0), y1: y(0), x2: x(1), y2: y(1), "stroke-dasharray": "3 3" }));
  for (const [, quality, colour] of kinds) {
    const bins = quality.reliability.filter((bin) => bin.count);
    const most = Math.max(1, ...bins.map((bin) => bin.count));
    svg.append(line(bins.map((bin) => [bin.mean_forecast, bin.mean_outcome]), x, y, colour));
    for (const bin of bins)
      svg.append(shape("circle", { cx: x(bin.mean_forecast), cy: y(bin.mean_outcome), r: 2 + 6 * Math.sqrt(bin.count / most), fill: `var(--${colour})`, opacity: 0.35 }));
  }
  return panel(
    "Reliability",
    svg,
    legend(kinds.map(([name, quality, colour]) => [colour, `${name}: error ${number(quality.calibration_error)}`])),
    figures(
      "Reliability",
      [["forecast of"], ["from", "number"], ["to", "number"], ["mean forecast", "number"], ["mean outcome", "number"], ["count", "number"]],
      kinds.flatMap(([name, quality]) =>
        quality.reliability.map((bin) => [name, number(bin.from_forecast, 1), number(bin.to_forecast, 1), number(bin.mean_forecast), number(bin.mean_outcome), count(bin.count)]),
      ),
    ),
  );
}

function forecastAgainstOutcome(windows) {
  const rows = windows.filter((w) => w.success_rate !== null);
  if (!rows.length) return panel("Forecast against outcome", element("p", { class: "quiet" }, "No outcomes yet."));
  const middle = (w) => (w.first_step + w.last_step) / 2;
  const x = scale(rows[0].first_step, rows.at(-1).last_step, MARGIN.left, WIDTH - MARGIN.right);
  const y = scale(0, 1, HEIGHT - MARGIN.bottom, MARGIN.top);
  const svg = frame("Mean success rate of what was observed, forecast and outcome, over steps", {
    x, y, xTicks: [rows[0].first_step, rows.at(-1).last_step], yTicks: [0, 0.25, 0.5, 0.75, 1], xTitle: "step",
  });
  svg.append(line(rows.map((w) => [middle(w), w.success_rate_forecast]), x, y, "forecast", "4 3"));
  svg.append(line(rows.map((w) => [middle(w), w.success_rate]), x, y, "policy"));
  return panel("Forecast against outcome", svg, legend([["forecast", "forecast"], ["policy", "outcome"]]),
    figures("Success rate by steps", [["steps"], ["forecast", "number"], ["outcome", "number"]],
      rows.map((w) => [`${w.first_step}–${w.last_step}`, number(w.success_rate_forecast), number(w.success_rate)])));
}

function bars(label, counts, names, colour) {
  const most = Math.max(1, ...counts);
  const x = scale(0, counts.length, MARGIN.left, WIDTH - MARGIN.right);
  const y = scale(0, most, HEIGHT - MARGIN.bottom, MARGIN.top);
  const svg = frame(label, { x, y, xTicks: [], yTicks: [0, most] });
  const width = (WIDTH - MARGIN.left - MARGIN.right) / counts.length;
  counts.forEach((value, i) => {
    svg.append(shape("rect", { x: x(i) + 1, width: Math.max(1, width - 2), y: y(value), height: y(0) - y(value), fill: `var(--${colour})`, opacity: 0.8 }));
    if (names[i] !== "") svg.append(shape("text", { x: x(i) + width / 2, y: TICKS_AT, "text-anchor": "middle" }, names[i]));
  });
  return svg;
}

function beliefHistogram(beliefs) {
  const counts = beliefs.success_rate_counts;
  const names = counts.map((_, i) => (i % 5 === 0 ? number(i / counts.length, 2) : ""));
  return panel(
    "Beliefs about the pool now",
    bars("Prompts by believed success rate", counts, names, "policy"),
    element("p", { class: "quiet" }, "Prompts by believed success rate."),
    figures("Prompts by believed success rate", [["from", "number"], ["to", "number"], ["prompts", "number"]],
      counts.map((value, i) => [number(i / counts.length, 2), number((i + 1) / counts.length, 2), count(value)])),
  );
}

function beliefsOverSteps(windows) {
  const title = "Beliefs over the run";
  const rows = windows.filter((w) => w.believed_counts).map((w) => ({ ...w, total: w.believed_counts.reduce((sum, n) => sum + n, 0) }));
  if (!rows.length) return panel(title, element("p", { class: "quiet" }, "No outcomes yet."));
  const [first, last] = [rows[0].first_step, rows.at(-1).last_step];
  const x = scale(first, last + 1, MARGIN.left, WIDTH - MARGIN.right);
  const y = scale(0, 1, HEIGHT - MARGIN.bottom, MARGIN.top);
  const svg = frame("Share of the pool by believed success rate, over steps: the darker, the more prompts", {
    x, y, xTicks: [first, last], yTicks: [0, 0.25, 0.5, 0.75, 1], xTitle: "step",
  });
  const share = (w, i) => w.believed_counts[i] / w.total;
  for (const w of rows)
    w.believed_counts.forEach((n, i) => {
      const bins = w.believed_counts.length;
      // By its root, or one full bin leaves all others pale.
      if (n) svg.append(shape("rect", { class: "cell", x: x(w.first_step), width: x(w.last_step + 1) - x(w.first_step), y: y((i + 1) / bins), height: y(i / bins) - y((i + 1) / bins), fill: "var(--policy)", opacity: Math.min(1, Math.sqrt(2 * share(w, i))).toFixed(3) }));
    });
  const between = (w, from, to) => percent(w.believed_counts.reduce((sum, _, i) => sum + (i >= from && i < to ? share(w, i) : 0), 0));
  return panel(
    title,
    svg,
    element("p", { class: "quiet" }, "Believed success rate (upwards) by step: the stronger the colour, the more prompts. The gps belief, as it was when each stretch of steps began."),
    figures("Share of the pool by believed success rate, over steps",
      [["steps"], ["below .2", "number"], [".2 to .4", "number"], [".4 to .6", "number"], [".6 to .8", "number"], [".8 and above", "number"]],
      rows.map((w) => [`${w.first_step}–${w.last_step}`, ...[0, 4, 8, 12, 16].map((from) => between(w, from, from + 4))])),
  );
}

function coveragePanel(coverage) {
  const names = coverage.visits.map((bin) => (bin.to_visits === null ? `${bin.from_visits}+` : bin.to_visits > bin.from_visits + 1 ? `${bin.from_visits}–${bin.to_visits - 1}` : String(bin.from_visits)));
  return panel(
    "Coverage",
    bars("Prompts by number of visits", coverage.visits.map((bin) => bin.prompts), names, "control"),
    element("p", { class: "quiet" }, `${percent(coverage.tried_share)} of ${count(coverage.pool_size)} prompts tried, ${number(coverage.mean_visits, 2)} visits a prompt.`),
  );
}

// Views.

function alarmList(alarms) {
  if (!alarms?.length) return null;
  return element("ul", { class: "alarms", "aria-label": "Alarms" },
    alarms.map((alarm) => element("li", {}, element("strong", {}, alarm.code.replaceAll("_", " ")), ` since step ${alarm.since_step}: ${alarm.message}`)));
}

function tile(name, value, note) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value, note ? element("small", {}, ` ${note}`) : null));
}

const link = (run) => `#/runs/${encodeURIComponent(run)}`;
const promptLink = (run, id) => `${link(run)}/prompts/${encodeURIComponent(id)}`;

async function showRuns(current) {
  const page = await ask(`runs?limit=${SHOWN_RUNS}`);
  if (current !== generation) return;
  document.title = "Even Odds";
  const rows = page.runs.map((run) => [
    element("a", { href: link(run.run) }, run.run), run.predictor, count(run.pool_size), count(run.head_step), count(run.observations), count(run.model_version),
    run.last_refit ? `${run.last_refit.status} ${moment(run.last_refit.finished_at ?? run.last_refit.requested_at)}` : "–",
  ]);
  replace(
    element("h1", {}, "Runs"),
    rows.length
      ? panel("All runs", table("Runs", [["run", "id"], ["predictor"], ["pool", "number"], ["step", "number"], ["observations", "number"], ["model", "number"], ["last refit (UTC)"]], rows),
          page.next_cursor ? element("p", { class: "quiet" }, `The first ${SHOWN_RUNS} by name; open another by its address, #/runs/NAME.`) : null)
      : panel("No runs yet", element("p", {}, "Create one: ", element("code", {}, "PUT /runs/NAME"), " — see the ", element("a", { href: "docs" }, "API"), ".")),
  );
}

async function showRun(run, current) {
  const path = `runs/${encodeURIComponent(run)}`;
  const rest = () => Promise.all([ask(`${path}/report`), ask(`${path}/beliefs`), ask(`${path}/refits`)]);
  const early = view.hasChildNodes() ? null : rest(); // nothing is drawn yet: do not wait for the state first
  early?.catch(() => null); // where the state fails too, its error is the one that is shown
  const state = await ask(path);
  const shown = `${current} ${JSON.stringify(state)}`;
  if (shown === lastShown) return; // nothing has happened since
  const [report, beliefs, refits] = await (early ?? rest());
  if (current !== generation) return;
  lastShown = shown;
  document.title = `${run} · Even Odds`;
  const lift = report.lift;
  const policy = report.arms.find((arm) => arm.arm === "policy")?.informative_share;
  replace(
    element("p", { class: "quiet" }, element("a", { href: "#/" }, "Runs")),
    element("h1", {}, run),
    alarmList(state.alarms),
    element("dl", { class: "tiles" },
      tile("predictor", state.predictor, `groups of ${state.group_size}`),
      tile("step", count(state.head_step)),
      tile("observations", count(state.observations)),
      tile("informative", percent(policy?.value), policy ? `of ${count(policy.observations)}` : null),
      tile("lift over control", lift ? percent(lift.difference) : "–", lift ? `${percent(lift.difference_interval[0])} to ${percent(lift.difference_interval[1])}` : null),
      tile("rollouts saved", lift ? percent(lift.rollouts_saved_share) : "–"),
      tile("coverage", percent(report.coverage.tried_share)),
      tile("rank correlation", number(report.rank_correlation)),
      tile("skill against MoPPS", number(report.skill.per_observation), "nats"),
      tile("model", count(state.model_version)),
    ),
    report.lift_missing ? element("p", { class: "quiet" }, `No lift: ${report.lift_missing}`) : null,
    element("div", { class: "grid" },
      shareOverSteps(report.windows),
      reliability(report),
      forecastAgainstOutcome(report.windows),
      beliefHistogram(beliefs),
      beliefsOverSteps(report.windows),
      coveragePanel(report.coverage),
      refitsPanel(refits.refits),
    ),
    report.others ? othersPanel(report.others) : null,
    element("div", { class: "grid pair" }, categoriesPanel(report.categories), promptsPanel(run, "Hardest prompts", beliefs.hardest), promptsPanel(run, "Easiest prompts", beliefs.easiest)),
    searchPanel(run),
  );
  // When the charts first stood on the screen, in milliseconds since the navigation: benchmarks/page.py reads it.
  requestAnimationFrame(() => setTimeout(() => (view.dataset.drawnMs ??= Math.round(performance.now()))));
}

function refitsPanel(refits) {
  if (!refits.length) return panel("Refits", element("p", { class: "quiet" }, "None yet. A worker (", element("code", {}, "evenodds work"), ") fits the shared model once enough was observed."));
  return panel("Refits", table("Refits", [["asked (UTC)"], ["status"], ["model", "number"], ["fit s", "number"], ["error", "text"]],
    refits.slice(0, 8).map((refit) => [moment(refit.requested_at), refit.status, count(refit.model_version), number(refit.report?.seconds_fitting, 1), refit.error ?? ""])));
}

function othersPanel(others) {
  return panel("What others showed",
    element("p", { class: "quiet" }, `Believed with weight ${number(others.weight)} together; worth ${number(others.per_observation)} nats an outcome so far.`),
    table("What others showed", [["source", "id"], ["weight", "number"], ["has tried", "number"]],
      others.sources.map((source) => [source.name, number(source.weight), percent(source.prompts_share)])));
}

function categoriesPanel(categories) {
  const made = panel("Categories", categories.length
    ? table("Categories", [["category", "id"], ["prompts", "number"], ["tried", "number"], ["success rate", "number"], ["informative", "number"], ["forecast", "number"]],
        categories.slice(0, 50).map((c) => [c.category ?? "(none)", count(c.prompts), count(c.tried), number(c.success_rate), number(c.informative_share?.value), number(c.informative_forecast)]))
    : element("p", { class: "quiet" }, "The pool is empty."));
  made.classList.add("wide");
  return made;
}

function promptRows(run, prompts) {
  return table("Prompts", [["prompt", "id"], ["success rate", "number"], ["attempts", "number"], ["text", "text"]],
    prompts.map((p) => [element("a", { href: promptLink(run, p.prompt_id) }, p.prompt_id), number(p.success_rate), count(p.attempts_seen), shorten(p.text)]));
}

const shorten = (text) => (text === null || text === undefined ? "(no text kept)" : text.length > 200 ? `${text.slice(0, 200)} …` : text);

function promptsPanel(run, title, prompts) {
  return panel(title, prompts.length ? promptRows(run, prompts) : element("p", { class: "quiet" }, "The pool is empty."));
}

function searchPanel(run) {
  const found = element("div", { role: "status" });
  const input = element("input", { name: "search", type: "search", required: true, maxlength: 200, autocomplete: "off" });
  const form = element("form", {
    role: "search",
    onsubmit: async (event) => {
      event.preventDefault();
      try {
        const page = await ask(`runs/${encodeURIComponent(run)}/prompts?limit=20&search=${encodeURIComponent(input.value)}`);
        found.replaceChildren(
          page.prompts.length
            ? table("Prompts found", [["prompt", "id"], ["category"], ["text", "text"]],
                page.prompts.map((p) => [element("a", { href: promptLink(run, p.prompt_id) }, p.prompt_id), p.category ?? "", shorten(p.text)]))
            : element("p", {}, "No prompt has this in its id or text."),
        );
      } catch (error) {
        found.replaceChildren(element("p", {}, error.message));
      }
    },
  }, element("label", {}, "Find a prompt by a part of its id or text", input), element("button", {}, "Find"));
  const made = panel("Search", form, found);
  made.id = "search";
  return made;
}

async function showPrompt(run, id, current) {
  const prompt = await ask(`runs/${encodeURIComponent(run)}/prompts/${encodeURIComponent(id)}`);
  if (current !== generation) return;
  document.title = `${id} · ${run} · Even Odds`;
  const belief = prompt.belief;
  const history = [...prompt.history].reverse();
  replace(
    element("p", { class: "quiet" }, element("a", { href: "#/" }, "Runs"), " / ", element("a", { href: link(run) }, run)),
    element("h1", {}, id),
    element("dl", { class: "tiles" },
      tile("success rate", number(belief.success_rate), `${number(belief.interval[0])} to ${number(belief.interval[1])}`),
      tile("informative", percent(belief.informative_probability)),
      tile("attempts seen", count(belief.attempts_seen)),
      tile("visits", count(prompt.visits)),
      tile("last step", count(prompt.last_step)),
      tile("category", prompt.category ?? "–"),
    ),
    panel("Text", element("pre", {}, prompt.text ?? "(no text kept)")),
    element("div", { class: "grid" },
      panel("History", history.length
        ? table("History, oldest first", [["step", "number"], ["successes", "number"], ["attempts", "number"], ["rate", "number"]],
            history.map((visit) => [count(visit.step), String(visit.successes), count(visit.attempts), number(visit.successes / visit.attempts)]))
        : element("p", { class: "quiet" }, "Never observed."))),
  );
}

function askForKey() {
  const input = element("input", { name: "key", type: "password", required: true, autocomplete: "off" });
  replace(
    element("h1", {}, "This service asks for an API key"),
    element("form", {
      onsubmit: (event) => {
        event.preventDefault();
        sessionStorage.setItem("evenodds-key", input.value.trim());
        show();
      },
    }, element("label", {}, "Key with the scope read; kept in this tab only", input), element("button", {}, "Open")),
  );
}

function replace(...children) {
  const typed = view.querySelector("input");
  const typing = typed && document.activeElement === typed && view.contains(document.activeElement);
  const opened = [...view.querySelectorAll("details")].map((details) => details.open);
  const search = view.querySelector("#search");
  view.replaceChildren(...children.filter((child) => child !== null));
  const fresh = view.querySelector("#search");
  if (search && fresh) {
    fresh.replaceWith(search); // what was typed and found stays while the figures move
    if (typing) search.querySelector("input").focus();
  }
  [...view.querySelectorAll("details")].forEach((details, i) => (details.open = opened[i] ?? false));
}

// Talking to the service.

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path) {
  const key = sessionStorage.getItem("evenodds-key");
  const reply = await fetch(path, { headers: { Accept: "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) } });
  const body = await reply.json().catch(() => null);
  if (!reply.ok) throw new Refused(reply.status, body?.detail ?? `the service answered ${reply.status}`);
  return body;
}

async function refresh(current) {
  const [kind, run, sub, id] = location.hash.replace(/^#\//, "").split("/").map(decodeURIComponent);
  try {
    if (kind === "runs" && run && sub === "prompts" && id) await showPrompt(run, id, current);
    else if (kind === "runs" && run) await showRun(run, current);
    else await showRuns(current);
    if (current === generation) statusLine.textContent = `As of ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    if (current !== generation) return;
    statusLine.textContent = error.message;
    if (error.status === 401) return askForKey();
    if (error.status === 404) replace(element("h1", {}, "Not found"), element("p", {}, element("a", { href: "#/" }, "All runs")));
  }
  setTimeout(() => current === generation && (document.hidden ? wait(current) : refresh(current)), POLL_MS);
}

function wait(current) {
  document.addEventListener("visibilitychange", () => current === generation && refresh(current), { once: true });
}

function show() {
  generation += 1;
  statusLine.textContent = "Loading …";
  view.replaceChildren();
  refresh(generation);
}

// Theme: the system's, until the button says otherwise.

const themeButton = document.getElementById("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  const chosen = localStorage.getItem("evenodds-theme");
  const dark = chosen ? chosen === "dark" : systemDark.matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  themeButton.setAttribute("aria-pressed", String(dark));
}
themeButton.addEventListener("click", () => {
  localStorage.setItem("evenodds-theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  theme();
});
systemDark.addEventListener("change", theme);
theme();

addEventListener("hashchange", () => {
  show();
  document.getElementById("main").focus();
});
show();
