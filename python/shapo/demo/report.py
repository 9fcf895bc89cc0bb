"""The demo's table and report.md, from what was measured: text and tables only, every number is one of report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shapo.tables import table

FINAL_MODEL = "shapo-probe"

_HEADER = (
    "method",
    "accuracy %",
    "(95 %)",
    "unseen %",
    "clean loss",
    "flips fitted %",
    "loss increase",
    "rho",
    "rho/‖W_S‖",
    "ms/update",
)


def method_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table, a row a method."""
    rows: list[tuple[str, ...]] = []
    for row in results["methods"]:
        accuracy, ratio = row["test"]["accuracy"], row["rho_over_weight_norm"]
        rows.append(
            (
                row["name"],
                f"{100 * accuracy['value']:.1f}",
                f"{100 * accuracy['low']:.0f}-{100 * accuracy['high']:.0f}",
                f"{100 * row['unseen']['accuracy']['value']:.1f}",
                f"{row['test']['loss']:.3f}",
                f"{100 * row['flips_fitted']:.1f}",
                f"{row['increase']:+.3f}",
                f"{row['rho']:g}" if row["rho"] else "-",
                f"{ratio:.2g}" if ratio else "-",
                f"{1e3 * row['seconds_per_update']:.0f}",
            )
        )
    return rows


