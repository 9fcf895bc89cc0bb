"""A model and its optimizer as Accelerate prepares them: DDP, FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3, or one process.

Accelerate's configuration, or torchrun alone, says which; one process has nothing to prepare. The loops see no
difference: gradients are averaged over the ranks, `Engine.step` clips and steps, states and the finished model are
those of one process.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapo.config import LoopConfig
from shapo.errors import UserError
from shapo.libraries.accelerate import beneath, make_accelerator, wanted_engine, wanted_precision
from shapo.models.spread import allocated, replace_parameters, skeleton
from shapo.notes import note
from shapo.ranks import Ranks
from shapo.training.checkpoint import Stateful
from shapo.training.optimizers import largest_norm, make_optimizer, require_finite
from shapo.training.rounding import StepRounding
from shapo.training.sharding import partition_by_zero3, shard_by_fsdp2
from shapo_kernels.interop.deepspeed import EngineStep
from shapo_kernels.interop.quantised import is_quantised
from shapo_kernels.interop.torch_private import is_dtensor

# Their update of an element depends on that element alone, so a part of a weight is updated as the whole one is.
_ELEMENTWISE = ("adamw", "adam", "nadam", "radam", "rmsprop", "sgd", "adagrad")


class Engine:
    """The model and optimizer of one run.

    Attributes:
        ranks: The processes that share it.
        model: As it is called in training: wrapped or sharded where the launcher said so.
        base: What a `ShaPOOptimizer` is made around, with `model`.

    Args:
        model: The model on rank 0, whole; the others may have its `skeleton`. Values are rank 0's.
        config: The loop's; its optimizer is made over the parameters as they are trained, parts of them where the
            model is sharded.
        each: Examples of a micro-batch on a rank.

    Raises:
        UserError: An engine that the loop cannot use, or an optimizer that cannot step parts of weights.
    """

    def __init__(self, model: nn.Module, config: LoopConfig, each: int) -> None:
        self.ranks, self._clip = Ranks.here(), config.clip
        self.model: Any = model
        self.kind, self._skeleton = "one", None
        if self.ranks.count == 1:
            if wanted_engine():
                note(f"one process trains without {wanted_engine()}, whatever the Accelerate config says")
            self.base: Any = make_optimizer(model.parameters(), config)
            return
        dtype = next(model.parameters()).dtype
        self._accelerator = make_accelerator(
            micro_batch_size=each, clip=config.clip, bf16_weights=dtype == torch.bfloat16
        )
        self.kind = self._kind()
        if wanted_precision() != "no" and not config.bf16:
            note(f"mixed_precision: {wanted_precision()} of the Accelerate config is not used; --bf16 computes in bf16")
        if self.kind in ("fsdp2", "zero") and config.optimizer not in _ELEMENTWISE:
            raise UserError(
                f"{config.optimizer} cannot step a part of a weight, which is what a rank has under FSDP2 and ZeRO: "
                f"take one of {', '.join(_ELEMENTWISE)}, or DDP"
            )
        # What is sharded is gathered into it when it is saved.
        if self.kind == "fsdp2" or (self.kind == "zero" and self._stage == 3):
            self._skeleton = skeleton(model)
        if self.kind == "fsdp2":
            self.model = shard_by_fsdp2(self._accelerator, model)
            self.base = make_optimizer(self.model.parameters(), config)
            return
        if self._skeleton is not None:
            partition_by_zero3(self._accelerator, model)
        else:
            # DDP and DeepSpeed send rank 0's values when they wrap the model.
            device = self._accelerator.device
            replace_parameters(model, lambda weight: allocated(weight, device))
            model.to(device)
        self.model, prepared = self._accelerator.prepare(model, make_optimizer(model.parameters(), config))
        self.base = prepared if self.kind == "zero" else beneath(prepared)

    def _kind(self) -> str:
        accelerator = self._accelerator
        kind = accelerator.distributed_type.value
        if kind == "DEEPSPEED":
            self._stage = int(accelerator.state.deepspeed_plugin.zero_stage)
            if "optimizer" in accelerator.state.deepspeed_plugin.deepspeed_config:
                raise UserError("the DeepSpeed config has an optimizer, which --optimizer names; leave it out there")
            return "zero"
        if kind == "FSDP":
            if not accelerator.is_fsdp2:
                raise UserError("the Accelerate config asks for FSDP 1; set fsdp_version: 2")
            return "fsdp2"
        return "ddp"

    def plain(self) -> Any:
        """The optimizer of plain updates."""
        return EngineStep(self.model, self.base) if self.kind == "zero" else self.base

    @property
    def only(self) -> str | None:
        """What alone can go on with a checkpoint; None where one process, DDP and FSDP2 can, on any number of ranks."""
        return f"ZeRO-{self._stage} on {self.ranks.count} ranks" if self.kind == "zero" else None

    # -- an update

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around the passes of a micro-batch. Gradients are averaged over the ranks in the `last` one of an update.

        Under FSDP2 they are in each: whole gradients that wait for the last would take the memory of a whole model.
        """
        if self.kind == "zero":
            self.model.set_gradient_accumulation_boundary(is_boundary=last)
            return nullcontext()
        if last or self.kind != "ddp":
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self.model)
        return context

    def backward(self, loss: Tensor) -> None:
        """The backward pass of the descent."""
        if self.kind == "zero":
            self.model.backward(loss)
        else:
            loss.backward()

    def step(self, optimizer: Any, rounding: StepRounding) -> dict[str, float]:
        """Clips the gradients, steps and clears them. Returns `grad_norm`, and what `rounding` measured.

        Raises:
            UserError: The norm is not finite. Nothing was stepped then, but by DeepSpeed, which clips in its step.
        """
        if self.kind == "zero":
            moved = rounding.step(optimizer)
            norm: Any = torch.as_tensor(self.model.get_global_grad_norm())
            require_finite(norm)
        else:
            clip = nn.utils.clip_grad_norm_ if self.kind == "one" else self._accelerator.clip_grad_norm_
            norm = clip(self.model.parameters(), largest_norm(self._clip))
            norm = norm.full_tensor() if is_dtensor(norm) else norm
            require_finite(norm)
            moved = rounding.step(optimizer)
        optimizer.zero_grad()
        return {"grad_norm": float(norm), **moved}

    # -- what is saved

    def states(self, optimizer: Any) -> tuple[Stateful, Stateful]:
        """Model and optimizer with the states that one process has; asking for one is a collective."""
        if self.kind == "fsdp2":
            return _WholeModel(self.model, self.ranks), _WholeOptimizer(optimizer, self.ranks)
        if self.kind == "zero":
            return _Kept(None), _Kept(optimizer)
        whole = self._unwrapped()
        packed = any(is_quantised(parameter) for parameter in whole.parameters())
        return _Trained(whole) if packed else whole, optimizer

    def save_parts(self, folder: Path) -> None:
        """What each rank keeps by itself, under ZeRO alone (a collective); before the checkpoint is written."""
        if self.kind == "zero":
            self.ranks.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
            self.model.save_checkpoint(str(folder), tag="parts", save_latest=False)

    def load_parts(self, folder: Path) -> None:
        """Takes back what `save_parts` kept (a collective).

        Raises:
            UserError: It is not there.
        """
        if self.kind == "zero":
            if not (folder / "parts").is_dir():
                raise UserError(f"{folder} is missing, where DeepSpeed kept the states of the checkpoint's ranks")
            self.model.load_checkpoint(str(folder), tag="parts", load_lr_scheduler_states=False)

    def whole_model(self) -> Any:
        """The model as one process has it, to be saved by rank 0 (a collective)."""
        if self._skeleton is None:
            return self._unwrapped()
        weights = self._gathered_weights()
        if self.ranks.is_main:
            self._skeleton.load_state_dict(weights, strict=False, assign=True)
            getattr(self._skeleton, "tie_weights", lambda: None)()
        return self._skeleton

    def _unwrapped(self) -> Any:
        return self.model if self.kind in ("one", "fsdp2") else self.model.module

    def _gathered_weights(self) -> dict[str, Tensor]:
        if self.kind == "fsdp2":
            return _WholeModel(self.model, self.ranks).state_dict()
        import deepspeed  # type: ignore[import-untyped]

        weights = {}
        for name, parameter in self.model.module.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.ranks.is_main:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        return weights

    def broken_weight(self) -> str | None:
        """The name of a weight that is not finite, the same on every rank (a collective); None where all are."""
        own = (name for name, part in self._parts() if not part.isfinite().all())
        return next((name for name in self.ranks.gathered(next(own, None)) if name is not None), None)

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._unwrapped().named_parameters():
            part = parameter.to_local() if is_dtensor(parameter) else getattr(parameter, "ds_tensor", parameter)
            yield name, part.detach()


