"""What each rank of the tests of checkpoints does: the example's own training, from a checkpoint on."""

import copy
import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from tests.support.ranks import on_rank

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from torchrun_fsdp2 import Training


def whole(training):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = get_state_dict(training.model, training.opt, options=options)
    # On a single rank there is nothing to gather, and what is given is the parameters themselves.
    return copy.deepcopy({"model": model, "optimizer": optimizer, "shapo": training.opt.shapo_state_dict()})


def resumed(case):
    """What was loaded, and what it has become after the last update."""
    training = Training()
    dcp.load({"training": training}, checkpoint_id=case["checkpoint"])
    found = [whole(training)]
    while training.opt.updates < case["updates"]:
        training.update()
    return [*found, whole(training)]


if __name__ == "__main__":
    on_rank(resumed)
