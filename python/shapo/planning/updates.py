"""One update of each way, run on tensors without contents: what of it stays in memory, and what it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shapo.config import LoopConfig
from shapo.errors import UserError, first_line
from shapo.models.adapters import Lora, add_lora
from shapo.models.blocks import checkpoint_blocks, set_attention
from shapo.models.fused_head import FusedHead, unusable
from shapo.models.wrappers import unwrap
from shapo.planning.four_bits import add_scales, to_four_bits
from shapo.planning.partition import Partition
from shapo.planning.tracing import ACTIVATIONS, GRADIENTS, PERTURBATION, STATES, WEIGHTS, Trace
from shapo.planning.units import Unit, lowest_block, units_of
from shapo.scoring.logps import PairLogps, batch_logps
from shapo.selection import random_subspace
from shapo.training.optimizers import largest_norm, make_optimizer
from shapo_kernels import ShaPOOptimizer, Subspace, losses

#: The ways, and what each is.
WAYS = {
    "plain": "DPO of all weights",
    "lora": "DPO of an adapter",
    "qlora": "the same over a base model in 4 bits",
    "in_place": "ShaPO in some neurons, written in place",
    "delta": "ShaPO in some neurons, added in the forward pass",
    "reuse": "the same in upper blocks, those below computed once",
    "sam": "uniform SAM: all weights are moved",
    "published": "the published code's pattern: dense masks, the reference model run in both passes",
}


@dataclass(frozen=True)
class Load:
    """What goes through a model in one update on one rank.

    Attributes:
        pairs: Pairs through the model at once.
        micro_batches: Such parts an update.
        length: Tokens of prompt and response together.
        prompt: Tokens of the prompt, which have no label.
        dtype: Of the weights.
        loop: Optimizer, autocast, fused head, clipping.
        gradient_checkpointing: Blocks keep their input alone.
        attn: transformers' attention, or None for its choice.
        lora: The adapter of the ways "lora" and "qlora".
        percent: Share of the neurons that are selected.
        depth: Share of the blocks they are selected from, from the top, by the way "reuse".
        foreach: Whether the optimizer works on all weights at once, as torch chooses on a GPU.
        shares: What one rank holds of each part; see `Trace`.
        zero: Stage of DeepSpeed's ZeRO, 0 without it.
        ranks: Number of ranks, which matters to ZeRO alone.
    """

    pairs: int
    micro_batches: int
    length: int
    prompt: int
    dtype: str
    loop: LoopConfig
    gradient_checkpointing: bool = False
    attn: str | None = None
    lora: Lora = field(default_factory=Lora)
    percent: float = 1.0
    depth: float = 0.25
    foreach: bool = True
    shares: Mapping[str, float] = field(default_factory=dict)
    zero: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class Update:
    """What one update of a way takes, on one rank and but for what an engine adds.

    Attributes:
        way: Its name.
        in_passes: Bytes by part when most are in use before the step.
        in_step: The same in the step, with the clipping of the gradients.
        largest: The most bytes of each part, not all at the same moment.
        flops: Floating-point operations of products and attention.
        forward_flops: Those of a forward pass over the same pairs.
        units: The weights, in the order in which a forward pass uses them.
        itemsize: Bytes of a weight's element.
        direction: Bytes of the selected neurons' gradient; 0 without a perturbation.
        targets: Number of weights with selected neurons.
        lowest: The lowest block with a selected neuron.
        micro_batches: Parts of the update.
    """

    way: str
    in_passes: dict[str, float]
    in_step: dict[str, float]
    largest: dict[str, float]
    flops: int
    forward_flops: int
    units: tuple[Unit, ...]
    itemsize: int
    direction: int
    targets: int
    lowest: int
    micro_batches: int

    @property
    def peak(self) -> float:
        """Bytes, without those of an engine."""
        return max(sum(self.in_passes.values()), sum(self.in_step.values()))

    @property
    def passes(self) -> float:
        """The update in units of a forward pass."""
        return self.flops / self.forward_flops

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for unit in self.units for shape in unit.shapes)


def trace_update(config: Any, way: str, load: Load) -> Update:
    """Builds the model that `config` describes, without contents, and runs one update of a way.

    Args:
        config: A transformers configuration.
        way: Of `WAYS`.
        load: What goes through the model.

    Raises:
        UserError: The model's architecture or an option does not allow it.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model, reference = _build(config, way, load), _reference(config, way, load)
    with fake:
        for one in (model, reference):
            _to_fake(one)
        scales = list(add_scales(model, getattr(torch, load.dtype))) if way == "qlora" else []
        head = _fused_head(model, load.loop.fused_head)
        batch = _batch(load)
    trace = Trace(_vocabulary(model), 2 * load.pairs * (load.length - max(1, load.prompt)), load.shares)
    for owner in (model, *([] if reference is None else [reference])):
        for tensor in (*owner.parameters(), *owner.buffers(), *scales):
            trace.put(tensor, WEIGHTS)
    subspace = _subspace(model, way, load)
    base = make_optimizer(model.parameters(), load.loop)
    with fake:
        partition = Partition(model, load.zero, load.ranks, load.loop, trace) if load.zero else None
    for parameter in model.parameters():
        if parameter.requires_grad:
            kept = partition.take if partition else (lambda p: trace.put(_grad_of(p), GRADIENTS))
            parameter.register_post_accumulate_grad_hook(kept)
    stepped = partition.base if partition else base
    for group in stepped.param_groups:
        group["foreach"] = load.foreach
    run = _Run(model, reference, base, head, batch, load, trace, partition)
    update, optimizer = run.plain, None
    if subspace is not None and way == "published":
        update = partial(run.published, subspace)
    elif subspace is not None:
        options: dict[str, Any] = {"ascent": "grad"} if way == "sam" else {}
        options["perturbation"] = "delta" if way in ("delta", "reuse") else "in_place"
        optimizer = ShaPOOptimizer(base, model, subspace, rho=0.05, reuse_prefix=way == "reuse", **options)
        update = partial(run.shapo, optimizer)
    with fake, trace:
        _fill_states(stepped, trace)
        trace.begin()
        with torch.no_grad():
            run.forward()
        forward = trace.flops
        trace.begin()
        update()
    if optimizer is not None:
        optimizer.detach()
    weights = dict(model.named_parameters())
    return Update(
        way=way,
        in_passes=run.in_passes,
        in_step=trace.peak,
        largest=trace.largest,
        flops=trace.flops * load.micro_batches // run.micro_batches,
        forward_flops=forward * load.micro_batches,
        units=units_of(model),
        itemsize=next(iter(weights.values())).element_size(),
        direction=0 if subspace is None else _direction_bytes(weights, subspace, dense=way == "published"),
        targets=0 if subspace is None else len(subspace.names),
        lowest=lowest_block(model, subspace),
        micro_batches=load.micro_batches,
    )


