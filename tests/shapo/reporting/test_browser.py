"""The page in a real browser, where there is one: three widths, light and dark, everything by keyboard, no message."""

from __future__ import annotations

import base64
import re

import pytest

from shapo.reporting.collect import collect
from shapo.reporting.page import render
from tests.support import browser, runs

pytestmark = pytest.mark.skipif(browser.PATH is None, reason="no Chromium is installed")
WIDTHS = (360, 768, 1280)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    paths = [runs.train_run(folder / f"dpo-{s}", seed=s, accuracy=(0.5, 0.75 + s / 8)) for s in (0, 1)]
    paths += [
        runs.train_run(folder / "other method", loss="ipo", accuracy=(0.5, 0.6)),
        runs.train_run(folder / "unfinished", loss="cdpo", accuracy=(0.5, 0.6)),
        runs.attack(folder / "attacked"),
    ]
    (folder / "unfinished" / "run.json").unlink()
    paths += [runs.sharpness(folder / "sharp"), runs.safety(folder / "e.json"), folder / ("long-" * 12)]
    (folder / "page.html").write_text(render(collect(paths)))
    return folder / "page.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    found = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


# What stands further right than the page is wide, outside of what scrolls by itself.
WIDE = """[...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, svg")
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map((e) => e.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_and_nothing_complains(width, scheme, page, chromium):
    chromium.open(page, width, scheme=scheme)
    chromium.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert chromium.run("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert chromium.run(WIDE) == []
    assert chromium.messages == []


# Where the focus is: a number for each element, in the order of the document.
HERE = """(() => {
  const all = [...document.querySelectorAll("body *")];
  return all.indexOf(document.activeElement);
})()"""
STOPS = """(() => {
  const all = [...document.querySelectorAll("body *")];
  const visible = all.filter((e) => e.checkVisibility());
  const wanted = visible.filter((e) => e.matches(".scroll, th button, summary, nav a, g .mark:first-of-type"));
  return wanted.map((e) => all.indexOf(e));
})()"""


def test_the_tab_key_comes_to_every_table_column_and_line_and_out_again(page, chromium):
    chromium.open(page, 768)
    wanted, found = chromium.run(STOPS), []
    assert len(wanted) > 40
    while (here := _after(chromium, "Tab")) >= 0 and here not in found:
        found.append(here)
    # In the order in which they stand, each once; after the last one the focus leaves the page.
    assert found == wanted
    back = []
    while (here := _after(chromium, "Tab", shift=True)) >= 0 and here not in back:
        back.append(here)
    assert back[-len(wanted) :] == wanted[::-1]


def _after(chromium, key, **options):
    chromium.press(key, **options)
    return chromium.run(HERE)


def test_what_has_the_focus_is_outlined(page, chromium):
    chromium.open(page, 1280)
    for _ in range(12):
        chromium.press("Tab")
        assert "solid 2px" in chromium.run("getComputedStyle(document.activeElement).outline")


def test_arrow_keys_go_along_a_line_and_say_its_numbers(page, chromium):
    chromium.open(page, 768)
    while chromium.run("document.activeElement.matches('.mark')") is not True:
        chromium.press("Tab")
    read = "document.activeElement.closest('figure').querySelector('.reading').textContent"
    said = [chromium.run(read)]
    for key in ("ArrowRight", "ArrowRight", "Home", "End", "ArrowLeft"):
        chromium.press(key)
        said.append(chromium.run(read))
    first, last = "dpo, updates 0: 50.0%", "dpo, updates 10: 81.2% (75.0% to 87.5%)"
    assert said == [first, last, last, first, last, first]


def test_enter_on_a_columns_head_sorts_the_rows_up_and_down(page, chromium):
    chromium.open(page, 768)
    while chromium.run("document.activeElement.textContent") != "accuracy %":
        chromium.press("Tab")
    values = "[...document.querySelector('table').tBodies[0].rows].map((row) => row.cells[2].textContent)"
    upwards = ["60.0 (50 to 70)", "81.2 (seeds 75.0 to 87.5)"]
    for order, direction in ((upwards, "ascending"), (upwards[::-1], "descending")):
        chromium.press("Enter")
        assert chromium.run(values) == order
        assert chromium.run("document.activeElement.closest('th').getAttribute('aria-sort')") == direction


# WCAG's contrast of each text with the page's background.
CONTRAST = """(() => {
  const light = (text) => {
    const parts = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
    const [r, g, b] = parts.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  const against = (color) => ratio(light(color), paper);
  const text = [...document.querySelectorAll("p, li, td, th, a, summary, figcaption")];
  const lines = [...document.querySelectorAll("polyline.line")];
  return [Math.min(...text.map((e) => against(getComputedStyle(e).color))),
          Math.min(...lines.map((e) => against(getComputedStyle(e).stroke)))];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(scheme, page, chromium):
    chromium.open(page, 1280, scheme=scheme)
    text, lines = chromium.run(CONTRAST)
    assert text >= 4.5  # WCAG 2.1, 1.4.3
    assert lines >= 3  # 1.4.11


def test_the_page_prints_with_its_numbers(page, chromium):
    chromium.open(page, 1280, scheme="dark")
    printed = base64.b64decode(chromium.ask("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF")
    chromium.ask("Emulation.setEmulatedMedia", media="print")
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.run("[...document.querySelectorAll('details')].every((part) => part.open)")
    # A4 in CSS pixels: no table is wider than the paper.
    chromium.ask("Emulation.setDeviceMetricsOverride", width=794, height=1123, deviceScaleFactor=1, mobile=False)
    assert chromium.run("document.documentElement.scrollWidth") == 794
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) < 12
