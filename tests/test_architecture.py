"""docs/architecture.md lists every module with its job, which is the first sentence of the module.

python tests/test_architecture.py     # writes the list anew
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("shapo_kernels", "python/shapo", "benchmarks")
MARKERS = "<!-- tree -->\n", "<!-- /tree -->"


def job(path):
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.:]) (?=[A-Z`])|(?<=\w\.)$", first)[0].rstrip(".:")


def tree():
    lines = []
    for package in PACKAGES:
        modules = sorted(p for p in (ROOT / package).rglob("*.py") if "results" not in p.parts)
        for folder in sorted({p.parent for p in modules}, key=lambda f: f.relative_to(ROOT).parts):
            title = folder.relative_to(ROOT).as_posix()
            face = folder / "__init__.py"
            lines += [f"### {title}", "", job(face) + "." if face.exists() and job(face) else "", ""]
            rows = [p for p in modules if p.parent == folder and p.name != "__init__.py"]
            if rows:
                lines += ["| module | job |", "|---|---|", *(f"| `{p.name}` | {job(p)} |" for p in rows), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def test_the_page_lists_every_module_with_its_job():
    page = PAGE.read_text()
    begin, end = (page.index(marker) for marker in MARKERS)
    written = page[begin + len(MARKERS[0]) : end].strip()
    assert written == tree().strip(), "run `python tests/test_architecture.py`, which writes the list anew"


def test_every_module_says_what_it_is_for():
    silent = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if p.stat().st_size and not job(p)]
    assert not silent


def test_every_test_that_a_page_names_exists():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {path for page in pages for path in re.findall(r"tests/[\w/]*test_\w+\.py", page.read_text())}
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_file_that_the_page_names_exists():
    files = [p.relative_to(ROOT).as_posix() for package in (*PACKAGES, "tests") for p in (ROOT / package).rglob("*.py")]
    page = PAGE.read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", page[: page.index(MARKERS[0])]))
    missing = [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)]
    assert named
    assert not missing


if __name__ == "__main__":
    text = PAGE.read_text()
    start, stop = (text.index(marker) for marker in MARKERS)
    PAGE.write_text(text[: start + len(MARKERS[0])] + "\n" + tree().strip() + "\n\n" + text[stop:])
    sys.exit(0)
