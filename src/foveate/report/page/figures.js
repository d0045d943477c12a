// ---------------------------------------------------------------- figures

let doc = null;
const model = id => doc.get_model_by_name(id);
const has = id => roots.has(id);
const roots = new Set();

async function drawFigures() {
  const script = document.createElement("script");
  script.nonce = document.currentScript?.nonce ?? [...document.scripts].find(s => s.nonce).nonce;
  script.textContent = new TextDecoder().decode(await unpack("bokeh"));
  document.head.append(script);
  Bokeh.set_log_level("error");
  const { doc: json, roots: names } = JSON.parse(byId("figures").textContent);
  const places = {};
  for (const [id, figure] of Object.entries(names)) {
    places[id] = byId(figure === "layers" ? "layers-figure" : figure);
    roots.add(figure);
  }
  const ids = Object.fromEntries(Object.entries(places).map(([id, node]) => [id, node.id]));
  await Bokeh.embed.embed_items({ report: json }, [{ docid: "report", roots: ids, root_ids: Object.keys(ids) }]);
  doc = Bokeh.documents.at(-1);
  for (const box of document.querySelectorAll(".figure")) {
    const id = box.id.replace(/-box$/, "");
    if (box.id && !has(id)) box.hidden = true;
    // what the canvas shows is told beside it in words
    for (const node of box.querySelectorAll(":scope > div")) node.setAttribute("aria-hidden", "true");
  }
}

function fill(source, data) { model(source).data = data; }

/** A matrix of shares as the data of an image. */
function picture(values, rows, columns, x0, y0, width, height) {
  const { ndarray } = Bokeh.require("core/util/ndarray");
  return { image: [ndarray(values, { dtype: "float32", shape: [rows, columns] })], x: [x0], y: [y0], dw: [width], dh: [height] };
}

/** The colours of the text around the figures follow the page. */
function paintFigures() {
  const css = getComputedStyle(document.documentElement);
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map(v => css.getPropertyValue(v).trim());
  for (const id of roots) {
    const plot = model(id);
    for (const part of [...plot.above, ...plot.below, ...plot.left, ...plot.right]) {
      if (part.type.endsWith("Axis")) part.setv({
        axis_label_text_color: soft, major_label_text_color: ink, axis_line_color: line, major_tick_line_color: line });
      if (part.type === "ColorBar") part.setv({ title_text_color: soft, major_label_text_color: ink });
      if (part.type === "Legend") part.setv({ label_text_color: ink });
      if (part.type === "Title") part.setv({ text_color: ink });
    }
    for (const renderer of plot.renderers) if (renderer.name?.endsWith("_ink")) renderer.glyph.setv({ line_color: { value: ink } });
  }
}

function startTheme() {
  const button = byId("theme"), say = { auto: "as the system", light: "light", dark: "dark" };
  const repaint = theme => { applyTheme(theme); paintFigures(); };
  button.addEventListener("click", () => {
    chosenTheme = THEMES[(THEMES.indexOf(chosenTheme) + 1) % THEMES.length];
    button.textContent = `Theme: ${say[chosenTheme]}`;
    repaint();
  });
  dark.addEventListener("change", () => repaint());
  addEventListener("beforeprint", () => repaint("light"));
  addEventListener("afterprint", () => repaint());
  paintFigures();
}

/** Arrow keys move a cursor over the cells of a figure; `move` gets steps, `act` the other keys. */
function arrows(box, move, act = {}) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [-10, 0], PageDown: [10, 0] };
  box.addEventListener("keydown", event => {
    if (event.target !== box || event.ctrlKey || event.metaKey || event.altKey) return;
    if (steps[event.key]) move(...steps[event.key].map(s => event.shiftKey ? s * 8 : s));
    else if (act[event.key]) act[event.key](event);
    else return;
    event.preventDefault();
  });
}
