"""Reward scores for the reward level: a sequence-classification model asked once for each response, its answers kept in
a file.

The scorer speaks the reward model's language, not the policy's: its own tokenizer, its own chat template where it has
one, its own end-of-sequence token.  A cost model (higher is worse) is told by `sign="cost"`, never guessed.
`train_reward_model` makes a small one by Bradley-Terry for demonstrations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shapo.checked import checked
from shapo.data.chat import ChatTemplate, Message, common_length
from shapo.data.pairs import PreferencePair, parse_transcript
from shapo.data.tokens import keep_end, without_oldest_exchange
from shapo.errors import UserError
from shapo.models.architectures import learned_positions
from shapo.models.loading import load_model, load_tokenizer
from shapo.models.modes import evaluating
from shapo.ranks import ALONE, Ranks
from shapo.storage.caches import load_cached, save_cached
from shapo.storage.fingerprint import digest_model, digest_rows
from shapo_kernels.errors import warn

SIGNS = ("reward", "cost")


@dataclass(frozen=True)
class PairRewards:
    """Rewards (higher is better) of the two responses of each pair, each `[N]` fp32 on the CPU.

    Raises:
        UserError: A reward is NaN or infinite.
    """

    chosen: Tensor
    rejected: Tensor

    def __post_init__(self) -> None:
        broken = (~(self.chosen.isfinite() & self.rejected.isfinite())).nonzero()[:, 0]
        if len(broken):
            raise UserError(
                f"the rewards of {len(broken)} of {len(self.chosen)} pairs are NaN or infinite, first of pair "
                f"{int(broken[0]) + 1}; look at the reward model and at that pair"
            )

    def __getitem__(self, indices: Sequence[int]) -> PairRewards:
        index = torch.as_tensor(indices, dtype=torch.int64)
        return PairRewards(self.chosen[index], self.rejected[index])

    def digest(self) -> str:
        """Changes with any score."""
        return digest_rows([self.chosen.tolist(), self.rejected.tolist()])

    def agreement(self) -> float:
        """Share of the pairs whose label the rewards agree with; a tie counts half."""
        difference = self.chosen - self.rejected
        return float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())


class RewardScorer:
    """A reward model with the way it wants to be asked.

    Args:
        model: A transformers sequence-classification model with one label.
        tokenizer: The reward model's own tokenizer, with a padding token.
        sign: "reward" where a higher score is a better response, "cost" where it is a worse one.
        max_length: Tokens of prompt + response; longer texts lose the beginning of the prompt, as in
            `shapo.data.tokens`: BOS, system message and headers stay, the oldest exchanges go first. A warning tells
            how many were cut.
        batch_size: Responses at once.

    Raises:
        UserError: The model does not give one score, the tokenizer has no padding token, or its chat template fails.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        sign: Literal["reward", "cost"] = "reward",
        max_length: int = 1024,
        batch_size: int = 16,
    ) -> None:
        config: Any = model.config
        if getattr(config, "num_labels", None) != 1:
            raise UserError(
                f"the reward model gives {getattr(config, 'num_labels', 'no')} scores; one label is expected"
            )
        if sign not in SIGNS:
            raise UserError(f"unknown reward sign {sign!r}: choose reward (higher is better) or cost (higher is worse)")
        if config.pad_token_id is None:
            if tokenizer.pad_token_id is None:
                raise UserError(
                    "neither the reward model nor its tokenizer names a padding token; set pad_token in the tokenizer"
                )
            # The model finds the last token of a row by the padding id of its configuration.
            config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.pad_token_id = model, tokenizer, int(config.pad_token_id)
        self.sign, self.batch_size = sign, batch_size
        self.max_length = min(max_length, learned_positions(model) or max_length)
        embedding: Any = model
        self._vocabulary = len(embedding.get_input_embeddings().weight)
        if not 0 <= self.pad_token_id < self._vocabulary:
            raise UserError(
                f"the reward model pads with id {self.pad_token_id}, but has {self._vocabulary} token embeddings"
            )
        self._chat = ChatTemplate(tokenizer, eos=True) if getattr(tokenizer, "chat_template", None) else None

    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], responses: Sequence[str], *, progress: bool = True, ranks: Ranks = ALONE
    ) -> Tensor:
        """Rewards `[N]` fp32 on the CPU, in order; a cost enters negated. Ranks score them between them."""
        device = next(self.model.parameters()).device
        rows = self.encode_all(prompts, responses)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))[ranks.rank :: ranks.count]
        scores = torch.empty(len(order))
        with (
            evaluating(self.model),
            tqdm(total=len(order), desc="reward model", unit="response", disable=not progress) as bar,
        ):
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                batch = pad([rows[index] for index in indices], self.pad_token_id)
                output = self.model(**{name: value.to(device) for name, value in batch.items()})
                scores[start : start + len(indices)] = output.logits[:, 0].float().cpu()
                bar.update(len(indices))
        scores = ranks.spread(scores, order, len(rows))
        return scores if self.sign == "reward" else -scores

    def encode(self, prompt: str, response: str) -> list[int]:
        """Token ids in the reward model's own form: its chat template, or plain text between its BOS and its EOS."""
        return self._encoded(prompt, response)[0]

    def encode_all(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """`encode` of every response; warns of those that the length has cut."""
        encoded = [self._encoded(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        if cut := sum(is_cut for _, is_cut in encoded):
            warn(
                f"{cut} of {len(encoded)} texts have more than the {self.max_length} tokens that the reward model is "
                "given: they are cut"
            )
        return [ids for ids, _ in encoded]

    def _encoded(self, prompt: str, response: str) -> tuple[list[int], bool]:
        """The ids, and whether they were cut."""
        if self._chat is None:
            ids = list(self.tokenizer(prompt + response)["input_ids"])
            eos = self.tokenizer.eos_token_id
            if eos is not None and (not ids or ids[-1] != eos):
                ids.append(eos)
            head = int(ids[:1] == [self.tokenizer.bos_token_id])
            return self._require_embeddings(keep_end(ids, self.max_length, head)), len(ids) > self.max_length
        answer: Message = {"role": "assistant", "content": response.strip()}
        messages: Sequence[Message] = parse_transcript(prompt)
        ids, is_cut = self._ids(self._chat.conversation([*messages, answer])), False
        while len(ids) > self.max_length and (fewer := without_oldest_exchange(messages)) is not None:
            messages, is_cut = fewer, True
            ids = self._ids(self._chat.conversation([*messages, answer]))
        if len(ids) > self.max_length:
            one, other = (self._ids(text) for text in self._chat.head(messages))
            head = common_length(one, other)
            if 2 * head > self.max_length:  # a system message without room keeps BOS alone
                head = int(ids[0] == self.tokenizer.bos_token_id)
            ids, is_cut = keep_end(ids, self.max_length, head), True
        return self._require_embeddings(ids), is_cut

    def _ids(self, text: str) -> list[int]:
        # Whole: the score is read at the last token, which may be the break behind the end of turn.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def score_pairs(
        self, pairs: Sequence[PreferencePair], *, progress: bool = True, ranks: Ranks = ALONE
    ) -> PairRewards:
        """Rewards of both responses of every pair."""
        prompts = [pair.prompt for pair in pairs] * 2
        responses = [response for side in _sides(pairs) for response in side]
        scores = self.score(prompts, responses, progress=progress, ranks=ranks)
        return PairRewards(scores[: len(pairs)], scores[len(pairs) :])

    def cached_pairs(
        self,
        path: str | os.PathLike[str],
        pairs: Sequence[PreferencePair],
        *,
        progress: bool = True,
        ranks: Ranks = ALONE,
    ) -> PairRewards:
        """`score_pairs`, or what an earlier call wrote to `path` with the same model, sign and texts."""
        key = {
            "model": digest_model(self.model),
            "sign": self.sign,
            "data": digest_rows(
                zip(*(self.encode_all([pair.prompt for pair in pairs], side) for side in _sides(pairs)), strict=True)
            ),
        }
        found = ranks.on_main(lambda: load_cached(path, key, ("chosen", "rejected"), len(pairs)))
        if found is not None:
            return PairRewards(**found)
        rewards = self.score_pairs(pairs, progress=progress, ranks=ranks)
        ranks.on_main(lambda: save_cached(path, key, {"chosen": rewards.chosen, "rejected": rewards.rejected}))
        return rewards

    def _require_embeddings(self, ids: list[int]) -> list[int]:
        if (largest := max(ids, default=0)) >= self._vocabulary:
            raise UserError(
                f"the reward model's tokenizer gives the id {largest}, but the model has {self._vocabulary} token "
                "embeddings; the tokenizer is another model's"
            )
        return ids


def load_reward_scorer(
    name: str, *, sign: Literal["reward", "cost"], device: torch.device, **options: Any
) -> RewardScorer:
    """A scorer from a local folder or a hub name, computed in fp32 whatever the checkpoint's type.

    In bf16 a score of 10 is a multiple of 1/16, so the difference of two scores may lose its sign.

    Raises:
        UserError: The model or its tokenizer cannot be loaded, or it is no reward model.
    """
    model = load_model(name, device=str(device), kind="AutoModelForSequenceClassification", what="reward model")
    return RewardScorer(model, load_tokenizer(name), sign=sign, **options)


@checked
def train_reward_model(
    scorer: RewardScorer,
    pairs: Sequence[PreferencePair],
    *,
    updates: int,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Trains the scorer's model in place by Bradley-Terry: -log sigmoid(r_chosen - r_rejected), AdamW, clipped at 1.

    A demonstration's reward model, not a recipe: a reward level is only as good as the labels that this model saw.
    """
    generator = torch.Generator().manual_seed(seed)
    model = scorer.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    device = next(model.parameters()).device
    rows = list(zip(*(scorer.encode_all([pair.prompt for pair in pairs], side) for side in _sides(pairs)), strict=True))
    model.train()
    for _ in tqdm(range(updates), desc="reward model", unit="update", disable=not progress):
        chosen = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        batch = pad([rows[i][0] for i in chosen] + [rows[i][1] for i in chosen], scorer.pad_token_id)
        scores = model(**{name: value.to(device) for name, value in batch.items()}).logits[:, 0]
        nn.functional.softplus(scores[batch_size:] - scores[:batch_size]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _sides(pairs: Sequence[PreferencePair]) -> tuple[list[str], list[str]]:
    return [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]


def pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded `input_ids` and `attention_mask`, `[B, T]`."""
    width = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
