// One run: how it stands, its charts over steps, its categories and prompts.

import { ask, here, link, promptLink, replace, send, setQuery } from "./page.js";
import { chart } from "./charts.js";
import { asCards, between, count, element, figures, moment, number, panel, percent, points, quiet, shorten, steps, table, tile, verdictLine, wide, wordsOf } from "./elements.js";

const rate = (value) => number(value, 3);
const empty = (title, text = "No outcomes yet.") => panel(title, quiet(text));
const path = (run) => `runs/${encodeURIComponent(run)}`;
let drawn = { told: "", hash: "" }; // what stands on the page, of which state, at which address

export async function showRun(run, current) {
  const rest = () => Promise.all([ask(`${path(run)}/report`), ask(`${path(run)}/refits`)]);
  const early = current.isNew ? rest() : null; // nothing is drawn yet: do not wait for the state first
  early?.catch(() => null); // where the state fails too, its error is the one that is shown
  const state = await ask(path(run));
  const told = JSON.stringify(state);
  const isSame = !current.isNew && told === drawn.told;
  if (isSame && location.hash === drawn.hash) return; // nothing has happened since
  const figuresNow = isSame ? drawn.figures : await (early ?? rest());
  const found = current.query.get("search") ? await ask(`${path(run)}/prompts?limit=20&search=${encodeURIComponent(current.query.get("search"))}`) : null;
  if (!here(current)) return;
  drawn = { run, current, state, told, hash: location.hash, figures: figuresNow, found };
  document.title = `${run} · Even Odds`;
  draw();
}

function draw() {
  const { run, current, state, figures: [report, refits], found } = drawn;
  const range = rangeOf(current.query);
  const windows = report.windows.map((w) => ({ ...w, middle: (w.first_step + w.last_step) / 2 }));
  const over = { range: spanOf(windows, range), windows };
  const [spread, ends] = poolPanels(run);
  replace(
    quiet(element("a", { href: "#/" }, "Runs")),
    element("h1", {}, run),
    verdictLine(state),
    alarmList(run, state.alarms),
    tiles(state, report),
    report.lift_missing ? quiet(`No lift: ${report.lift_missing}`) : null,
    noteList(report.notes),
    windows.length ? rangeForm(windows, range) : null,
    element("div", { class: "grid" },
      informativeOverSteps(over), successOverSteps(over), beliefsOverSteps(over),
      reliability(report), spread, coveragePanel(report.coverage)),
    report.others ? othersPanel(report.others) : null,
    element("div", { class: "grid" }, categoriesPanel(report.categories, report.other_categories), refitsPanel(refits)),
    ends,
    searchPanel(run, current.query.get("search"), found),
  );
}

// Beliefs about the whole pool take long to compute where it is large: they are asked for while they are in view, and
// then a tenth of the time at most.

const RESTS = 9; // after each answer, of the time that it took
let pool = { run: null }; // what was answered last, and of which state
const seen = new Set(); // panels of it that are in view
const inView = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) isIntersecting ? seen.add(target) : seen.delete(target);
  lookAtPool(pool);
});

/** How the beliefs are spread, and the prompts at both ends. */
function poolPanels(run) {
  if (pool.run !== run) pool = { run, beliefs: null, told: null, problem: null, nextAt: 0, isAsking: false };
  const { beliefs, problem, step } = pool;
  const titled = (title, shown) => (beliefs ? shown(title) : panel(title, quiet(problem ?? "Loading …")));
  const spread = titled("Beliefs about the pool now", (title) => beliefHistogram(title, beliefs, step));
  const ends = element("div", { class: "grid pair", id: "ends" },
    titled("Hardest prompts", (title) => promptsPanel(run, title, beliefs.hardest)),
    titled("Easiest prompts", (title) => promptsPanel(run, title, beliefs.easiest)));
  inView.disconnect();
  seen.clear();
  for (const each of [spread, ends]) inView.observe(each);
  return [spread, ends];
}

