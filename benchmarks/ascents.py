"""Cheaper ascents: what a part of the batch, or every k-th update, costs and loses. Rows under results/ascents/.

    python -m benchmarks.ascents fidelity --seed 0    # how well a part's direction stands for the whole batch's
    python -m benchmarks.ascents effect --seed 0      # what is left of the method's effect at the end of training
    python -m benchmarks.ascents price --pairs 8      # time of an update, in multiples of a plain one
    python -m benchmarks.ascents table --into docs/combinations.md

Fidelity and effect train the demo's model on its data with 30 % of the labels flipped, the neurons chosen by its probe;
their rows are added to those of other seeds. The price is that of the Llama of test_shapo_update.py, for batches of 8
pairs, and of 32 as in the published recipe: a pass has costs that do not shrink with its batch (the weights are read
once, Python runs through the layers once), and they weigh less beside a larger one.

For a batch and the gradient g_S of its loss L on the subspace, eps = rho g_S / ||g_S||; a part of its pairs gives eps'.
Reported are cos(eps, eps') and (L(theta + eps') - L(theta)) / (L(theta + eps) - L(theta)), L being of the whole batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shapo_kernels as sk
from benchmarks.report import between_markers
from benchmarks.rows import RESULTS, environment, interleaved, row
from shapo.ascents import AscentPart
from shapo.models.memory import keep_freed_memory
from shapo_kernels import losses

FOLDER = RESULTS / "ascents"
FRACTIONS = (0.5, 0.25, 0.125)
INTERVALS = (2, 5, 10)
MEASURED_EVERY, MEASURED_BATCHES, DRAWS = 8, 4, 2
ROUNDS = 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("fidelity", "effect", "price", "table"))
    parser.add_argument("--seed", type=int, default=0, help="of data, weights, order, flips and draws")
    parser.add_argument("--size", default="full", help="of the demo")
    parser.add_argument("--variants", nargs="*", help="effect, price: these alone, by name")
    parser.add_argument("--pairs", type=int, default=PRICE_PAIRS[0], help="price: of a batch")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="price: of all variants in turn")
    parser.add_argument("--work", type=Path, default=Path("runs/ascents"), help="where the SFT models are kept")
    parser.add_argument("--into", type=Path, help="table: a Markdown file with the two markers")
    options = parser.parse_args()
    if options.part == "price":
        save("price", measure_price(options.pairs, options.rounds, options.variants), keep=("pairs",))
    elif options.part == "table":
        files = (FOLDER / f"{name}.json" for name in ("fidelity", "effect", "price"))
        text = table(*(json.loads(path.read_text()) if path.exists() else {"rows": []} for path in files))
        if options.into:
            options.into.write_text(between_markers(options.into.read_text(), text))
        else:
            print(text)
    else:
        prepared = Prepared(options.work, options.size, options.seed)
        if options.part == "fidelity":
            save("fidelity", measure_fidelity(prepared), keep=("seed",))
        else:
            save("effect", measure_effect(prepared, options.variants), keep=("seed", "variant"))


def save(name: str, rows: Iterable[dict[str, Any]], keep: Sequence[str]) -> None:
    """Write rows beside earlier ones that differ in one of the columns `keep`; each says of which commit it is."""
    now, path = environment(), FOLDER / f"{name}.json"
    new = [{**one, "commit": now["commit"]} for one in rows]
    earlier = json.loads(path.read_text())["rows"] if keep and path.exists() else []
    replaced = {tuple(one[column] for column in keep) for one in new}
    kept = [one for one in earlier if tuple(one[column] for column in keep) not in replaced]
    FOLDER.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": now, "rows": [*kept, *new]}, indent=1) + "\n")


class Prepared:
    """The demo's SFT model, its probe's neurons and its noisy pairs, made once for each seed."""

    def __init__(self, work: Path, size: str, seed: int) -> None:
        from shapo.demo import run as demo
        from shapo.demo.settings import SIZES
        from shapo.scoring.logps import TokenizedPairs

        self.seed, self.folder = seed, work / f"{size}-{seed}"
        task = demo.Task(str(self.folder), SIZES[size], seed, "cpu")
        torch.set_num_threads(1)
        if not (self.folder / "subspaces" / "probe.safetensors").exists():
            demo.prepare_model(task, progress=False)
            demo.prepare_subspaces(task)
        self.epochs = SIZES[size].epochs
        self.subspace = demo.load_subspace(self.folder, "probe")
        self.model, encoder = demo.load_model(self.folder / "sft" / "model", task)
        self.data = TokenizedPairs(demo.noisy_pairs(task), encoder)
        self.test = TokenizedPairs(demo.split_pairs(self.folder, "test"), encoder)


# -- fidelity


def measure_fidelity(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Along a run of ShaPO whose ascents see the whole batch: at every 8th update, on 4 batches that it is not at."""
    from shapo.demo.settings import BATCH, BETA, LR, RHO_NEURONS
    from shapo.scoring.logps import batch_logps, compute_logps
    from shapo.training.order import DataOrder

    model, data = prepared.model, prepared.data
    reference = compute_logps(model, data, progress=False)

    def loss(indices: Sequence[int]) -> Tensor:
        policy, ref = batch_logps(model, data.batch(indices, torch.device("cpu"))), reference[indices]
        return losses.dpo(policy.chosen, policy.rejected, ref.chosen, ref.rejected, beta=BETA).mean()

    model.train()
    opt = sk.ShaPOOptimizer(torch.optim.AdamW(model.parameters(), lr=LR), model, prepared.subspace, rho=RHO_NEURONS)
    order, other = (DataOrder(len(data), BATCH, prepared.seed + offset) for offset in (0, 1000))
    total = prepared.epochs * order.updates_per_epoch
    measured = 0
    for update in range(total):
        if update % MEASURED_EVERY == 0:
            batches = [other.batch(measured + i) for i in range(MEASURED_BATCHES + 1)]
            measured += MEASURED_BATCHES
            for one in fidelity_of(loss, model, prepared.subspace, batches, RHO_NEURONS, prepared.seed, update):
                yield {"seed": prepared.seed, "update": update, "of": total, "batch": BATCH, **one}
        batch = order.batch(update)
        with opt.ascent():
            opt.ascend(loss(batch))
        with opt.perturbed():
            loss(batch).backward()
        opt.step()
        opt.zero_grad()
    opt.detach()


