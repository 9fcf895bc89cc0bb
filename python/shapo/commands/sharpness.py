"""How much the loss rises at a distance rho along its gradient: inside given subspaces, random ones, and all
parameters.

The loss is DPO's on --data, against --reference (by default the model itself, where the loss begins at log 2).  Every
curve is measured at the same radii twice, as they are (--rhos, weight units) and as multiples of ||W_S|| (--ratios).
The weights are restored bit for bit; nothing is trained.  eps is added as in training: exactly, where the weights or
--bf16 have too few bits to hold it.

Writes to --output: sharpness.json and sharpness.png.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shapo.commands import common
from shapo.errors import UserError
from shapo.notes import note
from shapo.options import Group, option, positive_int, radii, seed_number

if TYPE_CHECKING:
    from shapo_kernels import Subspace

SUMMARY = "loss increase against rho inside subspaces (Figure 1 of the paper)"


@dataclass(frozen=True)
class SharpnessOptions:
    """Where and how far is measured."""

    reference: str | None = option("the model that training started from", None, metavar="NAME", reads=True)
    subspace: list[str] = option(
        "a file of `shapo select`, or head (output projection); may be repeated",
        metavar="[NAME=]FILE",
        repeated=True,
        reads=True,
    )
    random: int = option(
        "random controls of the first subspace, of each kind: any layer, same layers",
        1,
        metavar="N",
        needs=("subspace",),
    )
    random_seed: int = option(
        "of the first control; the next ones count up", 0, parse=seed_number, needs=("subspace+random",)
    )
    rhos: list[float] = option("radii in weight units", (0.01, 0.03, 0.1, 0.3, 1.0), parse=radii, metavar="R,R,...")
    ratios: list[float] = option(
        "radii as multiples of ||W_S||", (0.003, 0.01, 0.03, 0.1, 0.3), parse=radii, metavar="R,R,..."
    )
    beta: float = option("inverse temperature of the DPO loss", 0.1)
    bf16: bool = option("compute in bfloat16 under autocast; eps stays exact", False)
    batch_size: int = option("pairs through the model at once", 16, parse=positive_int, metavar="N")


REPLACES = ("sharpness.json", "sharpness.png")
OPTIONS = (Group(common.FolderOutput), common.MODEL, *common.DATA, Group(SharpnessOptions), common.QUIET)


def run(arguments: argparse.Namespace) -> None:
    from shapo.models.loading import load_tokenizer
    from shapo.plots import plot_sharpness
    from shapo.scoring.logps import TokenizedPairs, compute_logps
    from shapo.sharpness import PairLoss, measure
    from shapo.storage.files import require_writable, write_json
    from shapo.tables import table
    from shapo.versions import versions

    if not (0 < arguments.beta < math.inf and 0 <= arguments.random <= 1000):
        raise UserError("--beta must be a finite number above 0, and --random from 0 to 1000")
    output = require_writable(arguments.output, folder=True)
    files = _named_files(arguments.subspace, {name for _, *names in _controls(arguments) for name in names})
    pairs = common.load_data(arguments)
    model = common.load_model(arguments.model, arguments)
    subspaces = _subspaces(model, files, arguments)
    data = TokenizedPairs(pairs, common.make_encoder(arguments, load_tokenizer(arguments.model), model))
    judge = common.load_model(arguments.reference, arguments) if arguments.reference else model
    quiet: dict[str, Any] = {"progress": not arguments.quiet}
    computed: dict[str, Any] = {"batch_size": arguments.batch_size, "bf16": arguments.bf16}
    reference = compute_logps(judge, data, description="reference", **computed, **quiet)
    loss = PairLoss(model, data, reference, beta=arguments.beta, **computed)
    result = measure(loss, subspaces, rhos=arguments.rhos, ratios=arguments.ratios, **quiet)
    settings = {"arguments": vars(arguments), "versions": versions()}
    write_json(output / "sharpness.json", {**settings, **result.as_dict()})
    plot_sharpness(
        output / "sharpness.png", result, title=f"{arguments.model}, {len(data)} pairs, loss {result.loss:.4f}"
    )
    columns = ("subspace", "neurons or rows", "||W_S||", "gradient share", "price")
    header = (*columns, *(f"rho {rho:g}" for rho in arguments.rhos))
    rows = [
        (
            c.name,
            str(c.neurons),
            f"{c.weight_norm:.3g}",
            f"{100 * c.gradient_share:.2f} %",
            "" if c.price is None else f"{c.price:.2f}",
            *(f"{p.increase:+.4f}" for p in c.by_rho),
        )
        for c in result.curves
    ]
    print(table(header, rows))
    lost = [(p.realised, p.rho, c.name) for c in result.curves for p in (*c.by_rho, *c.by_ratio) if p.realised < 0.9]
    if lost:
        cosine, rho, name = min(lost)
        print(
            f"rounded: at rho {rho:g} in {name} eps has cosine {cosine:.2f} with what moved; --dtype float32 is exact"
        )
    print(f"written: {output / 'sharpness.json'}, {output / 'sharpness.png'}")


def _controls(arguments: argparse.Namespace) -> list[tuple[int, str, str]]:
    """Seed and names of the random controls: over any layers, and over the layers of the first subspace."""
    seeds = [arguments.random_seed + number for number in range(arguments.random)]
    suffixes = [f" {seed}" if len(seeds) > 1 else "" for seed in seeds]
    return [(seed, f"random{end}", f"random, same layers{end}") for seed, end in zip(seeds, suffixes, strict=True)]


def _named_files(given: list[str], taken: set[str]) -> dict[str, str]:
    from pathlib import Path

    named: dict[str, str] = {}
    for text in given:
        name, separator, path = text.partition("=")
        key = name if separator else Path(text).stem
        if key in taken:
            raise UserError(
                f"a random control is called {key!r} too; name the file apart: --subspace NAME={path or text}"
            )
        if key in named:
            raise UserError(f"two subspaces are called {key!r}; name them apart: --subspace NAME={path or text}")
        named[key] = path if separator else text
    return named


def _subspaces(model: Any, files: dict[str, str], arguments: argparse.Namespace) -> dict[str, Subspace]:
    from shapo.models.architectures import value_vectors
    from shapo_kernels import Subspace

    if any(path == "full" for path in files.values()):
        raise UserError("all parameters are always measured; leave --subspace full out")
    if any(path == "adapters" for path in files.values()):
        raise UserError("an adapter is measured merged into the weights; --subspace adapters is for `shapo train`")
    found = {name: Subspace.head(model) if path == "head" else Subspace.load(path) for name, path in files.items()}
    for name, subspace in found.items():
        if not subspace.count:
            raise UserError(f"{files[name]} selects no neuron, so there is nothing to move; select some")
        try:
            subspace.validate(model)
        except ValueError as error:
            raise UserError(f"{files[name]}: {error}") from error
    if not found or not arguments.random:
        return found
    vectors = value_vectors(model)
    first = next((space for space in found.values() if space.keys() <= vectors.sizes.keys()), None)
    if first is None:
        note("no random controls: no --subspace is made of neurons")
        return found
    percent = 100 * first.count / sum(vectors.sizes.values())
    for seed, anywhere, same_layers in _controls(arguments):
        drawn = Subspace.random(vectors.sizes, percent, seed=seed, axis=vectors.axis)
        if drawn == first:
            note(f"the control {anywhere!r} has the given subspace's neurons; choose another --random-seed")
        found[anywhere] = drawn
        found[same_layers] = Subspace.random_like(first, vectors.sizes, seed=seed)
    return found