async function lookAtPool(asked) {
  const isDue = () => asked === pool && seen.size > 0 && asked.run === drawn.run && asked.told !== drawn.told && here(drawn.current);
  if (asked.isAsking || !isDue()) return;
  asked.isAsking = true;
  await new Promise((done) => setTimeout(done, asked.nextAt - performance.now()));
  if (isDue()) {
    const { told, state } = drawn;
    const began = performance.now();
    try {
      const beliefs = await ask(`${path(asked.run)}/beliefs?shown=12`);
      Object.assign(asked, { beliefs, step: state.head_step, problem: null });
    } catch (error) {
      asked.problem = error.message;
    }
    asked.told = told;
    asked.nextAt = performance.now() + RESTS * (performance.now() - began);
    if (asked === pool && asked.run === drawn.run && here(drawn.current)) draw();
  }
  asked.isAsking = false;
}

function alarmList(run, alarms) {
  if (!alarms?.length) return null;
  return element("ul", { class: "alarms", "aria-label": "Alarms" },
    alarms.map((alarm) => element("li", {},
      element("strong", {}, `${wordsOf(alarm.code)}${alarm.category ? ` in ${alarm.category}` : ""}`), `: ${alarm.message}`,
      alarm.remedy ? remedyButton(run, alarm.remedy) : null)));
}

/** What was learned meanwhile is taken back with one click, after a question. */
function remedyButton(run, { operation, body }) {
  const what = body.from_step === undefined ? `after step ${count(body.step)}` : `of ${steps({ first_step: body.from_step, last_step: body.to_step ?? body.from_step })}`;
  const press = async () => {
    if (!confirm(`Take back everything that ${run} learned ${what}? This cannot be undone.`)) return;
    await send(`runs/${encodeURIComponent(run)}/${operation}`, body);
  };
  return element("button", { type: "button", onclick: press }, `Take back what was learned ${what}`);
}

function tiles(state, report) {
  const policy = report.arms.find((arm) => arm.arm === "policy")?.informative_share;
  const { lift, newest } = report;
  const recent = newest?.lift ?? null;
  return element("dl", { class: "tiles" },
    tile("predictor", state.predictor, `groups of ${state.group_size}; ${state.model_version ? `snapshot ${count(state.model_version)}` : "no snapshot yet"}`),
    tile("step", count(state.head_step)),
    tile("observations", count(state.observations)),
    tile("informative, newest steps", percent(newest?.informative_share), newest ? `${steps(newest)}; whole run ${percent(policy?.value)}` : null),
    tile("lift, newest steps", recent ? points(recent.difference) : "–", recent ? `${between(...recent.difference_interval, points)}; whole run ${points(lift?.difference)}` : "not measured"),
    tile("rollouts saved, whole run", lift ? percent(lift.rollouts_saved_share) : "–", (lift?.rollouts_saved_share ?? null) === null ? "not measured" : between(...lift.rollouts_saved_share_interval, percent)),
    tile("pool tried", percent(report.coverage.tried_share), `of ${count(report.coverage.pool_size)} prompts`),
    tile("rank correlation, newest steps", number(newest?.rank_correlation), `whole run ${number(report.rank_correlation)}`),
  );
}

function noteList(notes) {
  return notes?.length ? element("ul", { class: "quiet", "aria-label": "Notes" }, notes.map((note) => element("li", {}, note.message))) : null;
}

// Steps that the charts show, in the address.

function rangeOf(query) {
  const ends = ["from", "to"].map((name) => (/^\d{1,16}$/.test(query.get(name) ?? "") ? Number(query.get(name)) : null));
  return ends.some((end) => end !== null) ? ends : null;
}

function spanOf(windows, range) {
  if (!windows.length) return null;
  const [first, last] = [windows[0].first_step, windows.at(-1).last_step];
  const [from, to] = [range?.[0] ?? first, range?.[1] ?? last];
  return from <= to ? [from, to] : [to, from];
}

