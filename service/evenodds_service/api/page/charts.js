// Charts by uPlot, which draws, hovers and zooms. Here stands what it leaves open: colours of both themes, keys, a band
// between two lines, and charts that stay where they are while their figures move.

const FONT = "12px system-ui, sans-serif";
const HEIGHT = 240;
const charts = new Map(); // label -> chart on the page

const palette = new Map(); // colours of the present theme: to read one while a view is built, all styles are computed

function colour(name) {
  if (!palette.has(name)) palette.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return palette.get(name);
}

/** All charts are measured together, and built from what was measured: to ask for a width lays out the whole page. */
const watch = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const made = [...charts.values()].find(({ box }) => box === target);
    const width = Math.floor(contentRect.width);
    if (!made || made.width === width) continue;
    made.width = width;
    if (made.plot && width) made.plot.setSize({ width, height: HEIGHT });
    else build(made);
  }
});

/** Forget the charts: another view is shown. */
export function clear() {
  watch.disconnect();
  for (const { plot } of charts.values()) plot?.destroy();
  charts.clear();
}

/** Give the chart its focus back that had it before it moved. */
export function refocus() {
  for (const made of charts.values()) {
    if (made.hadFocus) made.box.focus({ preventScroll: true });
    made.hadFocus = false;
  }
}

/** Draw all anew, in the colours of the present theme. */
export function recolour() {
  palette.clear();
  for (const chart of charts.values()) build(chart);
}

/**
 * A chart that reads by hover, touch and arrow keys.
 *
 * @param label Names it, on the page and to screen readers.
 * @param spec.x Where the values stand, ascending; spec.xTitle and spec.yTitle are the axes' titles.
 * @param spec.series `{name, values, colour, dash, low, high, shown}`; null is a gap, `low` and `high` a band around it.
 * @param spec.y Ends of the y axis; from the values where left out. spec.shown: a value as text.
 * @param spec.at Text of the x at an index. spec.ticks: [x, text] pairs instead of numbers.
 * @param spec.bars Draw bars; spec.dots draw points without lines.
 * @param spec.cells Heights 0 to 1 of a column of cells behind each x, `{from, to, shares}`.
 * @param spec.range, spec.select [first, last] of x that is shown, and what to call with another one, or with null.
 */
export function chart(label, spec) {
  const known = charts.get(label);
  if (known) {
    known.spec = spec;
    known.hadFocus = document.activeElement === known.box; // which it loses on its way into the new view
    build(known);
    return known.box;
  }
  const told = document.createElement("output");
  told.className = "told";
  const box = document.createElement("div");
  box.className = "chart";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `${label}. Arrow keys read values${spec.select ? "; with Shift they mark steps, Enter shows those, Escape all" : ""}.`);
  box.append(told);
  const made = { box, told, spec, plot: null, idx: null, width: 0 };
  watch.observe(box);
  box.addEventListener("keydown", (event) => onKey(made, event));
  charts.set(label, made);
  return box;
}

function dataOf(spec) {
  return [spec.x, ...spec.series.flatMap((one) => (one.low ? [one.values, one.high, one.low] : [one.values]))];
}

function ends({ x, range, bars, xEnds }) {
  const [min, max] = range ?? xEnds ?? [x[0], x.at(-1)];
  const margin = bars ? (x.length > 1 ? (x[1] - x[0]) / 2 : 0.5) : max > min ? 0 : 0.5;
  return { min: min - margin, max: max + margin };
}

