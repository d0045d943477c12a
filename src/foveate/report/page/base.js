// ---------------------------------------------------------------- data

const byId = id => document.getElementById(id);
const D = JSON.parse(byId("data").textContent);
const P = D.profiles;
const two = P.length === 2;
const matched = !D.compared || D.compared.matched;
const SLOTS = ["a", "b"].slice(0, P.length);
const TYPES = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };
let buffer = null, texts = null;

async function unpack(name) {
  const bytes = Uint8Array.from(atob(byId("blob-" + name).textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** The array that `Pack.add` wrote; `part` takes one item of its first axis. */
function array(place, part) {
  let { at, shape } = place;
  if (part !== undefined) {
    shape = shape.slice(1);
    at += part * TYPES[place.type].BYTES_PER_ELEMENT * shape.reduce((a, b) => a * b, 1);
  }
  return new TYPES[place.type](buffer, at, shape.reduce((a, b) => a * b, 1));
}

/** 8 bits on a log scale as shares; 0 is nothing that could be drawn. */
const SHARE = Float32Array.from({ length: 256 }, (_, q) => q ? D.floor ** (1 - (q - 1) / 254) : 0);
const shares = bytes => Float32Array.from(bytes, q => SHARE[q]);

// ---------------------------------------------------------------- text

const HIDDEN = new Set([0x61c, 0x200b, 0x200e, 0x200f, 0x2028, 0x2029, 0xfeff]);
function visibleChar(c) {
  const n = c.codePointAt(0);
  if (n < 0x20) return String.fromCodePoint(0x2400 + n);
  if (n === 0x7f) return "\u2421";
  const odd = n >= 0x80 && n < 0xa0 || n >= 0x202a && n <= 0x202e || n >= 0x2066 && n <= 0x2069;
  if (odd || HIDDEN.has(n)) return `‹U+${n.toString(16).toUpperCase().padStart(4, "0")}›`;
  return n >= 0xd800 && n <= 0xdfff ? "\ufffd" : c;
}
/** A token as one can read it in a line: no control character, no character that turns the text around. */
const visible = text => Array.from(text, visibleChar).join("").replaceAll("\u240a", "⏎") || "∅";

/** An element; text never becomes markup. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter(c => c != null));
  return node;
}
const options = (select, items) => select.replaceChildren(...items.map(([value, text, group]) => group
  ? el("optgroup", { label: group }, ...text.map(([v, t]) => el("option", { value: v }, t)))
  : el("option", { value }, text)));
function show(id, yes) { const node = byId(id); if (node) node.hidden = !yes; }
function missing(id, sentence) { const node = byId(id); node.hidden = !sentence; if (sentence) node.textContent = sentence; }

// ---------------------------------------------------------------- numbers

const digits = v => v === 0 ? "0" : Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") :
  Math.abs(v) >= 1e-3 ? String(Number(v.toPrecision(3))) : v.toExponential(1);
function percent(v) {
  const p = 100 * v, size = Math.abs(p);
  return (size >= 9.995 || size === 0 ? p.toFixed(size < 99.5 && size > 0 ? 1 : 0).replace(/\.0$/, "") : size >= 0.01 ? p.toPrecision(2) : p.toExponential(0)) + "%";
}
const number = (v, unit) => !Number.isFinite(v) ? "–" : unit === "%" ? percent(v) : digits(v) + (unit ? " " + unit : "");
const bare = (v, unit) => unit === "%" ? percent(v).replace("%", "") : digits(v);
const interval = (low, high, unit) => Number.isFinite(low) && Number.isFinite(high) && high > low
  ? `${bare(low, unit)} to ${bare(high, unit)}` : "";
const count = (n, one, many = one + "s") => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const known = values => Array.from(values).filter(Number.isFinite);
function quantile(sorted, q) {
  if (!sorted.length) return NaN;
  const at = (sorted.length - 1) * q, low = Math.floor(at);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (at - low);
}

// ---------------------------------------------------------------- profiles

const name = head => `${head[0]}.${head[1]}`;
P.forEach((p, n) => {
  p.slot = SLOTS[n];
  p.names = p.heads.map(name);
  p.at = new Map(p.names.map((key, i) => [key, i]));
  p.metric = new Map(p.metrics.map(m => [m.name, m]));
});
/** value, low and high of one metric over the heads of a profile. */
function numbers(p, metric) {
  const m = p.metric.get(metric);
  return m && { ...m, value: array(p.value, m.row), low: array(p.low, m.row), high: array(p.high, m.row) };
}
const told = (m, i) => {
  const range = interval(m.low[i], m.high[i], m.unit);
  return number(m.value[i], m.unit) + (range ? ` (${range})` : "");
};
/** The metrics of a select, grouped by family. */
function metricOptions(metrics) {
  const families = Map.groupBy ? Map.groupBy(metrics, m => m.family) : metrics.reduce((map, m) =>
    map.set(m.family, [...(map.get(m.family) ?? []), m]), new Map());
  return [...families].map(([family, list]) => ["", list.map(m => [m.name, m.title]), family]);
}

// ---------------------------------------------------------------- what is chosen

const state = { metric: null, second: "", open: null, selected: new Set(), cursor: P[0].names[0], shown: [] };
const listeners = [];
const onChange = (keys, act) => listeners.push([keys.split(" "), act]);
function change(changes) {
  const keys = Object.keys(changes).filter(k => state[k] !== changes[k]);
  Object.assign(state, changes);
  for (const [wanted, act] of listeners) if (keys.some(k => wanted.includes(k))) act();
}
