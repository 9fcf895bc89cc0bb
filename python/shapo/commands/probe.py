"""Trains the safety probe: a linear classifier, safe or unsafe, on a model's mean hidden states.

The data need safety labels: PKU-SafeRLHF has them, in hh-rlhf the rejected answer counts as the unsafe one.  Validation
prompts are none of the training prompts.  An accuracy near the majority class's means that the direction points
nowhere.

Writes to --output: probe.safetensors (for `shapo select`), probe.json, probe.png, and with --cache the features.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from shapo.commands import common
from shapo.notes import note
from shapo.options import Group, option, positive_int, seed_number
from shapo.ranks import Ranks

SUMMARY = "train the safety probe on a model's hidden states"


@dataclass(frozen=True)
class ProbeOptions:
    """How the probe is trained."""

    layer: int = option("hidden state: -1 the last, 0 the embeddings", -1)
    lr: float = option("learning rate", 0.05, needs=("!published",))
    epochs: int = option("passes over the features", 60, needs=("!published",))
    batch_size: int = option("features an update", 256, metavar="N", needs=("!published",))
    published: bool = option("the published recipe, far from converged: lr 1e-5, 10 epochs, batches of 256", False)
    validation: float = option("of the prompts, held out", 0.2, metavar="SHARE")
    balanced: bool = option("weight the two classes equally", False)
    keep: str = option("which epoch's weights to keep", "last", choices=("last", "best"))
    seed: int = option("of the split and the order", 0, parse=seed_number)
    feature_batch_size: int = option("texts through the model at once", 16, parse=positive_int, metavar="N")
    bf16: bool = option("compute the hidden states under bfloat16 autocast", False)
    cache: bool = option("keep the features in the output folder, and use them again", False)


REPLACES = ("probe.safetensors", "probe.json", "probe.png", "features.safetensors")
OPTIONS = (Group(common.FolderOutput), common.MODEL, *common.DATA, Group(ProbeOptions, "probe"), common.QUIET)


def _recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.published:
        from shapo.probe import PUBLISHED

        return dict(PUBLISHED)
    return {"lr": arguments.lr, "epochs": arguments.epochs, "batch_size": arguments.batch_size}


def run(arguments: argparse.Namespace) -> None:
    from shapo.models.loading import load_tokenizer
    from shapo.plots import plot_probe
    from shapo.probe import extract_features, probe_examples, train_probe
    from shapo.storage.files import require_writable, write_json
    from shapo.storage.fingerprint import digest_model
    from shapo.versions import versions

    output = require_writable(arguments.output, folder=True)
    examples = probe_examples(common.load_data(arguments))
    model = common.load_model(arguments.model, arguments)
    features = extract_features(
        model,
        common.make_encoder(arguments, load_tokenizer(arguments.model), model),
        examples,
        batch_size=arguments.feature_batch_size,
        layer=arguments.layer,
        cache=output / "features.safetensors" if arguments.cache else None,
        progress=not arguments.quiet,
        bf16=arguments.bf16,
        ranks=Ranks.here(),
    )
    if not Ranks.here().is_main:
        return
    probe = train_probe(
        features,
        [example.unsafe for example in examples],
        [example.prompt for example in examples],
        **_recipe(arguments),
        seed=arguments.seed,
        validation=arguments.validation,
        balanced=arguments.balanced,
        keep=arguments.keep,
        progress=not arguments.quiet,
        metadata={
            "model": arguments.model,
            "model_digest": digest_model(model),
            "chat_template": str(arguments.chat_template),
            "data": " ".join(arguments.data),
        },
    )
    probe.save(output / "probe.safetensors")
    curve = [epoch.validation_accuracy for epoch in probe.curve]
    write_json(
        output / "probe.json",
        {
            "arguments": vars(arguments),
            "versions": versions(),
            "accuracy": probe.accuracy,
            "balanced_accuracy": probe.balanced_accuracy,
            "majority": probe.majority,
            "epoch": probe.epoch,
            "validation_accuracy": curve,
        },
    )
    plot_probe(output / "probe.png", curve, baseline=probe.majority, title=f"safety probe, {arguments.model}")
    print(
        f"validation accuracy {100 * probe.accuracy:.1f} %, majority class {100 * probe.majority:.1f} %, "
        f"{len(examples)} responses"
    )
    if probe.accuracy <= probe.majority:
        note("the probe does no better than the majority class: its direction points nowhere")
    print(f"probe: {output / 'probe.safetensors'}")
