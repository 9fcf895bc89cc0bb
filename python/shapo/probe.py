"""The linear safety probe: which direction of the hidden space is "unsafe".

Features are means of the last hidden states over the attention mask of prompt + response; the probe is one linear layer
with two classes, trained with cross-entropy (arXiv:2602.07340). What selection takes from it is `Probe.direction`.
The probe judges hidden states; which neurons are opposed to its direction is for `selection`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from shapo.checked import checked
from shapo.data.noise import rank
from shapo.data.pairs import PreferencePair
from shapo.data.tokens import Encoded, PairEncoder, warn_of_cuts
from shapo.errors import UserError
from shapo.models.modes import evaluating
from shapo.models.wrappers import unwrap
from shapo.ranks import ALONE, Ranks
from shapo.storage.caches import header_of, load_cached, save_cached
from shapo.storage.files import atomic_file
from shapo.storage.fingerprint import digest_model, digest_rows

__all__ = [
    "PUBLISHED",
    "SAFE",
    "UNSAFE",
    "Epoch",
    "Probe",
    "ProbeExample",
    "extract_features",
    "probe_examples",
    "train_probe",
]

SAFE, UNSAFE = 0, 1
"""The probe's classes: rows of its weight."""

PUBLISHED: Mapping[str, float | int] = {"lr": 1e-5, "epochs": 10, "batch_size": 256}
"""The recipe of arXiv:2602.07340, for models of 7 B."""


@dataclass(frozen=True)
class ProbeExample:
    """A prompt with one response, and whether the response is unsafe."""

    prompt: str
    response: str
    unsafe: bool


def probe_examples(pairs: Iterable[PreferencePair]) -> list[ProbeExample]:
    """Both responses of each pair that carry a safety flag, in the order of the pairs, the chosen one first.

    PKU-SafeRLHF has flags; in hh-rlhf the rejected answer counts as the unsafe one. Flags follow their text through
    label noise, so the probe's labels stay true.

    Raises:
        UserError: no response has a flag (TRL formats have none).
    """
    examples = []
    for pair in pairs:
        for response, unsafe in ((pair.chosen, pair.chosen_unsafe), (pair.rejected, pair.rejected_unsafe)):
            if unsafe is not None:
                examples.append(ProbeExample(pair.prompt, response, unsafe))
    if not examples:
        raise UserError("the pairs have no safety labels to train a probe on; use PKU-SafeRLHF or hh-rlhf data")
    return examples


class _Example(Protocol):
    @property
    def prompt(self) -> str: ...
    @property
    def response(self) -> str: ...


@checked
def extract_features(
    model: nn.Module,
    encoder: PairEncoder,
    examples: Sequence[_Example],
    *,
    batch_size: int = 16,
    layer: int = -1,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
    bf16: bool = False,
    ranks: Ranks = ALONE,
) -> Tensor:
    r"""Mean hidden states, `[N, hidden]` fp32 on the CPU, in the order of `examples`.

    .. math:: f = \frac{\sum_t m_t h_t}{\sum_t m_t},  m the attention mask over prompt + response

    The model runs in eval mode without gradients; the mean is accumulated in fp32 (fp64 for an fp64 model).

    Args:
        model: a causal language model of transformers; wrappers are seen through, the head is not computed.
        encoder: the template and truncation that training uses too.
        examples: anything with a `prompt` and a `response`.
        batch_size: examples of about one length that go through the model together.
        layer: which hidden state: -1 the last (after the final norm, what the head sees), 0 the embeddings.
        cache: a file to keep the features in. It is used only if it was made from these weights, tokens and settings,
            and is computed anew and replaced otherwise.
        progress: show a progress bar.
        bf16: compute the hidden states under bf16 autocast.
        ranks: processes that compute them between them; all have the result, and rank 0 keeps it.

    Raises:
        UserError: no examples; a layer that the model does not have; `cache` is a file of another kind; features that
            are not finite.
    """
    if not len(examples):
        raise UserError("there are no examples to extract features from")
    inner = unwrap(model)
    encoded = [encoder.encode(example.prompt, example.response) for example in examples]
    warn_of_cuts(encoded, encoder.max_length)
    key = {}
    if cache is not None:
        key = _cache_key(inner, encoded, layer, bf16)
        path = Path(cache)
        found = ranks.on_main(lambda: _read_cache(path, key, len(encoded)))
        if found is not None:
            return found
    features = _compute_features(inner, encoder, encoded, batch_size, layer, progress, bf16, ranks)
    if not features.isfinite().all():
        raise UserError("the model's hidden states are not finite; check its weights and precision")
    if cache is not None:
        ranks.on_main(lambda: save_cached(path, key, {"features": features}))
    return features


