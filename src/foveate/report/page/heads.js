// ---------------------------------------------------------------- the grids of heads

const KINDS = { retrieves: "retrieves", local: "local", sink: "on the first token" };

/** What a grid shows: a profile and one of its metrics. */
function gridMetrics() {
  if (two) return { grid_a: [P[0], state.metric], grid_b: [P[1], state.metric] };
  return { grid_a: [P[0], state.metric], ...(state.second ? { grid_b: [P[0], state.second] } : {}) };
}

function drawGrids() {
  const shown = gridMetrics();
  const all = two ? known(Object.values(shown).flatMap(([p, m]) => Array.from(numbers(p, m)?.value ?? []))) : null;
  for (const id of ["grid_a", "grid_b"]) {
    show(id + "-box", id in shown);
    if (!(id in shown)) continue;
    const [p, metric] = shown[id], m = numbers(p, metric);
    const label = two ? `${p.slot.toUpperCase()}: ${m?.title ?? metric}` : m.title;
    model(id + "_title").text = m ? label + (m.unit && m.unit !== "%" ? `, ${m.unit}` : "") : `${label} was not measured`;
    const percents = m?.unit === "%";
    fill(id + "_source", {
      x: p.heads.map(h => h[1]), y: p.heads.map(h => h[0]), v: m ? Array.from(m.value, v => percents ? 100 * v : v) : p.heads.map(() => NaN),
      alpha: p.heads.map(() => 1), head: p.names, text: p.heads.map((_, i) => m ? told(m, i) : "–"),
      kind: p.kinds.map(k => KINDS[k] ?? "–"),
    });
    // two profiles share a scale, or their colours could not be compared
    scale(id, all ?? known(m.value), percents, !two);
    byId(id + "-box").dataset.metric = metric;
  }
  drawScatter(shown);
}

function scale(id, values, percents, fromZero) {
  const mapper = model(id + "_mapper");
  const k = percents ? 100 : 1;
  let low = k * Math.min(...values), high = k * Math.max(...values);
  if (fromZero && low > 0 && low < high / 3) low = 0;
  if (!(high > low)) { low = Number.isFinite(low) ? low - 0.5 : 0; high = low + 1; }
  mapper.setv({ low, high });
  const bar = model(id).right.find(r => r.type === "ColorBar");
  bar.title = percents ? "%" : "";
}

function drawScatter(shown) {
  if (!has("scatter")) return;
  const visibleNow = "grid_b" in shown && matched;
  show("scatter-box", visibleNow);
  if (!visibleNow) return;
  const [x, y] = Object.values(shown).map(([p, m]) => numbers(p, m));
  if (!x || !y) return show("scatter-box", false);
  const p = P[0], plot = model("scatter");
  const label = (m, n) => (two ? `${"AB"[n]}: ` : "") + m.title + (m.unit ? `, ${m.unit}` : "");
  const [kx, ky] = [x, y].map(m => m.unit === "%" ? 100 : 1);
  fill("scatter_source", {
    x: Array.from(x.value, v => v * kx), y: Array.from(y.value, v => v * ky), head: p.names,
    tx: p.names.map((_, i) => told(x, i)), ty: p.names.map((_, i) => told(y, i)),
    colour: p.names.map(n => state.selected.has(n) ? "#d9822b" : "#3a7fc4"),
  });
  plot.below[0].axis_label = label(x, 0);
  plot.left[0].axis_label = label(y, 1);
  const both = known([...x.value, ...y.value]).map(v => v * kx);
  const ends = two && both.length ? [Math.min(...both), Math.max(...both)] : [];
  fill("scatter_diagonal", { x: ends, y: ends });
}

function drawMarks() {
  const chosen = [...state.selected].map(n => n.split(".").map(Number));
  const at = state.cursor.split(".").map(Number);
  for (const id of ["grid_a", "grid_b", "grid_d"].filter(has)) {
    fill(id + "_selected", { x: chosen.map(h => h[1]), y: chosen.map(h => h[0]) });
    fill(id + "_cursor", { x: [at[1]], y: [at[0]] });
  }
  if (has("scatter")) model("scatter_source").data = {
    ...model("scatter_source").data, colour: (model("scatter_source").data.head ?? []).map(n => state.selected.has(n) ? "#d9822b" : "#3a7fc4") };
}

