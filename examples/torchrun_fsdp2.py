"""FSDP2 with checkpoints that any number of ranks resume: `torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py`."""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import shapo_kernels as sk


class Training:
    """The model and its optimizer, as torch.distributed.checkpoint saves and loads them (its Stateful protocol)."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 9), nn.Tanh(), nn.Linear(9, 1)).double()
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(self.model)
        subspace = sk.Subspace({"2.weight": [3, 17, 32], "4.weight": [5]})
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.opt = sk.ShaPOOptimizer(base, self.model, subspace, rho=0.1, interval=2)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.opt)  # by names, so that ranks may come and go
        return {"model": model, "optimizer": optimizer, "shapo": self.opt.shapo_state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.opt.load_shapo_state_dict(state["shapo"])

    def update(self) -> float:
        generator = torch.Generator().manual_seed(self.opt.updates)  # the whole batch; each rank takes its part
        x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
        x = x.chunk(dist.get_world_size())[dist.get_rank()].to(next(self.model.parameters()).device)

        def loss() -> torch.Tensor:
            return (self.model(x) - x.sin().sum(-1, keepdim=True)).square().mean()

        if self.opt.due:
            with self.opt.ascent():
                self.opt.ascend(loss())
        with self.opt.perturbed():
            at_eps = loss()
            at_eps.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        self.opt.zero_grad()
        return at_eps.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
    training = Training()
    # A checkpoint is complete once its metadata are there: they are written last.
    done = [int(path.parent.name) for path in options.checkpoints.glob("*/.metadata")]
    if done:
        dcp.load({"training": training}, checkpoint_id=options.checkpoints / str(max(done)))
    while training.opt.updates < options.updates:
        value = training.update()
        if dist.get_rank() == 0:
            print(f"update {training.opt.updates}: {value:.4f}", flush=True)
        if training.opt.updates % options.save_every == 0:
            dcp.save({"training": training}, checkpoint_id=options.checkpoints / str(training.opt.updates))
    dist.barrier()  # a rank that leaves early would abort those that still write
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
