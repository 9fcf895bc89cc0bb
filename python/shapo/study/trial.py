"""The work of each kind of job: one model held in memory, put back to its initial weights after each training."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapo import selection
from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data.noise import flip_labels
from shapo.data.pairs import PreferencePair
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError
from shapo.evaluation import log_ratios
from shapo.models.loading import load_model, load_tokenizer, save_model
from shapo.models.modes import evaluating
from shapo.probe import extract_features, probe_examples, train_probe
from shapo.scoring.logps import PairLogps, TokenizedPairs, compute_logps
from shapo.scoring.reward_head import fit_reward_head, reward_model_of, saturated, sharpness_hint
from shapo.scoring.rewards import PairRewards, RewardScorer
from shapo.sharpness import PairLoss
from shapo.storage.files import write_json
from shapo.storage.fingerprint import digest_model
from shapo.study.data import TESTS, StudyData, drawn, groups
from shapo.study.losses import LanguageLoss, Loss, climb, moved
from shapo.study.plan import Plan
from shapo.study.queue import Job, Row
from shapo.study.radius import match_radius
from shapo.study.spaces import Spaces, by_layer, common, largest
from shapo.training.loop import METRICS
from shapo.training.metrics import read_metrics
from shapo.training.preference import train_preferences
from shapo.versions import versions
from shapo_kernels import Subspace

_Start = tuple[Loss, Mapping[str, Tensor], Tensor]


class Trial:
    """Does jobs; see `plan` for what their settings mean.

    Args:
        model: Folder or hub name of an aligned model.
        pairs: Folder of `shapo safety-pairs`.
        folder: Of the study: scores and temporary files.
        plan: Sizes.
        device: As the commands take it.
    """

    def __init__(self, model: str, pairs: Path, folder: Path, plan: Plan, *, device: str = "auto") -> None:
        self.model = load_model(model, device=device)
        self.plan = replace(plan, layers=len(selection.value_vectors(self.model).names))
        self.data, self.folder = StudyData(pairs, self.plan), folder
        self._require_settings(model)
        self._tokenizer = load_tokenizer(model)
        if plan.template is not None:
            self._tokenizer.chat_template = plan.template
        self.encoder = PairEncoder(
            self._tokenizer,
            max_length=plan.max_length,
            max_prompt_length=plan.max_prompt_length,
            chat_template=bool(self._tokenizer.chat_template),
        )
        self.space = Spaces(self.model, folder / "scores")
        self._initial = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._references: dict[str, PairLogps] = {}
        self._start: tuple[str, _Start] | None = None

    def __call__(self, job: Job, needs: Mapping[str, Row]) -> Row:
        kinds: dict[str, Callable[[Mapping[str, Any], Mapping[str, Row]], Row]] = {
            "probe": self._probe,
            "gradient": self._gradient,
            "benign": self._benign,
            "shares": self._shares,
            "figure": self._figure,
            "steps": self._steps,
            "match": self._match,
            "tune": self._tune,
            "train": self._train,
            "choice": self._choice,
            "wider": self._wider,
            "reward": self._reward,
        }
        return kinds[job.kind](job.settings, needs)

    def _require_settings(self, model: str) -> None:
        """Writes what the rows depend on, or compares it with what an earlier call wrote."""
        made_from = {"plan": self.plan.as_dict(), "model": digest_model(self.model), "pairs": self.data.digests()}
        path = self.folder / "settings.json"
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            earlier["plan"] = Plan.from_dict(earlier["plan"]).as_dict()
            if different := [key for key, value in made_from.items() if earlier[key] != value]:
                raise UserError(
                    f"{self.folder} holds rows of another {' and '.join(different)}; choose another --output"
                )
            return
        write_json(path, {**made_from, "model_name": Path(model).name, "versions": versions()})

    # -- scores and subspaces

    def _probe(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        examples = probe_examples(self.data.read("selection"))
        features = extract_features(self.model, self.encoder, examples, progress=False)
        labels, groups = [e.unsafe for e in examples], [e.prompt for e in examples]
        probe = train_probe(features, labels, groups, lr=0.05, epochs=60, progress=False)
        self.space.save("probe", selection.probe_scores(self.model, probe.direction))
        return {"accuracy": probe.accuracy, "majority": probe.majority, "responses": len(examples)}

    def _gradient(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        pairs = self.data.read("selection")
        found = selection.gradient_scores(
            self.model, self.encoder, pairs, beta=self.plan.beta, batch_size=16, progress=False
        )
        self.space.save("gradient", found)
        return {"pairs": len(pairs), "largest": largest(found, 5), "by_layer": by_layer(found)}

    def _benign(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        loss = self._language_loss("selection")
        gradient = self._with_evaluation(loss.gradient)
        vectors = selection.value_vectors(self.model)
        found = {
            name: torch.linalg.vector_norm(gradient[name].double(), dim=1 - vectors.axis).cpu()
            for name in vectors.names
        }
        self.space.save("benign", found)
        return {"texts": len(loss), "largest": largest(found, 5), "by_layer": by_layer(found)}

    def _shares(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        """The share of the squared gradient by selection and percentage, and how far selections overlap."""
        gradient = self._climbed("preference")[1]
        total = sum(float(value.double().square().sum()) for value in gradient.values())
        vectors = selection.value_vectors(self.model)
        own = {n: gradient[n].double().square().sum(dim=1 - vectors.axis).cpu() for n in vectors.names}
        neurons = sum(float(value.sum()) for value in own.values())
        shares = {}
        for method in ("gradient", "probe", "opposite", "benign"):
            for percent in (0.01, 0.05, 0.1, 0.5, 1, 2, 5):
                space = self.space(f"{method}-{percent:g}")
                held = sum(float(own[name][space[name]].sum()) for name in space.names)
                shares[f"{method}-{percent:g}"] = {"of_all": held / total, "of_neurons": held / neurons}
        overlaps = {}
        for percent in (0.01, 0.1, 1, 5):
            a, b = self.space(f"gradient-{percent:g}"), self.space(f"benign-{percent:g}")
            overlaps[f"{percent:g}"] = {
                "neurons": a.count,
                "common": common(a, b),
                "by_chance": a.count * percent / 100,
            }
            a, b = self.space(f"gradient-{percent:g}"), self.space(f"probe-{percent:g}")
            overlaps[f"{percent:g}"]["common_with_probe"] = common(a, b)
        return {
            "neurons_of_all": neurons / total,
            "shares": shares,
            "overlaps": overlaps,
            "by_layer": by_layer({name: value.sqrt() for name, value in own.items()}),
        }

    def _reward(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        """A head fitted to the selection split's clean labels, and its rewards of the training pairs."""
        scorer = RewardScorer(reward_model_of(self.model), self._tokenizer, max_length=self.plan.max_length)
        fit = fit_reward_head(scorer, self.data.read("selection"), progress=False)
        rewards = scorer.score_pairs(self.data.read("train"), progress=False)
        self.space.save("reward", {"chosen": rewards.chosen, "rejected": rewards.rejected})
        beta = sharpness_hint(rewards)
        return {
            "accuracy": fit.accuracy,
            "penalty": fit.penalty,
            "pairs": fit.pairs,
            "agreement": rewards.agreement(),
            "beta_reward": beta,
            "saturated": {f"{one:g}": saturated(rewards, one) for one in (0.3, 1.0, 3.0, 10.0, round(beta, 3))},
        }

    def _rewards(self, pairs: Sequence[PreferencePair]) -> PairRewards:
        """Those that `_reward` found, of some of the training pairs, flipped or not."""
        found, train = self.space.scores("reward"), self.data.read("train")
        known = {(pair.prompt, pair.chosen): value for pair, value in zip(train, found["chosen"], strict=True)}
        known |= {(pair.prompt, pair.rejected): value for pair, value in zip(train, found["rejected"], strict=True)}
        return PairRewards(
            torch.stack([known[pair.prompt, pair.chosen] for pair in pairs]),
            torch.stack([known[pair.prompt, pair.rejected] for pair in pairs]),
        )

    # -- Figure 1

    def _figure(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        loss, gradient, base = self._climbed(settings["loss"])
        space = self.space(settings["space"])
        points = []
        with evaluating(self.model):
            for rho in settings["rhos"]:
                with moved(self.model, space, gradient, rho):
                    points.append({"rho": rho, "rise": _rounded(loss.per_item() - base)})
        return {
            **self._described(space, gradient),
            "loss_at_theta": base.mean().item(),
            "points": points,
            "groups": self.data.groups(settings["loss"]),
        }

    def _steps(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        loss, gradient, base = self._climbed("preference")
        space = self.space(settings["space"])
        rises = {
            str(steps): _rounded(climb(loss, space, settings["rho"], steps=steps, first=gradient) - base)
            for steps in (1, settings["steps"])
        }
        return {"rises": rises, "groups": self.data.groups("preference")}

    def _match(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        loss, gradient, base = self._climbed("matching")
        space, start = self.space(settings["space"]), base.mean().item()

        def rise(rho: float) -> float:
            with evaluating(self.model), moved(self.model, space, gradient, rho):
                return loss.per_item().mean().item() - start

        target = settings["target"] or needs["wider"]["target"]
        described = self._described(space, gradient)
        rho, reached, tried = match_radius(rise, target, start=target / described["gradient_norm"])
        ratio = rho / described["weight_norm"]
        return {"target": target, "rho": rho, "rise": reached, "ratio": ratio, "tried": tried}

    def _described(self, space: Subspace, gradient: Mapping[str, Tensor]) -> Row:
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        with moved(self.model, space, weights) as weight_norm:
            pass
        with moved(self.model, space, gradient) as own:
            pass
        total = math.sqrt(sum(float(value.double().square().sum()) for value in gradient.values()))
        return {
            "neurons": space.count,
            "weight_norm": weight_norm,
            "gradient_norm": own,
            "gradient_share": (own / total) ** 2,
        }

    # -- training

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
        self._start = None
        self.model.train()
        try:
            summary = train_preferences(
                self.model,
                data,
                loss=_loss(loss, settings["noise"], plan.beta, needs.get("reward", {}).get("beta_reward")),
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
                subspace=None if plain else self.space(method),
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
                kept = settings["keep"] if isinstance(settings["keep"], str) else _run_name(settings)
                self._keep(kept)
            return {**result, **self._measured()} if measure else result
        finally:
            self.model.load_state_dict(self._initial)
            self.model.zero_grad(set_to_none=True)
            self.model.eval()
            shutil.rmtree(folder, ignore_errors=True)

    def _measured(self) -> Row:
        """h of every test pair, and the rise of the loss at the yardstick's radius in all parameters."""
        found: Row = {}
        for split in TESTS:
            pairs = self.data.first(split, self.plan.test_pairs)
            policy = self._logps(TokenizedPairs(pairs, self.encoder))
            found[split] = {"h": _rounded(log_ratios(policy, self._reference(split))), "groups": groups(pairs)}
        if not self.plan.yardstick:
            return found
        data = TokenizedPairs(self.data.first("selection", self.plan.match_pairs), self.encoder)
        loss = PairLoss(self.model, data, self._reference("matching"), beta=self.plan.beta, batch_size=16)
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

    def _wider(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        """The rise with the lowest clean selection loss at the end."""
        tried = [(row["settings"]["target"], row["watched"][-1]["loss"]) for row in needs.values()]
        target, loss = min(tried, key=lambda found: found[1])
        return {"target": target, "loss": loss}

    def _keep(self, name: str) -> None:
        save_model(self.folder / "models" / name, self.model, self._tokenizer)

    def _language_loss(self, half: str) -> LanguageLoss:
        return LanguageLoss(self.model, self.encoder, self.data.benign_texts(half))

    def _climbed(self, name: str) -> _Start:
        """A loss at the initial weights, its gradient in all parameters, and its value of every item."""
        if self._start is None or self._start[0] != name:
            loss: Loss
            if name == "benign":
                loss = self._language_loss("test")
            else:
                few = (
                    self.data.figure_pairs()
                    if name == "preference"
                    else self.data.first("selection", self.plan.match_pairs)
                )
                data = TokenizedPairs(few, self.encoder)
                reference = compute_logps(self.model, data, batch_size=16, progress=False)
                loss = PairLoss(self.model, data, reference, beta=self.plan.beta, batch_size=16)
            self._start = (name, (loss, self._with_evaluation(loss.gradient), self._with_evaluation(loss.per_item)))
        return self._start[1]

    def _with_evaluation(self, function: Callable[[], Any]) -> Any:
        with evaluating(self.model):
            return function()

    def _reference(self, split: str) -> PairLogps:
        """Log-probabilities at the initial weights, asked once."""
        if split not in self._references:
            kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self._initial)
            if split == "matching":
                data = TokenizedPairs(self.data.first("selection", self.plan.match_pairs), self.encoder)
                self._references[split] = compute_logps(self.model, data, batch_size=16, progress=False)
            else:
                self._references[split] = self._logps(
                    TokenizedPairs(self.data.first(split, self.plan.test_pairs), self.encoder)
                )
            self.model.load_state_dict(kept)
        return self._references[split]

    def _logps(self, data: TokenizedPairs) -> PairLogps:
        return compute_logps(self.model, data, batch_size=16, bf16=self.plan.bf16, progress=False)


def _run_name(settings: Mapping[str, Any]) -> str:
    """Of a kept model: the method, and the loss where it is not DPO's."""
    if settings["method"] != "plain":
        return f"shapo-{settings['method']}"
    return settings.get("loss", "dpo-early" if settings.get("early") else "dpo")


def _loss(name: str, noise: float, beta: float, beta_reward: float | None = None) -> LossConfig:
    if name == "drdpo":
        return LossConfig("dpo", beta=beta, aggregation="drdpo")
    if name in ("rdpo", "cdpo"):
        return LossConfig(name, beta=beta, epsilon=noise)
    return LossConfig(name, beta=beta, beta_reward=beta_reward)


def _watched(row: Mapping[str, Any]) -> Row:
    return {
        "update": row["update"],
        "loss": row["loss"],
        "accuracy": row["accuracy"]["value"],
        "flips_fitted": row["flips_fitted"]["value"] if row.get("flips_fitted") else None,
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 6) for value in values]
