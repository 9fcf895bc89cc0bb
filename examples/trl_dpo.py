"""ShaPO in trl's DPOTrainer: `python examples/trl_dpo.py <model> <preferences.jsonl> <subspace.safetensors>`.

The model is a folder or a hub name; the rows have trl's columns prompt, chosen, rejected; the subspace comes from
`shapo select`.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import shapo_kernels as sk
from shapo.integrations import ShaPOArguments, ShaPOTrainerMixin


class ShaPODPOTrainer(ShaPOTrainerMixin, DPOTrainer):
    pass


if len(sys.argv) != 4:
    sys.exit(__doc__)
model, data, subspace = sys.argv[1:]
trainer = ShaPODPOTrainer(
    AutoModelForCausalLM.from_pretrained(model),
    args=DPOConfig(
        "runs/trl_dpo",
        max_steps=4,
        logging_steps=1,
        precompute_ref_log_probs=True,  # or the reference is asked once for each batch
        bf16=torch.cuda.is_available(),
        report_to=[],
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(model),
    shapo=ShaPOArguments(sk.Subspace.load(subspace), rho=0.05, relative=True),
)
trainer.train()
