"""A DPO update on a CPU with and without freed memory kept (`shapo.models.memory`): seconds and page faults.

    python -m benchmarks.kept_memory [--pairs 16] [--tokens 96] [--updates 3]

A Llama of SmolLM2-135M's shape with random weights, computing under bfloat16 autocast, AdamW. Each way has a process of
its own, since the setting cannot be taken back. Writes `benchmarks/results/kept_memory.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks import rows

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def updates(pairs: int, tokens: int, count: int) -> dict[str, Any]:
    """Seconds, page faults and the largest size of a process, after one update that is not counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from shapo.models.memory import keep_freed_memory
    from shapo_kernels import losses

    kept = keep_freed_memory()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, SHAPE["vocab_size"], (2 * pairs, tokens))
    seconds, faults = [], []
    for _ in range(count + 1):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        sums, _ = losses.sequence_logps(logits, ids)
        losses.dpo(sums[:pairs], sums[pairs:], sums[:pairs].detach(), sums[pairs:].detach(), beta=0.1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"kept": kept, "seconds": seconds[1:], "faults": faults[1:], "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--updates", type=int, default=3)
    arguments = parser.parse_args()
    case = f"DPO update of {arguments.pairs} pairs of {arguments.tokens} tokens, 135 M parameters, bfloat16"
    found = []
    for variant, returned in (("kept", "0"), ("handed back", "1")):
        code = (
            "from benchmarks.kept_memory import updates; import json; "
            f"print(json.dumps(updates({arguments.pairs}, {arguments.tokens}, {arguments.updates})))"
        )
        environment = {**os.environ, "SHAPO_RETURN_MEMORY": returned}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        result = json.loads(run.stdout.splitlines()[-1])
        if result["kept"] != (variant == "kept"):
            raise SystemExit("this C library does not let memory be kept; there is nothing to compare")
        more = {"faults": sorted(result["faults"])[len(result["faults"]) // 2], "peak_bytes": result["bytes"]}
        found.append(rows.row("kept_memory", case, variant, result["seconds"], **more))
        print(
            f"{variant}: {found[-1]['p50_ms'] / 1e3:.2f} s an update, {more['faults']} page faults, "
            f"{more['peak_bytes'] / 2**30:.2f} GiB at its largest",
            flush=True,
        )
    rows.write("kept_memory", found)


if __name__ == "__main__":
    main()
