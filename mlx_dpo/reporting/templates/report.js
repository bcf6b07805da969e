"use strict";
// Draws the curves, shows values under the pointer, and asks a live page's server for new rows.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const tooltip = document.getElementById("tooltip");
const isSingle = data.names.length === 1;
const hiddenRuns = new Set();
const charts = new Map();

const lineKey = (line) => `${line.run} ${line.completion} ${line.heldOut}`;
const shown = (chart) => [...chart.lines.values()].filter((line) => !hiddenRuns.has(line.run));

// --- numbers ---------------------------------------------------------------------------------

function ticks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => span / size <= count);
  const values = [];
  const first = Math.ceil(low / step - 1e-9);
  for (let i = first; i * step <= high + step * 1e-9; i++) values.push(i * step || 0);  // not -0
  return { values, step };
}

function tickLabel(value, step) {
  let digits = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
  if (Math.abs(step * 10 ** digits % 1) > 1e-6) digits += 1;  // 2.5 and its like
  if (value !== 0 && digits > 4) return value.toExponential(1).replace("e-", "e−").replace("-", "−");
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })
    .replace("-", "−");
}

function format(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en").replace("-", "−");
  const size = Math.abs(value);
  const text = size < 1e-3 ? value.toExponential(2)
    : size < 100 ? value.toPrecision(4) : value.toLocaleString("en", { maximumFractionDigits: 1 });
  return text.replace("-", "−");
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
}

// Index of the point whose x is nearest; x rises.
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] <= xs[low] - x ? low - 1 : low;
}

// --- charts ----------------------------------------------------------------------------------

function colour(line) {
  return (isSingle ? Number(line.completion === data.rejected) : line.run) % data.colours;
}

function label(line) {
  const parts = isSingle ? [line.heldOut ? "held out" : "training"] : [data.names[line.run]];
  if (line.completion) parts.push(line.completion);
  if (!isSingle && line.heldOut) parts.push("held out");
  return parts.join(", ");
}

function path(xs, ys) {
  let text = "", pen = "M";
  xs.forEach((x, i) => {
    if (ys[i] === null) { pen = "M"; return; }
    text += `${pen}${x.toFixed(1)} ${ys[i].toFixed(1)}`;
    pen = "L";
  });
  return text;
}

function scale(chart, width, height) {
  const lines = shown(chart);
  const xs = extent(lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]));
  let ys = extent(lines.flatMap((line) => line.smoothed ? line.y.concat(line.smoothed) : line.y));
  if (!xs || !ys) return null;
  if (chart.baseline !== null) ys = extent([...ys, chart.baseline]);
  if (chart.startsAtZero) ys = [0, Math.max(ys[1], 0) || 1];
  if (ys[0] === ys[1]) { const pad = Math.abs(ys[0]) * 0.1 || 1; ys = [ys[0] - pad, ys[1] + pad]; }
  const pad = (ys[1] - ys[0]) * 0.05;
  const [low, high] = [chart.startsAtZero ? 0 : ys[0] - pad, ys[1] + pad];
  const rows = ticks(low, high, Math.max(3, Math.round(height / 45)));
  const labels = rows.values.map((value) => tickLabel(value, rows.step));
  const left = 12 + 7.2 * Math.max(...labels.map((text) => text.length));
  const columns = ticks(xs[0], xs[1], Math.max(2, Math.round((width - left) / 90)));
  const spread = xs[1] - xs[0] || 1;
  return {
    rows, labels, columns, left, right: width - 8, top: 8, bottom: height - 24,
    x(value) { return this.left + (this.right - this.left) * (xs[0] === xs[1] ? 0.5 : (value - xs[0]) / spread); },
    y(value) { return value === null ? null : this.bottom - (this.bottom - this.top) * (value - low) / (high - low); },
    value(pixel) { return xs[0] + spread * (pixel - this.left) / (this.right - this.left); },
  };
}

