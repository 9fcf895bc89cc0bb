"""The page in a real browser, where there is one: three widths, no console message, no overflow, tables by keyboard."""

from __future__ import annotations

import html
import json
import shutil
import subprocess

import pytest

from shapo.reporting.collect import collect
from shapo.reporting.page import render
from tests.support import runs

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
WIDTHS = (360, 768, 1280)

# Runs inside the page: what a person with a keyboard finds, what sorting does, whether anything sticks out.
PROBE = """
addEventListener("load", () => {
  const reach = [];
  const regions = [...document.querySelectorAll(".scroll")];
  for (const region of regions) {
    if (region.closest("details")) region.closest("details").open = true;
    region.focus();
    reach.push(document.activeElement === region);
    const button = region.querySelector("th button");
    button.focus();
    reach.push(document.activeElement === button);
  }
  const marks = [...document.querySelectorAll("circle.mark")];
  for (const mark of marks) { mark.focus(); reach.push(document.activeElement === mark); }
  const table = document.querySelector("table");
  const button = table.querySelectorAll("th button")[2];
  const values = () => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent);
  const order = [];
  for (let click = 0; click < 2; click++) { button.click(); order.push(values()); }
  const wide = [...document.querySelectorAll("body *")].filter((e) =>
    !e.closest(".scroll, svg") && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5);
  parent.postMessage({width: innerWidth, scroll: document.documentElement.scrollWidth, tables: regions.length,
    marks: marks.length, reach: reach.every(Boolean), order, sort: button.closest("th").getAttribute("aria-sort"),
    wide: wide.map((e) => e.tagName), errors: window.problems}, "*");
});
"""

FRAME = """<!doctype html><body><pre id="found"></pre><script>
const found = [];
addEventListener("message", (event) => {
  found.push(event.data);
  if (found.length === %d) document.getElementById("found").textContent = JSON.stringify(found);
});
</script>%s</body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    paths = [runs.train_run(folder / f"dpo-{s}", seed=s, accuracy=(0.5, 0.75 + s / 8)) for s in (0, 1)]
    paths += [
        runs.train_run(folder / "other method", loss="ipo", accuracy=(0.5, 0.6)),
        runs.attack(folder / "attacked"),
    ]
    paths += [runs.sharpness(folder / "sharp"), runs.safety(folder / "e.json"), folder / ("long-" * 12)]
    return render(collect(paths))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_finds_no_fault_at_three_widths(page, tmp_path):
    # The probe is let in past the page's own policy, which allows inline scripts alone.
    early = "<script>window.problems = []; addEventListener('error', (e) => problems.push(e.message));</script>"
    probed = page.replace("<head>", f"<head>{early}", 1).replace("</body>", f"<script>{PROBE}</script></body>", 1)
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(probed)}"></iframe>'
        for width in WIDTHS
    )
    (tmp_path / "frames.html").write_text(FRAME % (len(WIDTHS), frames))
    done = _browse(tmp_path, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frames.html").as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    text = done.stdout.partition('<pre id="found">')[2].partition("</pre>")[0]
    found = {entry["width"]: entry for entry in json.loads(html.unescape(text))}
    assert set(found) == set(WIDTHS)
    for width, entry in found.items():
        assert entry["errors"] == []
        assert (entry["scroll"], entry["wide"]) == (width, [])
        assert entry["tables"] >= 8
        assert entry["marks"] >= 12
        assert entry["reach"]
        upwards = ["60.0 (50 to 70)", "81.2 (seeds 75.0 to 87.5)"]
        assert entry["order"] == [upwards, upwards[::-1]]
        assert entry["sort"] == "descending"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_prints(page, tmp_path):
    (tmp_path / "page.html").write_text(page)
    _browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri())
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def _browse(folder, *arguments):
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    return subprocess.run(
        [str(BROWSER), *options, "--enable-logging=stderr", *arguments],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
