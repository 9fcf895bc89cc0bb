"""Trains the safety probe: a linear classifier, safe or unsafe, on a model's mean hidden states.

The data need safety labels: PKU-SafeRLHF has them, in hh-rlhf the rejected answer counts as the unsafe one.  Validation
prompts are none of the training prompts.  An accuracy near the majority class's means that the direction points
nowhere.

Writes to --output: probe.safetensors (for `shapo select`), probe.json, probe.png, and with --cache the features.
"""

from __future__ import annotations

import argparse

from shapo.commands import common

SUMMARY = "train the safety probe on a model's hidden states"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where everything is written")
    common.add_model_arguments(parser)
    common.add_data_arguments(parser)
    probe = parser.add_argument_group("probe")
    probe.add_argument("--layer", type=int, default=-1, help="hidden state: -1 the last, 0 the embeddings")
    probe.add_argument("--lr", type=float, default=1e-3, help="learning rate (published: 1e-5 on models of 7 B)")
    probe.add_argument("--epochs", type=int, default=10, help="passes over the features")
    probe.add_argument("--batch-size", type=int, default=256, metavar="N", help="features an update")
    probe.add_argument("--validation", type=float, default=0.2, metavar="SHARE", help="of the prompts, held out")
    probe.add_argument("--balanced", action="store_true", help="weight the two classes equally")
    probe.add_argument("--keep", default="last", choices=("last", "best"), help="which epoch's weights")
    probe.add_argument("--seed", type=int, default=0, help="of the split and the order")
    probe.add_argument(
        "--feature-batch-size",
        type=common.positive_int,
        default=16,
        metavar="N",
        help="texts through the model at once",
    )
    probe.add_argument("--bf16", action="store_true", help="compute the hidden states under bfloat16 autocast")
    probe.add_argument(
        "--cache", action="store_true", help="keep the features in the output folder, and use them again"
    )
    common.add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    from shapo.models.loading import load_tokenizer
    from shapo.plots import plot_probe
    from shapo.probe import extract_features, probe_examples, train_probe
    from shapo.storage.files import require_writable, write_json
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
    )
    probe = train_probe(
        features,
        [example.unsafe for example in examples],
        [example.prompt for example in examples],
        lr=arguments.lr,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        validation=arguments.validation,
        balanced=arguments.balanced,
        keep=arguments.keep,
        progress=not arguments.quiet,
        metadata={"model": arguments.model, "data": arguments.data},
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
    print(f"probe: {output / 'probe.safetensors'}")
