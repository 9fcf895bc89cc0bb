"""The README's example is run as it stands, and what it says of files is so."""

import re
from pathlib import Path

import pytest

from benchmarks import report

README = Path(__file__).parents[1] / "README.md"
KERNELS = ["subspace_update", "column_cosine", "shapo_update", "reused_prefix"]
LOGPS = ["sequence_logps", "linear_sequence_logps", "linear_sequence_logps_step"]
TABLES = [
    ("README.md", ["--wide", *KERNELS]),
    ("README.md", ["--gpu", "--wide"]),
    ("docs/measurements.md", KERNELS),
    ("docs/measurements.md", ["--gpu"]),
    ("docs/losses.md", ["--wide", *LOGPS]),
]


def test_the_usage_example_runs_and_trains(capsys):
    pytest.importorskip("transformers")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert "realised_cosine" in capsys.readouterr().out
    assert namespace["opt"].updates == 3
    assert namespace["loss"]().item() < 0.6931


def test_every_file_that_the_readme_links_to_exists():
    for link in re.findall(r"\]\((?!http)([^)#]+)", README.read_text()):
        assert (README.parent / link).exists(), link


@pytest.mark.parametrize(("document", "arguments"), TABLES)
def test_tables_are_those_of_the_recorded_rows(document, arguments, tmp_path):
    written = (README.parent / document).read_text()
    copy = tmp_path / "copy.md"
    copy.write_text(
        report.between_markers(written, "nothing", report.GPU_MARKERS if "--gpu" in arguments else report.MARKERS)
    )
    report.main(["--into", str(copy), *arguments])
    assert copy.read_text() == written


def test_the_readme_claims_gpu_runs_only_where_rows_are_recorded():
    recorded = any((report.RESULTS / f"{suite}.json").exists() for suite in report.GPU)
    assert recorded != ("there is no such row yet" in README.read_text())
