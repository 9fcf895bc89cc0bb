"""What depth costs: a selection from the upper blocks alone, beside one from all of them, on a model and its pairs.

    python -m benchmarks.depth MODEL --selection PAIRS --pairs PAIRS --name NAME    # one model's rows
    python -m benchmarks.depth --into docs/combinations.md                         # the table

As many neurons at every depth, chosen by the gradient on the selection pairs. On other pairs, with g the gradient of
their DPO loss L at theta and eps = rho g_S / ||g_S||: the increase L(theta + eps) - L(theta), its share of the increase
of the selection from all blocks, and the cosine between the two eps. The price is in plain updates, by units: (3 + 2 f)
/ 3 with f the share of the depth from the lowest selected block on, where the blocks below are reused.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import between_markers
from benchmarks.rows import RESULTS, add
from shapo_kernels import Subspace

MARKERS = ("<!-- depth -->", "<!-- /depth -->")
DEPTHS = {"all blocks": 1.0, "1/2": 0.5, "1/4": 0.25, "1/8": 0.125, "last block": 1e-9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder")
    parser.add_argument("--name", help="of the model, for the table")
    parser.add_argument("--selection", help="pairs to choose neurons by")
    parser.add_argument("--pairs", help="pairs of the loss")
    parser.add_argument("--count", type=int, default=16, help="pairs of either")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--percent", type=float, default=1.0, help="of the neurons")
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--into", type=Path, help="a Markdown file with the two markers")
    options = parser.parse_args()
    if options.into:
        text = table(json.loads((RESULTS / "depth.json").read_text()))
        options.into.write_text(between_markers(options.into.read_text(), text, MARKERS))
    else:
        add("depth", measure_depths(options))


def measure_depths(options: argparse.Namespace) -> list[dict[str, Any]]:
    from shapo import selection
    from shapo.data.formats import load_pairs
    from shapo.data.tokens import PairEncoder
    from shapo.models.architectures import value_vectors
    from shapo.models.loading import load_model, load_tokenizer
    from shapo.scoring.logps import TokenizedPairs, compute_logps
    from shapo.sharpness import PairLoss, measure

    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    encoder = PairEncoder(tokenizer, max_prompt_length=options.max_length // 2, max_length=options.max_length)
    chosen_by, pairs = (load_pairs(path, limit=options.count) for path in (options.selection, options.pairs))
    scores = selection.gradient_scores(model, encoder, chosen_by, batch_size=4)
    vectors = value_vectors(model)
    neurons = sum(vectors.sizes.values())
    spaces = {}
    for name, depth in DEPTHS.items():
        upper = vectors.upper(depth)
        share = options.percent * neurons / sum(upper.sizes.values())
        spaces[name] = Subspace.top({n: scores[n] for n in upper.names}, share, largest=True, axis=upper.axis)
    data = TokenizedPairs(pairs, encoder)
    loss = PairLoss(model, data, compute_logps(model, data, batch_size=8, progress=False), batch_size=4)
    gradient = loss.gradient()
    measured = measure(loss, spaces, rhos=[options.rho])
    increases = {curve.name: curve.by_rho[0].increase for curve in measured.curves}
    rows = []
    for name, space in spaces.items():
        lowest = min(_block(weight) for weight in space)
        above = 1 - lowest / len(vectors.names)
        rows.append(
            {
                "suite": "depth",
                "case": options.name or options.model,
                "variant": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "blocks": len(vectors.names),
                "neurons": space.count,
                "pairs": options.count,
                "rho": options.rho,
                "lowest": lowest,
                "price_in_units": (3 + 2 * above) / 3,
                "increase": increases[name],
                "share": increases[name] / increases["all blocks"],
                "cosine": _cosine(gradient, space, spaces["all blocks"]),
            }
        )
    return rows


def _block(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    assert found is not None, name
    return int(found[1])


def _cosine(gradient: Mapping[str, Tensor], space: Subspace, other: Subspace) -> float:
    """Both directions are the gradient, each inside its own subspace: what they share is the gradient in both."""

    def squares(of: Subspace, name: str, index: Tensor) -> float:
        return float(gradient[name].index_select(of.axis(name), index).double().square().sum())

    own = sum(squares(space, name, index) for name, index in space.items())
    others = sum(squares(other, name, index) for name, index in other.items())
    both = sum(squares(space, n, index[torch.isin(index, other[n])]) for n, index in space.items() if n in other)
    return both / math.sqrt(own * others)


def table(run: dict[str, Any]) -> str:
    lines = [
        "| model | selected from | lowest selected block | price | share of the increase | cosine |",
        "|---|---|---:|---:|---:|---:|",
    ]
    previous = None
    for row in run["rows"]:
        model = row["case"] if row["case"] != previous else ""
        previous = row["case"]
        lines.append(
            f"| {model} | {row['variant']} | {row['lowest']} of {row['blocks']} | {row['price_in_units']:.2f} "
            f"| {row['share']:.2f} | {row['cosine']:.2f} |"
        )
    first = {row["case"]: row for row in reversed(run["rows"])}.values()
    made = "; ".join(
        f"{row['case']}: {row['parameters'] / 1e6:.1f} M parameters, {row['neurons']} neurons, {row['pairs']} pairs, "
        f"rho {row['rho']:g}, increase from all blocks {row['increase']:.3g}"
        for row in sorted(first, key=lambda row: row["case"])
    )
    return "\n".join([*lines, "", f"{made}. Commit {run['environment']['commit']}."])


if __name__ == "__main__":
    main()
