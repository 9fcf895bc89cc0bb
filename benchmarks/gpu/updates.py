"""Whole updates of a Llama of 1.2 B parameters: what each form of ShaPO costs in multiples of a plain update.

Forward, backward and optimizer, by the host's clock with the device waited for: this is what a user waits for. Each
form takes turns with the plain update, alone on the model. The learning rate is 0, so that every update computes the
same; the weights must come back to the bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import shapo_kernels as sk
from benchmarks.baselines import IGNORE
from benchmarks.gpu.bench import OURS, Bench, using
from benchmarks.gpu.logps import dpo
from benchmarks.rows import row
from shapo_kernels import losses

SUITE = "gpu_updates"
PLAIN = "plain"
REUSED = {"perturbation": "delta", "reuse_prefix": True}


@dataclass(frozen=True)
class Form:
    """A form of the update: the optimizer's options, the share of the depth from the top, of the pairs in the ascent.

    `head`: the output projection moves instead of neurons; the fused head cannot serve it, since it calls no layer.
    `rounds` says how often it is timed.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    depth: float = 1.0
    pairs: float = 1.0
    head: bool = False
    rounds: int = 6


FORMS = (
    Form("selective, delta", {"perturbation": "delta"}),
    Form("selective, in_place", {"perturbation": "in_place"}),
    Form("grad, in_place", {"ascent": "grad", "perturbation": "in_place"}),
    Form("selective, delta, a quarter of the pairs", {"perturbation": "delta"}, pairs=0.25),
    Form("selective, delta, upper half", {"perturbation": "delta"}, depth=0.5),
    *(
        Form(f"selective, delta, {part}, prefix reused", REUSED, depth=depth)
        for part, depth in (("upper half", 0.5), ("upper quarter", 0.25), ("last block", 0.0))
    ),
    Form("selective, delta, head", {"perturbation": "delta"}, head=True),
    Form("selective, delta, head, prefix reused", REUSED, head=True),
)


