"""transformers' own tensor-parallel plans: in place, from the grad ascent; the selective one is refused."""

import pytest
import torch

from tests.support.ranks import run_ranks


@pytest.mark.slow
def test_a_planned_llama_equals_one_process_in_place_and_refuses_what_it_cannot_see(tmp_path):
    pytest.importorskip("transformers", minversion="5.0")
    from transformers import LlamaForCausalLM

    from tests.support.llamas import llama
    from tests.support.rank_transformers import update

    llama(hidden_size=32, intermediate_size=96, pad_token_id=0).double().save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    update(model)
    (results,) = run_ranks(tmp_path, 2, [{"model": str(tmp_path / "model")}], "rank_transformers.py")
    for result in results:
        assert "ascent='grad' with perturbation='in_place'" in result["refusal"]
        for name, weight in model.named_parameters():
            torch.testing.assert_close(result["weights"][name], weight.detach(), rtol=1e-10, atol=1e-12)