const selectSteps = (range) => setQuery({ from: range?.[0] ?? null, to: range?.[1] ?? null });

function rangeForm(windows, range) {
  const field = (name, value) => element("label", {}, name, element("input", { type: "number", name, min: 0, value: String(value), required: true }));
  const [from, to] = spanOf(windows, range);
  return element("form", {
    class: "range",
    "aria-label": "Steps shown",
    onsubmit: (event) => {
      event.preventDefault();
      selectSteps([event.target.elements.from.value, event.target.elements.to.value]);
    },
  }, field("from", from), field("to", to), element("button", {}, "Show steps"),
  element("button", { type: "button", disabled: !range, onclick: () => selectSteps(null) }, "All steps"),
  element("span", { class: "quiet" }, "or drag over a chart"));
}

const windowText = (windows) => (i) => steps(windows[i]);
const overSteps = ({ windows, range }, more) => ({
  x: windows.map((w) => w.middle), xTitle: "step", steps: true, at: windowText(windows), shown: rate, tick: (value) => number(value, 2), y: [0, 1], range, select: selectSteps, ...more,
});
const shareText = (windows, arm) => (value, i) => (windows[i][arm] ? `${rate(value)} (${between(...windows[i][arm].interval, rate)})` : rate(value));

function informativeOverSteps({ windows: all, range }) {
  const title = "Informative share over steps";
  const windows = all.filter((w) => w.informative_share !== null || w.policy_informative_share || w.control_informative_share);
  if (!windows.length) return empty(title);
  const arm = (name, key, colour) => ({
    name, colour, shown: shareText(windows, key), values: windows.map((w) => (w[key] ?? (key.startsWith("policy") ? { value: w.informative_share } : null))?.value ?? null),
    low: windows.map((w) => w[key]?.interval[0] ?? null), high: windows.map((w) => w[key]?.interval[1] ?? null),
  });
  const series = [arm("policy arm", "policy_informative_share", "policy"), arm("control arm", "control_informative_share", "control"),
    { name: "forecast", colour: "forecast", dash: [4, 3], values: windows.map((w) => w.informative_forecast) }];
  return panel(title, chart(title, overSteps({ windows, range }, { yTitle: "share of groups", series })),
    figures(title, [["steps"], ["policy", "number"], ["control", "number"], ["forecast", "number"], ["rank correlation", "number"], ["observations", "number"]],
      () => windows.map((w) => [steps(w), rate(w.policy_informative_share?.value), rate(w.control_informative_share?.value), rate(w.informative_forecast), rate(w.rank_correlation), count(w.observations)])));
}

function successOverSteps({ windows: all, range }) {
  const title = "Forecast against outcome";
  const windows = all.filter((w) => w.success_rate !== null);
  if (!windows.length) return empty(title);
  const series = [{ name: "outcome", colour: "policy", values: windows.map((w) => w.success_rate) },
    { name: "forecast", colour: "forecast", dash: [4, 3], values: windows.map((w) => w.success_rate_forecast) }];
  return panel(title, chart(title, overSteps({ windows, range }, { yTitle: "success rate", series })),
    figures(title, [["steps"], ["forecast", "number"], ["outcome", "number"]], () => windows.map((w) => [steps(w), rate(w.success_rate_forecast), rate(w.success_rate)])));
}