def _compute_features(
    model: nn.Module,
    encoder: PairEncoder,
    encoded: Sequence[Encoded],
    batch_size: int,
    layer: int,
    progress: bool,
    bf16: bool,
    ranks: Ranks,
) -> Tensor:
    device = next(model.parameters()).device
    backbone = getattr(model, "base_model", model)
    # Neighbours in length share a batch, so that little is spent on padding.
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    own = order[ranks.rank :: ranks.count]
    fed = own or order[:1]
    parts = []
    with (
        evaluating(model),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext(),
        tqdm(total=len(fed), desc="hidden states", disable=not progress, unit="text") as bar,
    ):
        for start in range(0, len(fed), batch_size):
            indices = fed[start : start + batch_size]
            batch = encoder.collate([encoded[index] for index in indices])
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            hidden = _hidden_states(backbone, inputs, layer)
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            mask = inputs["attention_mask"].to(hidden.dtype).unsqueeze(-1)
            # where, not a product: a padded position may hold inf or NaN, which 0 would not remove.
            total = torch.where(mask > 0, hidden, 0).sum(1)
            parts.append((total / mask.sum(1)).float().cpu())
            bar.update(len(indices))
    return ranks.spread(torch.cat(parts)[: len(own)], own, len(order))


def _hidden_states(backbone: nn.Module, inputs: Mapping[str, Tensor], layer: int) -> Tensor:
    if layer == -1:
        return backbone(**inputs, use_cache=False).last_hidden_state
    states = backbone(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    if not -len(states) <= layer < len(states):
        raise UserError(f"layer is {layer}; the model has the hidden states 0 to {len(states) - 1}, or -1 for the last")
    return states[layer]


_CACHE_FORMAT = "shapo-features"


def _cache_key(model: nn.Module, encoded: Sequence[Encoded], layer: int, bf16: bool) -> dict[str, str]:
    """What the features depend on. The tokens say all about texts, template, truncation and tokenizer."""
    return {
        "format": _CACHE_FORMAT,
        "model": digest_model(model),
        "data": digest_rows(example.input_ids for example in encoded),
        "settings": json.dumps({"layer": layer, "bf16": bf16, "pooling": "mean over the attention mask"}),
    }


def _read_cache(path: Path, key: Mapping[str, str], length: int) -> Tensor | None:
    """The features where the file was made from `key`, None where there is none or it is out of date or damaged."""
    if not path.exists():
        return None
    if header_of(path).get("format") != _CACHE_FORMAT:
        raise UserError(f"{path} is no readable feature cache and is left as it is; remove it or give another path")
    found = load_cached(path, key, ("features",), length)
    return None if found is None else found["features"]


@dataclass(frozen=True)
class Epoch:
    """Loss and accuracy after one pass over the probe's training examples."""

    train_loss: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class Probe:
    """A trained probe; logits are `features @ weight.T + bias`.

    Attributes:
        weight: `[2, hidden]` fp32, row 0 safe, row 1 unsafe.
        bias: `[2]`.
        accuracy: on the validation examples, whose prompts training did not see.
        majority: the accuracy there of always giving training's more frequent class: what to compare with.
        balanced_accuracy: mean of the two classes' recalls (over the classes present).
        epoch: the epoch whose weights these are, counted from 1.
        curve: every epoch.
        metadata: settings and sizes of the run, as text.
    """

    weight: Tensor
    bias: Tensor
    accuracy: float
    majority: float
    balanced_accuracy: float
    epoch: int
    curve: tuple[Epoch, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def direction(self) -> Tensor:
        """v = W[unsafe] - W[safe], `[hidden]`."""
        return self.weight[UNSAFE] - self.weight[SAFE]

    def predict(self, features: Tensor) -> Tensor:
        """True where a feature vector looks unsafe, `[N]`."""
        return functional.linear(features, self.weight, self.bias).argmax(1) == UNSAFE

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with everything in its header, atomically."""
        from safetensors.torch import save_file

        record = {name: value for name, value in asdict(self).items() if name not in ("weight", "bias")}
        header = {"format": _PROBE_FORMAT, "version": "1", "record": json.dumps(record)}
        with atomic_file(path) as temporary:
            save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """Read what `save` wrote: the file, or the folder of `shapo probe` that it lies in.

        Raises:
            UserError: a missing or damaged file, or one of another kind.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path) / "probe.safetensors" if Path(path).is_dir() else path
        try:
            with safe_open(os.fspath(path), "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != _PROBE_FORMAT:
                    raise UserError(f"{path} is no probe; write one with `shapo probe`")
                record: dict[str, Any] = json.loads(header["record"])
                record["curve"] = tuple(Epoch(**epoch) for epoch in record["curve"])
                probe = cls(weight=file.get_tensor("weight"), bias=file.get_tensor("bias"), **record)
                probe._check()
                return probe
        except OSError as error:
            raise UserError(f"cannot read the probe {path}: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is a damaged probe file: {error}") from error

    def _check(self) -> None:
        """Raises ValueError for what `save` has never written."""
        numbers = (self.accuracy, self.majority, self.balanced_accuracy, self.epoch)
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError("an accuracy is no number")
        if self.weight.dim() != 2 or len(self.weight) != 2 or list(self.bias.shape) != [2]:
            raise ValueError(f"weights of shape {list(self.weight.shape)} and {list(self.bias.shape)}")
        if not (self.weight.is_floating_point() and self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise ValueError("weights that are not finite")


_PROBE_FORMAT = "shapo-probe"


@checked
def train_probe(
    features: Tensor,
    unsafe: Sequence[bool] | Tensor,
    groups: Sequence[Hashable],
    *,
    lr: float = 0.05,
    epochs: int = 60,
    batch_size: int = 256,
    seed: int = 0,
    validation: float = 0.2,
    weight_decay: float = 0.0,
    balanced: bool = False,
    keep: str = "last",
    progress: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Probe:
    """Train a probe with AdamW on the features as they are: standardising them would turn the direction.

    The weights start from zero: the problem is convex, so no random start is needed, and one would stay in the
    direction wherever the features have no variance. The defaults converge in seconds; the published
    recipe (`PUBLISHED`) stops far from there, and the neurons that it selects are largely others.

    Args:
        features: `[N, hidden]`.
        unsafe: the label of each row.
        groups: the prompt of each row. Rows of one group go to the same side, so no prompt is in both.
        lr, epochs, batch_size, weight_decay: of AdamW; a partial last batch is used.
        seed: of the split and the order.
        validation: share of the groups held out, in (0, 1); at least one group.
        balanced: weight the classes inversely to their frequency in training. Off, as published: then the bias takes
            up an imbalance, and the majority baseline tells how much of the accuracy it explains.
        keep: the weights of the "last" epoch (its accuracy is unbiased), or of the epoch with the "best" validation
            loss (its accuracy was selected for).
        progress: show a progress bar.
        metadata: text to keep with the probe.

    Raises:
        UserError: a bad setting, fewer than two groups, or only one class to train on.
        ValueError: lengths that differ.
    """
    labels = torch.as_tensor(unsafe).to(torch.int64)
    if features.dim() != 2 or not len(features) == len(labels) == len(groups):
        raise ValueError(
            f"features {list(features.shape)}, {len(labels)} labels, {len(groups)} groups; expected [N, hidden], N, N"
        )
    _check_settings(lr, epochs, batch_size, validation, keep)
    held_out = _held_out(groups, validation, seed)
    data = features.detach().float().cpu()
    train_x, train_y, check_x, check_y = data[~held_out], labels[~held_out], data[held_out], labels[held_out]
    counts = torch.bincount(train_y, minlength=2)
    if counts.min() == 0:
        raise UserError(
            f"the probe's training examples are all {('safe', 'unsafe')[int(counts.argmax())]}; it needs both"
        )
    class_weights = len(train_y) / (2 * counts.float()) if balanced else None

    weight = torch.zeros(2, data.shape[1], requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    curve: list[Epoch] = []
    kept = (weight.detach().clone(), bias.detach().clone(), 0)
    for epoch in tqdm(range(1, epochs + 1), desc="probe", disable=not progress, unit="epoch"):
        total = 0.0
        for indices in torch.randperm(len(train_y), generator=generator).split(batch_size):
            logits = functional.linear(train_x[indices], weight, bias)
            loss = functional.cross_entropy(logits, train_y[indices], weight=class_weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(indices)
        with torch.no_grad():
            logits = functional.linear(check_x, weight, bias)
            check_loss = functional.cross_entropy(logits, check_y, weight=class_weights, reduction="sum")
            accuracy = (logits.argmax(1) == check_y).float().mean()
        curve.append(Epoch(total / len(train_y), check_loss.item() / len(check_y), accuracy.item()))
        if keep == "last" or curve[-1].validation_loss <= min(entry.validation_loss for entry in curve):
            kept = (weight.detach().clone(), bias.detach().clone(), epoch)
    predicted = functional.linear(check_x, kept[0], kept[1]).argmax(1)
    recalls = [(predicted[check_y == label] == label).float().mean() for label in check_y.unique()]
    settings: dict[str, object] = {
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "validation": validation,
    }
    settings |= {"weight_decay": weight_decay, "balanced": balanced, "keep": keep}
    sizes = {"train": len(train_y), "train_unsafe": int(counts[UNSAFE]), "validation_examples": len(check_y)}
    return Probe(
        weight=kept[0],
        bias=kept[1],
        accuracy=(predicted == check_y).float().mean().item(),
        majority=(check_y == counts.argmax()).float().mean().item(),
        balanced_accuracy=torch.stack(recalls).mean().item(),
        epoch=kept[2],
        curve=tuple(curve),
        metadata={name: str(value) for name, value in (settings | sizes | dict(metadata or {})).items()},
    )


def _check_settings(lr: float, epochs: int, batch_size: int, validation: float, keep: str) -> None:
    if not 0 < lr < float("inf"):
        raise UserError(f"the probe's learning rate is {lr}; expected a number above 0")
    if epochs < 1 or batch_size < 1:
        raise UserError(f"the probe has {epochs} epochs and a batch of {batch_size}; expected at least 1 of each")
    if not 0 < validation < 1:
        raise UserError(f"the probe's validation share is {validation}; expected a share above 0 and below 1")
    if keep not in ("last", "best"):
        raise UserError(f"keep is {keep!r}; expected last or best")


def _held_out(groups: Sequence[Hashable], share: float, seed: int) -> Tensor:
    """`[N]` bool: the rows of the held-out groups, which are the lowest by a hash of (seed, group)."""
    ranked = sorted(dict.fromkeys(groups), key=lambda group: rank(seed, group))
    if len(ranked) < 2:
        raise UserError(
            f"the probe's examples have {len(ranked)} different prompts; it needs two or more to hold some out"
        )
    chosen = set(ranked[: min(max(1, round(share * len(ranked))), len(ranked) - 1)])
    return torch.tensor([group in chosen for group in groups])
