"""The pages in a real browser: nothing on the console, nothing asked for, nothing cut off, light, dark, phone, paper."""

import os
import re
import subprocess
from itertools import pairwise

import pytest
import runs
from browser import AXE, CHROMIUM, HOW_TO_GET_AXE, HOW_TO_GET_IT, Browser

from gradflow.report import compare, report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=HOW_TO_GET_IT)
PHONE, LAPTOP = (380, 800), (1280, 800)


def resnet():
    """Three streams, as the stages of a ResNet."""
    maker = runs.Maker(blocks=9, last=300)
    tables = maker.tables()
    meta = maker.meta()
    stage = {name: f"layer{1 + i // 6}" for i, name in enumerate(maker.parts)}
    for branch in meta["branches"]:
        branch["stream"] = stage[branch["name"]]
    points = maker.points()
    meta["streams"] = [{"name": f"layer{k}", "kind": "stream", "points": [points[0], *points[6 * k - 5 : 6 * k + 1]], "exact": False} for k in (1, 2, 3)]
    streams = tables["streams"]
    names = ["layer1" if point == points[0] else stage[point.removesuffix(":add")] for point in streams["point"].to_pylist()]
    tables["streams"] = streams.set_column(streams.schema.get_field_index("stream"), "stream", [names])
    return runs.Run(meta, tables)


