// ---------------------------------------------------------------- one head, opened

const windowsOf = (p, index) => p.windows.filter(w => name([w.layer, w.head]) === p.names[index]);
const rowOf = (w, row) => {
  const width = w.keys[1] - w.keys[0];
  return shares(array(w.weights).subarray(row * width, (row + 1) * width));
};

const FACTS = ["retrieval_score", "first_token_mass", "sink_rate_mass", "streaming_mass", "local_mass_distance", "entropy",
  "column_mass_top5", "induction", "previous_token", "output_norm"];

function drawFacts(p, index) {
  const rank = m => 1 + Array.from(m.value).filter(v => v > m.value[index]).length;
  const shown = FACTS.filter(f => p.metric.has(f)).map(f => numbers(p, f));
  const listed = shown.length ? shown : p.metrics.slice(0, 8).map(m => numbers(p, m.name));
  const all = p.metrics.map(m => numbers(p, m.name));
  const details = el("details", {}, el("summary", {}, `All ${all.length} numbers of this head`), el("div", { class: "scroll" },
    el("table", {}, el("thead", {}, el("tr", {}, ...["Metric", "Value", "95 % interval", "Rank"].map((t, n) => el("th", { scope: "col", class: n ? "number" : null }, t)))),
      el("tbody", {}, ...all.map(m => el("tr", {}, el("th", { scope: "row" }, visible(m.title)), el("td", { class: "number" }, number(m.value[index], m.unit)),
        el("td", { class: "number" }, interval(m.low[index], m.high[index], m.unit) || "–"),
        el("td", { class: "number" }, m.same || !Number.isFinite(m.value[index]) ? "–" : `${rank(m)} of ${known(m.value).length}`)))))));
  byId(`facts_${p.slot}`).replaceChildren(...listed.map(m => el("div", {}, el("span", { class: "name" }, m.title),
    el("span", { class: "value" }, number(m.value[index], m.unit)), " ",
    m.same || !Number.isFinite(m.value[index]) ? "" : el("span", { class: "rank" }, `no. ${rank(m)}`))), details);
}

/** A matrix in a figure, with a cursor for the keyboard and words for what is under it. */
class Matrix {
  constructor(id) {
    this.id = id;
    this.cursor = [0, 0];
    const plot = model(id);
    plot.on_event("mousemove", e => this.at(e.y, e.x));
    plot.on_event("tap", e => this.at(e.y, e.x, true));
    arrows(byId(`${id}-box`), (down, right) => this.put(this.cursor[0] + down, this.cursor[1] + right, true));
  }

  /** Shares [rows, columns] with the edges of their bins; `says(r, c, share)` tells of a cell. */
  set(values, rows, columns, says) {
    Object.assign(this, { values, rows, columns, says });
    const [y0, y1, x0, x1] = [rows[0], rows.at(-1), columns[0], columns.at(-1)];
    fill(`${this.id}_source`, picture(values, rows.length - 1, columns.length - 1, x0, y0, x1 - x0, y1 - y0));
    const plot = model(this.id);
    plot.x_range.setv({ start: x0, end: x1 });
    plot.y_range.setv({ start: y1, end: y0 });
    fill(`${this.id}_cursor`, { x: [], y: [], w: [], h: [] });
    this.cursor = [0, 0];
    byId(`${this.id}-says`).textContent = "";
  }

  at(y, x, mark = false) {
    if (!this.values) return;
    const bin = (edges, v) => edges.findIndex((e, i) => v >= e && v < edges[i + 1]);
    const [r, c] = [bin(this.rows, y), bin(this.columns, x)];
    if (r >= 0 && c >= 0) this.put(r, c, mark);
  }

  put(row, column, mark) {
    if (!this.values) return;
    const r = clamp(row, 0, this.rows.length - 2), c = clamp(column, 0, this.columns.length - 2);
    byId(`${this.id}-says`).textContent = this.says(r, c, this.values[r * (this.columns.length - 1) + c]);
    if (!mark) return;
    this.cursor = [r, c];
    const [y0, y1, x0, x1] = [this.rows[r], this.rows[r + 1], this.columns[c], this.columns[c + 1]];
    fill(`${this.id}_cursor`, { x: [(x0 + x1) / 2], y: [(y0 + y1) / 2], w: [x1 - x0], h: [y1 - y0] });
    this.chosen?.(r, c);
  }
}

