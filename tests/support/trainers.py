"""transformers' Trainer with the mixin and without, on a tiny model and rows in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import shapo_kernels as sk
from shapo.integrations import ShaPOTrainerMixin


class InOrder:
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class ShaPOTrainer(ShaPOTrainerMixin, InOrder, Trainer):
    pass


class PlainTrainer(InOrder, Trainer):
    pass


def neurons(model: torch.nn.Module) -> sk.Subspace:
    return sk.Subspace.random(
        {name: p.shape[1] for name, p in model.named_parameters() if "down_proj" in name}, 5, seed=0
    )


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def arguments(folder, **options: Any) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def sgd(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, None]:
    return torch.optim.SGD(model.parameters(), lr=0.1), None


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def of_trl(name: str, **attributes: Any) -> type:
    """A class that looks like one of trl's trainers."""
    return type(name, (), {"__module__": f"trl.trainer.{name.lower()}", **attributes})
