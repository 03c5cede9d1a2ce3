"use strict";
// Names of models and workers are texts of others: they go into the page by textContent alone.

const INTERVAL_MS = 1000;
const KEPT = 900;
const history = [];
const order = { queue: { column: 2, down: true }, models: { column: 0, down: false }, workers: { column: 0, down: false } };
let last = null;

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const precise = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const show = (value) => (typeof value === "number" ? (value < 10 ? precise : number).format(value) : value);
const load = (row) => (row.slots ? row.in_flight / row.slots : 0);

const TABLES = {
  queue: [
    ["model", (row) => row.model], ["operation", (row) => row.operation + (row.resumes ? ", resumed" : "")],
    ["waiting", (row) => row.waiting], ["clients", (row) => row.clients], ["longest s", (row) => row.longest_wait_s],
    ["workers", (row) => row.workers], ["free", (row) => row.free], ["why", (row) => row.why],
  ],
  models: [
    ["model", (row) => row.name], ["workers", (row) => row.workers.length], ["running", (row) => row.in_flight],
    ["queued", (row) => row.queued], ["slots", (row) => row.slots], ["load", load], ["context", (row) => row.context_length],
  ],
  workers: [
    ["worker", (row) => row.name], ["state", (row) => row.state], ["models", (row) => row.models.join(", ")],
    ["running", (row) => row.in_flight], ["slots", (row) => row.slots], ["load", load],
    ["tokens/s", (row) => row.tokens_per_second], ["done", (row) => row.finished], ["failed", (row) => row.failed],
    ["silent ms", (row) => Math.round(row.silence_ms)],
  ],
};
const TEXTS = new Set(["model", "worker", "state", "models", "operation", "why"]);
const EMPTY = { queue: "nothing waits", models: "no model is served", workers: "no worker is registered: start one with zfabric-worker" };
const PLOTS = [
  ["requests", ["running", "running"], ["queued", "queued"]],
  ["a second", ["requests", "requests"], ["failures", "failures"]],
  ["a second", ["tokens", "tokens"], null],
];

const byId = (id) => document.getElementById(id);
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function duration(seconds) {
  const whole = Math.floor(seconds);
  for (const [name, above, below, part] of [["d", 86400, 3600, "h"], ["h", 3600, 60, "m"], ["m", 60, 1, "s"]]) {
    if (whole >= above) return `${Math.floor(whole / above)}${name} ${Math.floor((whole % above) / below)}${part}`;
  }
  return `${whole}s`;
}

function figures(status, now) {
  const stalled = last.workers.filter((worker) => worker.state === "stalled").length;
  const told = [
    ["running", status.in_flight], ["queued", status.queued], ["requests/s", now.requests], ["tokens/s", now.tokens],
    ["failures/s", now.failures], ["workers" + (stalled ? `, ${stalled} stalled` : ""), status.workers],
    ["clients", status.clients], ["failed in all", status.failed],
  ];
  byId("figures").replaceChildren(...told.map(([name, value]) => {
    const card = element("div", undefined, "figure");
    card.append(element("b", show(value)), element("span", name));
    return card;
  }));
  const states = ["draining", "recovering"].filter((name) => status[name]);
  byId("about").textContent = [status.version, `up ${duration(status.uptime_s)}`, status.policy, ...states].join(" · ");
}

function table(id, rows) {
  const columns = TABLES[id];
  const { column, down } = order[id];
  const head = element("tr");
  columns.forEach(([title], place) => {
    const cell = element("th", undefined, TEXTS.has(title) ? "text" : "");
    const button = element("button", title + (place === column ? (down ? " ▾" : " ▴") : ""));
    cell.setAttribute("aria-sort", place === column ? (down ? "descending" : "ascending") : "none");
    button.addEventListener("click", () => {
      order[id] = { column: place, down: place === column ? !down : place > 0 };
      render();
    });
    cell.append(button);
    head.append(cell);
  });
  byId(id).tHead.replaceChildren(head);
  const wanted = byId("filter").value.toLowerCase();
  const found = rows.filter((row) => !wanted || columns.some(([, of]) => String(of(row)).toLowerCase().includes(wanted)));
  const of = columns[column][1];
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  found.sort((a, b) => (down ? -1 : 1) * compare(of(a), of(b)) || (a.name ?? a.model).localeCompare(b.name ?? b.model));
  const lines = found.map((row) => {
    const line = element("tr");
    for (const [title, value] of columns) line.append(cellOf(title, value(row)));
    return line;
  });
  if (!lines.length) {
    const line = element("tr");
    const cell = element("td", rows.length ? "nothing has this text" : EMPTY[id], "empty");
    cell.colSpan = columns.length;
    line.append(cell);
    lines.push(line);
  }
  byId(id).tBodies[0].replaceChildren(...lines);
}