const stretch = (a, b) => b - a === 1 ? a.toLocaleString("en") : `${a.toLocaleString("en")} to ${(b - 1).toLocaleString("en")}`;

/** The map of the whole text. */
class HeadMap {
  constructor(p) {
    this.p = p;
    this.id = `map_${p.slot}`;
    if (has(this.id)) this.matrix = new Matrix(this.id);
  }

  open(index) {
    const p = this.p;
    const fine = p.maps.find(m => name([m.layer, m.head]) === p.names[index]);
    const choices = [];
    if (fine) choices.push([`${fine.edges.length - 1} bins (${fine.why})`, fine.edges, () => array(fine.values)]);
    if (p.map) choices.push([`${p.map.bins} bins`, p.map.edges, () => array(p.map.values, index)]);
    show(`${this.id}-part`, choices.length > 0);
    missing(`${this.id}-missing`, choices.length ? "" : p.maps.length ? "This profile has maps of some heads only, and not of this one."
      : "There are no maps in this profile: it was made without the metric attention_map, or by an older version.");
    if (!choices.length) return;
    const group = byId(`resolution_${p.slot}`);
    group.hidden = choices.length < 2;
    group.replaceChildren(group.firstElementChild, ...choices.map(([text, edges, values], n) => el("label", {},
      el("input", { type: "radio", name: `resolution_${p.slot}`, checked: n === 0, onchange: () => this.draw(edges, values()) }), visible(text))));
    this.draw(choices[0][1], choices[0][2]());
  }

  draw(edges, bytes) {
    this.matrix.set(shares(bytes), edges, edges, (r, c, share) => {
      const rows = edges[r + 1] - edges[r];
      return `Rows ${stretch(edges[r], edges[r + 1])} on keys ${stretch(edges[c], edges[c + 1])}: ` +
        (share ? `${percent(share)} of their attention, a mass of ${digits(share * rows)} of ${rows.toLocaleString("en")}.` : "nothing.");
    });
  }
}

/** Windows at full resolution, and their tokens. */
class Windows {
  constructor(p) {
    this.p = p;
    this.id = `window_${p.slot}`;
    this.strip = `strip_${p.slot}`;
    if (!has(this.id)) return;
    this.matrix = new Matrix(this.id);
    this.tokens = new Tokens(byId(this.strip), i => this.choose(i));
    this.tokens.moved = i => { if (!this.isRow(i)) this.say(`${quoted(this.pieceAt(i))}: a key, no row of this window.`); };
    this.matrix.chosen = r => this.row(r);
    byId(`windows_${p.slot}`).addEventListener("change", e => this.draw(this.list[e.target.value]));
  }

  say(text) { byId(`${this.strip}-says`).textContent = text; }

  open(index) {
    const p = this.p;
    this.list = windowsOf(p, index);
    show(`${this.id}-part`, this.list.length > 0);
    show(`${this.strip}-part`, this.list.length > 0);
    missing(`${this.id}-missing`, "");
    if (!this.list.length) return this.none(index);
    options(byId(`windows_${p.slot}`), this.list.map((w, n) => [n, visible(`${w.text === "needle" ? "needle prompt" : "this text"}, rows ${stretch(...w.rows)}: ${w.why}`)]));
    this.draw(this.list[0]);
  }

  none(index) {
    const key = this.p.names[index], node = byId(`${this.id}-missing`);
    const others = [...new Set(this.p.windows.map(w => name([w.layer, w.head])))];
    node.hidden = false;
    node.replaceChildren(others.length ? "No window of this head is embedded. There are windows of " : "No windows are in this profile.",
      ...others.flatMap((o, n) => [n ? ", " : "", el("button", { type: "button", class: "link", onclick: () => openHead(o, false) }, o)]),
      others.length ? ". " : " ", `Any window can be added: foveate zoom DIR --layer ${key.replace(".", " --head ")} --rows 0:128 --keys 0:128, then foveate report DIR.`);
  }

