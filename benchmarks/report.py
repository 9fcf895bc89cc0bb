"""Renders recorded rows as Markdown: no figure in a document is written by hand.

python -m benchmarks.report [suite ...]                 # on standard output
python -m benchmarks.report --wide [suite ...]          # a line for each case: the variants beside ours
python -m benchmarks.report --into README.md [suite ...]  # between <!-- benchmarks --> and <!-- /benchmarks -->
python -m benchmarks.report --gpu --into README.md        # between <!-- gpu --> and <!-- /gpu -->: recorded ones alone
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS

MARKERS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
GPU_MARKERS = ("<!-- gpu -->", "<!-- /gpu -->")
TITLES = {
    "subspace_update": "Norm, perturb and restore of all layers",
    "column_cosine": "Cosine of every neuron with a direction",
    "shapo_update": "A ShaPO update against a plain DPO update",
    "reused_prefix": "A ShaPO update above some blocks, these computed twice and once",
    "sequence_logps": "Log-probabilities of sequences from logits, forward and backward",
    "linear_sequence_logps": "A DPO loss from hidden states and the head's weight, forward and backward",
    "linear_sequence_logps_step": "Log-probabilities from hidden states: preference steps, and tiles of a quarter",
    "delta_forward": "What delta adds to a forward pass",
    "gpu_updates": "GPU: whole updates",
    "gpu_subspace_update": "GPU: norm, perturb and restore of all layers",
    "gpu_delta_forward": "GPU: what delta adds to a forward pass",
    "gpu_neurons": "GPU: a layer's delta, and the gradient of its neurons",
    "gpu_sequence_logps": "GPU: log-probabilities of sequences from logits, forward and backward",
    "gpu_linear_sequence_logps": "GPU: a DPO loss from hidden states and the head's weight, forward and backward",
    "gpu_column_cosine": "GPU: cosine of every neuron with a direction",
}
GPU = tuple(suite for suite in TITLES if suite.startswith("gpu_"))
# Column -> heading and format; a table has those that its rows have.
COLUMNS = {
    "p50_ms": ("median ms", "{:.2f}"),
    "p20_ms": ("p20", "{:.2f}"),
    "p80_ms": ("p80", "{:.2f}"),
    "warm_ms": ("warm ms", "{:.3f}"),
    "timing": ("timed by", "{}"),
    "gb_per_s": ("GB/s", "{:.1f}"),
    "of_floor": ("of floor", "{:.2f}"),
    "of_floor_64": ("of 64-byte floor", "{:.2f}"),
    "percent_of_copy": ("% of the copy", "{:.0f}"),
    "times_ours": ("of ours", "{:.1f}"),
    "ratio_to_plain": ("of plain", "{:.2f}"),
    "max_error": ("error", "{:.1e}"),
    "extra_bytes": ("extra bytes", "{:,}"),
    "extra_of_logits": ("extra, of the logits", "{:.2f}"),
    "of_eager_memory": ("of eager's", "{:.2f}"),
    "of_eager_beyond": ("beyond gradients, of eager's", "{:.3f}"),
    "peak_gib": ("peak GiB", "{:.1f}"),
}

OURS = "shapo_kernels"
# What a wide table says of memory.
MEMORY = {
    "extra_of_logits": "memory beyond the gradient, of the logits",
    "of_eager_memory": "memory, of eager's",
    "of_eager_beyond": "beyond the gradients, of eager's",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help="names of files under benchmarks/results; all by default")
    parser.add_argument("--wide", action="store_true", help="a line for each case: the variants beside ours")
    parser.add_argument("--gpu", action="store_true", help="the suites of the GPU runner that have been recorded")
    parser.add_argument("--into", type=Path, help="a Markdown file with the two markers")
    options = parser.parse_args(arguments)
    recorded = sorted(path.stem for path in RESULTS.glob("*.json"))
    default = [suite for suite in GPU if suite in recorded] if options.gpu else recorded
    suites = options.suites or default
    runs = {suite: json.loads((RESULTS / f"{suite}.json").read_text()) for suite in suites}
    shape = render_wide if options.wide else render
    text = "\n\n".join(shape(suite, run["rows"], run["environment"]) for suite, run in runs.items())
    if options.into is None:
        print(text)
    else:
        markers = GPU_MARKERS if options.gpu else MARKERS
        options.into.write_text(between_markers(options.into.read_text(), text, markers))


def between_markers(document: str, text: str, markers: tuple[str, str] = MARKERS) -> str:
    """The document with `text` between its markers.

    Raises:
        ValueError: the markers are not there, the first before the second.
    """
    first, last = markers
    head, begin, rest = document.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"expected the markers {first} and {last} in the document")
    body = f"\n\n{text}\n\n" if text else "\n"
    return f"{head}{first}{body}{last}{tail}"


def render(suite: str, rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> str:
    """One table and the machine that it was measured on.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"no rows of {suite}: run pytest benchmarks/test_{suite}.py")
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [
        f"### {TITLES.get(suite, suite)}",
        "",
        f"| case | variant | {' | '.join(COLUMNS[name][0] for name in columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    previous = None
    for row in rows:
        case = row["case"] if row["case"] != previous else ""
        previous = row["case"]
        cells = [COLUMNS[name][1].format(row[name]) if name in row else "" for name in columns]
        lines.append(f"| {case} | {row['variant']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _provenance(rows, environment)])


def render_wide(suite: str, rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> str:
    """One line for each case: our median, each other variant's time over ours, and the memory of all.

    Ours is the first variant of that name. Suites that compare with something else have their table as it is.

    Raises:
        ValueError: no rows.
    """
    if len({row["case"] for row in rows}) > 1 and all("ratio_to_plain" in row for row in rows):
        return _render_of_plain(suite, rows, environment)
    first = next((row["variant"] for row in rows if row["variant"].startswith(OURS)), None)
    if first is None or any("ratio_to_plain" in row or "times_ours" not in row for row in rows):
        return render(suite, rows, environment)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    others = [name for name in variants if name != first]
    memory = [name for name in MEMORY if any(name in row for row in rows)]
    title = {name: name.replace(OURS, "ours") for name in variants}
    floor = any("of_floor" in row for row in rows)
    titles = ["case", "ours, ms (p20 to p80)", *(["ours / floor"] if floor else [])]
    titles += [f"{title[name]} / ours" for name in others]
    titles += [f"{MEMORY[column]}: {'; '.join(title.values())}" for column in memory]
    lines = [f"### {TITLES.get(suite, suite)}", "", f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["variant"]: row for row in rows if row["case"] == case}
        ratio = lambda name, found=found: f"{found[name]['times_ours']:.2f}" if name in found else ""  # noqa: E731
        ours = found[first]
        short = ".1f" if ours["p50_ms"] >= 1 or not suite.startswith("gpu_") else ".3f"
        cells = [case, f"{ours['p50_ms']:,{short}} ({ours['p20_ms']:,{short}} to {ours['p80_ms']:,{short}})"]
        cells += [f"{ours['of_floor']:.2f}"] if floor else []
        cells += map(ratio, others)
        for column in memory:
            cells.append("; ".join(f"{found[name][column]:.2f}" if name in found else "none" for name in variants))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _provenance(rows, environment)])


def _render_of_plain(suite: str, rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> str:
    """One line for each case: the plain update's median, and every other update in plain ones."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    plain, others = variants[0], variants[1:]
    memory = ["MB at the peak: " + "; ".join(variants)] if all("extra_bytes" in row for row in rows) else []
    titles = ["case", f"{plain}, ms (p20 to p80)", *(f"{name}, of plain" for name in others), *memory]
    lines = [f"### {TITLES.get(suite, suite)}", "", f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["variant"]: row for row in rows if row["case"] == case}
        cells = [case, "{p50_ms:.0f} ({p20_ms:.0f} to {p80_ms:.0f})".format(**found[plain])]
        cells += [f"{found[name]['ratio_to_plain']:.2f}" if name in found else "" for name in others]
        if memory:
            cells.append("; ".join(f"{found[v]['extra_bytes'] / 1e6:.0f}" if v in found else "none" for v in variants))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _provenance(rows, environment)])


def _provenance(rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> str:
    hardware = (
        environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads of {environment['cores']} cores"
    )
    versions = f"torch {environment['torch']}" + (f", triton {environment['triton']}" if environment["gpu"] else "")
    commits = dict.fromkeys(row.get("commit", environment["commit"]) for row in rows)
    dates = dict.fromkeys(filter(None, (row.get("date", environment.get("date")) for row in rows)))
    sentence = (
        f"{hardware}; {versions}, commit {', '.join([*commits, *dates])}; "
        f"{rows[0]['rounds']} rounds, the variants in turn."
    )
    bandwidths = [row["copy_gb_per_s"] for row in rows if "copy_gb_per_s" in row]
    if bandwidths:
        sentence += (
            f" Floor: what must at least be moved, at the copy bandwidth of the same rounds ({min(bandwidths):.0f} to "
            f"{max(bandwidths):.0f} GB/s)."
        )
    return sentence


if __name__ == "__main__":
    main()