function beliefsOverSteps({ windows: all, range }) {
  const title = "Beliefs over the run";
  const windows = all.filter((w) => w.believed_counts?.some((n) => n));
  if (!windows.length) return empty(title);
  const shares = windows.map((w) => w.believed_counts.map((n) => n / w.believed_counts.reduce((sum, each) => sum + each, 0)));
  const within = (each, from, to) => each.reduce((sum, share, i) => sum + (i >= from && i < to ? share : 0), 0);
  const medianOf = (each) => {
    let below = 0;
    const i = each.findIndex((share) => (below += share) >= 0.5);
    return (i + 1 - (below - 0.5) / each[i]) / each.length;
  };
  const series = [{ name: "median belief", colour: "control", values: shares.map(medianOf), shown: (value, i) => `${rate(value)}; ${percent(within(shares[i], 4, 16))} between .2 and .8` }];
  const cells = windows.map((w, i) => ({ from: w.first_step - 0.5, to: w.last_step + 0.5, shares: shares[i] }));
  return panel(title, chart(title, overSteps({ windows, range }, { yTitle: "believed success rate", series, cells })),
    quiet("The stronger the colour, the more prompts. The gps belief, as it was when each stretch of steps began."),
    figures(title, [["steps"], ["below .2", "number"], [".2 to .4", "number"], [".4 to .6", "number"], [".6 to .8", "number"], [".8 and above", "number"]],
      () => windows.map((w, i) => [steps(w), ...[0, 4, 8, 12, 16].map((from) => percent(within(shares[i], from, from + 4)))])));
}

function reliability(report) {
  const title = "Reliability";
  const kinds = [["success rate", report.success_rate, "policy"], ["informative", report.informative, "forecast"]];
  if (!kinds.some(([, quality]) => quality.count)) return empty(title);
  const bins = kinds.map(([, quality]) => quality.reliability.filter((bin) => bin.count));
  const [x, ...values] = uPlot.join([[[0, 1], [0, 1]], ...bins.map((each) => [each.map((bin) => bin.mean_forecast), each.map((bin) => bin.mean_outcome)])]);
  const series = [{ name: "as forecast", colour: "quiet", dash: [3, 3], values: values[0] },
    ...kinds.map(([name, quality, colour], i) => ({ name: `${name}, mean error ${rate(quality.calibration_error)}`, colour, values: values[i + 1] }))];
  return panel(title, chart(title, { x, series, xTitle: "mean forecast", yTitle: "mean outcome", shown: rate, tick: (value) => number(value, 2), at: (i) => rate(x[i]), y: [0, 1] }),
    figures(title, [["forecast of"], ["from", "number"], ["to", "number"], ["mean forecast", "number"], ["mean outcome", "number"], ["count", "number"]],
      () => kinds.flatMap(([name, quality]) => quality.reliability.map((bin) => [name, number(bin.from_forecast, 1), number(bin.to_forecast, 1), rate(bin.mean_forecast), rate(bin.mean_outcome), count(bin.count)]))));
}

function beliefHistogram(title, { success_rate_counts: counts }, step) {
  if (!counts.some(Boolean)) return empty(title, "The pool is empty.");
  const bin = (i) => `${number(i / counts.length, 2)} to ${number((i + 1) / counts.length, 2)}`;
  return panel(title, chart(title, {
    x: counts.map((_, i) => (i + 0.5) / counts.length), xTitle: "believed success rate", yTitle: "prompts", bars: true, shown: count, at: bin,
    series: [{ name: "prompts", colour: "policy", values: counts }],
  }), step === null ? null : quiet(`As of step ${count(step)}.`),
  figures(title, [["believed success rate"], ["prompts", "number"]], () => counts.map((value, i) => [bin(i), count(value)])));
}

function coveragePanel(coverage) {
  if (!coverage.pool_size) return empty("Coverage", "The pool is empty.");
  const names = coverage.visits.map((bin) => (bin.to_visits === null ? `${bin.from_visits}+` : bin.to_visits > bin.from_visits ? `${bin.from_visits}–${bin.to_visits}` : String(bin.from_visits)));
  return panel("Coverage", names.length ? chart("Coverage", {
    x: names.map((_, i) => i), xTitle: "visits of a prompt", yTitle: "prompts", bars: true, shown: count, at: (i) => names[i], ticks: names.map((name, i) => [i, name]),
    series: [{ name: "prompts", colour: "control", values: coverage.visits.map((bin) => bin.prompts) }],
  }) : null, quiet(`${percent(coverage.tried_share)} of ${count(coverage.pool_size)} prompts tried, ${number(coverage.mean_visits, 2)} visits a prompt.`));
}