  draw(w) {
    this.w = w;
    const [rows, keys] = [w.rows, w.keys];
    const range = ([a, b]) => Array.from({ length: b - a + 1 }, (_, i) => a + i);
    this.inside = rows[0] >= keys[0] && rows[1] <= keys[1];
    this.tokens.set(this.inside ? [["", w.key_tokens]] : [["Rows: these look", w.row_tokens], ["Keys: these are looked at", w.key_tokens]]);
    this.matrix.set(shares(array(w.weights)), range(rows), range(keys), (r, c, share) =>
      `Token ${(rows[0] + r).toLocaleString("en")} ${quoted(w.row_tokens[r] ?? "")} on ${(keys[0] + c).toLocaleString("en")} ${quoted(w.key_tokens[c] ?? "")}: ${share ? percent(share) : "nothing"}.`);
    this.tokens.shade(() => 0, i => this.isRow(i));
    this.say("");
    // a first look: the row that looks hardest at one key of this window
    const all = this.matrix.values, width = keys[1] - keys[0];
    let best = -1, row = 0;
    for (let i = 0; i < all.length; i++) if (all[i] > best && i % width + keys[0] !== Math.floor(i / width) + rows[0] && i % width + keys[0] > 0) { best = all[i]; row = Math.floor(i / width); }
    this.row(row);
  }

  /** Tokens of the strip are rows, keys, or both. */
  rowAt(i) { return this.inside ? i - (this.w.rows[0] - this.w.keys[0]) : i; }
  isRow(i) { const r = this.rowAt(i); return r >= 0 && r < this.w.rows[1] - this.w.rows[0]; }
  pieceAt(i) { return this.inside ? this.w.key_tokens[i] : i < this.w.row_tokens.length ? this.w.row_tokens[i] : this.w.key_tokens[i - this.w.row_tokens.length]; }

  choose(i) {
    if (this.isRow(i)) this.row(this.rowAt(i));
    else this.say(`${quoted(this.pieceAt(i))}: a key, no row of this window.`);
  }

  row(r) {
    const w = this.w, weights = rowOf(w, r);
    const firstKey = this.inside ? 0 : w.row_tokens.length;
    const from = this.inside ? r + w.rows[0] - w.keys[0] : r;
    this.tokens.shade(i => i >= firstKey ? weightGrade(weights[i - firstKey]) : 0, i => this.isRow(i), from);
    this.tokens.center(from);
    this.say(`Token ${(w.rows[0] + r).toLocaleString("en")} ${quoted(w.row_tokens[r] ?? "")}: ${strongest(weights, w.key_tokens, w.keys[0])}.`);
  }
}

// ---------------------------------------------------------------- entropy by position, span to span

function drawPosition(p, index) {
  const id = `position_${p.slot}`;
  missing(`${id}-missing`, p.entropy ? "" : "Entropy by position is not in this profile: it was made by an older version, or without the metric entropy.");
  if (!p.entropy || !has(id)) return;
  const { edges, values } = p.entropy, middle = edges.slice(1).map((e, i) => (e + edges[i]) / 2);
  const mine = Array.from(array(values, index));
  const same = p.heads.map((h, i) => h[0] === p.heads[index][0] ? array(values, i) : null).filter(Boolean);
  fill(`${id}_head`, { x: middle, y: mine });
  fill(`${id}_layer`, { x: middle, y: middle.map((_, b) => { const v = known(same.map(s => s[b])); return v.reduce((a, c) => a + c, 0) / v.length; }) });
  fill(`${id}_most`, { x: middle, y: middle.map(x => Math.log(x + 1)) });
}

