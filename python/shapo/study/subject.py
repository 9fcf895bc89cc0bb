"""The subject of a study: a model in memory at its initial weights, the pairs, and how texts become tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from shapo import selection
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError
from shapo.models.loading import load_model, load_tokenizer, save_model
from shapo.scoring.logps import PairLogps, TokenizedPairs, compute_logps
from shapo.sharpness import PairLoss
from shapo.storage.files import write_json
from shapo.storage.fingerprint import digest_model
from shapo.study.data import StudyData
from shapo.study.plan import Plan
from shapo.study.spaces import Spaces
from shapo.versions import versions


class Subject:
    """Loads the model and writes, or compares, what the rows of a folder depend on.

    Args:
        model: Folder or hub name of an aligned model.
        pairs: Folder of `shapo safety-pairs`.
        folder: Of the study: scores, kept models and temporary files.
        plan: Sizes.
        device: As the commands take it.

    Raises:
        UserError: `folder` has rows of another plan, model or other pairs.
    """

    def __init__(self, model: str, pairs: Path, folder: Path, plan: Plan, *, device: str = "auto") -> None:
        self.model = load_model(model, device=device)
        self.plan = replace(plan, layers=len(selection.value_vectors(self.model).names))
        self.data, self.folder = StudyData(pairs, self.plan), folder
        self._require_settings(model)
        self.tokenizer = load_tokenizer(model)
        if plan.template is not None:
            self.tokenizer.chat_template = plan.template
        self.encoder = PairEncoder(
            self.tokenizer,
            max_length=plan.max_length,
            max_prompt_length=plan.max_prompt_length,
            chat_template=bool(self.tokenizer.chat_template),
        )
        self.space = Spaces(self.model, folder / "scores")
        self._initial = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._references: dict[str, PairLogps] = {}

    def restore(self) -> None:
        """Puts the model back to its initial weights."""
        self.model.load_state_dict(self._initial)
        self.model.zero_grad(set_to_none=True)
        self.model.eval()

    def keep(self, name: str) -> None:
        """Saves the model as it is."""
        save_model(self.folder / "models" / name, self.model, self.tokenizer)

    @contextmanager
    def at(self, name: str | None) -> Iterator[None]:
        """The model has the weights of a kept model inside, or its initial ones for None."""
        if name is None:
            yield
            return
        self.model.load_state_dict(load_model(str(self.folder / "models" / name), device="cpu").state_dict())
        try:
            yield
        finally:
            self.restore()

    def tokens(self, split: str) -> TokenizedPairs:
        """The pairs of a test, or of `figure` and `matching`, which have sizes of their own."""
        if split == "figure":
            return TokenizedPairs(self.data.figure_pairs(), self.encoder)
        if split == "matching":
            return TokenizedPairs(self.data.first("selection", self.plan.match_pairs), self.encoder)
        return TokenizedPairs(self.data.first(split, self.plan.test_pairs), self.encoder)

    def reference(self, split: str) -> PairLogps:
        """Log-probabilities of `tokens(split)` at the initial weights, asked once: the tests' as in training."""
        if split not in self._references:
            kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self._initial)
            self._references[split] = self.logps(split, bf16=self.plan.bf16 and split not in ("figure", "matching"))
            self.model.load_state_dict(kept)
        return self._references[split]

    def loss(self, split: str) -> PairLoss:
        """The preference loss of `tokens(split)`."""
        return PairLoss(self.model, self.tokens(split), self.reference(split), beta=self.plan.beta, batch_size=16)

    def logps(self, split: str, *, bf16: bool) -> PairLogps:
        """Log-probabilities of `tokens(split)` at the present weights."""
        return compute_logps(self.model, self.tokens(split), batch_size=16, bf16=bf16, progress=False)

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