def fidelity_of(
    loss: Callable[[Sequence[int]], Tensor],
    model: Any,
    subspace: sk.Subspace,
    batches: list[list[int]],
    rho: float,
    seed: int,
    update: int,
) -> Iterator[dict[str, Any]]:
    """Means over the batches but the last, which only lends its predecessor a direction that is not its own."""
    weights = {name: model.get_parameter(name) for name in subspace.names}

    def direction(indices: Sequence[int]) -> list[Tensor]:
        gradients = torch.autograd.grad(loss(indices), list(weights.values()))
        selected = [g.index_select(subspace.axis(n), subspace[n]) for n, g in zip(weights, gradients, strict=True)]
        norm = torch.sqrt(sum(g.double().square().sum() for g in selected))
        return [g / norm for g in selected]

    def loss_at(eps: list[Tensor] | None, indices: Sequence[int]) -> float:
        with torch.no_grad(), moved(weights, subspace, eps, rho):
            return loss(indices).item()

    found: dict[str, list[tuple[float, float]]] = {}
    for number, batch in enumerate(batches[:-1]):
        whole, here = direction(batch), loss_at(None, batch)
        increase = loss_at(whole, batch) - here
        parts = [("another batch", batches[number + 1])]
        for fraction in FRACTIONS:
            for draw in range(DRAWS):
                (rows,) = AscentPart(fraction, seed=seed).draw([len(batch)], update, DRAWS * number + draw)
                parts.append((part_name(fraction), [batch[i] for i in rows]))
        for name, indices in parts:
            eps = direction(indices)
            cosine = sum((a.double() * b.double()).sum().item() for a, b in zip(whole, eps, strict=True))
            found.setdefault(name, []).append((cosine, (loss_at(eps, batch) - here) / increase))
    for name, values in found.items():
        cosines, shares = zip(*values, strict=True)
        yield {
            "variant": name,
            "cosine": statistics.mean(cosines),
            "share": statistics.mean(shares),
            "directions": len(values),
        }


@contextmanager
def moved(weights: dict[str, Tensor], subspace: sk.Subspace, eps: list[Tensor] | None, rho: float) -> Iterator[None]:
    """The weights at theta + rho * eps inside; plainly written, not by the library's own perturbation."""
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    for (name, weight), e in zip(weights.items(), eps or [], strict=eps is not None):
        weight.data.index_add_(subspace.axis(name), subspace[name], rho * e)
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(kept[name])


# -- effect


def effect_variants() -> dict[str, dict[str, Any] | None]:
    """Name -> the options of ShaPO, or None for plain training."""
    parts = {part_name(fraction): {"ascent_fraction": fraction} for fraction in FRACTIONS}
    intervals = {f"interval {k}": {"interval": k} for k in INTERVALS}
    return {
        "plain DPO": None,
        "whole batch": {},
        **parts,
        "each micro-batch of 4": {"per_micro_batch": True},
        **intervals,
    }


