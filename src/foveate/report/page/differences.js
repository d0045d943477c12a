// ---------------------------------------------------------------- two profiles: what differs

function differenceRows(metric) {
  const c = D.compared, [a, b] = [numbers(P[0], metric), numbers(P[1], metric)];
  const exceeds = array(c.exceeds, c.metrics.indexOf(metric));
  return { a, b, exceeds, by: Array.from(a.value, (v, i) => b.value[i] - v) };
}

function drawDifferences() {
  const metric = byId("differences-metric").value, { a, b, exceeds, by } = differenceRows(metric);
  const p = P[0], k = a.unit === "%" ? 100 : 1, unit = a.unit === "%" ? "points" : a.unit;
  const signed = v => (v > 0 ? "+" : "") + digits(Number((k * v).toPrecision(3))) + (unit ? ` ${unit}` : "");
  const size = Math.max(...known(by).map(Math.abs), 1e-9) * k;
  model("grid_d_title").text = `B − A: ${a.title}` + (unit ? `, ${unit}` : "");
  model("grid_d_mapper").setv({ low: -size, high: size });
  fill("grid_d_source", {
    x: p.heads.map(h => h[1]), y: p.heads.map(h => h[0]), v: by.map(v => v * k), alpha: Array.from(exceeds, e => e ? 1 : 0.25), head: p.names,
    text: by.map((v, i) => `${signed(v)}: A ${told(a, i)}, B ${told(b, i)}`), kind: Array.from(exceeds, e => e ? "exceeds the intervals" : "within the intervals"),
  });
  const rows = p.heads.map((_, i) => i).filter(i => exceeds[i]).sort((x, y) => Math.abs(by[y]) - Math.abs(by[x]));
  const table = byId("differences-table");
  table.tHead.replaceChildren(el("tr", {}, ...["Head", "A", "B", "B − A"].map((t, c) => el("th", { scope: "col", class: c ? "number" : null }, t))));
  const cell = (m, i) => el("td", { class: "number" }, number(m.value[i], m.unit), el("span", { class: "interval" }, interval(m.low[i], m.high[i], m.unit)));
  table.tBodies[0].replaceChildren(...rows.slice(0, ROWS).map(i => el("tr", { "data-head": p.names[i] },
    el("td", {}, el("button", { type: "button", class: "link", onclick: () => openHead(p.names[i]) }, p.names[i])), cell(a, i), cell(b, i), el("td", { class: "number" }, signed(by[i])))));
  const exact = !a.low.some((v, i) => a.high[i] > v) || !b.low.some((v, i) => b.high[i] > v);
  byId("differences-count").textContent = exact ? "A fact of each text, without an interval: nothing is counted."
    : `${rows.length} of ${count(p.heads.length, "head")} ${rows.length === 1 ? "differs" : "differ"} by more than their intervals.`;
  change({ metric });
}

/** Fills the switch; gives the metric that differs in most heads. */
function startDifferences() {
  if (!two || !matched) return undefined;
  const c = D.compared, select = byId("differences-metric");
  const counts = c.metrics.map((m, n) => array(c.exceeds, n).reduce((a, v) => a + v, 0));
  const order = [...c.metrics.keys()].sort((x, y) => counts[y] - counts[x]);
  options(select, order.map(n => [c.metrics[n], `${P[0].metric.get(c.metrics[n]).title} (${counts[n]})`]));
  select.addEventListener("change", drawDifferences);
  onChange("metric", () => {
    if (select.value === state.metric || !c.metrics.includes(state.metric)) return;
    select.value = state.metric;
    drawDifferences();
  });
  select.value = "";
  return [...byId("metric").options].map(o => o.value).find(m => m === c.metrics[order[0]]);
}
