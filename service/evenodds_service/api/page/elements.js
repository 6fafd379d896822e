// What the views are made of. Every text goes in as a text node: what stands in a prompt is shown, never run.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
export const number = (value, digits = 3) => (isNumber(value) ? value.toFixed(digits).replace(/^(-?)0\./, "$1.") : "–");
export const percent = (value, digits = 1) => (isNumber(value) ? `${(100 * value).toFixed(digits)}\u00a0%` : "–");
export const points = (value) => (isNumber(value) ? `${(100 * value).toFixed(1)}\u00a0points` : "–");
export const count = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en") : "–");
export const moment = (iso) => (iso ? new Date(iso).toISOString().slice(0, 19).replace("T", " ") : "–");
export const between = (low, high, shown) => `${low === null ? "no limit" : shown(low)} to ${high === null ? "no limit" : shown(high)}`;
export const steps = ({ first_step: first, last_step: last }) => (first === last ? `step ${count(first)}` : `steps ${count(first)} to ${count(last)}`);
export const shorten = (text, most = 200) => (text ?? null) === null ? "(no text kept)" : text.length > most ? `${text.slice(0, most)} …` : text;
export const wordsOf = (code) => (code ?? "not looked at").replaceAll("_", " ");

export function ago(iso) {
  if (!iso) return "never";
  const seconds = Math.max(0, (Date.now() - new Date(iso)) / 1000);
  for (const [name, length] of [["day", 86400], ["hour", 3600], ["minute", 60]])
    if (seconds >= length) return `${Math.floor(seconds / length)} ${name}${seconds >= 2 * length ? "s" : ""} ago`;
  return "just now";
}

export const quiet = (...children) => element("p", { class: "quiet" }, ...children);
export const panel = (title, ...children) => element("section", { class: "panel" }, element("h2", {}, title), ...children);

export function wide(made) {
  made.classList.add("wide");
  return made;
}

/** On a phone, each row of the panel's table is a card. */
export function asCards(made) {
  made.classList.add("cards");
  return made;
}

/** Columns are `[title, class]`; rows hold texts or elements. On a phone the titles stand before the cells. */
export function table(caption, columns, rows) {
  const head = element("tr", {}, columns.map(([title, kind]) => element("th", { scope: "col", class: kind }, title)));
  const body = rows.map((cells) =>
    element("tr", {}, cells.map((cell, i) => element("td", { class: columns[i][1], "data-title": typeof columns[i][0] === "string" ? columns[i][0] : null }, ...[cell ?? "–"].flat()))),
  );
  return element(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("thead", {}, head), element("tbody", {}, body)),
  );
}

/** A table that is made when it is opened: most never are, and four of them hold half of what a page is made of. */
export function figures(caption, columns, rows) {
  const made = element("details", { ontoggle: () => made.fill() }, element("summary", {}, "Figures"));
  made.fill = () => made.open && made.children.length === 1 && made.append(table(caption, columns, rows()));
  return made;
}

/** In a narrow tile a line ends between the number and its unit, and never inside of the unit. */
export function tile(name, value, note) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value.replace("\u00a0", " "), note ? element("small", {}, ` ${note}`) : null));
}

/** The choices of a list, the chosen one marked; `changed` is given what is chosen. */
export function choice(label, options, chosen, changed) {
  const select = element("select", { name: label, onchange: () => changed(select.value) },
    options.map(([value, text]) => element("option", { value, selected: value === chosen }, text)));
  return element("label", {}, label, select);
}

// How a run stands, in one line.

export function verdictOf(state) {
  const { verdict, lift, rollouts_saved: saved } = state;
  const alarm = state.alarms?.[0];
  const measured = lift ? `lift ${points(lift.value)} (${between(lift.low, lift.high, (end) => (100 * end).toFixed(1))})` : "";
  if (verdict === "broken") return alarm ? `Broken: ${wordsOf(alarm.code)} since step ${count(alarm.since_step)}. ${alarm.next_step || alarm.message}` : "Broken: see the alarms";
  if (verdict === "helping") return `Helping: ${[measured, savings(saved, state)].filter(Boolean).join("; ")}`;
  if (verdict === "not_helping") return `Not helping: ${measured || "chosen batches give no more informative groups than uniform ones"}`;
  if (verdict === "no_data") return state.pool_size ? "No data: no outcomes were reported yet" : "No data: the pool is empty";
  if (verdict === "learning") return `Learning: ${state.control_share ? "too early to tell" : "there is no control arm to tell the lift by; set control_share"}${measured ? `; ${measured}` : ""}`;
  return "Not looked at since this release started";
}

function savings(saved, { began_at: began, active_at: active, fork_of: source }) {
  if (!saved) return "";
  const days = began && active && !source ? (new Date(active) - new Date(began)) / 86_400_000 : 0; // a fork has its source's savings
  const daily = days > 1 / 24 ? `, about ${count(saved.value / days)} a day` : "";
  return `${count(saved.value)} rollouts saved so far (${between(saved.low, saved.high, count)})${daily}`;
}

export const verdictLine = (state) =>
  element("p", { class: `verdict ${state.verdict ?? "unknown"}` }, verdictOf(state));

/** Shares from oldest to newest as a line of 96 by 24 pixels; the latest stands beside it. */
export function sparkline(shares) {
  if (!shares?.length) return "–";
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const x = (i) => 2 + (92 * i) / Math.max(1, shares.length - 1);
  line.setAttribute("points", shares.map(({ share }, i) => `${x(i).toFixed(1)},${(22 - 20 * share).toFixed(1)}`).join(" "));
  svg.setAttribute("viewBox", "0 0 96 24");
  svg.setAttribute("aria-hidden", "true");
  svg.append(line);
  return element("span", { class: "spark" }, svg, percent(shares.at(-1).share, 0));
}