function cellOf(title, value) {
  if (title === "load") {
    const cell = element("td");
    const bar = element("span", undefined, "bar");
    const part = element("i");
    part.style.width = `${Math.round(100 * Math.min(1, value))}%`;
    bar.append(part);
    bar.title = `${Math.round(100 * value)} %`;
    cell.append(bar);
    return cell;
  }
  return element("td", show(value), `${TEXTS.has(title) ? "text" : ""} ${title === "state" ? value : ""}`.trim());
}

const canvases = PLOTS.map(([unit, first, second]) => {
  const plot = element("figure", undefined, "plot");
  const caption = element("figcaption");
  caption.append(element("i", first[1], "first"));
  if (second) caption.append(element("i", second[1], "second"));
  const greatest = element("span");
  caption.append(" ", greatest);
  const canvas = element("canvas");
  canvas.setAttribute("role", "img");
  plot.append(caption, canvas);
  byId("plots").append(plot);
  return { canvas, greatest, unit, keys: [first, second].filter(Boolean).map(([key]) => key) };
});

function draw({ canvas, greatest, unit, keys }) {
  const scale = window.devicePixelRatio || 1;
  const width = (canvas.width = Math.round(canvas.clientWidth * scale));
  const height = (canvas.height = Math.round(canvas.clientHeight * scale));
  const most = Math.max(1, ...history.flatMap((sample) => keys.map((key) => sample[key])));
  greatest.textContent = `${unit}, ${show(most)} at most`;
  canvas.setAttribute("aria-label", `${keys.join(" and ")}: now ${keys.map((key) => show(history.at(-1)?.[key] ?? 0)).join(" and ")}`);
  const style = getComputedStyle(document.documentElement);
  const context = canvas.getContext("2d");
  context.strokeStyle = style.getPropertyValue("--line");
  context.beginPath();
  for (const part of [0.5, 1]) { context.moveTo(0, part * (height - 1)); context.lineTo(width, part * (height - 1)); }
  context.stroke();
  const until = history.length ? history.at(-1).at : 0;
  const span = Math.max(60, until - (history[0]?.at ?? until));
  keys.forEach((key, place) => {
    context.strokeStyle = style.getPropertyValue(place ? "--second" : "--first");
    context.lineWidth = 1.5 * scale;
    context.beginPath();
    for (const sample of history) {
      const x = width - ((until - sample.at) / span) * width;
      const y = height - 2 - (sample[key] / most) * (height - 4);
      context.lineTo(x, y);
    }
    context.stroke();
  });
}

function render() {
  if (!last) return;
  figures(last.status, history.at(-1) ?? { requests: 0, failures: 0, tokens: 0 });
  table("queue", last.queue);
  table("models", last.models);
  table("workers", last.workers);
  const left = last.left_out;
  byId("left-out").hidden = !(left.models || left.workers);
  byId("left-out").textContent = `${left.workers} more workers and ${left.models} more models are not shown`;
  canvases.forEach(draw);
}

async function look() {
  try {
    const answer = await fetch(`live.json?since=${history.at(-1)?.at ?? 0}`, { signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const now = await answer.json();
    if (last && last.status.epoch !== now.status.epoch) history.length = 0;
    last = now;
    history.push(...now.history);
    history.splice(0, history.length - KEPT);
    byId("trouble").hidden = true;
  } catch (error) {
    byId("trouble").textContent = `The controller does not answer (${error.message}); what is shown is older.`;
    byId("trouble").hidden = false;
  }
  render();
  setTimeout(look, INTERVAL_MS);
}

byId("filter").addEventListener("input", render);
window.addEventListener("resize", render);
look();
