// One prompt: its text, the present belief, and what was believed and seen at each visit.

import { ask, here, link, replace } from "./page.js";
import { chart } from "./charts.js";
import { between, count, element, figures, number, panel, percent, quiet, tile } from "./elements.js";

const rate = (value) => number(value);

export async function showPrompt(run, id, current) {
  // The id stands in the query: no path can hold `.` and `..`, and proxies change some others.
  const prompt = await ask(`runs/${encodeURIComponent(run)}/prompt?prompt_id=${encodeURIComponent(id)}`, { view: current });
  if (!here(current)) return;
  document.title = `${id} · ${run} · Even Odds`;
  const { belief } = prompt;
  replace(
    quiet(element("a", { href: "#/" }, "Runs"), " / ", element("a", { href: link(run) }, run)),
    element("h1", {}, id),
    element("dl", { class: "tiles" },
      tile("success rate", number(belief.success_rate), between(...belief.interval, rate)),
      tile("informative", percent(belief.informative_probability)),
      tile("attempts seen", count(belief.attempts_seen)),
      tile("visits", count(prompt.visits)),
      tile("last step", count(prompt.last_step)),
      tile("category", prompt.category ?? "–"),
    ),
    panel("Text", element("pre", {}, prompt.text ?? "(no text kept)")),
    historyPanel(prompt),
  );
}

function historyPanel({ history, belief }) {
  if (!history.length) return panel("History", quiet("Never observed."));
  const visits = [...history].sort((a, b) => a.step - b.step || a.log_position - b.log_position);
  const x = visits.map((visit, i) => visit.step + spread(visits, i));
  const now = (x.at(-1) ?? 0) + Math.max(1, (x.at(-1) - x[0]) / 20);
  const forecasts = [...visits.map((visit) => visit.forecast ?? null), { success_rate: belief.success_rate, interval: belief.interval }];
  const told = (i) => (i < visits.length ? `step ${count(visits[i].step)}` : "now");
  const outcome = (value, i) => `${number(value)} (${+visits[i].successes.toFixed(3)} of ${count(visits[i].attempts)})`;
  const series = [
    { name: "belief before", colour: "forecast", values: forecasts.map((f) => f?.success_rate ?? null), low: forecasts.map((f) => f?.interval[0] ?? null), high: forecasts.map((f) => f?.interval[1] ?? null),
      shown: (value, i) => `${number(value)} (${between(...forecasts[i].interval, rate)})` },
    { name: "outcome", colour: "policy", dots: true, shown: outcome, values: [...visits.map((visit) => visit.successes / visit.attempts), null] },
  ];
  return panel("History",
    chart("Belief and outcomes over time", { x: [...x, now], series, xTitle: "step; the last point is now", yTitle: "success rate", at: told, shown: rate, tick: (value) => number(value, 2), y: [0, 1], steps: true }),
    quiet(`The belief with its central 90\u00a0% interval before each visit that a batch chose${history.length === 100 ? "; the newest 100 visits" : ""}.`),
    figures("History, oldest first", [["step", "number"], ["belief before", "number"], ["successes", "number"], ["attempts", "number"], ["rate", "number"]],
      () => visits.map((visit) => [count(visit.step), number(visit.forecast?.success_rate), String(+visit.successes.toFixed(3)), count(visit.attempts), number(visit.successes / visit.attempts)])));
}

/** Visits of one step stand a little apart, or they would hide each other. */
function spread(visits, i) {
  const first = visits.findIndex((visit) => visit.step === visits[i].step);
  return Math.min(0.9, 0.1 * (i - first));
}