class Training:
    """A model, a batch of pairs, and the loss from logits or from hidden states."""

    def __init__(self, bench: Bench) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        big = not bench.small
        self.config = LlamaConfig(
            hidden_size=2048 if big else 48,
            intermediate_size=8192 if big else 640,
            num_hidden_layers=16 if big else 2,
            num_attention_heads=32 if big else 4,
            num_key_value_heads=8 if big else 2,
            vocab_size=128256 if big else 256,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
        self.rows, length = (16, 512) if big else (4, 16)
        torch.manual_seed(0)
        with torch.device(bench.device):
            self.model = LlamaForCausalLM(self.config).bfloat16()
            self.tokens = torch.randint(0, self.config.vocab_size, (self.rows, length))
        self.labels = self.tokens.clone()
        self.labels[:, : length // 4] = IGNORE
        self.fused = False
        self.base = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.selectable = [n for n, _ in self.model.named_parameters() if n.endswith("down_proj.weight")]
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        self.case = f"{millions:,.0f} M parameters, {self.rows} x {length} tokens, bfloat16"

    def loss(self, rows: Tensor | None = None) -> Tensor:
        tokens, labels = (self.tokens, self.labels) if rows is None else (self.tokens[rows], self.labels[rows])
        if self.fused:
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state
            return dpo(losses.linear_sequence_logps(hidden, self.model.lm_head.weight, labels)[0])
        return dpo(losses.sequence_logps(self.model(tokens, use_cache=False).logits, labels)[0])

    def part(self, share: float) -> Tensor:
        """Rows of the first pairs: chosen ones are the first half of the batch, rejected ones the second."""
        half, count = self.rows // 2, max(1, round(self.rows // 2 * share))
        device = self.tokens.device
        return torch.cat([torch.arange(count, device=device), torch.arange(half, half + count, device=device)])

    def subspace(self, depth: float) -> sk.Subspace:
        layers = self.config.num_hidden_layers
        names = self.selectable[layers - max(1, round(layers * depth)) :]
        percent = len(self.selectable) / len(names)  # as many neurons, whatever the depth
        return sk.Subspace.random(dict.fromkeys(names, self.config.intermediate_size), percent, seed=0)

    def neuron_norm(self, form: Form) -> float:
        """Of the gradient of a form's loss on its neurons."""
        self.base.zero_grad()
        self.loss(self.part(form.pairs) if form.pairs < 1 else None).backward()
        device = self.tokens.device
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        parts = [gradients[name][:, index.to(device)].flatten() for name, index in self.subspace(form.depth).items()]
        self.base.zero_grad()
        return torch.cat(parts).double().norm().item()

    def head_norm(self) -> float:
        """Of the gradient of the head's weight where it is not tied to the embedding."""
        with torch.no_grad():
            hidden = self.model.model(self.tokens, use_cache=False).last_hidden_state
        weight = self.model.lm_head.weight.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(dpo(losses.sequence_logps(hidden @ weight.t(), self.labels)[0]), weight)
        return grad.norm(dtype=torch.float64).item()

    def plain(self) -> None:
        self.loss().backward()
        self.base.step()
        self.base.zero_grad()

    def shapo(self, form: Form) -> tuple[Callable[[], None], sk.ShaPOOptimizer]:
        base = torch.optim.SGD(self.model.parameters(), lr=0.0)
        subspace = sk.Subspace.head(self.model) if form.head else self.subspace(form.depth)
        opt = sk.ShaPOOptimizer(base, self.model, subspace, rho=0.05, **form.options)
        rows = self.part(form.pairs) if form.pairs < 1 else None

        def update() -> None:
            with opt.ascent():
                opt.ascend(self.loss(rows))
            with opt.perturbed():
                self.loss().backward()
            opt.step()
            opt.zero_grad()

        return update, opt

    def published(self) -> Callable[[], None]:
        """The published code's pattern: two forwards a pass, masked dense gradients through host memory, no norm."""
        chosen = self.subspace(1.0)
        weights = {n: self.model.get_parameter(n) for n in self.selectable}
        masks = {
            n: torch.zeros(1, w.shape[1], device=w.device).index_fill_(1, chosen[n].to(w.device), 1.0)
            for n, w in weights.items()
        }

        def update() -> None:
            with torch.no_grad():
                self.loss()
            self.loss().backward()
            kept = {n: (w.grad.float() * masks[n]).cpu() for n, w in weights.items() if w.grad is not None}
            self._move(weights, kept, 4e-6)
            self.base.zero_grad()
            with torch.no_grad():
                self.loss()
            self.loss().backward()
            self._move(weights, kept, -4e-6)
            self.base.step()
            self.base.zero_grad()

        return update

    @torch.no_grad()
    def _move(self, weights: dict[str, nn.Parameter], by: dict[str, Tensor], scale: float) -> None:
        for name, moved in by.items():
            weights[name].add_((scale * moved.to(weights[name].device)).to(weights[name].dtype))

    def dense_sam(self) -> None:
        """SAM over all parameters: its copy of the weights is as large as the model."""
        self.loss().backward()
        with torch.no_grad():
            moved = [p for p in self.model.parameters() if p.grad is not None]
            gradients = [p.grad for p in moved]
            norm = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).norm()
            kept = [p.clone() for p in moved]
            torch._foreach_add_(moved, torch._foreach_mul(gradients, (0.05 / norm).to(moved[0].dtype)))
        self.base.zero_grad()
        self.loss().backward()
        with torch.no_grad():
            torch._foreach_copy_(moved, kept)
        self.base.step()
        self.base.zero_grad()


@torch.enable_grad()
def whole_updates(bench: Bench) -> None:
    training = Training(bench)
    with using(bench.backends[0]):
        for fused in (True, False):
            training.fused = fused
            case = f"{'fused head' if fused else 'logits'}, {training.case}"
            timer = _Timer(bench, training, case)
            timer.put(PLAIN, [(plain, plain) for plain, _ in timer.in_turn(training.plain, 3)])
            for form in FORMS:
                if bench.left() > 0 and not (form.head and fused):
                    _time_ours(timer, form)
            if not fused and bench.left() > 0:
                timer.put("dense SAM", timer.in_turn(training.dense_sam, 6))


@torch.enable_grad()
def published_updates(bench: Bench) -> None:
    """Alone and twice: it copies dense gradients through host memory."""
    training = Training(bench)
    with using(bench.backends[0]):
        timer = _Timer(bench, training, f"logits, {training.case}")
        timer.put("published pattern", timer.in_turn(training.published(), 2))


def _time_ours(timer: _Timer, form: Form) -> None:
    training, name = timer.training, f"{OURS}, {form.name}"
    before = [p.detach().clone() for p in training.model.parameters()]
    update, opt = training.shapo(form)
    try:
        pairs = timer.in_turn(update, form.rounds)
        check_update(training, form, opt, before)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        timer.bench.put({"suite": SUITE, "case": timer.case, "variant": name, "refused": reason})
    else:
        timer.put(name, pairs)
    finally:
        opt.detach()


def check_update(training: Training, form: Form, opt: sk.ShaPOOptimizer, before: Sequence[Tensor]) -> None:
    """The gradient's norm on the subspace is that of an ordinary backward pass; the weights are what they were."""
    expected = training.head_norm() if form.head else training.neuron_norm(form)
    got = float(opt.stats["grad_norm"])
    if not abs(got - expected) <= 0.02 * expected:
        raise AssertionError(f"the ascent found a gradient of norm {got:.4e}, an ordinary pass {expected:.4e}")
    if not all(torch.equal(p, b) for p, b in zip(training.model.parameters(), before, strict=True)):
        raise AssertionError("the weights were not restored to the bit")


class _Timer:
    """Times a form of the update in turn with the plain one, and writes its row."""

    def __init__(self, bench: Bench, training: Training, case: str) -> None:
        self.bench, self.training, self.case = bench, training, case
        self.peak = 0

    def in_turn(self, update: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
        for run in (self.training.plain, update):
            run()
        on_gpu = self.bench.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._time(update)
        self.peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return [(self._time(self.training.plain), self._time(update)) for _ in range(2 if self.bench.small else rounds)]

    def _time(self, run: Callable[[], None]) -> float:
        wait = torch.cuda.synchronize if self.bench.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start

    def put(self, name: str, pairs: Sequence[tuple[float, float]]) -> None:
        found = row(SUITE, self.case, name, [seconds for _, seconds in pairs], dtype="bfloat16")
        ratio = statistics.median(seconds / plain for plain, seconds in pairs)
        self.bench.put(found | {"ratio_to_plain": ratio, "peak_gib": self.peak / 2**30, "timing": "host"})
