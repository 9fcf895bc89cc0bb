"""The log-probabilities of responses as textbooks write them: what the losses' tests compare with."""

import torch
import torch.nn.functional as F

IGNORE = -100


def eager(logits, labels, ignore_index=IGNORE):
    """Textbook: the full log_softmax, in the dtype of the logits."""
    logps, targets = F.log_softmax(logits[:, :-1], -1), labels[:, 1:]
    picked = logps.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    counted = targets != ignore_index
    return torch.where(counted, picked, 0).sum(1), counted.sum(1)


def head(hidden, weight, bias=None, softcap=None, scale=1.0):
    logits = F.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def make_labels(rows, length, vocabulary, seed=0, kept=0.6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    return torch.where(torch.rand(rows, length, generator=generator) < kept, labels, IGNORE)
