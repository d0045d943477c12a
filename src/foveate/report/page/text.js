// ---------------------------------------------------------------- tokens one can walk through

/** A line of text for a token: line ends are kept, and seen. */
const written = piece => Array.from(piece, c => c === "\n" ? "⏎\n" : c === "\t" ? "\t" : visibleChar(c)).join("") || "∅";
const quoted = piece => `“${visible(piece)}”`;

class Tokens {
  /** `pick(i)` is called for the token that a person chooses. */
  constructor(box, pick) {
    this.box = box;
    this.pick = pick;
    this.cursor = 0;
    this.nodes = [];
    box.addEventListener("click", event => {
      const i = this.nodes.indexOf(event.target.closest(".k"));
      if (i >= 0) { this.move(i); pick(i); }
    });
    arrows(box, (down, right) => this.move(this.cursor + right + 12 * down), {
      Enter: () => pick(this.cursor), " ": () => pick(this.cursor),
      Home: () => this.move(0), End: () => this.move(this.nodes.length - 1),
    });
    box.addEventListener("focus", () => { if (box.matches(":focus-visible")) this.move(this.cursor, false); });
    box.addEventListener("blur", () => this.nodes[this.cursor]?.classList.remove("at"));
  }

  /** Parts of a text, each `[heading, tokens]`. */
  set(parts) {
    this.nodes = [];
    this.cursor = 0;
    const children = [];
    for (const [heading, pieces] of parts) {
      if (heading) children.push(el("span", { class: "gap" }, heading));
      for (const piece of pieces) {
        const node = el("span", { class: "k" }, written(piece));
        this.nodes.push(node);
        children.push(node);
      }
    }
    this.box.replaceChildren(...children);
  }

  /** The shade of each token, 0 to 9, and which may be chosen as rows. */
  shade(grade, isRow = () => false, from = -1) {
    this.nodes.forEach((node, i) => {
      const g = grade(i);
      node.className = `k${g ? ` g${g}` : ""}${isRow(i) ? " row" : ""}${i === from ? " from" : ""}`;
    });
  }

  move(to, scroll = true) {
    const i = clamp(to, 0, this.nodes.length - 1);
    this.nodes[this.cursor]?.classList.remove("at");
    this.cursor = i;
    const node = this.nodes[i];
    if (!node) return;
    node.classList.add("at");
    if (scroll) this.center(i);
    this.moved?.(i);
  }

  /** Scrolls the box, never the page. */
  center(i) {
    const node = this.nodes[i], box = this.box;
    if (!node) return;
    const top = node.offsetTop - box.offsetTop;
    if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 40) box.scrollTop = top - box.clientHeight / 2;
  }
}

/** A weight as a shade: 9 is half of the row and more, each step below is half as much. */
const weightGrade = w => w > 0 ? clamp(10 + Math.floor(Math.log2(w) + 1e-6), 0, 9) : 0;
const MASS_WORDS = ["less than the mean", ...Array.from({ length: 8 }, (_, g) => `${2 ** g} to ${2 ** (g + 1)} times the mean`), "over 256 times the mean"];

function legendOf(node, kind) {
  const steps = [1, 3, 5, 7, 9];
  const label = g => kind === "mass" ? `${2 ** (g - 1)}×` : percent(2 ** (g - 10));
  node.replaceChildren(kind === "mass" ? "Mass that a token receives, in multiples of the mean: " : "Share of the chosen row: ",
    ...steps.flatMap(g => [el("i", { class: `g${g}` }, label(g)), " "]), "and more");
}

/** The whole text of a profile, shaded for the opened head. */
class WholeText {
  constructor(p, n) {
    this.p = p;
    this.pieces = texts.pieces[n];
    this.id = `text_${p.slot}`;
    if (!this.pieces.length) {
      missing(`${this.id}-missing`, "The tokens' text is not in this profile: it was made without a tokenizer, or by an older version.");
      return;
    }
    show(`${this.id}-part`, true);
    this.tokens = new Tokens(byId(this.id), i => this.choose(i));
    this.tokens.set([["", this.pieces]]);
    this.tokens.moved = i => this.say(`Token ${i.toLocaleString("en")} ${quoted(this.pieces[i])}${this.received(i)}.`);
  }

  say(text) { byId(`${this.id}-says`).textContent = text; }
  grade(i) { return this.shades ? this.shades[Math.floor(i / this.p.shades.per)] : 0; }
  received(i) { return this.shades ? ` receives ${MASS_WORDS[this.grade(i)]}` : ""; }

  open(index) {
    if (!this.tokens) return;
    this.index = index;
    this.shades = this.p.shades && array(this.p.shades.values, index);
    this.rows = windowsOf(this.p, index).filter(w => w.text === "profile");
    this.mass();
  }

  mass() {
    legendOf(byId(`legend_${this.p.slot}`), "mass");
    if (!this.shades) byId(`legend_${this.p.slot}`).textContent = "Not shaded: the metric column_mass was not measured.";
    this.tokens.shade(i => this.grade(i), i => this.window(i) !== undefined);
    this.chosen = -1;
    this.say(this.rows.length ? "Underlined tokens have a window: choose one to see what it attends to." : "");
  }

  window(i) { return this.rows.find(w => i >= w.rows[0] && i < w.rows[1]); }

  choose(i) {
    const w = this.window(i);
    if (i === this.chosen) return this.mass();
    if (!w) {
      if (this.chosen >= 0) this.mass();
      return this.say(`Token ${i.toLocaleString("en")} ${quoted(this.pieces[i])}${this.received(i)}. What it attends to is not embedded; ${zoomHint(this.p.names[this.index], i)}`);
    }
    const weights = rowOf(w, i - w.rows[0]);
    legendOf(byId(`legend_${this.p.slot}`), "row");
    const at = k => k >= w.keys[0] && k < w.keys[1] ? weights[k - w.keys[0]] : 0;
    this.chosen = i;
    this.tokens.shade(k => weightGrade(at(k)), k => this.window(k) !== undefined, i);
    this.say(`Token ${i.toLocaleString("en")} ${quoted(this.pieces[i])}: ${strongest(weights, w.key_tokens, w.keys[0])}. Choose it again to go back.`);
  }
}

function strongest(weights, tokens, first) {
  const order = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]).slice(0, 3).filter(k => weights[k] > 0);
  const sum = weights.reduce((a, b) => a + b, 0);
  const best = order.map(k => `${percent(weights[k])} on ${quoted(tokens[k])} (${(first + k).toLocaleString("en")})`);
  return best.length ? `${best.join(", ")}; ${percent(Math.min(1, sum))} of its attention lies in this window` : "nothing in this window";
}
const zoomHint = (head, row) => {
  const [layer, at] = head.split("."), first = Math.max(0, row - 255);
  return `this computes it: foveate zoom DIR --layer ${layer} --head ${at} --rows ${row}:${row + 1} --keys ${first}:${row + 1}`;
};