function drawAxes(at) {
  let text = "";
  at.rows.values.forEach((value, i) => {
    const y = at.y(value).toFixed(1);
    text += `<path class="grid" d="M${at.left} ${y}H${at.right}"/>`
      + `<text x="${at.left - 6}" y="${y}" dy=".35em" text-anchor="end">${at.labels[i]}</text>`;
  });
  at.columns.values.forEach((value) => {
    const x = at.x(value), anchor = x > at.right - 14 ? "end" : "middle";
    if (x < at.left + 12 && at.left < 60) return;  // the name of the axis is there
    text += `<text x="${x.toFixed(1)}" y="${at.bottom + 17}" text-anchor="${anchor}">`
      + `${tickLabel(value, at.columns.step)}</text>`;
  });
  return text + `<text x="0" y="${at.bottom + 17}">${data.x}</text>`;
}

function drawLine(line, at) {
  const group = (kind, points) =>
    `<path class="line c${colour(line)}${kind}${line.completion === data.rejected ? " dashed" : ""}" d="${points}"/>`;
  const xs = line.x.map((x) => at.x(x));
  const ys = (line.smoothed || line.y).map((y) => at.y(y));
  let text = line.smoothed ? group(" raw", path(xs, line.y.map((y) => at.y(y)))) : "";
  text += group(line.heldOut ? " thin" : "", path(xs, ys));
  const every = line.heldOut || xs.length === 1 ? 1 : isSingle ? Infinity : Math.max(1, Math.floor(xs.length / 6));
  const first = every === 1 ? 0 : Math.floor(every / 2);
  for (let i = first; i < xs.length && every < Infinity; i += every) {
    if (ys[i] === null) continue;
    text += `<path class="mark c${colour(line)}${line.heldOut ? " filled" : ""}" `
      + `transform="translate(${xs[i].toFixed(1)} ${ys[i].toFixed(1)})" d="${data.markers[line.run]}"/>`;
  }
  return text;
}

// Only numbers and shapes of this script are in the markup; names are set as text.
function draw(chart) {
  chart.figure.hidden = chart.lines.size === 0;
  const width = chart.plot.clientWidth;
  if (!width || !chart.lines.size) return;
  const height = chart.figure.parentElement.classList.contains("results")
    ? Math.min(320, Math.max(210, Math.round(width * 0.5))) : 170;
  const at = chart.at = scale(chart, width, height);
  const baseline = at && chart.baseline !== null
    ? `<path class="baseline" d="M${at.left} ${at.y(chart.baseline)}H${at.right}"/>` : "";
  const content = at ? drawAxes(at) + baseline + shown(chart).map((line) => drawLine(line, at)).join("") : "";
  chart.plot.innerHTML = `<svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" `
    + `aria-hidden="true">${content}<g class="hover"></g></svg>`;
  chart.plot.setAttribute("aria-label", describe(chart));
  if (chart.figure.querySelector(".values").open) drawTable(chart);
  if (pointed && pointed.chart === chart) showValues(chart, pointed.x);
}

function describe(chart) {
  const parts = shown(chart).map((line) => {
    const ys = line.smoothed || line.y;
    return `${label(line)}: from ${format(ys[0])} to ${format(ys[ys.length - 1])}`;
  });
  return `${chart.title}. ${parts.join("; ")}. Arrow keys read the values.`;
}

// A table of at most 20 points, evenly spaced, for who cannot see or point.
function drawTable(chart) {
  const lines = shown(chart), all = positions(chart);
  const every = Math.max(1, Math.ceil(all.length / 20));
  const xs = all.filter((_, i) => (all.length - 1 - i) % every === 0);
  const table = document.createElement("table");
  table.className = "numbers";
  const addRow = (texts, name) => {
    const row = table.insertRow();
    texts.forEach((text, i) => {
      const cell = document.createElement(name === "th" || !i ? "th" : "td");
      cell.textContent = text;
      row.append(cell);
    });
  };
  addRow([data.x, ...lines.map(label)], "th");
  xs.forEach((x) => addRow([format(x), ...lines.map((line) => {
    const i = nearest(line.x, x);
    return line.x[i] === x ? format(line.y[i]) : "";
  })], "td"));
  chart.figure.querySelector(".values .wide").replaceChildren(table);
}

