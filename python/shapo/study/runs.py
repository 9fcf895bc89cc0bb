"""Jobs that train: a method's run and its measures on the tests, and what the selection split chooses between runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data.noise import flip_labels
from shapo.data.pairs import PreferencePair
from shapo.evaluation import log_ratios
from shapo.models.modes import evaluating
from shapo.scoring.logps import TokenizedPairs
from shapo.scoring.rewards import PairRewards
from shapo.study.data import TESTS, drawn, groups
from shapo.study.losses import moved
from shapo.study.queue import Row, rounded
from shapo.study.subject import Subject
from shapo.training.loop import METRICS
from shapo.training.metrics import read_metrics
from shapo.training.preference import train_preferences
from shapo_kernels import Subspace


class Training:
    """Does these jobs; each begins and ends at the model's initial weights.

    Args:
        subject: The study's model and data.
        rewards: The rewards of pairs, for the reward level.
    """

    def __init__(self, subject: Subject, rewards: Callable[[Sequence[PreferencePair]], PairRewards]) -> None:
        self._subject, self._rewards = subject, rewards
        self.model, self.plan, self.data, self.folder = subject.model, subject.plan, subject.data, subject.folder
        self.encoder = subject.encoder
        self.kinds: dict[str, Callable[[Mapping[str, Any], Mapping[str, Row]], Row]] = {
            "tune": self._tune,
            "train": self._train,
            "choice": self._choice,
            "wider": self._best,
            "best": self._best,
        }

    def _tune(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        return self._trained({**settings, "watch": True}, needs, measure=False)

    def _train(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        return self._trained(settings, needs, measure=True)

    def _trained(self, settings: Mapping[str, Any], needs: Mapping[str, Row], *, measure: bool) -> Row:
        plan, choice = self.plan, needs.get(settings.get("rate", "choice"), {})
        early = bool(settings.get("early"))
        lr = settings.get("lr") or choice["early" if early else "end"]["lr"]
        updates = choice["early"]["updates"] if early else plan.updates
        method = settings["method"]
        plain = method == "plain"
        pairs = drawn(self.data.read("train"), plan.train_pairs, settings["seed"])
        flipped = flip_labels(pairs, settings["noise"], seed=settings["seed"])
        data = TokenizedPairs(flipped, self.encoder)
        loss = settings.get("loss", "dpo")
        by_reward = loss == "reward_level"
        watched = (
            TokenizedPairs(self.data.first("selection", plan.watch_pairs), self.encoder)
            if settings.get("watch")
            else None
        )
        folder = self.folder / "work" / f"train-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        reference = self.folder / "references" / f"noise{settings['noise']:g}-seed{settings['seed']}.safetensors"
        if reference.exists():  # of the same pairs by the same model: asked once for all methods
            folder.mkdir(parents=True)
            shutil.copy(reference, folder / "reference.safetensors")
        torch.manual_seed(settings["seed"])
        self.model.train()
        try:
            summary = train_preferences(
                self.model,
                data,
                loss=self._loss(settings, needs),
                loop=LoopConfig(
                    updates=updates,
                    batch_size=plan.batch_size,
                    lr=lr,
                    warmup=plan.warmup,
                    bf16=plan.bf16,
                    seed=settings["seed"],
                    eval_every=plan.watch_every if settings.get("watch") else 0,
                ),
                shapo=None if plain else ShaPOConfig(rho=needs[settings["match"]]["rho"]),
                subspace=None if plain else self._subject.space(method),
                rewards=self._rewards(flipped) if by_reward else None,
                evaluation=watched,
                output=folder,
                progress=False,
            )
            evaluations = read_metrics(folder / METRICS, "evaluation")
            result = {
                "lr": lr,
                "updates": summary["updates"],
                "seconds_per_update": summary["seconds_per_update"],
                "ratio": summary["rho_over_weight_norm"],
                "rho": None if plain else needs[settings["match"]]["rho"],
                "flips_fitted": summary["final"].get("flips_fitted"),
                "flipped": summary["flipped"],
            }
            if settings.get("watch"):
                result["watched"] = [_watched(row) for row in evaluations]
            if not reference.exists():
                reference.parent.mkdir(exist_ok=True)
                shutil.copy(folder / "reference.safetensors", reference)
            if settings.get("keep"):
                self._subject.keep(settings["keep"])
            return {**result, **self._measured()} if measure else result
        finally:
            self._subject.restore()
            shutil.rmtree(folder, ignore_errors=True)

    def _loss(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> LossConfig:
        """rDPO and cDPO are told the noise rate, unless a job tries or chose another."""
        name, beta = settings.get("loss", "dpo"), self.plan.beta
        told = {**settings, **needs.get(settings.get("parameter", ""), {})}
        if name == "drdpo":
            return LossConfig("dpo", beta=beta, aggregation="drdpo", beta_prime=told.get("beta_prime"))
        if name in ("rdpo", "cdpo"):
            return LossConfig(name, beta=beta, epsilon=told.get("epsilon", settings["noise"]))
        return LossConfig(name, beta=beta, beta_reward=needs.get("reward", {}).get("beta_reward"))

    def _measured(self) -> Row:
        """h of every test pair, and the rise of the loss at the yardstick's radius in all parameters."""
        found: Row = {}
        for split in TESTS:
            pairs = self.data.first(split, self.plan.test_pairs)
            policy = self._subject.logps(split, bf16=self.plan.bf16)
            found[split] = {"h": rounded(log_ratios(policy, self._subject.reference(split))), "groups": groups(pairs)}
        if not self.plan.yardstick:
            return found
        loss = self._subject.loss("matching")
        with evaluating(self.model):
            base, gradient = loss.value(), loss.gradient()
            with moved(self.model, Subspace.full(self.model), gradient, self.plan.yardstick):
                found["yardstick"] = {"loss": base, "rise": loss.value() - base}
        return found

    def _choice(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        """The learning rate with the lowest clean selection loss at the end, and that with the lowest at any time.

        Losses are means over the seeds that were tried.
        """
        losses: dict[tuple[float, int], list[float]] = {}
        for row in needs.values():
            for seen in row["watched"]:
                if seen["update"] > 0:
                    losses.setdefault((row["lr"], seen["update"]), []).append(seen["loss"])
        means = {key: sum(values) / len(values) for key, values in losses.items()}
        end = min((key for key in means if key[1] == self.plan.updates), key=lambda key: means[key])
        early = min(means, key=lambda key: means[key])
        return {
            "end": {"lr": end[0], "loss": means[end]},
            "early": {"lr": early[0], "updates": early[1], "loss": means[early]},
        }

    def _best(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        """Of what was tried of a setting, `target` unless `key` says another, that with the lowest clean selection
        loss at the end.
        """
        key = settings.get("key", "target")
        tried = [(row["settings"][key], row["watched"][-1]["loss"]) for row in needs.values()]
        value, loss = min(tried, key=lambda found: found[1])
        return {key: value, "loss": loss}


def _watched(row: Mapping[str, Any]) -> Row:
    return {
        "update": row["update"],
        "loss": row["loss"],
        "accuracy": row["accuracy"]["value"],
        "flips_fitted": row["flips_fitted"]["value"] if row.get("flips_fitted") else None,
    }
