"""Adapters, attention, checkpointed blocks, accumulation and optimizers by name, through the commands."""

from __future__ import annotations

import copy

import pytest
import torch

from shapo.cli import main
from shapo.config import OPTIMIZERS, LoopConfig
from shapo.errors import UserError
from shapo.models.adapters import Lora, add_lora, digest_base, merged
from shapo.models.blocks import checkpoint_blocks, set_attention
from shapo.models.loading import load_model
from shapo.storage.fingerprint import digest_model
from shapo.training.metrics import read_metrics
from shapo.training.optimizers import make_optimizer
from shapo_kernels import Subspace
from tests.support.folders import write_training_folder

peft = pytest.importorskip("peft")
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory, _tiny_llama, tiny_tokenizer, synthetic_rows):
    folder = tmp_path_factory.mktemp("adapters")
    write_training_folder(folder, _tiny_llama, tiny_tokenizer, synthetic_rows["train"])
    Subspace({DOWN: [1, 2, 30]}).save(folder / "subspace.safetensors")
    return folder


@pytest.fixture
def shapo(files, tmp_path, monkeypatch, capsys):
    """Runs train or sft for three updates; gives exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    data = ["--model", files / "model", "--data", files / "train.jsonl", "--limit", 12, "--max-length", 96]
    short = ["--updates", 3, "--batch-size", 4, "--lr", "1e-2", "--warmup", 0, "--quiet"]

    def run(command: str, output: str, *more: object) -> tuple[int, str]:
        code = main([str(text) for text in [command, *data, *short, "--output", output, *more]])
        return code, capsys.readouterr().err

    return run


def test_a_rank_above_every_layers_is_refused(tiny_llama):
    with pytest.raises(UserError, match="r=99999999, but no layer of the model has a rank above 32"):
        add_lora(tiny_llama, Lora(r=99999999), seed=0)


def tokens() -> torch.Tensor:
    return torch.arange(3, 19).reshape(2, 8)


def test_an_adapter_at_the_start_changes_nothing_and_alone_is_trained(tiny_llama):
    with torch.no_grad():
        before = tiny_llama(input_ids=tokens()).logits
        adapted = add_lora(tiny_llama, Lora(r=2, targets=("q_proj", "v_proj")), seed=0)
        assert torch.equal(adapted(input_ids=tokens()).logits, before)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name for name in trained)


def test_a_merged_model_is_w_plus_scaled_b_a_and_the_base_comes_back_to_the_bit(tiny_llama):
    weight = tiny_llama.model.layers[0].mlp.down_proj.weight.detach().clone()
    adapted = add_lora(tiny_llama, Lora(r=2, alpha=6, targets=("down_proj",)), seed=0)
    layer = adapted.get_base_model().model.layers[0].mlp.down_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    wanted = weight + 6 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with merged(adapted) as (_, state):
        torch.testing.assert_close(state[DOWN], wanted)
        assert not any("lora" in name or "base_layer" in name for name in state)
    assert torch.equal(layer.get_base_layer().weight, weight)


def test_the_digest_of_the_base_is_that_of_the_model_without_the_adapter(tiny_llama):
    before = digest_model(tiny_llama)
    adapted = add_lora(tiny_llama, Lora(r=2), seed=0)
    assert digest_base(adapted) == before != digest_model(adapted)


@pytest.mark.parametrize("subspace", ["{files}/subspace.safetensors", "adapters"])
def test_shapo_trains_an_adapter_with_the_base_or_the_adapter_perturbed(subspace, shapo, files, tmp_path):
    shared = ["--lora", "r=2,targets=down_proj,q_proj", "--rho", "0.1", "--relative-rho"]
    more = [*shared, "--subspace", subspace.format(files=files), "--interval", 1]
    assert shapo("train", "apart", *more, "--adapter", "apart")[0] == 0
    assert shapo("train", "merged", *more)[0] == 0
    assert all(row["shapo"]["epsilon_norm"] > 0 for row in read_metrics("apart/metrics.jsonl", "update"))
    assert (tmp_path / "apart/model/adapter_config.json").is_file()
    assert not (tmp_path / "merged/model/adapter_config.json").exists()
    # The folder of the adapter is a model for every command, and the same one.
    apart, whole = load_model("apart/model"), load_model("merged/model")
    start = load_model(str(files / "model"))
    torch.testing.assert_close(dict(apart.named_parameters())[DOWN], dict(whole.named_parameters())[DOWN])
    changed = {n for n, w in whole.named_parameters() if not torch.equal(w, dict(start.named_parameters())[n])}
    assert changed == {n for n, _ in start.named_parameters() if n.endswith(("down_proj.weight", "q_proj.weight"))}


def test_a_run_with_an_adapter_resumes_to_the_bit_and_with_another_one_is_refused(shapo):
    lora = ["--lora", "r=2,dropout=0.1", "--dropout"]
    assert shapo("sft", "whole", *lora)[0] == 0
    assert shapo("sft", "parts", *lora, "--save-every", 2)[0] == 0
    assert shapo("sft", "parts", *lora, "--save-every", 2, "--resume")[0] == 0
    first, second = (load_model(f"{name}/model").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    code, error = shapo("sft", "parts", "--lora", "r=2,dropout=0.2", "--dropout", "--resume")
    assert code == 2
    assert "adapter.lora_dropout" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora", "rank=3"], "--lora does not know 'rank'; r=16"),
        (["--lora", "r=two"], "--lora is 'r=two'"),
        (["--lora", "r=0"], "r and alpha of at least 1"),
        (["--lora", "r=2,r=3"], "--lora has r twice"),
        (["--lora", "down_proj"], "--lora has 'down_proj'"),
        (["--lora", "targets=nowhere"], "cannot put LoRA onto the model"),
        (["--adapter", "apart"], "--adapter has no effect without --lora"),
        (["--attn", "nonsense"], "the attention nonsense cannot be used"),
        (["--attn", "flash_attention_2"], "the attention flash_attention_2 cannot be used"),
        (["--subspace", "adapters", "--rho", "1"], "--subspace adapters needs an adapter"),
        (["--optimizer", "bnb_adamw_8bit"], "the optimizer bnb_adamw_8bit needs a GPU, but the weights are on cpu"),
    ],
)
def test_an_impossible_recipe_gives_one_line(more, message, shapo, tmp_path):
    code, error = shapo("train", "out", *more)
    assert (code, error.count("shapo: error:")) == (2, 1)
    assert message in error
    assert not (tmp_path / "out/model").exists()


@pytest.mark.parametrize("perturbed", [False, True])
def test_checkpointed_blocks_give_the_same_model_and_keep_less(perturbed, shapo, files):
    more = ["--rho", 0.1, "--subspace", files / "subspace.safetensors"] if perturbed else []
    assert shapo("train", "kept", *more)[0] == 0
    assert shapo("train", "again", *more, "--gradient-checkpointing")[0] == 0
    first, second = (load_model(f"{name}/model").state_dict() for name in ("kept", "again"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_checkpointed_blocks_run_twice_in_evaluation_mode_too(tiny_llama):
    checkpoint_blocks(tiny_llama.eval())
    calls = []
    tiny_llama.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    tiny_llama(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert len(calls) == 2


def test_attention_is_the_one_that_was_asked_for(tiny_llama):
    eager, sdpa = copy.deepcopy(tiny_llama), tiny_llama
    set_attention(eager, "eager")
    set_attention(sdpa, "sdpa")
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    torch.testing.assert_close(eager(input_ids=tokens()).logits, sdpa(input_ids=tokens()).logits, rtol=1e-4, atol=1e-5)


def test_accumulation_is_a_number_of_micro_batches():
    assert LoopConfig(batch_size=10, accumulate=3).micro_batch_size == 4
    assert LoopConfig(batch_size=4, accumulate=9).micro_batch_size == 1
    with pytest.raises(UserError, match="say the same thing"):
        LoopConfig(batch_size=10, accumulate=3, micro_batch_size=2)
    with pytest.raises(UserError, match="at least 1"):
        LoopConfig(accumulate=0)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith(("bnb", "torchao"))])
def test_every_optimizer_of_torch_lowers_a_quadratic(name):
    weight = torch.nn.Parameter(torch.tensor([[3.0, -2.0], [1.0, 4.0]]))
    optimizer = make_optimizer([weight], LoopConfig(optimizer=name, lr=0.05))
    for _ in range(20):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.square().sum() < 29


def test_the_low_bit_optimizers_are_torchaos():
    library = pytest.importorskip("torchao.optim")
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    for name, kind in {"8bit": "AdamW8bit", "4bit": "AdamW4bit", "fp8": "AdamWFp8"}.items():
        optimizer = make_optimizer([weight], LoopConfig(optimizer=f"torchao_adamw_{name}", weight_decay=0.5))
        assert type(optimizer) is getattr(library, kind)
        assert optimizer.param_groups[0]["weight_decay"] == 0.5