def plain_table(results: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    return table(_HEADER, method_rows(results))


def render(results: Mapping[str, Any], output: Path) -> str:
    """report.md as text."""
    settings, methods = results["settings"], results["methods"]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    return "\n".join(
        [
            "# ShaPO on generated data: what was measured",
            "",
            f"Size {results['size']}, seed {results['seed']}, {results['seconds']:.0f} s in all. {versions}.",
            "",
            _setting(results),
            "",
            _markdown(_HEADER, method_rows(results)),
            "",
            _legend(settings, methods),
            "",
            "![accuracy and memorised flips over training](training.png)",
            "",
            _curves(settings),
            "",
            "## Is there something to learn?",
            "",
            _checks(results),
            "",
            "![probe](probe.png)",
            "",
            "## Sharpness: equal rho is not equal strength",
            "",
            _sharpness(results),
            "",
            "![sharpness](sharpness.png)",
            "",
            "## What this does not show",
            "",
            _limits(results),
            "",
            "## Going on from here",
            "",
            _commands(output, results),
            "",
        ]
    )


def _setting(results: Mapping[str, Any]) -> str:
    s, sft = results["settings"], results["sft"]
    return _paragraph(
        f"""
        A Llama of random weights ({s["layers"]} layers, hidden {s["hidden"]}, {s["layers"] * s["intermediate"]}
        neurons) was fine-tuned on {s["sft"]} generated answers of both styles ({s["sft_updates"]} updates, held-out
        loss {sft["loss"]:.3f} nats a token), then trained on {s["train"]} other preference pairs of which
        {100 * s["noise"]:.0f} % had their label flipped: {s["epochs"]} epochs, batch {s["batch"]}, AdamW, beta
        {s["beta"]:g}, gradient clipped at 1, ShaPO at every update. Accuracy, loss and increase are of clean test pairs
        that no training saw; all methods share data, flips, start and order.
        """
    )


def _legend(settings: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> str:
    lrs = sorted({row["lr"] for row in methods}, reverse=True)
    return _list(
        f"""
        accuracy: {settings["test"]} clean test pairs, with a 95 % Wilson interval; unseen: {settings["test_unseen"]}
        pairs of categories that no other split has.
        """,
        "clean loss: DPO's loss on the test pairs with their true labels, whatever the method was trained with.",
        "flips fitted: share of the flipped training labels that the model agrees with at the end. Less is better.",
        f"""
        loss increase: of the final model's loss on {settings["sharpness_pairs"]} clean test pairs at distance
        {settings["yardstick_rho"]:g} along its gradient in all parameters, the same yardstick for every method.
        """,
        """
        rho, rho/‖W_S‖: radius of the training perturbation, and relative to the norm of the weights it may move
        (median).
        """,
        "ms/update: median over the run, processor time of one thread on a CPU, wall time on a GPU.",
        f"""
        learning rate {lrs[0]:g}; the smaller one {lrs[-1]:g}. A subspace holds {settings["percent"]:g} % of the
        neurons.
        """,
    )


def _curves(settings: Mapping[str, Any]) -> str:
    return _paragraph(
        f"""
        Over training the accuracy is of the first {min(settings["curve_pairs"], settings["test"])} test pairs, in the
        table of all {settings["test"]}. At update 0 the model is its own reference: every pair is a tie, which counts
        half.
        """
    )


def _checks(results: Mapping[str, Any]) -> str:
    probe, rewards = results["probe"], results["rewards"]
    unseen = results["methods"][0]["unseen"]["accuracy"]
    verdict = "so the split can be learned"
    if unseen["low"] <= 0.5:
        verdict = "so the split was NOT shown to be learnable: do not read its column"
    return _list(
        f"""
        Unseen categories, checked with plain DPO: {100 * unseen["value"]:.1f} %
        (95 %: {100 * unseen["low"]:.0f}-{100 * unseen["high"]:.0f}), chance is 50 %, {verdict}.
        """,
        f"""
        The probe tells safe from unsafe in {100 * probe["accuracy"]:.1f} % of the responses to prompts it has not seen;
        the majority class alone gives {100 * probe["majority"]:.1f} % ({probe["responses"]} responses in all).
        That is the last epoch's; over the last {probe["last_epochs"]} it went from {100 * probe["lowest"]:.1f} to
        {100 * probe["highest"]:.1f} %.
        """,
        f"""
        The reward model of the reward level was trained by Bradley-Terry on the CLEAN labels of {rewards["pairs"]}
        held-out pairs: {100 * rewards["test_accuracy"]:.1f} % right on the test pairs, in agreement with
        {100 * rewards["training_label_agreement"]:.1f} % of the noisy training labels. What the reward level gains over
        the token level is first of all these clean labels.
        """,
    )


def _sharpness(results: Mapping[str, Any]) -> str:
    curves = results["sharpness"]["curves"]
    pick_rho = _middle(curves[0]["by_rho"], 2)
    pick_ratio = _middle(curves[0]["by_ratio"], 3)
    header = (
        "subspace",
        "neurons or rows",
        "‖W_S‖",
        "share of the squared gradient %",
        f"increase at rho {curves[0]['by_rho'][pick_rho]['rho']:g}",
        "of the full increase %",
        f"increase at rho/‖W_S‖ {curves[0]['by_ratio'][pick_ratio]['ratio']:g}",
    )
    rows = []
    for curve in curves:
        at_rho, at_ratio = curve["by_rho"][pick_rho], curve["by_ratio"][pick_ratio]
        share = at_rho["share"]
        rows.append(
            (
                curve["name"],
                str(curve["neurons"]),
                f"{curve['weight_norm']:.3g}",
                f"{100 * curve['gradient_share']:.1f}",
                f"{at_rho['increase']:+.4f}",
                "-" if share is None else f"{100 * share:.0f}",
                f"{at_ratio['increase']:+.4f}",
            )
        )
    text = _paragraph(
        f"""
        The final DPO model on {results["sharpness"]["pairs"]} clean test pairs, where its loss is
        {results["sharpness"]["loss"]:.3f}. To first order a subspace with a share s of the squared gradient
        gives sqrt(s) of the full increase at the same rho, so look at a random subspace before crediting a selected
        one; and at the same rho/‖W_S‖ the picture is another.
        """
    )
    return f"{text}\n\n{_markdown(header, rows)}"


def _limits(results: Mapping[str, Any]) -> str:
    test = results["settings"]["test"]
    width = max(row["test"]["accuracy"]["high"] - row["test"]["accuracy"]["low"] for row in results["methods"])
    return _list(
        f"""
        One seed. Accuracies on {test} pairs have intervals up to {100 * width:.0f} points wide, and another draw of
        data, weights and flips moves them too (`--seed`), and so does mere rounding, on another processor or version of
        torch; smaller differences between rows say nothing.
        """,
        """
        The probe's critical neurons against random ones: at this scale they have been no better in repeated trials. The
        published claim is about models of billions of parameters; this demo neither supports nor refutes it.
        """,
        """
        rho is not comparable between rows: uniform perturbation spreads a small rho over all weights, a subspace needs
        one near ‖W_S‖ to show anything. Compare at matched rho/‖W_S‖ and at matched loss increase too (plots above).
        """,
        """
        Much of the resistance to flipped labels can be had from a smaller learning rate or from stopping early; the row
        with the smaller learning rate and the curves over training are there to be compared with.
        """,
        "The data are templates. Nothing here is evidence about the safety of any real model.",
    )


def _commands(output: Path, results: Mapping[str, Any]) -> str:
    folder, seed = output.as_posix(), results["seed"]
    sft, data = f"{folder}/sft/model", f"{folder}/data"
    commands = [
        f"evaluate --model {folder}/model --reference {sft} --data {data}/test.jsonl "
        f"--output {folder}/try/evaluation.json",
        f"probe --model {sft} --data {data}/sft.jsonl --limit 2000 --lr 0.05 --epochs 60 --output {folder}/try/probe",
        f"select --method probe --percent 5 --model {sft} --probe {folder}/try/probe/probe.safetensors "
        f"--output {folder}/try/critical.safetensors",
        f"train --model {sft} --data {data}/train.jsonl --noise 0.3 --noise-seed {seed} --eval-data {data}/test.jsonl "
        f"--optimizer adamw --lr 1e-3 --batch-size 16 --epochs 2 --rho 0.5 --relative-rho "
        f"--subspace {folder}/try/critical.safetensors --output {folder}/try/train",
        f"sharpness --model {folder}/methods/dpo/model --reference {sft} --data {data}/test.jsonl --limit 100 "
        f"--subspace {folder}/try/critical.safetensors --output {folder}/try/sharpness",
    ]
    lines = "\n".join(f"shapo {command}" for command in commands)
    name = next(row["name"] for row in results["methods"] if row["slug"] == FINAL_MODEL)
    text = _paragraph(
        f"""
        The data, the models and the subspaces of this run are files that the other commands take. `model/` is that of
        the row "{name}", whatever the table says of it; the others are under `methods/`.
        """
    )
    return f"{text}\n\n```\n{lines}\n```"


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _list(*items: str) -> str:
    return "\n".join(f"* {_paragraph(item)}" for item in items)


def _middle(points: Sequence[Mapping[str, Any]], wanted: int) -> int:
    return min(wanted, len(points) - 1)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))
