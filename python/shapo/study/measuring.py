"""Jobs that train nothing: scores, Figure 1, radii at matched loss increase, rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shapo import selection
from shapo.answers.decoding import Request, TransformersEngine
from shapo.answers.turns import ending
from shapo.data.pairs import PreferencePair
from shapo.data.tokens import PairEncoder
from shapo.judges.refusal import refuses
from shapo.models.modes import evaluating
from shapo.probe import extract_features, probe_examples, train_probe
from shapo.scoring.reward_head import fit_reward_head, histogram, reward_model_of, saturated, sharpness_hint
from shapo.scoring.rewards import PairRewards, RewardScorer
from shapo.sharpness import moving
from shapo.study.losses import LanguageLoss, Loss, climb, moved
from shapo.study.queue import Row, rounded
from shapo.study.radius import match_radius
from shapo.study.spaces import by_layer, common, largest
from shapo.study.subject import Subject
from shapo_kernels import Subspace

_PROMPT = 128  # tokens of a prompt that is answered

_Start = tuple[Loss, Mapping[str, Tensor], Tensor]
_Work = Callable[[Mapping[str, Any], Mapping[str, Row]], Row]


class Measuring:
    """Does these jobs, and remembers the last loss that was climbed with its gradient.

    Args:
        subject: The study's model and data.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.model, self.plan, self.data, self.space = subject.model, subject.plan, subject.data, subject.space
        self.encoder = subject.encoder
        self._start: tuple[tuple[str, str | None], _Start] | None = None
        self.kinds: dict[str, _Work] = {
            "probe": self._probe,
            "gradient": self._gradient,
            "benign": self._benign,
            "shares": self._shares,
            "figure": self._figure,
            "steps": self._steps,
            "match": self._match,
            "reward": self._reward,
            "answers": self._answers,
        }

    def forget(self) -> None:
        """Frees the remembered gradient."""
        self._start = None

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
        scorer = RewardScorer(reward_model_of(self.model), self._subject.tokenizer, max_length=self.plan.max_length)
        fit = fit_reward_head(scorer, self.data.read("selection"), progress=False)
        rewards = scorer.score_pairs(self.data.read("train"), progress=False)
        self.space.save("reward", {"chosen": rewards.chosen, "rejected": rewards.rejected})
        beta, betas = sharpness_hint(rewards), (0.3, 1.0, 3.0, 10.0)
        return {
            "accuracy": fit.accuracy,
            "penalty": fit.penalty,
            "pairs": fit.pairs,
            "agreement": rewards.agreement(),
            "beta_reward": beta,
            "saturated": {f"{one:g}": saturated(rewards, one) for one in (*betas, round(beta, 3))},
            "histograms": {f"{one:g}": histogram(rewards, one) for one in betas},
        }

    def rewards(self, pairs: Sequence[PreferencePair]) -> PairRewards:
        """Those that `_reward` found, of some of the training pairs, flipped or not."""
        found, train = self.space.scores("reward"), self.data.read("train")
        known = {(pair.prompt, pair.chosen): value for pair, value in zip(train, found["chosen"], strict=True)}
        known |= {(pair.prompt, pair.rejected): value for pair, value in zip(train, found["rejected"], strict=True)}
        return PairRewards(
            torch.stack([known[pair.prompt, pair.chosen] for pair in pairs]),
            torch.stack([known[pair.prompt, pair.rejected] for pair in pairs]),
        )

    # -- generated answers

    def _answers(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        """Whether each answer refuses, by the phrases of `refusal-substring`; greedy, and no text is kept."""
        tokens, tokenizer, found = self.plan.answer_tokens, self._subject.tokenizer, {}
        template = bool(tokenizer.chat_template)
        encoder = PairEncoder(tokenizer, max_length=_PROMPT + tokens, max_prompt_length=_PROMPT, chat_template=template)
        end = ending(tokenizer, self.model, chat_template=template)
        with self._subject.at(settings["kept"]):
            engine = TransformersEngine(self.model, tokenizer, end, max_new_tokens=tokens)
            for kind, prompts in self.data.prompts().items():
                requests = [Request(encoder.encode_prompt(prompt, max_new_tokens=tokens)) for prompt in prompts]
                answers = engine.complete(requests)
                found[kind] = {
                    "refused": [int(refuses(answer.text)) for answer in answers],
                    "empty": sum(not answer.text.strip() for answer in answers),
                    "tokens": sum(answer.tokens for answer in answers) / len(answers),
                }
        return found

    # -- Figure 1

    def _figure(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        kept, space = settings.get("kept"), self.space(settings["space"])
        points = []
        with self._subject.at(kept), evaluating(self.model):
            loss, gradient, base = self._climbed(settings["loss"], kept)
            for rho in settings["rhos"]:
                with moved(self.model, space, gradient, rho):
                    points.append({"rho": rho, "rise": rounded(loss.per_item() - base)})
            described = self._described(space, gradient)
        return {
            **described,
            "loss_at_theta": base.mean().item(),
            "points": points,
            "groups": self.data.groups(settings["loss"]),
        }

    def _steps(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        loss, gradient, base = self._climbed("preference")
        space = self.space(settings["space"])
        rises = {
            str(steps): rounded(climb(loss, space, settings["rho"], steps=steps, first=gradient) - base)
            for steps in (1, settings["steps"])
        }
        return {"rises": rises, "groups": self.data.groups("preference")}

    def _match(self, settings: Mapping[str, Any], needs: Mapping[str, Row]) -> Row:
        target = settings["target"] or needs["wider"]["target"]
        space = self.space(settings["space"])
        if any(space.own_layer(name) for name in space.names):
            rho, reached, tried, weight_norm = self._matched_alone(space, target)
        else:
            loss, gradient, base = self._climbed("matching")
            start, described = base.mean().item(), self._described(space, gradient)

            def rise(rho: float) -> float:
                with evaluating(self.model), moved(self.model, space, gradient, rho):
                    return loss.per_item().mean().item() - start

            rho, reached, tried = match_radius(rise, target, start=target / described["gradient_norm"])
            weight_norm = described["weight_norm"]
        return {"target": target, "rho": rho, "rise": reached, "ratio": rho / weight_norm, "tried": tried}

    def _matched_alone(self, space: Subspace, target: float) -> tuple[float, float, int, float]:
        """`match_radius`, and ||W_S||, of a layer that is moved where a tied weight's other uses are not."""
        loss = self._subject.loss("matching")
        with evaluating(self.model), moving(loss, space) as mover:
            start = loss.value()

            def rise(rho: float) -> float:
                with mover.moved(rho):
                    return loss.value() - start

            return *match_radius(rise, target, start=target / mover.gradient_norm), mover.weight_norm

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

    def _language_loss(self, half: str) -> LanguageLoss:
        return LanguageLoss(self.model, self.encoder, self.data.benign_texts(half))

    def _climbed(self, name: str, kept: str | None = None) -> _Start:
        """A loss at the present weights, its gradient in all parameters, and its value of every item.

        Args:
            name: "preference" (Figure 1's pairs), "matching" (those for radii) or "benign".
            kept: The name of the model whose weights are the present ones.
        """
        if self._start is None or self._start[0] != (name, kept):
            loss: Loss
            if name == "benign":
                loss = self._language_loss("test")
            else:
                split = "figure" if name == "preference" else name
                loss = self._subject.loss(split)
            found = loss, self._with_evaluation(loss.gradient), self._with_evaluation(loss.per_item)
            self._start = ((name, kept), found)
        return self._start[1]

    def _with_evaluation(self, function: Callable[[], Any]) -> Any:
        with evaluating(self.model):
            return function()
