"""The report in headless Chromium: on a phone and on a desktop, in light and in dark.

Chromium is looked for in $CHROMIUM, on PATH (`apt-get install chromium`) and where Playwright installs it.
"""

import os
import pathlib
import shutil

import pytest

from gpsd_dist.checkpoint.storage import write_json
from gpsd_dist.fit import daily_outcome
from gpsd_dist.report.page import make_report
from tests.helpers.run_folders import scored, write_run
from tests.unit.fit.test_daily_outcome import scores_of, three_days

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup-dev")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell", "chrome")
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
MIN_CONTRAST = 4.5  # WCAG 2.1, 1.4.3, text of ordinary size
MIN_LINE_CONTRAST = 3.0  # WCAG 2.1, 1.4.11, parts of graphics

# Colours as the browser computed them, each on what is painted behind it: [text, colour, background] per text element.
COLOURS = """() => {
  const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const behind = element => {
    if (!element) return [255, 255, 255];
    const color = rgba(getComputedStyle(element).backgroundColor);
    return color[3] === 1 ? color.slice(0, 3) : over(color, behind(element.parentElement));
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const isText = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!isText || element.tagName === 'title' || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), isSvg = element instanceof SVGElement;
    found.push([element.textContent.trim().slice(0, 40), rgba(isSvg ? style.fill : style.color), behind(element)]);
  }
  return found;
}"""
LINES = """() => [...document.querySelectorAll('svg.figure path[style*="--c"], .swatch')].map(element => {
  const style = getComputedStyle(element), card = getComputedStyle(element.closest('figure, .scroll, body'));
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const stroke = element instanceof SVGElement ? style.stroke : style.backgroundColor;
  return stroke === 'none' ? null : [numbers(stroke), numbers(card.backgroundColor)];
}).filter(Boolean)"""
FIGURES = """() => [...document.querySelectorAll('svg.figure')].map(svg => {
  const box = svg.getBoundingClientRect(), style = getComputedStyle(svg);
  const texts = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
  const outside = texts.filter(t => t.left < box.left - 2 || t.right > box.right + 2).length;
  const smallest = Math.min(...texts.map(t => t.height));
  return {label: svg.getAttribute('aria-label'), width: box.width, height: box.height, right: box.right,
          outside, smallest,
          visible: style.visibility === 'visible' && style.display !== 'none' && Number(style.opacity) > 0,
          drawn: [...svg.querySelectorAll('path, use')].some(p => p.getBBox().width > 0)};
})"""
TOO_WIDE = """() => {
  const isScrolled = element => element && (['auto', 'scroll'].includes(getComputedStyle(element).overflowX) ||
                                            isScrolled(element.parentElement));
  return [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !isScrolled(e.parentElement))
    .map(e => e.tagName + ': ' + e.textContent.trim().slice(0, 40));
}"""


def find_chromium() -> str:
    """Path of a Chromium; skips if there is none."""
    given = os.environ.get("CHROMIUM")
    if given:
        assert shutil.which(given), f"CHROMIUM={given} cannot be run"
        return given
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        with sync_api.sync_playwright() as playwright:
            found = playwright.chromium.executable_path
    if not os.path.exists(found):
        pytest.skip(f"no Chromium: neither CHROMIUM nor {', '.join(NAMES)} on PATH; apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def browser():
    path = find_chromium()
    with sync_api.sync_playwright() as playwright:
        # root, as in a container, has no sandbox; the page is ours
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory) -> pathlib.Path:
    """A page with everything that can be wide: long names, many options, broken files, nine strategies, days."""
    root = tmp_path_factory.mktemp("report")
    pretrain = write_run(root / "runs/pretrain", stage="pretrain")
    for seed in (0, 1, 2):
        for index, strategy in enumerate(("NT", "ST", "FT", "ST_SF", "FT_SF")):
            init = "" if strategy == "NT" else pretrain
            scores = {"test": scored(0.6 + index / 20 + seed / 100, gauc=0.6, ne=0.9, calibration=1.01)}
            write_run(root / f"runs/s{seed}/{strategy}", strategy, seed, init_checkpoint=init, scores=scores)
    for layers in (1, 2, 3, 5):
        write_run(root / f"runs/a_long_name_of_a_folder_without_spaces_{layers}", options={"model.layers": layers})
    (root / "runs/s0/NT/plan.txt").write_text("table item: " + "row_wise on rank:0/cpu, " * 12)
    (root / "runs/s0/ST/environment.json").write_text("{")
    days = three_days()
    write_json(root / "runs/daily.json", daily_outcome.make(scores_of(days), days, ("click",), []).record)
    out = root / "report.html"
    out.write_text(make_report([root / "runs"]).html)
    return out


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture(params=list(SIZES))
def opened(browser, report_file, scheme, request):
    """(page, what went wrong, requests): the report with every fold open."""
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    wrong: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report_file.as_uri())
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    yield page, wrong, requests
    context.close()