PAGES = {
    "healthy": lambda path: report(runs.prenorm(), path, findings=[]),
    "trunk": lambda path: report(runs.trunk(), path),
    "resnet": lambda path: report(resnet(), path, findings=[]),
    "200 branches": lambda path: report(runs.many(), path, findings=runs.findings()),
    "full of findings": lambda path: report(runs.broken(), path, findings=runs.findings() * 4),
    "hostile": lambda path: report(runs.hostile(), path, findings=[runs.finding(where=runs.HOSTILE)]),
    "empty": lambda path: report(runs.empty(), path, findings=[]),
    "compare": lambda path: compare({"pre-norm": runs.prenorm(), "with residual connections, post-norm": runs.postnorm(), "without": runs.trunk()}, path),
    "compare many": lambda path: compare({name: runs.prenorm(blocks=2 + i, last=200) for i, name in enumerate(runs.HOSTILE)}, path, findings=[[]] * len(runs.HOSTILE)),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The file of a page, made once for all processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "pages"

    def make(name):
        path = folder / f"{name}.html"  # written as a whole: what is there is complete
        return path if path.is_file() else PAGES[name](path)

    return make


@pytest.fixture(scope="session")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(request, made, browser):
    return browser.open(made(request.param))


every_page = pytest.mark.parametrize("page", PAGES, indirect=True)


@every_page
def test_a_page_is_whole_at_every_size(page):
    for width, height in (PHONE, (768, 1024), LAPTOP, (1920, 1080)):
        page.size(width, height)
        assert page.ask("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
        assert page.overlaps() == []
    assert page.complaints() == []
    assert page.requests() == []


@every_page
def test_text_stands_out_in_light_and_in_dark(page):
    page.size(*LAPTOP)
    for scheme in ("light", "dark"):
        page.media(scheme=scheme)
        assert page.ask(CONTRAST) == []
    page.media()


@pytest.mark.skipif(AXE is None, reason=HOW_TO_GET_AXE)
@every_page
def test_axe_finds_no_barrier(page):
    page.size(*LAPTOP)
    assert page.axe() == []


@every_page
def test_a_page_prints_on_paper_in_ink_on_white(page, tmp_path):
    page.media(media="print", scheme="dark")
    assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.ask("getComputedStyle(document.body).color") == "rgb(28, 36, 48)"
    assert page.ask("getComputedStyle(document.querySelector('footer')).display") != "none"
    page.media()
    data = page.pdf(tmp_path / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    widths = {round(float(found)) for found in re.findall(rb"/MediaBox \[0 0 ([\d.]+)", data)}
    assert widths <= {594, 595, 596}  # A4 is 595 points wide
    assert widths


@pytest.mark.parametrize("page", ["full of findings", "trunk"], indirect=True)
def test_the_first_screen_says_whether_where_and_what_to_do(page):
    page.size(*LAPTOP)
    page.ask("scrollTo({top: 0, behavior: 'instant'})")
    seen = page.ask("[...document.querySelectorAll('.verdict h2, .verdict .claim, .verdict .label')].filter(e => e.getBoundingClientRect().bottom < 800).map(e => e.textContent)")
    assert any(text.strip().endswith(("error", "errors", "warning", "warnings")) for text in seen[:1])
    assert {"Where", "Next"} <= set(seen)


@pytest.mark.parametrize("page", ["healthy"], indirect=True)
def test_figures_change_with_the_theme(page):
    ask = "getComputedStyle(document.querySelector('#fig-signal-depth text')).fill"
    page.media(scheme="light")
    light = page.ask(ask)
    page.media(scheme="dark")
    assert page.ask(ask) != light
    page.media()


@pytest.mark.parametrize("page", ["healthy", "200 branches"], indirect=True)
def test_the_type_in_figures_stays_legible_on_a_phone(page):
    page.size(*PHONE)
    sizes = page.ask(
        "[...document.querySelectorAll('svg.plot')].flatMap(s => { const k = s.clientWidth / s.viewBox.baseVal.width; return [...s.querySelectorAll('text')].map(t => k * parseFloat(getComputedStyle(t).fontSize)); })"
    )
    assert len(sizes) > 200
    assert min(sizes) >= 7.5


@pytest.mark.parametrize("page", ["full of findings"], indirect=True)
def test_the_page_can_be_walked_with_the_keyboard(page):
    page.ask("scrollTo({top: 0, behavior: 'instant'}); document.activeElement.blur()")
    visited = []
    for _ in range(6):
        for kind in ("rawKeyDown", "keyUp"):
            page.send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        visited.append(page.ask("document.activeElement.textContent"))
    assert visited[0] == "Skip to the verdict"
    assert len(set(visited)) == 6


@pytest.mark.parametrize("page", ["hostile"], indirect=True)
def test_no_hostile_name_runs_or_hides_the_page(page):
    assert page.ask("document.querySelectorAll('script, img, iframe').length") == 0
    assert page.ask("getComputedStyle(document.body).display") == "block"
    assert page.ask("document.title").startswith("Not healthy: 1 error · <script>alert(1)</script>")


@pytest.mark.parametrize("page", ["healthy"], indirect=True)
def test_the_checks_of_this_file_notice_what_they_look_for(page):
    page.size(*LAPTOP)
    page.ask("{ const t = document.querySelectorAll('#fig-loss text'); t[0].after(t[0].cloneNode(true)); t[1].setAttribute('x', '-40'); t[1].removeAttribute('transform'); }")
    found = page.overlaps()
    assert any(text.startswith("overlap") for text in found)
    assert any(text.startswith("clipped") for text in found)
    page.ask("document.querySelector('.verdict p').style.color = '#cfe9de'")
    assert page.ask(CONTRAST) != []
    if AXE is not None:
        page.ask("document.documentElement.removeAttribute('lang')")
        assert any(text.startswith("html-has-lang") for text in page.axe())
    page.ask("console.error('seen')")
    assert page.complaints() != []


def test_chromium_itself_takes_a_screenshot_of_a_report(made, tmp_path):
    path = made("trunk")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1280,800", path.as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert (tmp_path / "shot.png").stat().st_size > 20_000


@every_page
def test_headings_descend_by_one(page):
    levels = page.ask("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert all(after - before <= 1 for before, after in pairwise(levels))


CONTRAST = """
(() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const lum = ([r, g, b]) => { const f = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }; return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const back = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0.99) return c; } return [255, 255, 255, 1]; };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest('defs, title, desc, .skip') || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const ink = parse(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [lum(ink), lum(back(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(e.tagName + ': ' + e.textContent.trim().slice(0, 40) + ' ' + ((a + 0.05) / (b + 0.05)).toFixed(2));
  }
  return [...new Set(bad)].slice(0, 20);
})()
"""
