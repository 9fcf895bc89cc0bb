"""ShaPO in transformers' Trainer: one mixin, one argument. `python examples/hf_trainer.py`."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import shapo_kernels as sk
from shapo.integrations import ShaPOArguments, ShaPOTrainerMixin


class ShaPOTrainer(ShaPOTrainerMixin, Trainer):
    pass


torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
)
sizes = {name: p.shape[1] for name, p in model.named_parameters() if name.endswith("down_proj.weight")}
tokens = torch.randint(0, 64, (32, 16))
with tempfile.TemporaryDirectory() as folder:
    trainer = ShaPOTrainer(
        model,
        TrainingArguments(
            folder, max_steps=4, gradient_accumulation_steps=2, logging_steps=1, report_to=[], save_strategy="no"
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        shapo=ShaPOArguments(sk.Subspace.random(sizes, 5, seed=0), rho=0.1),
    )
    trainer.train()
