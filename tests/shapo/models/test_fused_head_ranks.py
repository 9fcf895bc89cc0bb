"""The fused head of a model that FSDP2 shards or DDP replicates: what one process has from the logits."""

import pytest
import torch

from shapo_kernels import losses

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

REFUSED = {"by": "fsdp2", "head": "alone"}
CASES = {
    "fsdp2": {"by": "fsdp2"},
    "fsdp2, a tied embedding": {"by": "fsdp2", "tied": True},
    "fsdp2, checkpointing": {"by": "fsdp2", "checkpointing": True},
    "fsdp2, asked by trl": {"by": "fsdp2", "way": "trl"},
    "fsdp2, sharded with the norm": {"by": "fsdp2", "head": "with the norm", "way": "trl"},
    "ddp": {"by": "ddp"},
    "ddp, asked by trl": {"by": "ddp", "way": "trl"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from tests.support.ranks import run_ranks

    cases = [*CASES.values(), REFUSED]
    found = run_ranks(tmp_path_factory.mktemp("ranks"), 2, cases, "rank_fused_head.py")
    return dict(zip([*CASES, "refused"], found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_log_probabilities_and_the_step_of_one_process(name, results):
    from tests.support.rank_fused_head import LABELS, TOKENS, make

    model = make(CASES[name].get("tied", False))
    for update in range(2):
        model.zero_grad()
        sums, _ = losses.sequence_logps(model(TOKENS).logits, LABELS)
        (-sums).mean().backward()
        found = torch.cat([result["sums"][update] for result in results[name]])
        torch.testing.assert_close(found, sums.detach(), rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    for result in results[name]:
        assert not result["left"]  # asking the model leaves it as sharded as it was
        for parameter, weight in model.named_parameters():
            torch.testing.assert_close(result["weights"][parameter], weight.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2, a tied embedding", "fsdp2, asked by trl"])
def test_the_head_is_gathered_once_for_both_passes(name, results):
    """Forward: the layers, and the outermost module with the head. Backward: the layers again, and nothing else."""
    for result in results[name]:
        assert result["gathers"] == (3, 2)


def test_a_head_that_is_gathered_for_its_own_call_only_is_no_fused_one(results):
    assert results["refused"] == ("FSDP2 shards its head by itself, and gathers it for a call of its own only",) * 2
