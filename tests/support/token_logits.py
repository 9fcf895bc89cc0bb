"""Logits and labels, their log-probabilities by `log_softmax`, and those and the gradient of any function of them."""

import torch

F64, IGNORE = torch.float64, -100


def make(rows, length, vocabulary, *, dtype=F64, seed=0, kept=0.7, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, length, vocabulary, generator=generator, dtype=F64)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) >= kept
    return logits, labels.masked_fill(ignored, IGNORE)


def textbook(logits, labels, shift=1, dtype=F64):
    """Log-probabilities and entropies by log_softmax; 0 where nothing counts."""
    logps = torch.log_softmax(logits.to(dtype), -1)
    targets = torch.full_like(labels, IGNORE)
    targets[:, : labels.shape[1] - shift] = labels[:, shift:]
    picked = logps.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    entropy = -torch.where(logps == -torch.inf, 0.0, logps.exp() * logps).sum(-1)
    counted = targets != IGNORE
    return torch.where(counted, picked, 0.0), torch.where(counted, entropy, 0.0)


def run(function, logits, slope, **options):
    """Log-probabilities of all tokens, and the gradient of their product with `slope`."""
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    logps, entropy = function(logits, **options)
    (logps * slope).sum().backward()
    return logps.detach(), entropy, logits.grad
