"""The whole method on generated data, in minutes on a CPU: SFT, probe, selection, DPO beside ShaPO, flipped labels.

What comes out are measurements of one small model on one seed; `report` says what they do not show.  Every step is one
that the other commands offer too, and everything they need is left in the output folder.

Methods are trained side by side in worker processes of one thread each: small matrices gain little from a second
thread, and with one thread the numbers do not depend on how many cores a machine has.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shapo import selection
from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data import synthetic
from shapo.data.formats import load_pairs
from shapo.data.noise import flip_labels
from shapo.data.pairs import PreferencePair
from shapo.data.tokens import PairEncoder
from shapo.demo import report
from shapo.demo.settings import (
    BATCH,
    BETA,
    BETA_REWARD,
    NOISE,
    RATIOS,
    RHOS,
    SIZES,
    YARDSTICK_RHO,
    Method,
    Size,
    describe,
    methods,
)
from shapo.demo.workers import Spread, threads, workers
from shapo.evaluation import preference_metrics
from shapo.models import loading
from shapo.models.loading import quiet_transformers, save_model
from shapo.plots import plot_probe, plot_sharpness, plot_training
from shapo.probe import extract_features, probe_examples, train_probe
from shapo.reporting.collect import collect
from shapo.reporting.page import render as render_page
from shapo.scoring.logps import TokenizedPairs, compute_logps
from shapo.scoring.rewards import PairRewards, RewardScorer, train_reward_model
from shapo.sharpness import PairLoss, loss_increase, measure
from shapo.storage.caches import load_cached, save_cached
from shapo.storage.files import atomic_folder, write_json, write_text
from shapo.training.loop import METRICS
from shapo.training.metrics import read_metrics
from shapo.training.preference import train_preferences
from shapo.training.sft import train_sft
from shapo.versions import versions
from shapo_kernels import Subspace

_REWARDS_KEY = {"split": "train"}


@dataclass(frozen=True)
class Task:
    """What a step, in a worker process or not, is told: everything else is read from the output folder."""

    output: str
    size: Size
    seed: int
    device: str
    method: Method | None = None


def run_demo(
    output: Path, *, size: str = "full", seed: int = 0, jobs: int = 1, device: str = "cpu", progress: bool = True
) -> dict[str, Any]:
    """Runs everything, prints the table and writes `output`; returns what report.json holds.

    Args:
        output: Folder; what an earlier demo left there is replaced.
        size: A key of `SIZES`.
        seed: Of data, weights, order, flips and random subspaces.
        jobs: Worker processes; 1 works in this process.
        device: "cpu" or a CUDA device.
    """
    started = time.perf_counter()
    task = Task(str(output), SIZES[size], seed, device)
    quiet_transformers()
    with threads(1):
        prepare_model(task, progress)
        with workers(jobs) as spread:
            probe, rewards = spread([(prepare_subspaces, task), (_prepare_rewards, task)])
            if progress:
                print(
                    f"probe: validation accuracy {100 * probe['accuracy']:.1f} %; "
                    f"reward model: test accuracy {100 * rewards['test_accuracy']:.1f} %",
                    flush=True,
                )
            rows = _train_all(spread, task, progress)
        results = {
            "size": size,
            "seed": seed,
            "settings": describe(task.size),
            "versions": versions(),
            "sft": read_metrics(output / "sft" / METRICS, "evaluation")[-1],
            "probe": probe,
            "rewards": rewards,
            "methods": [{key: value for key, value in row.items() if key != "sharpness"} for row in rows],
            "sharpness": rows[0]["sharpness"],
            "seconds": time.perf_counter() - started,
        }
    _write(output, results)
    return results


def _train_all(spread: Spread, task: Task, progress: bool) -> list[dict[str, Any]]:
    work = [(_train, replace(task, method=method)) for method in methods()]
    rows = []
    with tqdm(total=len(work), desc="methods", unit="method", disable=not progress) as bar:
        for row in spread(work):
            rows.append(row)
            bar.update()
            if not progress:
                continue
            bar.write(
                f"{row['name']}: accuracy {100 * row['test']['accuracy']['value']:.1f} %, "
                f"flips fitted {100 * row['flips_fitted']:.1f} %, {1e3 * row['seconds_per_update']:.0f} ms an update"
            )
    return rows


def prepare_model(task: Task, progress: bool) -> None:
    """Data, tokenizer, a model of random weights, and SFT on both styles of answer, which leaves no preference."""
    output, size = Path(task.output), task.size
    synthetic.write(output / "data", task.seed, **size.rows)
    rows = synthetic.generate(task.seed, **size.rows)["sft"]
    examples = synthetic.sft_examples(rows, seed=task.seed)
    tokenizer = synthetic.train_tokenizer((prompt + response for prompt, response in examples), size.vocabulary)
    torch.manual_seed(task.seed)
    model = _new_model(size, tokenizer).to(task.device)
    held_out = len(examples) // 25
    train_sft(
        model,
        _encoder(tokenizer),
        examples[held_out:],
        config=LoopConfig(
            updates=size.sft_updates, batch_size=32, lr=3e-3, warmup=20, schedule="cosine", seed=task.seed
        ),
        output=output / "sft",
        held_out=examples[:held_out],
        progress=progress,
    )
    save_model(output / "sft" / "model", model, tokenizer)


def prepare_subspaces(task: Task) -> dict[str, Any]:
    """Probe and selections from the SFT model; nothing here sees a training or test pair."""
    output, size = Path(task.output), task.size
    model, encoder = load_model(output / "sft" / "model", task)
    pairs = split_pairs(output, "sft")[: size.probe_rows]
    examples = probe_examples(pairs)
    features = extract_features(model, encoder, examples, batch_size=32, progress=False)
    labels, groups = [e.unsafe for e in examples], [e.prompt for e in examples]
    probe = train_probe(features, labels, groups, lr=0.05, epochs=60, seed=task.seed)
    probe.save(output / "probe" / "probe.safetensors")
    curve = [epoch.validation_accuracy for epoch in probe.curve]
    plot_probe(output / "probe.png", curve, baseline=probe.majority, title="safety probe on the SFT model")
    held_out = split_pairs(output, "selection")
    spaces = {
        "probe": selection.select_by_probe(model, probe.direction, size.percent),
        "gradient": selection.select_by_gradient(
            model, encoder, held_out, size.percent, beta=BETA, batch_size=32, progress=False
        ),
        "random": selection.random_subspace(model, size.percent, seed=task.seed),
    }
    spaces["random-like-probe"] = selection.random_like(model, spaces["probe"], seed=task.seed)
    (output / "subspaces").mkdir(exist_ok=True)
    for name, space in spaces.items():
        space.save(output / "subspaces" / f"{name}.safetensors")
    end = curve[-10:]
    return {
        "accuracy": probe.accuracy,
        "majority": probe.majority,
        "responses": len(examples),
        "last_epochs": len(end),
        "lowest": min(end),
        "highest": max(end),
    }


def _prepare_rewards(task: Task) -> dict[str, Any]:
    """A small reward model, trained on clean labels of the selection split, and its scores of the training pairs."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    quiet_transformers()
    output = Path(task.output)
    torch.manual_seed(task.seed)
    folder = output / "sft" / "model"
    # The backbone is the SFT model's; its language-model head is dropped and a score head made, which transformers
    # tells.
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).to(task.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = RewardScorer(model, tokenizer, batch_size=64)
    held_out, noisy = split_pairs(output, "selection"), noisy_pairs(task)
    updates = task.size.reward_updates
    train_reward_model(scorer, held_out, updates=updates, lr=5e-4, seed=task.seed, progress=False)
    save_model(output / "reward_model", model, tokenizer)
    rewards = scorer.score_pairs(noisy, progress=False)
    save_cached(output / "rewards.safetensors", _REWARDS_KEY, {"chosen": rewards.chosen, "rejected": rewards.rejected})
    test = scorer.score_pairs(split_pairs(output, "test"), progress=False)
    return {"pairs": len(held_out), "test_accuracy": test.agreement(), "training_label_agreement": rewards.agreement()}


def _train(task: Task) -> dict[str, Any]:
    """Trains one method and measures its end."""
    method, output, size = task.method, Path(task.output), task.size
    if method is None:
        raise ValueError("the task names no method")
    folder = output / "methods" / method.slug
    model, encoder = load_model(output / "sft" / "model", task)
    reference, _ = load_model(output / "sft" / "model", task)
    data = TokenizedPairs(noisy_pairs(task), encoder)
    test = TokenizedPairs(split_pairs(output, "test"), encoder)
    space = _subspace(output, method, model)
    updates_an_epoch = -(-len(data) // BATCH)
    summary = train_preferences(
        model,
        data,
        loss=_loss(method),
        loop=LoopConfig(
            epochs=size.epochs, batch_size=BATCH, lr=method.lr, seed=task.seed, eval_every=updates_an_epoch
        ),
        shapo=ShaPOConfig(rho=method.rho) if space else None,
        subspace=space,
        rewards=_rewards(output, len(data)) if method.reward_level else None,
        evaluation=test.subset(range(min(size.curve_pairs, len(test)))),
        output=folder,
        progress=False,
    )
    save_model(folder / "model", model, encoder.tokenizer)
    return {
        **asdict(method),
        "flips_fitted": summary["final"]["flips_fitted"],
        "rho_over_weight_norm": summary["rho_over_weight_norm"],
        # One thread a process: the processor's time is an update's cost, whatever else the machine does.
        "seconds_per_update": summary["seconds_per_update" if task.device != "cpu" else "cpu_seconds_per_update"],
        "updates": summary["updates"],
        **_measure(task, model, reference, encoder, test),
    }


def _measure(task: Task, model: Any, reference: Any, encoder: PairEncoder, test: TokenizedPairs) -> dict[str, Any]:
    output, size = Path(task.output), task.size
    unseen = TokenizedPairs(split_pairs(output, "test_unseen"), encoder)
    result: dict[str, Any] = {}
    for name, data in (("test", test), ("unseen", unseen)):
        policy, base = (compute_logps(m, data, batch_size=32, progress=False) for m in (model, reference))
        result[name] = preference_metrics(policy, base, data.pairs, beta=BETA, by_category=False)
        if name == "test":
            part = range(min(size.sharpness_pairs, len(data)))
            loss = PairLoss(model, data.subset(part), base[part], beta=BETA)
    result["increase"] = loss_increase(loss, Subspace.full(model), YARDSTICK_RHO)
    if task.method and task.method.slug == "dpo":
        spaces = {
            "critical by probe": load_subspace(output, "probe"),
            "critical by gradient": load_subspace(output, "gradient"),
            "random": load_subspace(output, "random"),
            "random, layers as probe": load_subspace(output, "random-like-probe"),
            "all neurons": selection.full_neurons(model),
        }
        curves = measure(loss, spaces, rhos=RHOS, ratios=RATIOS, progress=False)
        plot_sharpness(
            output / "sharpness.png", curves, title=f"sharpness of the DPO model, {len(loss)} clean test pairs"
        )
        result["sharpness"] = curves.as_dict()
    return result


def _write(output: Path, results: dict[str, Any]) -> None:
    """The plots over training, the JSON and the report, and the model that everything was for."""
    runs = {
        row["name"]: read_metrics(output / "methods" / row["slug"] / METRICS, "evaluation")
        for row in results["methods"]
    }
    plot_training(
        output / "training.png",
        runs,
        title=f"{100 * NOISE:.0f} % of {results['settings']['train']} training labels flipped, seed {results['seed']}",
    )
    write_json(output / "report.json", results)
    write_text(output / "report.md", report.render(results, output))
    write_text(output / "report.html", render_page(collect([output]), title="ShaPO on generated data"))
    with atomic_folder(output / "model") as folder:
        shutil.copytree(output / "methods" / report.FINAL_MODEL / "model", folder, dirs_exist_ok=True)


def _new_model(size: Size, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _encoder(tokenizer: Any) -> PairEncoder:
    return PairEncoder(tokenizer, max_length=128, max_prompt_length=64)


def load_model(folder: Path, task: Task) -> tuple[Any, PairEncoder]:
    """A saved model in eval mode, and the encoder that goes with it."""
    return loading.load_model(str(folder), device=task.device), _encoder(loading.load_tokenizer(str(folder)))


def split_pairs(output: Path, split: str) -> list[PreferencePair]:
    """The clean pairs of a split that `prepare_model` has written."""
    return load_pairs(output / "data" / f"{split}.jsonl").pairs


def noisy_pairs(task: Task) -> list[PreferencePair]:
    """The training pairs with their flipped labels."""
    return flip_labels(split_pairs(Path(task.output), "train"), NOISE, seed=task.seed)


def _loss(method: Method) -> LossConfig:
    if method.reward_level:
        return LossConfig("reward_level", beta=BETA, beta_reward=BETA_REWARD)
    return LossConfig("dpo", beta=BETA)


def _rewards(output: Path, pairs: int) -> PairRewards:
    found = load_cached(output / "rewards.safetensors", _REWARDS_KEY, ("chosen", "rejected"), pairs)
    if found is None:
        raise RuntimeError(f"{output / 'rewards.safetensors'} has gone while the demo was running")
    return PairRewards(**found)


def _subspace(output: Path, method: Method, model: Any) -> Subspace | None:
    if method.subspace is None:
        return None
    return Subspace.full(model) if method.subspace == "all" else load_subspace(output, method.subspace)


def load_subspace(output: Path, name: str) -> Subspace:
    """One of those that `prepare_subspaces` has written."""
    return Subspace.load(output / "subspaces" / f"{name}.safetensors")