function refitsPanel({ refits, is_due: isDue }) {
  const worker = element("code", {}, "evenodds work");
  const due = isDue ? quiet("A refit is due, and no worker has taken it. Check that a worker (", worker, ") is running.") : null;
  if (!refits.length) return wide(panel("Refits", due ?? quiet("None yet. A worker (", worker, ") fits the shared model once enough was observed.")));
  return wide(asCards(panel("Refits", due, table("Refits", [["asked (UTC)"], ["status"], ["model", "number"], ["fitted in seconds", "number"], ["error", "text"]],
    refits.slice(0, 8).map((refit) => [moment(refit.requested_at), refit.status, count(refit.model_version), number(refit.report?.seconds_fitting, 1), refit.error ?? ""])))));
}

function othersPanel(others) {
  return panel("What others showed",
    quiet(`Believed with weight ${number(others.weight)} together; worth ${number(others.per_observation)} nats an outcome so far.`),
    table("What others showed", [["source", "id"], ["weight", "number"], ["has tried", "number"]],
      others.sources.map((source) => [source.name, number(source.weight), percent(source.prompts_share)])));
}

/** How far a category's outcomes lie from their forecasts, in standard errors: the worst come first. */
function trouble({ observed, attempts, success_rate: seen, success_rate_forecast: forecast }) {
  if (!observed || seen === null || forecast === null) return 0;
  return Math.abs(seen - forecast) / Math.sqrt(Math.max(forecast * (1 - forecast), 0.01) / attempts + 0.05 / observed);
}

function categoriesPanel(categories, others) {
  const all = [...categories].sort((a, b) => trouble(b) - trouble(a));
  if (others) all.push({ ...others, category: "(all later categories)" });
  return wide(asCards(panel("Categories", all.length
    ? element("div", { class: "tall" }, table("Categories, the one farthest from its forecast first",
        [["category", "id"], ["prompts", "number"], ["tried", "number"], ["success rate", "number"], ["forecast", "number"], ["off by, in standard errors", "number"], ["informative", "number"], ["informative forecast", "number"]],
        all.map((c) => [c.category ?? "(none)", count(c.prompts), count(c.tried), rate(c.success_rate), rate(c.success_rate_forecast), number(trouble(c), 1), rate(c.informative_share?.value), rate(c.informative_forecast)])))
    : quiet("The pool is empty."))));
}

const excerpt = (text) => element("span", { class: "clamp" }, shorten(text));
const idLink = (run, id) => element("a", { href: promptLink(run, id) }, id);

function promptsPanel(run, title, prompts) {
  return asCards(panel(title, prompts.length
    ? table(title, [["prompt", "id"], ["success rate", "number"], ["attempts", "number"], ["text", "text"]],
        prompts.map((p) => [idLink(run, p.prompt_id), rate(p.success_rate), count(p.attempts_seen), excerpt(p.text)]))
    : quiet("The pool is empty.")));
}

function searchPanel(run, searched, found) {
  const input = element("input", { name: "search", type: "search", maxlength: 200, autocomplete: "off", value: searched ?? "" });
  const form = element("form", {
    role: "search",
    onsubmit: (event) => {
      event.preventDefault();
      setQuery({ search: input.value || null });
    },
  }, element("label", {}, "Find a prompt by a part of its id or text", input), element("button", {}, "Find"));
  const made = panel("Search", form, found && element("div", {}, found.prompts.length
    ? table("Prompts found", [["prompt", "id"], ["category"], ["text", "text"]], found.prompts.map((p) => [idLink(run, p.prompt_id), p.category ?? "", excerpt(p.text)]))
    : element("p", {}, "No prompt has this in its id or text.")));
  made.classList.add("cards");
  return made;
}