// --- values under the pointer ----------------------------------------------------------------

let pointed = null;

function positions(chart) {
  return [...new Set(shown(chart).flatMap((line) => line.x))].sort((a, b) => a - b);
}

function showValues(chart, wanted) {
  const lines = shown(chart).filter((line) => line.x.length);
  if (!chart.at || !lines.length) return hideValues();
  const all = positions(chart), x = all[nearest(all, wanted)], at = chart.at;
  pointed = { chart, x };
  let marks = `<path class="cursor" d="M${at.x(x).toFixed(1)} ${at.top}V${at.bottom}"/>`;
  const head = document.createElement("b");
  head.textContent = `${data.x} ${format(x)}`;
  const rows = lines.map((line) => {
    const i = nearest(line.x, x), y = (line.smoothed || line.y)[i];
    if (y !== null) {
      marks += `<circle class="mark c${colour(line)}" cx="${at.x(line.x[i]).toFixed(1)}" cy="${at.y(y).toFixed(1)}" r="4"/>`;
    }
    const row = document.createElement("div"), name = document.createElement("span");
    const value = document.createElement("strong");
    const where = line.x[i] === x ? "" : ` (${data.x} ${format(line.x[i])})`;
    name.textContent = label(line) + where;
    row.className = `c${colour(line)}`;
    value.textContent = format(line.smoothed ? y : line.y[i]);
    row.append(name, value);
    return row;
  });
  chart.plot.querySelector(".hover").innerHTML = marks;
  tooltip.replaceChildren(head, ...rows);
  tooltip.hidden = false;
  placeTooltip(chart, at.x(x));
}

function placeTooltip(chart, pixel) {
  const box = chart.plot.getBoundingClientRect(), width = tooltip.offsetWidth;
  let left = box.left + pixel + 14;
  if (left + width > document.documentElement.clientWidth - 8) left = box.left + pixel - width - 14;
  left = Math.max(8, left);
  tooltip.style.transform = `translate(${left + scrollX}px, ${box.top + scrollY + 10}px)`;
}

function hideValues() {
  if (pointed) pointed.chart.plot.querySelector(".hover")?.replaceChildren();
  pointed = null;
  tooltip.hidden = true;
}

function onPointer(chart, event) {
  if (pointed && pointed.chart !== chart) hideValues();
  if (chart.at) showValues(chart, chart.at.value(event.clientX - chart.plot.getBoundingClientRect().left));
}

function onKey(chart, event) {
  const all = positions(chart);
  if (!all.length) return;
  const i = pointed && pointed.chart === chart ? nearest(all, pointed.x) : all.length;
  const next = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: all.length - 1 }[event.key];
  if (event.key === "Escape") hideValues();
  if (next === undefined) return;
  event.preventDefault();
  if (pointed && pointed.chart !== chart) hideValues();
  showValues(chart, all[Math.min(all.length - 1, Math.max(0, next))]);
}

// --- set up ----------------------------------------------------------------------------------

const waiting = new Set();
function redraw(chart) {
  if (!waiting.size) requestAnimationFrame(() => { const due = [...waiting]; waiting.clear(); due.forEach(draw); });
  waiting.add(chart);
}

const resized = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const chart = charts.get(target.parentElement.dataset.chart);
    if (Math.round(contentRect.width) !== chart.width) { chart.width = Math.round(contentRect.width); redraw(chart); }
  }
});

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const plot = figure.querySelector(".plot");
  const chart = {
    figure, plot, title: figure.dataset.chart, lines: new Map(), at: null, width: -1,
    baseline: figure.dataset.baseline === "" ? null : Number(figure.dataset.baseline),
    startsAtZero: "zero" in figure.dataset,
  };
  charts.set(chart.title, chart);
  plot.addEventListener("pointermove", (event) => onPointer(chart, event));
  plot.addEventListener("pointerdown", (event) => onPointer(chart, event));
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hideValues(); });
  plot.addEventListener("keydown", (event) => onKey(chart, event));
  plot.addEventListener("blur", hideValues);
  figure.querySelector(".values").addEventListener("toggle", () => redraw(chart));
  resized.observe(plot);
}

