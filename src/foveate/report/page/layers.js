// ---------------------------------------------------------------- layers, sinks, meanings

function drawLayers() {
  const metric = byId("layers-metric").value;
  P.forEach((p, n) => {
    const m = numbers(p, metric), k = m?.unit === "%" ? 100 : 1;
    const last = p.layers.at(-1) || 1;
    const x = two ? layer => 100 * layer / last : layer => layer;
    const band = { x: [], low: [], mid: [], high: [], text: [] };
    for (const layer of m ? p.layers : []) {
      const values = known(p.heads.map((h, i) => h[0] === layer ? m.value[i] * k : NaN)).sort((a, b) => a - b);
      if (!values.length) continue;
      band.x.push(x(layer));
      band.low.push(quantile(values, 0.25)); band.mid.push(quantile(values, 0.5)); band.high.push(quantile(values, 0.75));
      band.text.push(String(layer));
    }
    fill(`layers_${p.slot}_band`, band);
    fill(`layers_${p.slot}_dots`, m ? { x: p.heads.map(h => x(h[0])), y: Array.from(m.value, v => v * k), head: p.names, text: p.names.map((_, i) => told(m, i)) }
      : { x: [], y: [], head: [], text: [] });
    if (n === 0 && m) model("layers").left[0].axis_label = m.title + (m.unit ? `, ${m.unit}` : "");
  });
}

function drawAgreement(p) {
  const id = `agreement_${p.slot}`;
  show(`${id}-missing`, !has(id));
  if (!has(id)) return;
  for (const metric of ["head_similarity", "top_k_overlap_layers", "top_k_overlap_rows"]) {
    const m = numbers(p, metric);
    if (!m) continue;
    const mean = layer => { const v = known(p.heads.map((h, i) => h[0] === layer ? m.value[i] : NaN)); return v.reduce((a, b) => a + b, 0) / v.length; };
    fill(`${id}_${metric}`, { x: p.layers, y: p.layers.map(mean) });
  }
}

function drawSinks(p, n) {
  const found = texts.sinks[n], says = byId(`sinks_${p.slot}-says`), table = byId(`sinks_${p.slot}`);
  show(`sinks_${p.slot}-box`, !!found?.keys.length);
  says.classList.toggle("missing", !found);
  if (!found) { says.textContent = "Sinks need the metric sink_rate, which was not measured."; return; }
  const threshold = percent(found.threshold);
  if (!found.keys.length) { says.textContent = `No key takes over ${threshold} of the rows after it, in any head.`; return; }
  const elsewhere = found.keys.filter(k => k.key > 0).length;
  says.textContent = `${count(found.all, "key")} ${found.all === 1 ? "is a sink" : "are sinks"}: in some head the rows after it give it over ${threshold} on average. ` +
    `${count(found.heads, "head has", "heads have")} one. ` + (elsewhere ? "" : "All sit on the first token. ") + (found.all > found.keys.length ? `The ${found.keys.length} of most heads are listed.` : "");
  const words = k => k.token === undefined ? el("td", {}, "–") : el("td", { class: "context" },
    ...k.before.map(t => el("span", {}, visible(t))), el("b", {}, visible(k.token)), ...k.after.map(t => el("span", {}, visible(t))));
  table.replaceChildren(
    el("thead", {}, el("tr", {}, ...["Token", "In context", "Heads", "Mean weight on it", "Strongest in"].map((t, c) => el("th", { scope: "col", class: c && c !== 1 && c !== 4 ? "number" : null }, t)))),
    el("tbody", {}, ...found.keys.map(k => el("tr", {}, el("td", {}, k.key.toLocaleString("en")), words(k), el("td", { class: "number" }, String(k.heads)),
      el("td", { class: "number" }, percent(k.mean)),
      el("td", {}, ...k.best.flatMap(([layer, head, v], i) => [i ? ", " : "", el("button", { type: "button", class: "link", onclick: () => openHead(`${layer}.${head}`) }, `${layer}.${head}`), ` (${percent(v)})`]))))));
}

function startLayers() {
  const select = byId("layers-metric");
  const usable = P[0].metrics.filter(m => !m.same && !m.name.includes(">") && (!two || P[1].metric.has(m.name)));
  options(select, metricOptions(usable.length ? usable : P[0].metrics));
  select.addEventListener("change", drawLayers);
  onChange("metric", () => {
    if ([...select.options].some(o => o.value === state.metric)) select.value = state.metric;
    drawLayers();
  });
  P.forEach((p, n) => {
    drawAgreement(p);
    drawSinks(p, n);
    drawSpans(`spans_all_${p.slot}`, p, null);
  });
  const meanings = new Map(P.flatMap(p => p.metrics).map(m => [m.metric || m.name, m]));
  byId("meanings").replaceChildren(
    el("thead", {}, el("tr", {}, ...["Metric", "What it says", "When it misleads"].map(t => el("th", { scope: "col" }, t)))),
    el("tbody", {}, ...[...meanings].map(([key, m]) => el("tr", {}, el("th", { scope: "row" }, visible(key)), el("td", {}, m.summary || "–"), el("td", {}, m.misleads || "–")))));
}
