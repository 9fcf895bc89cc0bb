"""What each rank of the test of `shapo plan` does: an update of a small Llama under an engine, counted."""

import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import shapo_kernels as sk
from shapo.models.adapters import Lora, add_lora
from shapo.models.wrappers import unwrap
from shapo.scoring.logps import batch_logps
from shapo.selection import random_subspace
from shapo_kernels import losses
from tests.support.heap import peak_bytes
from tests.support.llamas import llama
from tests.support.rank_bytes import Collectives
from tests.support.ranks import on_rank

# DeepSpeed's own objects take 20 MB; and it compiles a function, which imports the compiler.
LATE_IMPORTS = ("deepspeed", "deepspeed.runtime.zero.muon.original_muon")
LENGTH, PROMPT = 48, 16
SHAPE = {"vocab_size": 640, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4}
#: Of which the weights are most of the memory.
LARGE = {**SHAPE, "hidden_size": 320, "intermediate_size": 1024}
# DeepSpeed's buckets hold 5e8 elements whatever the model; under ZeRO-3 small weights are kept, and so are those that
# are used again soon. For a model of half a million weights that is all of them.
ZERO = {
    "zero2": {"allgather_bucket_size": 100000, "reduce_bucket_size": 100000},
    "zero3": {
        "reduce_bucket_size": 100000,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    },
}


def shard(model):
    """As Accelerate shards a transformers model: block by block, the embedding, the last norm with the head."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = unwrap(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    for block in inner.model.layers:
        fully_shard(block, mesh=mesh)
    tail = [inner.model.norm, head]
    if head.weight is embedding.weight:
        tail = [inner.model.norm, embedding, head]
    else:
        fully_shard(embedding, mesh=mesh)
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    return model


def deepspeed_engine(model, case):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.simplefilter("ignore", FutureWarning)
    config = {
        "train_micro_batch_size_per_gpu": case["pairs"],
        "gradient_accumulation_steps": case.get("micro_batches", 1),
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(case["engine"][-1]), **ZERO[case["engine"]]},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    base = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=base, config=config)[0]


class Update:
    def __init__(self, case):
        self.case = case
        shape = LARGE if case.get("large") else SHAPE
        self.model = llama(**shape, tie_word_embeddings=case.get("tied", False)).eval()
        if case["way"] == "lora":
            self.model = add_lora(self.model, Lora(), seed=0)
        generator = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(0, 100, (2 * case["pairs"], LENGTH), generator=generator)
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        depth = {"delta": 1.0, "reuse": 0.5}.get(case["way"])
        subspace = None if depth is None else random_subspace(self.model, 5.0, seed=0, depth=depth)
        engine = case["engine"]
        if engine.startswith("zero"):
            self.model = deepspeed_engine(self.model, case)
            base = self.model.optimizer
        else:
            # As the loop has it.
            data_parallel = partial(DistributedDataParallel, broadcast_buffers=False)
            self.model = shard(self.model) if engine == "fsdp2" else data_parallel(self.model)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            base = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
        self.opt = base
        if subspace is not None:
            self.opt = sk.ShaPOOptimizer(base, self.model, subspace, rho=0.05, perturbation="delta",
                                         reuse_prefix=case["way"] == "reuse")  # fmt: skip

    def loss(self):
        policy = batch_logps(self.model, self.batch)
        known = policy.chosen.detach()
        return losses.dpo(policy.chosen, policy.rejected, known, known, beta=0.1).mean()

    def __call__(self):
        if isinstance(self.opt, sk.ShaPOOptimizer):
            with self.opt.ascent():
                self.opt.ascend(self.loss())
            with self.opt.perturbed():
                self._backward()
        else:
            self._backward()
        if self.case["engine"].startswith("zero"):
            self.model.step()
            return
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        self.opt.zero_grad()

    def _backward(self):
        times = self.case.get("micro_batches", 1)
        for _ in range(times):
            (self.model if self.case["engine"].startswith("zero") else self).backward(self.loss())

    def backward(self, loss):
        loss.backward()


def measured(case):
    if case.get("large"):
        return {"peak": peak_bytes(lambda: updates(case))}
    update = updates(case)
    with Collectives() as sent:
        update()
    return {"sent": sent.seen}


def updates(case):
    """A model under an engine from nothing, and the updates in which engines set themselves up: DDP takes two."""
    update = Update(case)
    for _ in range(2 if case["engine"] == "ddp" else 1 + bool(case.get("large"))):
        update()
    return update


if __name__ == "__main__":
    on_rank(measured)