document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".plot")) hideValues(); });

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const run = Number(button.dataset.run), isHidden = hiddenRuns.delete(run);
    if (!isHidden) hiddenRuns.add(run);
    button.setAttribute("aria-pressed", String(isHidden));
    charts.forEach(redraw);
  });
}

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not(.values):not([open])")];
  opened.forEach((element) => { element.open = true; });
  charts.forEach(draw);
});
addEventListener("afterprint", () => opened.forEach((element) => { element.open = false; }));

function addPoints(part) {
  const chart = charts.get(part.chart), key = lineKey(part);
  const line = chart.lines.get(key) || { ...part, x: [], y: [], smoothed: part.smoothed && [] };
  for (const name of ["x", "y", "smoothed"]) {
    if (part[name]) line[name] = [...line[name].slice(0, part.start), ...part[name]];
  }
  chart.lines.set(key, line);
  // Lines are drawn in the order of runs, chosen before rejected, training before held out.
  chart.lines = new Map([...chart.lines].sort(([a], [b]) => a < b ? -1 : 1));
  redraw(chart);
}

function updateLegend() {
  const lines = [...charts.values()].flatMap((chart) => [...chart.lines.values()]);
  document.querySelector(".legend .held-out").hidden = !lines.some((line) => line.heldOut);
  const hasRejected = lines.some((line) => line.completion === data.rejected);
  for (const part of document.querySelectorAll(".legend .rejected")) part.hidden = !hasRejected;
}

data.lines.forEach(addPoints);
updateLegend();
if (!data.isLive) return;

// --- live page -------------------------------------------------------------------------------

const token = new URLSearchParams(location.search).get("token");
const connection = document.getElementById("connection");
const title = document.title;
let cursor = "", failures = 0;

// The parts are HTML that the server wrote and escaped; what a reader opened stays open.
function replacePart(id, html) {
  const part = document.getElementById(id);
  const isOpen = new Set([...part.querySelectorAll("details[open]")].map((e) => e.dataset.key));
  const offsets = [...part.querySelectorAll(".wide")].map((e) => e.scrollLeft);
  const focused = [...part.querySelectorAll("summary")].indexOf(document.activeElement);
  part.innerHTML = html;
  part.querySelectorAll("details").forEach((e) => { e.open = isOpen.has(e.dataset.key); });
  part.querySelectorAll(".wide").forEach((e, i) => { e.scrollLeft = offsets[i] || 0; });
  if (focused >= 0) part.querySelectorAll("summary")[focused]?.focus({ preventScroll: true });
}

function update(news) {
  cursor = news.cursor;
  for (const run of news.restarted) {
    charts.forEach((chart) => {
      for (const [key, line] of chart.lines) if (line.run === run) { chart.lines.delete(key); redraw(chart); }
    });
  }
  news.lines.forEach(addPoints);
  if (news.lines.length || news.restarted.length) updateLegend();
  Object.entries(news.parts).forEach(([id, html]) => replacePart(id, html));
  document.title = (news.progress === null ? "" : `${news.progress} % · `) + title;
  connection.hidden = true;
}

async function poll() {
  let news = null;
  try {
    const reply = await fetch(`/update?cursor=${encodeURIComponent(cursor)}`, { headers: { "X-Token": token } });
    if (reply.ok) news = await reply.json();
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // no connection
  }
  failures = news ? 0 : failures + 1;
  if (!news?.isOver && failures < 60) setTimeout(poll, Math.min(10, 1 + failures) * 1000);
  if (news) update(news);
  if (failures > 1) {
    connection.textContent = "No connection: the program that serves this page has ended. "
      + "The page shows the last state; serve it again with `mlx-dpo report RUN --live`.";
    connection.hidden = false;
  }
}
poll();
})();
