"""The report in a real browser: Debian's Chromium, headless, without a network."""

import json
import os
import shutil

import pytest

import fabricated
from foveate.profiling import Profile
from foveate.report import report, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="browser tests need Chromium: apt-get install chromium"),
    # one browser is enough for all workers
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright: pip install -e '.[dev]'")
    with sync.sync_playwright() as playwright:
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if root else [])
        yield running
        running.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The pages that the tests open."""
    folder = tmp_path_factory.mktemp("reports")
    plain = fabricated.make()
    entropy = plain.heads[plain.heads.metric == "entropy"]
    little = Profile(entropy, plain.keys.iloc[:0], plain.info | {"summary": {"thresholds": {}, "heads": 12}})
    pages = {
        "plain": report(plain),
        "hostile": report(fabricated.make(hostile=True)),
        "little": report(little),
        "old": report(fabricated.make(pictures=False)),
        "pair": report(plain, fabricated.make(seed=1, shift=0.5)),
        "unlike": report(plain, fabricated.make(layers=2, heads=5)),
    }
    return {name: write(html, folder / f"{name}.html") for name, html in pages.items()}


class Visit:
    """An open page, and everything that it must not do."""

    def __init__(self, browser, file, scheme="light", width=1400):
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.requests, self.errors, self.dialogs = [], [], []
        url = file.as_uri()
        self.context.route("**/*", lambda r: r.continue_() if r.request.url.split("#")[0] == url else r.abort())
        page = self.page = self.context.new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda r: self.requests.append(r.url))
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("dialog", lambda d: (self.dialogs.append(d.message), d.dismiss()))
        page.goto(url)
        page.wait_for_selector("html[data-ready=yes]", state="attached")

    def __enter__(self):
        return self.page

    def __exit__(self, kind, *_):
        outside = [u for u in self.requests if not u.startswith(("file:", "data:", "blob:"))]
        pages = [u for u in self.requests if u.startswith("file:")]
        pwned = self.page.evaluate("window.pwned")
        self.context.close()
        if kind is None:
            assert self.errors == []
            assert outside == []
            assert len(pages) == 1, "the file itself and nothing else"
            assert self.dialogs == []
            assert pwned is None


FIRST_CELL = """() => {
  const view = Bokeh.index.find_one_by_id(doc.get_model_by_name("grid_a").id);
  const frame = view.frame.bbox, place = view.el.getBoundingClientRect();
  return [place.left + frame.left + frame.width / 6, place.top + frame.top + frame.height / 8];
}"""
TOOLTIPS = """() => {
  const found = [];
  const walk = node => {
    for (const child of [...(node.shadowRoot?.children ?? []), ...(node.children ?? [])]) {
      if (String(child.className).includes("bk-Tooltip")) found.push((child.shadowRoot ?? child).textContent);
      walk(child);
    }
  };
  walk(document.body);
  return found.join(" ");
}"""
UNNAMED = """() => [...document.querySelectorAll("button, select, input, textarea, [tabindex]")]
  .filter(n => !n.closest("[aria-hidden]"))
  .filter(n => !(n.getAttribute("aria-label") || n.labels?.length || n.textContent.trim()))
  .map(n => n.outerHTML.slice(0, 80))"""


def source(page, name, column):
    """What a figure shows."""
    return page.evaluate("([n, c]) => Array.from(doc.get_model_by_name(n).data[c])", [name, column])


def choose(page, select, value):
    page.select_option(f"#{select}", value)


def shades(page, box):
    """How many tokens have each class of shade."""
    return page.evaluate(
        "b => [...document.querySelectorAll(`#${b} .k`)].map(n => [...n.classList].find(c => /^g[0-9]/.test(c)) ?? '')",
        box,
    )


def test_nothing_is_loaded_and_nothing_complains(browser, files):
    for name, file in files.items():
        with Visit(browser, file) as page:
            assert page.locator("h1").is_visible(), name
            assert page.locator("#trouble").is_hidden(), name


def test_the_metric_switch_changes_the_grid(browser, files):
    plain = fabricated.make()
    with Visit(browser, files["plain"]) as page:
        choose(page, "metric", "entropy")
        assert source(page, "grid_a_source", "v") == pytest.approx(plain.metric("entropy").to_numpy().ravel(), rel=1e-5)
        choose(page, "metric", "first_token_mass")
        shares = 100 * plain.metric("first_token_mass").to_numpy().ravel()
        assert source(page, "grid_a_source", "v") == pytest.approx(shares, rel=1e-5)
        assert "to" in source(page, "grid_a_source", "text")[0], "the interval is told on hover"
        assert "First" not in page.inner_text("#meaning")
        assert "mass" in page.inner_text("#meaning")
        # two metrics: a second grid, and one against the other
        assert page.locator("#grid_b-box").is_hidden()
        choose(page, "second", "entropy")
        assert page.locator("#grid_b-box").is_visible()
        assert page.locator("#scatter-box").is_visible()
        assert source(page, "scatter_source", "x") == pytest.approx(shares, rel=1e-5)
        assert len(page.query_selector_all("#table thead th")) == 5


def test_hovering_a_cell_tells_the_interval(browser, files):
    with Visit(browser, files["plain"]) as page:
        choose(page, "metric", "entropy")
        box = page.locator("#grid_a-box")
        box.scroll_into_view_if_needed()
        left, top = page.evaluate(FIRST_CELL)
        page.mouse.move(left, top)
        page.mouse.move(left + 3, top + 3)
        page.wait_for_timeout(300)
        tip = page.evaluate(TOOLTIPS)
        told = source(page, "grid_a_source", "text")[0]
        assert " to " in told
        assert told in tip


def test_the_table_sorts_and_filters(browser, files):
    plain = fabricated.make()
    with Visit(browser, files["plain"]) as page:
        choose(page, "metric", "entropy")

        def heads():
            return page.eval_on_selector_all("#table tbody tr", "rows => rows.map(r => r.dataset.head)")

        values = plain.heads[plain.heads.metric == "entropy"].sort_values("value", ascending=False)
        expected = [f"{n}.{h}" for n, h in zip(values.layer, values["head"], strict=True)]
        assert heads() == expected
        page.click("[data-sort=value]")
        assert heads() == expected[::-1]
        assert page.get_attribute("th:has([data-sort=value])", "aria-sort") == "ascending"
        page.click("[data-sort=head]")
        assert heads() == sorted(expected)
        page.fill("#filter", "layer>=2 head!=0")
        assert heads() == ["2.1", "2.2", "3.1", "3.2"]
        page.fill("#filter", "retrieves")
        assert set(heads()) == {"2.1", "3.0"}
        page.fill("#filter", "retrieval_score>50%")
        assert heads() == ["2.1"]
        page.fill("#filter", "entropi<2")
        assert "Not understood: entropi<2" in page.inner_text("#filter-says")


def test_heads_are_selected_and_copied(browser, files):
    with Visit(browser, files["plain"]) as page:
        page.check("input[data-head='3.1']")
        page.check("input[data-head='0.2']")
        assert page.input_value("#selection") == "0.2,3.1"
        assert page.inner_text("#selected-count") == "2 heads selected."
        assert source(page, "grid_a_selected", "y") == [0, 3] or source(page, "grid_a_selected", "y") == [3, 0]
        page.click("#copy")
        assert page.evaluate("navigator.clipboard.readText()") == "0.2,3.1"
        choose(page, "format", "json")
        assert json.loads(page.input_value("#selection")) == {"model": "made-up", "heads": [[0, 2], [3, 1]]}
        page.click("#copy")
        assert json.loads(page.evaluate("navigator.clipboard.readText()"))["heads"] == [[0, 2], [3, 1]]
        page.fill("#filter", "retrieves")
        page.click("#select-shown")
        assert json.loads(page.input_value("#selection"))["heads"] == [[0, 2], [2, 1], [3, 0], [3, 1]]
        page.click("#clear")
        assert page.input_value("#selection") == ""
        assert page.is_disabled("#copy")


def test_everything_is_reached_with_the_keyboard(browser, files):
    with Visit(browser, files["plain"]) as page:
        choose(page, "open", "0.0")
        page.focus("#grid_a-box")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#cursor-says").startswith("Head 1.1")
        assert source(page, "grid_a_cursor", "x") == [1]
        page.keyboard.press("Space")
        assert page.input_value("#selection") == "1.1"
        page.keyboard.press("Enter")
        assert page.inner_text("#head-title") == "Head 1.1"
        page.focus("#map_a-box")
        page.keyboard.press("ArrowDown")
        assert "Rows" in page.inner_text("#map_a-says")
        page.focus("#text_a")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert "Token 3" in page.inner_text("#text_a-says")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", "the focus can be seen"
        # every control has a name, and no canvas is left without words
        unnamed = page.evaluate(UNNAMED)
        assert unnamed == []
        # the first stop of the tabulator leads to the findings
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")


def test_a_head_opens_with_its_map(browser, files):
    plain = fabricated.make()
    with Visit(browser, files["plain"]) as page:
        page.click("#table tbody tr[data-head='2.1'] button")
        assert page.inner_text("#head-title") == "Head 2.1"
        image = page.evaluate("Array.from(doc.get_model_by_name('map_a_source').data.image[0])")
        assert len(image) == 90 * 90, "the fine map comes first"
        assert image == pytest.approx(plain.maps[0].mass.ravel(), rel=0.03, abs=2e-5)
        page.check("#resolution_a input >> nth=1")
        assert len(page.evaluate("Array.from(doc.get_model_by_name('map_a_source').data.image[0])")) == 256
        page.hover("#map_a-box")
        page.wait_for_function("document.getElementById('map_a-says').textContent.startsWith('Rows')")
        choose(page, "open", "0.1")
        assert page.locator("#resolution_a").is_hidden()
        assert page.locator("#window_a-missing").is_visible()
        first = plain.arrays["entropy_by_position"][0, 1]
        assert source(page, "position_a_head", "y") == pytest.approx(first, rel=1e-5)
        assert len(source(page, "spans_a_source", "v")) == 64


def test_tokens_are_shaded_and_clicked(browser, files):
    with Visit(browser, files["plain"]) as page:
        choose(page, "open", "2.1")
        received = shades(page, "text_a")
        assert len(received) == 90
        assert any(received)
        page.click("#text_a .k >> nth=45")
        attended = shades(page, "text_a")
        assert attended != received
        assert not any(attended[60:]), "a row sees no later key, nor one outside of its window"
        said = page.inner_text("#text_a-says")
        assert said.startswith("Token 45")
        assert "of its attention lies in this window" in said
        page.click("#text_a .k >> nth=45")
        assert shades(page, "text_a") == received
        page.click("#text_a .k >> nth=5")
        assert "foveate zoom DIR --layer 2 --head 1 --rows 5:6" in page.inner_text("#text_a-says")
        # the window's own tokens
        before = shades(page, "strip_a")
        page.click("#strip_a .k >> nth=3")
        assert shades(page, "strip_a") != before
        assert page.inner_text("#strip_a-says").startswith("Token 33")
        choose(page, "windows_a", "1")
        assert page.locator("#strip_a .gap").count() == 2, "rows and keys are different tokens here"


def test_hostile_text_is_text(browser, files):
    with Visit(browser, files["hostile"]) as page:
        texts = page.eval_on_selector_all("#text_a .k", "nodes => nodes.map(n => n.textContent)")
        assert texts[1] == "</script>"
        assert texts[3] == fabricated.HOSTILE[2]
        assert "␀" in texts[8]
        assert "‹U+202E›" in texts[12]
        assert texts[15] == fabricated.HOSTILE[14], "emoji are not taken apart"
        assert page.locator("#text_a img, #text_a script, header b[onclick], img").count() == 0
        assert "evil" in page.inner_text("h1")
        isolated = page.evaluate("getComputedStyle(document.querySelector('#text_a .k')).unicodeBidi")
        assert isolated == "isolate"
        page.click("#text_a .k >> nth=47")
        for nth in range(40, 58):
            page.click(f"#text_a .k >> nth={nth}")
        choose(page, "open", "2.1")
        assert page.locator("#window_a-part").is_visible()
        page.hover("#window_a-box")
        page.wait_for_timeout(200)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser, files, scheme):
    with Visit(browser, files["plain"], scheme) as page:

        def colours():
            return page.evaluate(
                """() => [getComputedStyle(document.body).backgroundColor,
                          doc.get_model_by_name("grid_a").left[0].major_label_text_color]"""
            )

        paper, ink = colours()
        bright = sum(map(int, paper[4:-1].split(","))) > 400
        assert bright == (scheme == "light")
        assert (int(str(ink)[1:3], 16) > 128) == (scheme == "dark"), "the figures follow"
        page.click("#theme")
        page.click("#theme" if scheme == "light" else "body")
        assert page.inner_text("#theme") == ("Theme: dark" if scheme == "light" else "Theme: light")
        assert colours()[0] != paper


@pytest.mark.parametrize("width", [700, 1400])
def test_nothing_is_cut_off(browser, files, width):
    for name in ("plain", "pair"):
        with Visit(browser, files[name], width=width) as page:
            page.select_option("#metric", "entropy")
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{name} scrolls sideways at {width}"


def test_parts_that_are_missing_say_so(browser, files):
    with Visit(browser, files["old"]) as page:
        for part in ("map_a", "text_a", "window_a", "position_a", "spans_a"):
            assert page.locator(f"#{part}-missing").is_visible(), part
            assert page.locator(f"#{part}-box").is_hidden() or part == "text_a", part
    with Visit(browser, files["little"]) as page:
        assert "Sinks need the metric sink_rate" in page.inner_text("#sinks_a-says")
        assert page.locator("#agreement_a-missing").is_visible()


def test_two_profiles_side_by_side(browser, files):
    with Visit(browser, files["pair"]) as page:
        choose(page, "differences-metric", "induction")
        rows = page.eval_on_selector_all("#differences-table tbody tr", "rows => rows.map(r => r.dataset.head)")
        assert "1.1" in rows
        assert rows[0] == "1.1", "the largest comes first"
        alpha = source(page, "grid_d_source", "alpha")
        assert sum(a == 1 for a in alpha) == len(rows)
        assert page.locator("#grid_a-box").is_visible() and page.locator("#grid_b-box").is_visible()
        choose(page, "open", "2.1")
        assert page.locator("#pane_a #map_a-box").is_visible() and page.locator("#pane_b #map_b-box").is_visible()
    with Visit(browser, files["unlike"]) as page:
        assert "no head of one has a counterpart" in page.inner_text("#differences")
        choose(page, "open", "3.0")
        assert "There is no head 3.0" in page.inner_text("#absent_b")
        assert len(source(page, "layers_b_band", "x")) == 2


def test_links_of_the_sentences_lead_to_the_evidence(browser, files):
    with Visit(browser, files["plain"]) as page:
        page.click(".findings a[data-metric=streaming_mass] >> nth=0")
        assert page.input_value("#metric") == "streaming_mass"
        page.click(".findings a[data-head='3.0']")
        assert page.inner_text("#head-title") == "Head 3.0"
