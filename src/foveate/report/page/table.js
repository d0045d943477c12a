// ---------------------------------------------------------------- the table of heads, the filter, the selection

const ROWS = 400;
const order = { by: "value", down: true };

/** Columns of the table: what the grids show. */
function columns() {
  return Object.values(gridMetrics()).map(([p, metric], n) => ({ key: n ? "other" : "value", p, m: numbers(p, metric) })).filter(c => c.m);
}

/** The filter's terms as tests; words are looked for in the head's name and kind, `metric>number` in the numbers. */
function parseFilter(text) {
  const tests = [], odd = [];
  for (const term of text.trim().split(/\s+/).filter(Boolean)) {
    const found = /^([^<>=!]+)(<=|>=|<|>|!=|=)(-?[\d.]+(?:e-?\d+)?)(%?)$/i.exec(term);
    if (!found) {
      const word = term.toLowerCase().replace(/^l(\d+)h(\d+)$/, "$1.$2");
      const isKind = Object.keys(KINDS).some(k => k.startsWith(word));
      if (isKind) tests.push(i => P[0].kinds[i].startsWith(word));
      else if (/^\d+(\.\d*)?$/.test(word)) tests.push(i => word.includes(".") ? P[0].names[i].startsWith(word) : String(P[0].heads[i][0]) === word);
      else odd.push(term);
      continue;
    }
    const [, what, op, digitsText, sign] = found;
    const limit = Number(digitsText) / (sign ? 100 : 1);
    const get = what === "layer" ? i => P[0].heads[i][0] : what === "head" ? i => P[0].heads[i][1] : (() => {
      const m = numbers(P[0], what);
      return m && (i => m.value[i]);
    })();
    if (!get || Number.isNaN(limit)) { odd.push(term); continue; }
    const compare = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b, "!=": (a, b) => a !== b }[op];
    tests.push(i => compare(get(i), limit));
  }
  return { tests, odd };
}

function drawTable() {
  const shown = columns(), filter = parseFilter(byId("filter").value);
  const keyOf = {
    head: i => i, kind: i => P[0].kinds[i] || "~",
    value: i => shown[0]?.m.value[i], other: i => shown[1]?.m.value[shown[1].p.at.get(P[0].names[i])],
  };
  const key = keyOf[order.by];
  const rows = P[0].heads.map((_, i) => i).filter(i => filter.tests.every(t => t(i))).sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    const [nx, ny] = [x, y].map(v => v === undefined || Number.isNaN(v));
    if (nx || ny) return nx - ny || a - b;
    const by = x < y ? -1 : x > y ? 1 : 0;
    return (order.down ? -by : by) || a - b;
  });
  change({ shown: rows });
  const title = c => (two ? `${c.p.slot.toUpperCase()}: ` : "") + c.m.title;
  const header = (id, text, klass) => el("th", { scope: "col", class: klass, "aria-sort": order.by === id ? (order.down ? "descending" : "ascending") : "none" },
    el("button", { type: "button", "data-sort": id, onclick: () => sortBy(id) }, text));
  byId("table").tHead.replaceChildren(el("tr", {}, el("th", { scope: "col" }, el("span", { "aria-label": "selected" }, "✓")), header("head", "Head"),
    ...shown.map(c => header(c.key, title(c), "number")), header("kind", "Kind")));
  const body = rows.slice(0, ROWS).map(i => {
    const key = P[0].names[i];
    const box = el("input", { type: "checkbox", "data-head": key, "aria-label": `select head ${key}`, onchange: e => toggle([key], e.target.checked) });
    box.checked = state.selected.has(key);
    return el("tr", { "data-head": key, class: state.open === key ? "opened" : null }, el("td", {}, box),
      el("td", {}, el("button", { type: "button", class: "link", onclick: () => openHead(key) }, key)),
      ...shown.map(c => {
        const at = c.p.at.get(key);
        const range = at === undefined ? "" : interval(c.m.low[at], c.m.high[at], c.m.unit);
        return el("td", { class: "number" }, at === undefined ? "–" : number(c.m.value[at], c.m.unit), range ? el("span", { class: "interval" }, range) : null);
      }),
      el("td", {}, KINDS[P[0].kinds[i]] ?? ""));
  });
  if (rows.length > ROWS) body.push(el("tr", {}, el("td", { colspan: 3 + shown.length }, `${rows.length - ROWS} more; filter to see them.`)));
  byId("table").tBodies[0].replaceChildren(...body);
  byId("filter-says").textContent = filter.odd.length
    ? `Not understood: ${filter.odd.map(visible).join(" ")}. Write a layer, a head such as 18.6, retrieves, local, sink, or metric>number (entropy<2).`
    : `${rows.length} of ${count(P[0].heads.length, "head")}`;
}

function sortBy(id) {
  order.down = order.by === id ? !order.down : id === "value" || id === "other";
  order.by = id;
  drawTable();
  byId("table").querySelector(`[data-sort="${id}"]`).focus();
}

function sorted(names) {
  return [...names].map(n => n.split(".").map(Number)).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
}
function selectionText() {
  const heads = sorted(state.selected);
  if (!heads.length) return "";
  return byId("format").value === "json" ? JSON.stringify({ model: P[0].model, heads }) : heads.map(name).join(",");
}

function drawSelection() {
  const n = state.selected.size;
  byId("selected-count").textContent = n ? `${count(n, "head")} selected.` : "No head selected.";
  byId("selection").value = selectionText();
  byId("copy").disabled = byId("clear").disabled = !n;
  for (const box of byId("table").querySelectorAll("input[data-head]")) box.checked = state.selected.has(box.dataset.head);
}

async function copySelection() {
  const area = byId("selection"), button = byId("copy");
  try {
    await navigator.clipboard.writeText(area.value);
  } catch {
    // no permission for the clipboard: the old way
    area.focus();
    area.select();
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function startTable() {
  onChange("metric second", drawTable);
  onChange("selected", drawSelection);
  onChange("open", () => {
    for (const row of byId("table").tBodies[0].rows) row.classList.toggle("opened", row.dataset.head === state.open);
  });
  byId("filter").addEventListener("input", drawTable);
  byId("format").addEventListener("change", drawSelection);
  byId("copy").addEventListener("click", copySelection);
  byId("clear").addEventListener("click", () => change({ selected: new Set() }));
  byId("select-shown").addEventListener("click", () => toggle(state.shown.map(i => P[0].names[i]), true));
  drawSelection();
}
