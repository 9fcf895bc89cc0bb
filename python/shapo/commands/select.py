"""Selects the neurons to perturb and writes them as a subspace.

  probe     the share --percent of all neurons most opposed to the "unsafe" direction of --probe (the published way)

  gradient  those on which the loss of --data has the largest gradient; give it pairs that neither training nor
            evaluation sees

  random    as many at random: over all layers together, the same share of each (--match layer), or in each layer as
            many as --like has

  neurons   every neuron

  full      every parameter, the uniform control (ordinary SAM)

Writes --output, a safetensors file; its header says how it was made.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from shapo import config as settings
from shapo.commands import common
from shapo.errors import UserError

if TYPE_CHECKING:
    from shapo_kernels import Subspace

SUMMARY = "select the neurons to perturb"

# Option -> the methods that use it, and what it is where it is not given.
_OPTIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "probe": (("probe",), None),
    "data": (("gradient",), None),
    "like": (("random",), None),
    "percent": (("probe", "gradient", "random"), 1.0),
    "match": (("random",), "total"),
    "seed": (("random",), 0),
    "loss": (("gradient",), "dpo"),
    "beta": (("gradient",), 0.1),
    "batch_size": (("gradient",), 8),
    "bf16": (("gradient",), False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FILE", help="safetensors file of the subspace")
    parser.add_argument(
        "--method", required=True, choices=("probe", "gradient", "random", "neurons", "full"), help="see above"
    )
    parser.add_argument("--percent", type=float, help="share of all neurons, in (0, 100] (default: 1)")
    common.add_model_arguments(parser)
    parser.add_argument("--probe", metavar="FILE", help="probe: what `shapo probe` wrote")
    parser.add_argument(
        "--match", choices=("total", "layer"), help="random: drawn over all layers, or layer by layer (default: total)"
    )
    parser.add_argument(
        "--like", metavar="FILE", help="random: a subspace whose number of neurons in each layer is taken"
    )
    parser.add_argument("--seed", type=int, help="random: of the draw (default: 0)")
    common.add_data_arguments(parser, required=False, what="gradient: held-out preference pairs")
    parser.add_argument(
        "--loss",
        choices=[name for name in settings.LOSSES if name != "reward_level"],
        help="gradient: which loss (default: dpo)",
    )
    parser.add_argument("--beta", type=float, help="gradient: inverse temperature of the loss (default: 0.1)")
    parser.add_argument(
        "--batch-size",
        type=common.positive_int,
        metavar="N",
        help="gradient: pairs through the model at once (default: 8)",
    )
    parser.add_argument("--bf16", action="store_true", default=None, help="gradient: compute under bfloat16 autocast")
    common.add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    from shapo.storage.files import atomic_file, require_writable
    from shapo.tables import table

    _check(arguments)
    require_writable(arguments.output)
    pairs = common.load_data(arguments) if arguments.method == "gradient" else None
    model = common.load_model(arguments.model, arguments)
    subspace = _select(arguments, model, pairs)
    with atomic_file(arguments.output) as temporary:
        subspace.save(temporary)
    rows = [(name, str(subspace[name].numel())) for name in subspace.names]
    print(table(("weight", "neurons"), rows))
    print(f"{subspace.count} neurons of {len(subspace)} weights: {arguments.output}")


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what the method has no use for, and fills in what was not given."""
    if arguments.like and (arguments.percent is not None or arguments.match):
        raise UserError("--like says how many neurons of which layer; leave --percent and --match out")
    for option, (methods, default) in _OPTIONS.items():
        if getattr(arguments, option) is None:
            setattr(arguments, option, default)
        elif arguments.method not in methods:
            name = option.replace("_", "-")
            raise UserError(
                f"--{name} is an option of --method {' or '.join(methods)}, not of --method {arguments.method}"
            )
    if not 0 < arguments.percent <= 100:
        raise UserError(f"percent is {arguments.percent}, but a share in (0, 100] is expected")
    if arguments.method in ("probe", "gradient"):
        option = "probe" if arguments.method == "probe" else "data"
        if not getattr(arguments, option):
            raise UserError(f"--method {arguments.method} needs --{option}")


def _select(arguments: argparse.Namespace, model: Any, pairs: Any) -> Subspace:
    from shapo import selection
    from shapo.config import LossConfig
    from shapo.models.loading import load_tokenizer
    from shapo.probe import Probe
    from shapo_kernels import Subspace

    made_from = {"model": arguments.model}
    if arguments.method == "probe":
        probe = Probe.load(arguments.probe)
        return selection.select_by_probe(
            model, probe.direction, arguments.percent, metadata={**made_from, "probe": arguments.probe}
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
            progress=not arguments.quiet,
            metadata={**made_from, "data": arguments.data},
        )
    if arguments.method == "random":
        if arguments.like:
            like = Subspace.load(arguments.like)
            return selection.random_like(
                model, like, seed=arguments.seed, metadata={**made_from, "like": arguments.like}
            )
        return selection.random_subspace(
            model, arguments.percent, seed=arguments.seed, match=arguments.match, metadata=made_from
        )
    if arguments.method == "neurons":
        return selection.full_neurons(model, metadata=made_from)
    return selection.full_parameters(model, metadata=made_from)