function build(made) {
  const { box, spec, width } = made;
  if (!width) return;
  const read = made.idx; // what is read stays read
  made.plot?.destroy();
  const shown = spec.shown ?? ((value) => String(value));
  const newest = spec.steps ? spec.x.length - 1 : null; // is read where nothing is hovered over
  const atX = (i) => (i === null ? "–" : spec.at ? spec.at(i) : String(spec.x[i]));
  const series = [{ label: spec.xTitle, value: (_, __, ___, i) => atX(i ?? newest) }];
  const bands = [];
  for (const one of spec.series) {
    const stroke = colour(one.colour);
    const told = (_, __, ___, i) => ((one.values[i ?? newest] ?? null) === null ? "–" : (one.shown ?? shown)(one.values[i ?? newest], i ?? newest));
    series.push({
      label: one.name, stroke, width: 2, dash: one.dash, value: told, spanGaps: true, fill: spec.bars ? stroke : undefined,
      paths: spec.bars ? uPlot.paths.bars({ size: [0.85, 80] }) : one.dots ? () => null : undefined,
      points: { show: !spec.bars && (one.dots || spec.x.length < 40) && !one.dash, size: 6, fill: stroke },
    });
    if (!one.low) continue;
    const at = series.length;
    for (const bound of ["high", "low"]) series.push({ label: bound, stroke: "transparent", width: 0, spanGaps: true, points: { show: false }, class: "bound" });
    bands.push({ series: [at, at + 1], fill: `${stroke}33` });
  }
  const axis = (title, more) => ({
    label: title, font: FONT, labelFont: FONT, labelSize: 20, labelGap: 2, stroke: colour("quiet"),
    grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1, size: 4 }, ...more,
  });
  const ticks = spec.ticks && { splits: () => spec.ticks.map(([at]) => at), values: () => spec.ticks.map(([, text]) => text) };
  made.plot = new uPlot({
    width, height: HEIGHT, padding: [10, 14, 0, 0], series, bands,
    scales: { x: { time: false, range: (_, min, max) => [min, max] }, y: spec.y ? { range: spec.y } : { range: (_, min, max) => [Math.min(0, min), max || 1] } },
    axes: [
      axis(spec.xTitle, { size: 28, space: 60, values: (_, at) => at.map((value) => (value >= 1000 ? value.toLocaleString("en") : String(+value.toFixed(3)))), incrs: spec.steps ? whole : undefined, ...ticks }),
      axis(spec.yTitle, { incrs: spec.bars ? whole : undefined, values: (_, at) => at.map((value) => (spec.tick ?? shown)(value)), size: (_, texts) => 14 + 7 * Math.max(1, ...(texts ?? []).map((text) => text.length)) }),
    ],
    cursor: { drag: { x: Boolean(spec.select), y: false, setScale: false }, sync: spec.select ? { key: "steps", setSeries: false } : undefined, bind: { dblclick: () => () => made.spec.select?.(null) } },
    hooks: { setCursor: [(plot) => (made.idx = plot.cursor.idx)], drawClear: [(plot) => drawCells(plot, made.spec)], setSelect: [(plot) => plot.select.width > 0 && take(made)] },
  }, dataOf(spec), box);
  made.plot.setScale("x", ends(spec));
  if (read !== null && read < spec.x.length) queueMicrotask(() => point(made, read));
}

/** Distances between ticks of an axis that counts: there is no half of a step or of a prompt. */
const whole = Array.from({ length: 16 }, (_, i) => [10 ** i, 2 * 10 ** i, 5 * 10 ** i]).flat();

/** The marked steps become the range that is shown. */
function take({ plot, spec }) {
  const [from, to] = [plot.select.left, plot.select.left + plot.select.width].map((left) => Math.round(plot.posToVal(left, "x")));
  plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  spec.select?.([Math.max(0, from), Math.max(0, to)]);
}

function drawCells(plot, { cells }) {
  const { ctx } = plot;
  ctx.save();
  ctx.fillStyle = colour("policy");
  for (const { from, to, shares } of cells ?? []) {
    const [left, right] = [from, to].map((x) => Math.min(Math.max(plot.valToPos(x, "x", true), plot.bbox.left), plot.bbox.left + plot.bbox.width));
    shares.forEach((share, i) => {
      const [top, bottom] = [(i + 1) / shares.length, i / shares.length].map((y) => plot.valToPos(y, "y", true));
      ctx.globalAlpha = Math.min(1, Math.sqrt(2 * share)); // by its root, or one full bin leaves all others pale
      ctx.fillRect(Math.round(left), Math.round(top), Math.round(right) - Math.round(left), Math.round(bottom) - Math.round(top));
    });
  }
  ctx.restore();
}

const point = ({ plot, spec }, i) => plot.setCursor({ left: plot.valToPos(spec.x[i], "x"), top: plot.over.clientHeight / 2 });

function onKey(made, event) {
  const { plot, spec, told } = made;
  if (!plot) return;
  const last = spec.x.length - 1;
  const now = made.idx;
  const next = { ArrowRight: (now ?? -1) + 1, ArrowLeft: (now ?? last + 1) - 1, Home: 0, End: last }[event.key];
  if (next !== undefined) {
    const i = Math.min(Math.max(next, 0), last);
    const at = (index) => plot.valToPos(spec.x[index], "x");
    if (event.shiftKey && spec.select) {
      made.anchor ??= now ?? i;
      const [from, to] = [at(made.anchor), at(i)].sort((a, b) => a - b);
      plot.setSelect({ left: from, top: 0, width: Math.max(to - from, 1), height: plot.over.clientHeight }, false);
    } else made.anchor = undefined;
    point(made, i);
    told.textContent = plot.series.filter((one) => one.class !== "bound").map((one) => `${one.label} ${one.value(plot, plot.data[plot.series.indexOf(one)][i], 0, i)}`).join(", ");
  } else if (event.key === "Enter" && spec.select && made.anchor !== undefined) {
    made.anchor = undefined;
    take(made);
  } else if (event.key === "Escape" && spec.select) spec.select(null);
  else return;
  event.preventDefault();
}
