"""Selects the neurons to perturb and writes them as a subspace.

  probe     the share --percent of all neurons most opposed to the "unsafe" direction of --probe (the published way)

  gradient  those on which the loss of --data has the largest gradient; give it pairs that neither training nor
            evaluation sees

  random    as many at random: over all layers together, the same share of each (--match layer), or in each layer as
            many as --like has

  neurons   every neuron

  full      every parameter, the uniform control (ordinary SAM)

With --depth 0.25 all but the last select from the upper quarter of the blocks only, as many neurons as from all of
them; `shapo train --reuse-prefix` then computes the other blocks once an update.

Writes --output, a safetensors file; its header says how it was made.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shapo.commands import common
from shapo.config import LOSSES
from shapo.errors import UserError
from shapo.notes import note
from shapo.options import Group, declared, fill, given, option, positive_int, seed_number, typed
from shapo.ranks import Ranks

if TYPE_CHECKING:
    from shapo_kernels import Subspace

SUMMARY = "select the neurons to perturb"

METHODS = ("probe", "gradient", "random", "neurons", "full")


@dataclass(frozen=True)
class SelectOptions:
    """How many neurons, chosen how; each option with the methods that use it."""

    percent: float = option("share of all neurons, in (0, 100]", 1.0, of=("probe", "gradient", "random"))
    depth: float = option(
        "share of the blocks to select from, from the top, in (0, 1]; see --reuse-prefix of shapo train",
        1.0,
        of=("probe", "gradient", "random", "neurons"),
        metavar="SHARE",
    )
    probe: str | None = option(
        "what `shapo probe` wrote: its folder or the file", None, of=("probe",), metavar="PATH", reads=True
    )
    match: str = option("drawn over all layers, or layer by layer", "total", of=("random",), choices=("total", "layer"))
    like: str | None = option(
        "a subspace whose number of neurons in each layer is taken", None, of=("random",), metavar="FILE", reads=True
    )
    seed: int = option("of the draw", 0, of=("random",), parse=seed_number)
    data: list[str] = option(
        "held-out preference pairs: a local file, a folder of splits or a hub name; may be repeated",
        of=("gradient",),
        repeated=True,
        metavar="SOURCE",
        reads=True,
    )
    loss: str = option("which loss", "dpo", of=("gradient",), choices=tuple(n for n in LOSSES if n != "reward_level"))
    beta: float = option("inverse temperature of the loss", 0.1, of=("gradient",))
    batch_size: int = option("pairs through the model at once", 8, of=("gradient",), parse=positive_int, metavar="N")
    bf16: bool = option("compute under bfloat16 autocast", False, of=("gradient",))


@dataclass(frozen=True)
class MethodOptions:
    """What to write, and by which method."""

    output: str = option("safetensors file of the subspace", metavar="FILE", writes=True)
    method: str = option("see above", choices=METHODS)


OPTIONS = (
    Group(MethodOptions),
    common.MODEL,
    Group(SelectOptions, "selection", given_only=True),
    Group(common.FormatOptions, "data", given_only=True),
    Group(common.TokenOptions, "tokens", given_only=True),
    common.QUIET,
)


def run(arguments: argparse.Namespace) -> None:
    from shapo.probe import Probe
    from shapo.storage.files import atomic_file, require_writable
    from shapo.tables import counted, table

    _check(arguments)
    require_writable(arguments.output)
    pairs = common.load_data(arguments) if arguments.method == "gradient" else None
    probe = Probe.load(arguments.probe) if arguments.method == "probe" else None
    model = common.load_model(arguments.model, arguments, slow=arguments.method == "gradient")
    subspace = _select(arguments, model, pairs, probe)
    if not Ranks.here().is_main:
        return
    with atomic_file(arguments.output) as temporary:
        subspace.save(temporary)
    rows = [(name, str(subspace[name].numel())) for name in subspace.names]
    print(table(("weight", "neurons"), rows))
    neurons, layers = counted(subspace.count, "neuron"), counted(len(subspace), "layer")
    print(f"{neurons} in {layers}: {arguments.output}")


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what the method has no use for, and fills in what was not given."""
    if arguments.like and (arguments.percent is not None or arguments.match or arguments.depth is not None):
        raise UserError("--like says how many neurons of which layer; leave --percent, --match and --depth out")
    for table in (common.FormatOptions, common.TokenOptions):
        if arguments.method != "gradient" and (useless := given(table, arguments)):
            note(f"{useless[0]} says how --data is read, and --method {arguments.method} reads none")
        fill(table, arguments)
    for name, (field, told) in declared(SelectOptions).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, [] if told.repeated else field.default)
        elif arguments.method not in told.of:
            raise UserError(
                f"{typed(name)} is an option of --method {' or '.join(told.of)}, not of --method {arguments.method}"
            )
    if not 0 < arguments.depth <= 1:
        raise UserError(f"depth is {arguments.depth}, but a share of the blocks in (0, 1] is expected")
    if not 0 < arguments.percent <= 100:
        raise UserError(f"percent is {arguments.percent}, but a share in (0, 100] is expected")
    if arguments.method in ("probe", "gradient"):
        needed = "probe" if arguments.method == "probe" else "data"
        if not getattr(arguments, needed):
            raise UserError(f"--method {arguments.method} needs --{needed}")


def _select(arguments: argparse.Namespace, model: Any, pairs: Any, probe: Any) -> Subspace:
    from shapo import selection
    from shapo.config import LossConfig
    from shapo.models.loading import load_tokenizer
    from shapo_kernels import Subspace

    made_from = {"model": arguments.model}
    if arguments.method == "probe":
        return selection.select_by_probe(
            model,
            probe.direction,
            arguments.percent,
            depth=arguments.depth,
            metadata={**made_from, "probe": arguments.probe},
        )
    if arguments.method == "gradient":
        return selection.select_by_gradient(
            model,
            common.make_encoder(arguments, load_tokenizer(arguments.model), model),
            pairs,
            arguments.percent,
            loss=LossConfig(name=arguments.loss, beta=arguments.beta),
            batch_size=arguments.batch_size,
            bf16=arguments.bf16,
            depth=arguments.depth,
            progress=not arguments.quiet,
            ranks=Ranks.here(),
            metadata={**made_from, "data": " ".join(arguments.data)},
        )
    if arguments.method == "random":
        if arguments.like:
            like = Subspace.load(arguments.like)
            return selection.random_like(
                model, like, seed=arguments.seed, metadata={**made_from, "like": arguments.like}
            )
        return selection.random_subspace(
            model,
            arguments.percent,
            seed=arguments.seed,
            match=arguments.match,
            depth=arguments.depth,
            metadata=made_from,
        )
    if arguments.method == "neurons":
        return selection.full_neurons(model, depth=arguments.depth, metadata=made_from)
    return selection.full_parameters(model, metadata=made_from)
