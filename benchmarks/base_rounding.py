"""What 16-bit weights lose of training when steps fall below their spacing: the threshold of `shapo`'s warning.

    python -m benchmarks.base_rounding

A Llama of 0.6 million parameters, trained for 60 updates in fp32 and rounded to bfloat16, is fine-tuned on generated
answers for 100 more updates by AdamW (10 of warm-up) with weights in float32 and in bfloat16. `moved` is the share of
elements that an update changes (`shapo.training.rounding`), `kept` the decrease of the loss relative to float32's. No
timing; one seed.
"""

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shapo.data import synthetic
from shapo.data.tokens import Encoded, PairEncoder
from shapo.training.rounding import StepRounding

UPDATES, WARMUP, BATCH = 100, 10, 16
RATES = (5e-7, 5e-6, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)


def train(model: Any, encoder: PairEncoder, rows: list[Encoded], *, lr: float, updates: int) -> float:
    """Trains in place; the mean share of moved elements, 1 for fp32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / WARMUP))
    rounding = StepRounding(model.parameters(), scheduler, warmup=WARMUP, total=updates)
    generator = torch.Generator().manual_seed(1)
    shares: list[float] = []
    for _ in range(updates):
        batch = torch.randint(len(rows), (BATCH,), generator=generator).tolist()
        model(**encoder.collate([rows[index] for index in batch])).loss.float().backward()
        shares += rounding.step(optimizer).values()
        scheduler.step()
        optimizer.zero_grad()
    return sum(shares) / len(shares) if shares else 1.0


@torch.no_grad()
def loss(model: Any, encoder: PairEncoder, rows: list[Encoded]) -> float:
    """In fp32, whatever the weights are kept in."""
    exact = copy.deepcopy(model).float()
    parts = [encoder.collate(rows[start : start + 64]) for start in range(0, len(rows), 64)]
    return sum(exact(**part).loss.item() for part in parts) / len(parts)


def main() -> None:
    splits = synthetic.generate(0, sft=256, train=1, selection=1, test=1, test_unseen=1)
    examples = synthetic.sft_examples(splits["sft"], seed=0)
    tokenizer = synthetic.train_tokenizer((prompt + response for prompt, response in examples), 600)
    encoder = PairEncoder(tokenizer, max_length=128, max_prompt_length=64)
    rows = [encoder.encode(prompt, response) for prompt, response in examples]
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    start: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **size))
    train(start, encoder, rows, lr=1e-3, updates=60)
    start = start.bfloat16().float()
    at_start = loss(start, encoder, rows)
    print(f"{'lr':>8}  {'moved':>6}  {'decrease fp32':>13}  {'bf16':>7}  kept")
    for lr in RATES:
        exact, halved = copy.deepcopy(start), copy.deepcopy(start).bfloat16()
        train(exact, encoder, rows, lr=lr, updates=UPDATES)
        moved = train(halved, encoder, rows, lr=lr, updates=UPDATES)
        whole, part = (at_start - loss(model, encoder, rows) for model in (exact, halved))
        print(f"{lr:8.0e}  {moved:6.3f}  {whole:13.4f}  {part:7.4f}  {part / whole:.2f}")


if __name__ == "__main__":
    main()