def luminance(color: list[float]) -> float:
    """Relative luminance of sRGB 0 to 255 (WCAG 2.1)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in color[:3])]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: list[float], second: list[float]) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([119, 119, 119], [255, 255, 255]) == pytest.approx(4.48, abs=0.01)  # the usual example, #777


def test_page_fits_its_window_and_asks_for_nothing(opened, report_file):
    page, wrong, requests = opened
    widths = page.evaluate("() => [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
    assert widths[0] <= widths[2] and widths[1] <= widths[2], widths
    assert page.evaluate(TOO_WIDE) == []
    page.evaluate("() => window.scrollTo(1000, 0)")
    assert page.evaluate("() => window.scrollX") == 0
    assert wrong == [] and requests == [report_file.as_uri()]


def test_wide_tables_scroll_in_their_own_box(opened):
    page, _, _ = opened
    boxes = page.evaluate(
        "() => [...document.querySelectorAll('.scroll')].map(b => { b.scrollLeft = 1e6;"
        " return [b.scrollWidth > b.clientWidth + 1, b.scrollLeft > 0, b.querySelectorAll('td').length]; })"
    )
    assert len(boxes) > 10 and any(is_wide for is_wide, _, _ in boxes)
    assert all(is_wide == is_moved and num_cells > 0 for is_wide, is_moved, num_cells in boxes)
    first = page.evaluate(
        "() => [...document.querySelectorAll('.scroll')].filter(b => b.scrollLeft > 0).map(b =>"
        " b.querySelector('tbody th').getBoundingClientRect().left - b.getBoundingClientRect().left)"
    )
    assert all(-1 <= left <= 2 for left in first), "the first column must stay in sight"


def test_every_figure_is_seen(opened):
    page, _, _ = opened
    figures = page.evaluate(FIGURES)
    assert len(figures) > 30
    width = page.evaluate("() => innerWidth")
    for figure in figures:
        assert figure["visible"] and figure["drawn"], figure
        assert figure["width"] > 200 and figure["height"] > 100 and figure["right"] <= width, figure
        assert figure["outside"] == 0 and figure["smallest"] >= 9, figure


def test_text_and_lines_can_be_read(opened, scheme):
    page, _, _ = opened
    colours = page.evaluate(COLOURS)
    assert len(colours) > 500
    for text, color, background in colours:
        assert color[3] == 1 and contrast(color, background) >= MIN_CONTRAST, (text, color, background)
    is_dark = luminance(page.evaluate(COLOURS)[0][2]) < 0.2
    assert is_dark == (scheme == "dark")
    lines = page.evaluate(LINES)
    assert len(lines) > 100
    assert all(contrast(color, background) >= MIN_LINE_CONTRAST for color, background in lines)


def test_links_at_the_top_lead_to_their_sections(browser, report_file):
    page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
    page.goto(report_file.as_uri())
    for link in page.query_selector_all("nav a"):
        link.click()
        top = page.evaluate("() => document.querySelector(location.hash).getBoundingClientRect().top")
        is_end = page.evaluate("() => innerHeight + scrollY >= document.body.scrollHeight - 2")
        assert 0 <= top < 844 and (top < 60 or is_end), link.inner_text()
    page.context.close()