@dataclass
class _Run:
    """The updates of `shapo.training.preference`, without what it logs."""

    model: Any
    reference: Any
    base: torch.optim.Optimizer
    head: FusedHead | None
    batch: dict[str, Tensor]
    load: Load
    trace: Trace
    partition: Partition | None
    in_passes: dict[str, float] = field(default_factory=dict)

    @property
    def micro_batches(self) -> int:
        """Those that are run: from the second on, one is like another."""
        return min(2, self.load.micro_batches)

    def loss(self, model: Any) -> Tensor:
        policy = self._logps(model)
        known = policy.chosen.detach() if self.reference is None else self._reference_logps()
        per_pair = losses.dpo(policy.chosen, policy.rejected, known, known, beta=0.1)
        return per_pair.mean() / self.load.micro_batches

    def forward(self) -> None:
        self._logps(self.model)

    def plain(self) -> None:
        self._backward()
        self._step(self.base)

    def shapo(self, optimizer: ShaPOOptimizer) -> None:
        with self.trace.part(PERTURBATION), ExitStack() as ending:
            ending.enter_context(optimizer.ascent())
            with self.trace.part(ACTIVATIONS):
                for _ in range(self.micro_batches):
                    loss = self.loss(self.model)
                    with self.trace.survivors(PERTURBATION):
                        optimizer.ascend(loss)
                        del loss
        with self.trace.part(PERTURBATION), ExitStack() as ending:
            ending.enter_context(optimizer.perturbed())
            with self.trace.part(ACTIVATIONS):
                self._backward()
        self._step(optimizer)

    def published(self, subspace: Subspace) -> None:
        weights = dict(self.model.named_parameters())
        with self.trace.part(PERTURBATION):
            masks = {name: torch.zeros_like(weights[name]) for name in subspace.names}
        self._backward()
        with self.trace.part(PERTURBATION), torch.no_grad():
            moved = {name: _grad_of(weights[name]) * mask for name, mask in masks.items()}
            for name, eps in moved.items():
                weights[name].add_(eps.mul_(1e-6))
        self.base.zero_grad()
        self._backward()
        with torch.no_grad():
            for name, eps in moved.items():
                weights[name].sub_(eps)
        self._step(self.base)

    def _backward(self) -> None:
        for _ in range(self.micro_batches):
            self.loss(self.model).backward()

    def _step(self, optimizer: Any) -> None:
        self.in_passes = self.trace.next_peak()
        with self.trace.part(STATES):
            if self.partition is not None:
                self.partition.step()
                return
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest_norm(self.load.loop.clip))
            optimizer.step()
            optimizer.zero_grad()

    def _logps(self, model: Any) -> PairLogps:
        return batch_logps(model, self.batch, bf16=self.load.loop.bf16, head=self.head)

    def _reference_logps(self) -> Tensor:
        with torch.no_grad():
            return self._logps(self.reference).chosen