def measure_effect(prepared: Prepared, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """The demo's run with each kind of ascent: accuracy on clean test pairs, and the share of the flips fitted."""
    import copy

    from shapo.config import LoopConfig, LossConfig, ShaPOConfig
    from shapo.demo.settings import BATCH, BETA, LR, NOISE, RHO_NEURONS
    from shapo.training.preference import train_preferences

    loop = LoopConfig(epochs=prepared.epochs, batch_size=BATCH, lr=LR, seed=prepared.seed)
    for name, options in effect_variants().items():
        if names and name not in names:
            continue
        micro = 4 if options and options.get("per_micro_batch") else None
        with tempfile.TemporaryDirectory() as folder:
            summary = train_preferences(
                copy.deepcopy(prepared.model),
                prepared.data,
                loss=LossConfig("dpo", beta=BETA),
                loop=replace(loop, micro_batch_size=micro),
                shapo=None if options is None else ShaPOConfig(rho=RHO_NEURONS, **options),
                subspace=None if options is None else prepared.subspace,
                evaluation=prepared.test,
                output=Path(folder),
                progress=False,
            )
        final = summary["final"]
        yield {
            "seed": prepared.seed,
            "variant": name,
            "accuracy": final["accuracy"],
            "flips_fitted": final["flips_fitted"],
            "updates": summary["updates"],
            "test_pairs": len(prepared.test),
            "noise": NOISE,
        }
        print(f"{name}: accuracy {final['accuracy']:.3f}, flips fitted {final['flips_fitted']:.3f}", flush=True)


# -- price


def measure_price(pairs: int, rounds: int, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Milliseconds of an update, all variants in turn.

    An interval's is what one ShaPO update and k - 1 that are not due took in the same round, divided by k.
    """
    from benchmarks.test_shapo_update import build_model, check_agreement

    memory_kept = keep_freed_memory()
    model = build_model()
    check_agreement(model)
    parts = {part_name(fraction): {"fraction": fraction} for fraction in FRACTIONS}
    options: dict[str, dict[str, Any]] = {"whole batch": {}, **parts, "not due": {"interval": 10**9}}
    variants = {name: make_update(model, pairs, **one) for name, one in options.items() if not names or name in names}
    seconds = interleaved({"plain DPO": make_plain_update(model, pairs), **variants}, rounds=rounds)
    not_due = seconds.pop("not due", None)
    for k in INTERVALS if not_due else ():
        together = zip(seconds["whole batch"], not_due, strict=True)
        seconds[f"interval {k}"] = [(due + (k - 1) * other) / k for due, other in together]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    shape = f"{millions:.0f} M parameters, {pairs} pairs of {PRICE_TOKENS} tokens"
    return [
        row(
            "ascents",
            "price",
            name,
            values,
            dtype="float32",
            shape=shape,
            pairs=pairs,
            freed_memory_kept=memory_kept,
            **ratio_columns(values, seconds["plain DPO"]),
        )
        for name, values in seconds.items()
    ]


PRICE_PAIRS, PRICE_TOKENS = (8, 32), 64


def ratio_columns(seconds: list[float], plain: list[float]) -> dict[str, float]:
    """How many times longer than a plain update, round by round: quantiles over the rounds."""
    found = sorted(mine / other for mine, other in zip(seconds, plain, strict=True))
    at = lambda p: found[round(p * (len(found) - 1))]  # noqa: E731
    return {"ratio_to_plain": statistics.median(found), "ratio_p20": at(0.2), "ratio_p80": at(0.8)}


def make_loss(model: Any, count: int) -> Callable[[list[int]], Tensor]:
    """The DPO loss of some of `count` pairs of random tokens, half of each the prompt."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 4096, (2, count, PRICE_TOKENS), generator=generator)
    reference = torch.full((count,), -150.0)

    def loss(pairs: list[int]) -> Tensor:
        rows = tokens[:, pairs].flatten(0, 1)
        labels = rows.clone()
        labels[:, : PRICE_TOKENS // 2] = -100
        logps, _ = losses.sequence_logps(model(rows).logits, labels)
        chosen, rejected = logps.chunk(2)
        return losses.dpo(chosen, rejected, reference[pairs], reference[pairs], beta=0.1).mean()

    return loss


def make_plain_update(model: Any, pairs: int) -> Callable[[], None]:
    """The learning rate is 0 here and below: all variants share the model."""
    loss, base = make_loss(model, pairs), torch.optim.AdamW(model.parameters(), lr=0.0)

    def plain() -> None:
        loss(list(range(pairs))).backward()
        base.step()
        base.zero_grad()

    return plain


def make_update(model: Any, pairs: int, *, fraction: float = 1.0, interval: int = 1) -> Callable[[], None]:
    loss, part = make_loss(model, pairs), AscentPart(fraction)
    sizes = {name: p.shape[1] for name, p in model.named_parameters() if name.endswith("down_proj.weight")}
    base, subspace = torch.optim.AdamW(model.parameters(), lr=0.0), sk.Subspace.random(sizes, 1, seed=0)
    opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.05, interval=interval)

    def shapo() -> None:
        if opt.due:
            with opt.ascent():
                opt.ascend(loss(part.draw([pairs], opt.updates)[0]))
        with opt.perturbed():
            loss(list(range(pairs))).backward()
        opt.step()
        opt.zero_grad()

    return shapo


# -- the table


def table(fidelity: dict[str, Any], effect: dict[str, Any], price: dict[str, Any]) -> str:
    """What a user chooses by: a line for each kind of ascent."""
    batches = sorted({one["pairs"] for one in price["rows"]})
    columns = ["ascent", *(f"time, {pairs} pairs" for pairs in batches), "cosine", "share of the increase"]
    ends = ("accuracy", "flips_fitted") if effect["rows"] else ()
    columns += ["clean accuracy", "flips fitted"] if ends else []
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    names = {"plain DPO": "none (plain DPO)", "whole batch": "the whole batch", "another batch": "another whole batch"}
    for variant in [*effect_variants(), "another batch"]:
        cells = [
            *(_price(price["rows"], variant, pairs) for pairs in batches),
            *(_spread(fidelity["rows"], variant, column) for column in ("cosine", "share")),
            *(_over_seeds(effect["rows"], variant, column) for column in ends),
        ]
        if not any(cells):
            continue
        if variant == "whole batch":
            cells[len(batches) : len(batches) + 2] = "1", "1"
        lines.append(f"| {names.get(variant, variant)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _provenance(fidelity, effect, price)])


def part_name(fraction: float) -> str:
    return f"1/{round(1 / fraction)} of the pairs"


def _price(rows: list[dict[str, Any]], variant: str, pairs: int) -> str:
    """The median ratio to a plain update, and its 20th and 80th percentiles over the rounds."""
    for one in rows:
        if one["variant"] == variant == "plain DPO":
            return "1"
        if one["variant"] == variant and one["pairs"] == pairs:
            return f"{one['ratio_to_plain']:.2f} ({one['ratio_p20']:.2f} to {one['ratio_p80']:.2f})"
    return ""


def _spread(rows: list[dict[str, Any]], variant: str, column: str) -> str:
    """The mean over training and seeds, and between which means it lies at single points of training."""
    values = [one[column] for one in rows if one["variant"] == variant]
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def _over_seeds(rows: list[dict[str, Any]], variant: str, column: str) -> str:
    """The mean over seeds with its standard error, and that of the difference from plain training of the same seed."""
    found = {one["seed"]: 100 * one[column] for one in rows if one["variant"] == variant}
    plain = {one["seed"]: 100 * one[column] for one in rows if one["variant"] == "plain DPO"}
    if len(found) < 2:
        return ""
    mean = f"{statistics.mean(found.values()):.1f} ± {_standard_error(list(found.values())):.1f} %"
    differences = [value - plain[seed] for seed, value in found.items() if seed in plain]
    if variant == "plain DPO" or len(differences) < 2:
        return mean
    return f"{mean} ({statistics.mean(differences):+.1f} ± {_standard_error(differences):.1f})"


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def _provenance(fidelity: dict[str, Any], effect: dict[str, Any], price: dict[str, Any]) -> str:
    measured, trained, timed = fidelity["rows"], effect["rows"], price["rows"]
    seeds = sorted({one["seed"] for one in measured}), sorted({one["seed"] for one in trained})
    points = len({one["update"] for one in measured})
    machine = price["environment"]
    rounds = " and ".join(str(number) for number in dict.fromkeys(one["rounds"] for one in timed))
    time = (
        f"Time, in plain updates: {timed[0]['shape'].split(',')[0]}, pairs of {PRICE_TOKENS} tokens, {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, medians (20th to 80th percentile) of {rounds} rounds "
        f"with the variants in turn, freed memory kept, commit {timed[0]['commit']}."
    )
    directions = (
        f"Cosine with the whole batch's direction, and share of its increase of the whole batch's loss, for batches of "
        f"{measured[0]['batch']} pairs: means over {points} points of a run of {measured[0]['of']} updates and seeds "
        f"{', '.join(map(str, seeds[0]))} (least and greatest mean at one point), commit {measured[0]['commit']}."
    )
    ends = trained and (
        f"Accuracy on {trained[0]['test_pairs']} clean test pairs, and share of the flipped labels fitted, after "
        f"{trained[0]['updates']} updates with {100 * trained[0]['noise']:.0f} % of the labels flipped: means and "
        f"standard errors over {len(seeds[1])} seeds (difference from plain training of the same seed), commit "
        f"{trained[0]['commit']}."
    )
    return f"{time} {directions}{f' {ends}' if trained else ''}"


if __name__ == "__main__":
    main()
