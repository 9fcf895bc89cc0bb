"""What each rank of the fused head's tests does: its row of a batch through a sharded or replicated small Llama."""

import contextlib

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from shapo.integrations.fused_head import _answer
from shapo.models.fused_head import FusedHead, describe_head, find_fused_head
from shapo.models.wrappers import unwrap
from tests.support.llamas import llama
from tests.support.ranks import on_rank

TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.masked_fill(torch.tensor([[True] * 4 + [False] * 5, [False] * 9]), -100)


def make(tied=False):
    return llama(vocab_size=61, tie_word_embeddings=tied).double()


def wrap(model, case):
    if case["by"] == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable()
        model.train()
    for layer in model.model.layers:
        fully_shard(layer)
    if case.get("head") == "with the norm":  # as Accelerate does
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    if case.get("head") == "alone":
        fully_shard(model.lm_head)
    return fully_shard(model)


def sums_of(model, head, rows, case):
    if case.get("way") == "trl":
        output = model(input_ids=TOKENS[rows], labels=LABELS[rows], fused_lm_head=True)
        return output.log_probs.sum(1)
    return head.sequence_logps(model, LABELS[rows], input_ids=TOKENS[rows], use_cache=False)[0]


def counting(case):
    """CommDebugMode loses its way through the modules that checkpointing calls again."""
    return contextlib.nullcontext() if case.get("checkpointing") else CommDebugMode()


def gathers(mode):
    return (
        0
        if mode is None
        else sum(count for operator, count in mode.get_comm_counts().items() if "gather" in str(operator))
    )


def one_pass(case):
    """Two passes with a step of the weights between them: sums, gradients, gathers, and what asking left behind."""
    rank = torch.distributed.get_rank()
    model = wrap(make(case.get("tied", False)), case)
    if case.get("head") == "alone":
        return describe_head(model)
    head = find_fused_head(model, "on")
    assert head == FusedHead(1.0, None)
    if case.get("way") == "trl":
        _answer(unwrap(model, for_calls=True), head, required=True)
    left = [n for n, p in model.named_parameters() if isinstance(model, FSDPModule) and not isinstance(p, DTensor)]
    sums = []
    for _ in range(2):
        model.zero_grad()
        with counting(case) as forward:
            mine = sums_of(model, head, slice(rank, rank + 1), case)
        with counting(case) as backward:
            (-mine).mean().backward()
        sums.append(mine.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    whole = lambda x: (x.full_tensor() if isinstance(x, DTensor) else x).detach()  # noqa: E731
    weights = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
    return {"sums": sums, "weights": weights, "gathers": (gathers(forward), gathers(backward)), "left": left}


if __name__ == "__main__":
    on_rank(one_pass)