def _build(config: Any, way: str, load: Load) -> Any:
    model = _plain_model(config, load)
    if load.attn:
        set_attention(model, load.attn)
    if way == "qlora":
        to_four_bits(model, getattr(torch, load.dtype))
    if way in ("lora", "qlora"):
        model = add_lora(model, load.lora, seed=0)
    if load.gradient_checkpointing:
        checkpoint_blocks(model)
    return model


def _plain_model(config: Any, load: Load) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, load.dtype)).eval()
    except Exception as error:  # each configuration class raises its own kinds
        raise UserError(f"no model can be built from this configuration: {first_line(error)}") from error


def _reference(config: Any, way: str, load: Load) -> Any:
    """The published code keeps the reference model beside the policy; other ways ask it once, before training."""
    return _plain_model(config, load).requires_grad_(False) if way == "published" else None


def _to_fake(model: nn.Module | None) -> None:
    """Tensors on the meta device -> fake ones of the processor, for which attention takes the way it does there."""
    made: dict[int, Any] = {}
    for module in () if model is None else model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    fake: Any = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, fake)
                if tensor is not None:
                    held[name] = made[id(tensor)][1]


def _fused_head(model: Any, choice: str) -> FusedHead | None:
    """As `find_fused_head`, which asks the model for numbers; a soft cap of the configuration is taken to be one."""
    if choice == "off":
        return None
    inner = unwrap(model, for_calls=True)
    reason = unusable(inner)
    if reason is None:
        return FusedHead(1.0, getattr(inner.config, "final_logit_softcapping", None))
    if choice == "on":
        raise UserError(f"the fused head cannot serve this model, because {reason}; choose auto or off")
    return None


def _vocabulary(model: Any) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.shape[0])


def _batch(load: Load) -> dict[str, Tensor]:
    shape = (2 * load.pairs, load.length)
    ids = torch.zeros(shape, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}


def _subspace(model: Any, way: str, load: Load) -> Subspace | None:
    if way in ("plain", "lora", "qlora"):
        return None
    if way == "sam":
        return Subspace.full(model)
    return random_subspace(model, load.percent, seed=0, depth=load.depth if way == "reuse" else 1.0)


def _fill_states(optimizer: torch.optim.Optimizer, trace: Trace) -> None:
    """One step with gradients of nothing, so that the update that is looked at finds the states of a running one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                trace.put(value, STATES)


def _grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _direction_bytes(weights: Mapping[str, Tensor], subspace: Subspace, *, dense: bool) -> int:
    """Bytes of the selected neurons' gradient as ranks agree on it, in float32; of the whole weights if `dense`."""
    elements = 0
    for name, index in subspace.items():
        weight = weights[name]
        neurons = weight.shape[subspace.axis(name)]
        elements += weight.numel() if dense else weight.numel() // neurons * len(index)
    return 4 * elements