/** Mass between the parts of a text: measured spans where there are some, else eight stretches of the map. */
function spanMatrix(p, index) {
  if (p.spans.length) {
    const value = (a, b) => {
      const m = p.metric.get(`span_mass:${a}>${b}`);
      if (!m) return NaN;
      const all = array(p.value, m.row);
      return index === null ? known(all).reduce((a, c) => a + c, 0) / known(all).length : all[index];
    };
    return { names: p.spans.map(visible), values: p.spans.map(a => p.spans.map(b => value(a, b))) };
  }
  if (!p.map) return null;
  const { edges, bins } = p.map, per = Math.ceil(bins / 8), parts = Math.ceil(bins / per);
  const mass = Array.from({ length: parts }, () => new Float64Array(parts));
  for (const i of index === null ? p.heads.keys() : [index]) {
    const q = array(p.map.values, i);
    for (let r = 0; r < bins; r++) for (let c = 0; c < bins; c++)
      if (q[r * bins + c]) mass[Math.floor(r / per)][Math.floor(c / per)] += SHARE[q[r * bins + c]] * (edges[r + 1] - edges[r]);
  }
  const edge = n => edges[Math.min(n * per, bins)], heads = index === null ? p.heads.length : 1;
  const short = v => v >= 1e4 ? `${Math.round(v / 1e3)}k` : v.toLocaleString("en");
  return {
    names: Array.from({ length: parts }, (_, n) => `${short(edge(n))}–${short(edge(n + 1))}`),
    values: mass.map((row, r) => Array.from(row, v => v / heads / (edge(r + 1) - edge(r)))),
  };
}

function drawSpans(id, p, index) {
  const found = has(id) ? spanMatrix(p, index) : null;
  show(`${id}-missing`, !found);
  show(`${id}-box`, !!found);
  if (!found) return;
  const plot = model(id), { names, values } = found;
  plot.x_range.factors = names;
  plot.y_range.factors = [...names].reverse();
  const cells = names.flatMap((a, r) => names.map((b, c) => [a, b, values[r][c]]));
  const high = Math.max(...cells.map(c => c[2]).filter(Number.isFinite), 1e-6);
  const text = v => !Number.isFinite(v) || v < 5e-4 ? "" : v >= 0.0995 ? (100 * v).toFixed(0) : (100 * v).toFixed(1);
  fill(`${id}_source`, { x: cells.map(c => c[1]), y: cells.map(c => c[0]), v: cells.map(c => c[2] > 0 ? c[2] : NaN), text: cells.map(c => text(c[2])),
    ink: cells.map(c => c[2] > 0.55 * high ? "#101418" : "#ffffff") });
  model(`${id}_mapper`).setv({ low: 0, high });
}

// ---------------------------------------------------------------- opening

function startHead() {
  const names = two ? [...new Set([...P[0].names, ...P[1].names])].map(n => n.split(".").map(Number)).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(name) : P[0].names;
  const kindOf = key => P[0].kinds[P[0].at.get(key)] ?? "";
  options(byId("open"), names.map(n => [n, kindOf(n) ? `${n} · ${KINDS[kindOf(n)]}` : n]));
  byId("open").addEventListener("change", e => openHead(e.target.value, false));
  const step = by => openHead(names[(names.indexOf(state.open) + by + names.length) % names.length], false);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  P.forEach((p, n) => { p.windows = texts.windows[n]; });
  const parts = P.map((p, n) => ({ p, map: new HeadMap(p), text: new WholeText(p, n), windows: new Windows(p) }));
  onChange("open", () => {
    byId("open").value = state.open;
    byId("head-title").textContent = `Head ${state.open}`;
    for (const { p, map, text, windows } of parts) {
      const index = p.at.get(state.open);
      missing(`absent_${p.slot}`, index === undefined ? `There is no head ${state.open} in ${visible(p.model)}.` : "");
      byId(`pane_${p.slot}`).querySelector(".content").hidden = index === undefined;
      if (index === undefined) continue;
      if (p.slot === "a") byId("head-kind").textContent = p.kinds[index] ? `It ${p.kinds[index] === "retrieves" ? "retrieves" : p.kinds[index] === "local" ? "is local" : "gives most of its mass to the first token"}.` : "";
      drawFacts(p, index);
      map.open(index);
      text.open(index);
      windows.open(index);
      drawPosition(p, index);
      drawSpans(`spans_${p.slot}`, p, index);
    }
  });
  const s = P[0];
  const best = s.kinds.indexOf("retrieves") >= 0 ? bestBy("retrieval_score") : s.windows.length ? s.at.get(name([s.windows[0].layer, s.windows[0].head])) : 0;
  return s.names[best ?? 0];
}
function bestBy(metric) {
  const m = numbers(P[0], metric);
  return m ? m.value.reduce((best, v, i) => v > m.value[best] ? i : best, 0) : 0;
}