class _WholeModel:
    """A sharded model with the state of one process; rank 0 alone is given its tensors."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks

    def state_dict(self) -> dict[str, Any]:
        return _gathered(self._model.state_dict(), self._ranks)

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        own = self._model.state_dict()
        return self._model.load_state_dict({name: _like(value, own[name]) for name, value in state.items()})


class _WholeOptimizer:
    """An optimizer of sharded weights with the state of one process; rank 0 alone is given its tensors."""

    def __init__(self, optimizer: Any, ranks: Ranks) -> None:
        self._optimizer, self._ranks = optimizer, ranks

    def state_dict(self) -> dict[str, Any]:
        return _gathered(self._optimizer.state_dict(), self._ranks)

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        sharded = {
            number: {name: _like(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return self._optimizer.load_state_dict({**state, "state": sharded})


class _Trained:
    """Of a model over a base in 4 bits: what is trained. The base is loaded as it was, and takes no state back."""

    def __init__(self, model: Any) -> None:
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        return {name: weight.detach() for name, weight in self._weights.items()}

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        if state.keys() != self._weights.keys():
            raise RuntimeError(f"the checkpoint has {len(state)} trained weights and the model {len(self._weights)}")
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state[name])
        return None


class _Kept:
    """What of a ZeRO engine's states is not in its own files: the ShaPO optimizer's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        state = getattr(self._optimizer, "shapo_state_dict", None)
        return {} if state is None else {"shapo": state()}

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        if "shapo" in state:
            self._optimizer.load_shapo_state_dict(state["shapo"])
        return None


def _gathered(value: Any, ranks: Ranks) -> Any:
    """A state with whole tensors on the CPU in the place of sharded ones, on other ranks than 0 None (a collective)."""
    if isinstance(value, dict):
        return {name: _gathered(item, ranks) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_gathered(item, ranks) for item in value)
    if not is_dtensor(value):
        return value
    whole = value.full_tensor()
    return whole.cpu() if ranks.is_main else None


def _like(value: Any, sharded: Any) -> Any:
    """A whole tensor, sharded as another one of its shape is; anything else as it is."""
    if not is_dtensor(sharded) or not isinstance(value, Tensor) or value.shape != sharded.shape or not value.dim():
        return value
    from torch.distributed.tensor import distribute_tensor

    where = sharded.device_mesh
    # Every rank has read the whole tensor, so none is sent.
    return distribute_tensor(value.to(where.device_type), where, sharded.placements, src_data_rank=None)