function sayCursor() {
  const key = state.cursor;
  const said = Object.values(gridMetrics()).map(([p, metric]) => {
    const m = numbers(p, metric), i = p.at.get(key);
    const who = two ? `${p.slot.toUpperCase()}: ` : "";
    return `${who}${m?.title ?? metric} ${m && i !== undefined ? told(m, i) : "–"}`;
  });
  const kind = KINDS[P[0].kinds[P[0].at.get(key)]];
  byId("cursor-says").textContent = `Head ${key}${kind ? ` (${kind})` : ""}${state.selected.has(key) ? ", selected" : ""}: ${said.join("; ")}`;
}

function toggle(names, yes) {
  const selected = new Set(state.selected);
  for (const n of names) (yes ?? !selected.has(n)) ? selected.add(n) : selected.delete(n);
  change({ selected });
}

function openHead(key, jump = true) {
  change({ open: key, cursor: key });
  if (jump) { byId("head").scrollIntoView(); byId("open").focus({ preventScroll: true }); }
}

function startGrids() {
  for (const id of ["grid_a", "grid_b", "grid_d"].filter(has)) {
    const plot = model(id), p = id === "grid_b" && two ? P[1] : P[0];
    const under = event => p.names[p.heads.findIndex(h => h[1] === Math.round(event.x) && h[0] === Math.round(event.y))];
    plot.on_event("tap", event => {
      const key = under(event);
      if (!key) return;
      if (event.modifiers.shift || event.modifiers.ctrl) toggle([key]);
      else openHead(key);
    });
    plot.on_event("selectiongeometry", ({ geometry: g, final }) => {
      if (!final || g.type !== "rect") return;
      const inside = (v, a, b) => v + 0.5 > Math.min(a, b) && v - 0.5 < Math.max(a, b);
      toggle(p.heads.filter(h => inside(h[1], g.x0, g.x1) && inside(h[0], g.y0, g.y1)).map(name), true);
    });
    if (id === "grid_d") continue;
    const go = i => { if (i !== undefined) change({ cursor: p.names[i] }); };
    arrows(byId(id + "-box"), (down, right) => {
      const [layer, head] = p.heads[p.at.get(state.cursor) ?? 0];
      const goal = `${clamp(layer + down, 0, p.layers.at(-1))}.${Math.max(0, head + right)}`;
      go(p.at.get(goal) ?? (right ? undefined : nearest(p, layer + down, head)));
    }, {
      Enter: () => openHead(state.cursor),
      " ": () => toggle([state.cursor]),
      Home: () => go(0),
      End: () => go(p.heads.length - 1),
    });
  }
  onChange("metric second", drawGrids);
  onChange("selected cursor", drawMarks);
  onChange("selected cursor metric second", sayCursor);
}
const clamp = (v, low, high) => Math.max(low, Math.min(high, v));
/** The head of the wanted layer that is nearest, for layers that were not read or have fewer heads. */
function nearest(p, layer, head) {
  const wanted = p.layers.reduce((a, b) => Math.abs(b - layer) < Math.abs(a - layer) ? b : a);
  let best;
  p.heads.forEach((h, i) => { if (h[0] === wanted && h[1] <= head) best = i; });
  return best;
}

function startMetricControls() {
  const listed = two ? P[0].metrics.filter(m => P[1].metric.has(m.name)) : P[0].metrics;
  const metrics = listed.filter(m => !m.name.includes(">"));
  const usable = metrics.length ? metrics : P[0].metrics;
  options(byId("metric"), metricOptions(usable));
  const first = ["retrieval_score", "first_token_mass", "entropy"].find(n => usable.some(m => m.name === n)) ?? usable[0].name;
  byId("metric").addEventListener("change", e => change({ metric: e.target.value }));
  const second = byId("second");
  if (second) {
    options(second, [["", "nothing"], ...metricOptions(usable)]);
    second.addEventListener("change", e => change({ second: e.target.value }));
    byId("swap").addEventListener("click", () => change({ metric: state.second, second: state.metric }));
  }
  onChange("metric second", () => {
    byId("metric").value = state.metric;
    if (second) second.value = state.second;
    show("swap", !!state.second);
    const m = P[0].metric.get(state.metric);
    byId("meaning").textContent = [m.summary, m.misleads && `Beware: ${m.misleads}.`, m.same && "It is one number for the whole model."].filter(Boolean).join(" ");
  });
  return first;
}
