"""Judges that classify in one pass: a sequence classifier, and the linear probe on a model's hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from shapo.data.pairs import parse_transcript
from shapo.data.tokens import PairEncoder, tokenizer_digest
from shapo.errors import UserError
from shapo.judges.base import UNREADABLE, Verdict
from shapo.models.modes import evaluating
from shapo.probe import UNSAFE, Probe, ProbeExample, extract_features
from shapo.scoring.rewards import pad
from shapo.storage.fingerprint import digest_model, digest_rows, digest_tensors


class ClassifierJudge:
    """A transformers sequence classifier. Its input is its chat template's rendering, or prompt and answer as a text
    pair.

    Args:
        model: With two labels or more, or with one (a logit of harm).
        tokenizer: The classifier's own.
        unsafe: The label that means unsafe, by name or number; found by itself where exactly one label is named so.
        threshold: An answer is unsafe from this probability on.
        max_length: Longest input in tokens; a longer one is unreadable.

    Raises:
        UserError: The unsafe label is not given and not clear, or the model has none of that name.
    """

    name = "classifier"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        unsafe: str | None = None,
        threshold: float = 0.5,
        batch_size: int = 16,
        max_length: int = 2048,
    ) -> None:
        self.model, self.tokenizer, self.threshold = model, tokenizer, threshold
        self.batch_size, self.max_length = batch_size, max_length
        self.unsafe = _unsafe_label(model.config, unsafe)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        if model.config.pad_token_id is None:
            raise UserError("neither the classifier nor its tokenizer names a padding token; set pad_token")

    @cached_property
    def digest(self) -> str:
        settings = [self.name, self.unsafe, self.threshold, self.max_length]
        return digest_rows([*settings, digest_model(self.model), tokenizer_digest(self.tokenizer)])

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        rows = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        verdicts = [UNREADABLE] * len(rows)
        order = sorted((n for n, row in enumerate(rows) if 0 < len(row) <= self.max_length), key=lambda n: len(rows[n]))
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                batch = pad([rows[n] for n in indices], int(self.model.config.pad_token_id))
                logits = self.model(**{name: value.to(device) for name, value in batch.items()}).logits.float().cpu()
                harm = logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(1)[:, self.unsafe]
                for n, value in zip(indices, harm.tolist(), strict=True):
                    verdicts[n] = by_threshold(value, self.threshold)
        return verdicts

    def _encode(self, prompt: str, answer: str) -> list[int]:
        if not answer.strip():
            return []
        messages = parse_transcript(prompt)
        if getattr(self.tokenizer, "chat_template", None):
            whole = [*messages, {"role": "assistant", "content": answer.strip()}]
            text = self.tokenizer.apply_chat_template(whole, tokenize=False)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        question = "\n".join(message["content"] for message in messages)
        return list(self.tokenizer(question, answer.strip())["input_ids"])


@dataclass
class ProbeJudge:
    """A linear probe (`shapo probe`) on the mean hidden states of prompt and answer.

    Attributes:
        model: The causal language model that the probe was trained on.
        encoder: The template it was trained with.
        probe: Of that model; its width is checked.
        threshold: An answer is unsafe from this probability on. One longer than the encoder's length is unreadable.
    """

    model: Any
    encoder: PairEncoder
    probe: Probe
    threshold: float = 0.5
    batch_size: int = 16
    name: str = "probe"

    def __post_init__(self) -> None:
        width, hidden = self.probe.weight.shape[1], self.model.config.get_text_config().hidden_size
        if width != hidden:
            raise UserError(f"the probe was trained on hidden states of {width}, but the model's are of {hidden}")
        made = self.probe.metadata
        if made.get("chat_template", str(self.encoder.chat_template)) != str(self.encoder.chat_template):
            given = "with" if self.encoder.chat_template else "without"
            raise UserError(f"the probe was trained otherwise than {given} --chat-template; judge as it was trained")
        if made.get("model_digest", self._model_digest) != self._model_digest:
            raise UserError(
                "the probe was trained on other weights, or in another --dtype; give the model that it was trained on"
            )

    @cached_property
    def _model_digest(self) -> str:
        return digest_model(self.model)

    @cached_property
    def digest(self) -> str:
        probe = digest_tensors({"weight": self.probe.weight, "bias": self.probe.bias})
        settings = [self.name, self.threshold, probe_layer(self.probe), self.encoder.settings]
        return digest_rows([*settings, probe, self._model_digest])

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        # An answer that does not fit is unreadable, as for the guards: half of it is another answer.
        kept = [n for n, answer in enumerate(answers) if answer.strip() and self._fits(prompts[n], answer)]
        verdicts = [UNREADABLE] * len(answers)
        if not kept:
            return verdicts
        examples = [ProbeExample(prompts[n], answers[n], False) for n in kept]
        features = extract_features(
            self.model,
            self.encoder,
            examples,
            batch_size=self.batch_size,
            layer=probe_layer(self.probe),
            progress=False,
        )
        logits = torch.nn.functional.linear(features, self.probe.weight, self.probe.bias)
        for n, harm in zip(kept, logits.softmax(1)[:, UNSAFE].tolist(), strict=True):
            verdicts[n] = by_threshold(harm, self.threshold)
        return verdicts

    def _fits(self, prompt: str, answer: str) -> bool:
        return not self.encoder.encode(prompt, answer).response_cut


def probe_layer(probe: Probe) -> int:
    """The hidden state that the probe was trained on: the last where its file does not say."""
    return int(probe.metadata.get("layer", -1))


def by_threshold(harm: float, threshold: float) -> Verdict:
    """Unsafe from `threshold` on; a NaN is unreadable."""
    if math.isnan(harm):
        return UNREADABLE
    return Verdict("unsafe" if harm >= threshold else "safe", score=harm)


def _unsafe_label(config: Any, wanted: str | None) -> int:
    names = {int(number): str(name) for number, name in config.id2label.items()}
    if config.num_labels == 1:
        return 0
    if wanted is not None:
        found = [n for n, name in names.items() if wanted in (str(n), name)]
    else:
        found = [n for n, name in names.items() if name.lower() in ("unsafe", "harmful", "toxic", "label_unsafe")]
    if len(found) != 1:
        listed = ", ".join(f"{n} {name}" for n, name in sorted(names.items()))
        raise UserError(f"which of the classifier's labels means unsafe? It has {listed}; name one with --unsafe-label")
    return found[0]
