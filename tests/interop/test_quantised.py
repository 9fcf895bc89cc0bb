"""Layers whose weights are packed: perturbed beside them by delta, everything that needs the weight itself refused."""

import copy

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from tests.support.updates import update


class Packed4bit(nn.Module):
    """A linear layer as bitsandbytes': two 4-bit numbers in a byte, `[out * in / 2, 1]`, and a forward of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 7
        codes = (linear.weight.detach() / self.scale).round().clamp(-8, 7).add(8).to(torch.uint8).flatten()
        self.weight = nn.Parameter((codes[::2] << 4 | codes[1::2]).unsqueeze(1), requires_grad=False)
        self.bias = linear.bias

    def dequantised(self) -> torch.Tensor:
        codes = torch.stack([self.weight >> 4, self.weight & 15], dim=1).flatten().to(self.scale.dtype)
        return (codes - 8).mul(self.scale).view(self.out_features, self.in_features)

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


@pytest.fixture
def packed(toy):
    """A toy with packed down projections, and the same numbers in ordinary ones."""

    def make(dtype=torch.float64):
        plain = toy(dtype)
        model = copy.deepcopy(plain)
        for ordinary, layer in zip(plain.layers, model.layers, strict=True):
            layer.down_proj = Packed4bit(layer.down_proj)
            ordinary.down_proj.weight.data = layer.down_proj.dequantised().to(dtype)
            ordinary.down_proj.weight.requires_grad_(False)
        return model, plain

    return make


def wrap(model, subspace, **options):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return sk.ShaPOOptimizer(torch.optim.SGD(trainable, lr=0.1), model, subspace, rho=0.3, **options)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("perturbation", ["delta", "auto"])
def test_packed_layers_train_as_their_dequantised_twins(packed, batch, loss, perturbation, axis):
    model, plain = packed()
    subspace = sk.Subspace({f"layers.{i}.down_proj.weight": [1, 5, 7] for i in range(2)}, axis=axis)
    opt, other = wrap(model, subspace, perturbation=perturbation), wrap(plain, subspace)
    codes = [layer.down_proj.weight.clone() for layer in model.layers]
    for step in range(3):
        update(opt, model, batch(step), loss)
        update(other, plain, batch(step), loss)
        assert opt.stats["grad_norm"] == pytest.approx(other.stats["grad_norm"], rel=1e-6)
        assert opt.stats["epsilon_norm"] == pytest.approx(0.3, rel=1e-6)
        assert opt.stats["realised_cosine"] == pytest.approx(1.0, rel=1e-6)
    for a, b in zip(
        (p for p in model.parameters() if p.requires_grad),
        (p for p in plain.parameters() if p.requires_grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # directions of packed weights are float32
    assert all(torch.equal(layer.down_proj.weight, c) for layer, c in zip(model.layers, codes, strict=True))


def test_the_norm_of_packed_weights_is_unknown_and_says_so(packed, batch, loss, subspace):
    model, _ = packed(torch.float32)
    opt = wrap(model, subspace)
    update(opt, model, batch(dtype=torch.float32), loss)
    assert torch.tensor(opt.stats["weight_norm"]).isnan()
    assert torch.tensor(opt.stats["relative_radius"]).isnan()


@pytest.mark.parametrize("options", [{"perturbation": "in_place"}, {"ascent": "grad"}, {"relative": True}])
def test_what_needs_the_weight_itself_is_refused_when_the_optimizer_is_made(packed, subspace, options):
    model, _ = packed()
    with pytest.raises(sk.SubspaceError, match=r"'layers\.0\.down_proj\.weight' is quantised.*perturbation='delta'"):
        wrap(model, subspace, **options)
    assert not any(m._forward_hooks for m in model.modules())


def test_neurons_are_counted_by_the_layers_features_not_by_its_bytes(packed):
    model, _ = packed()
    with pytest.raises(sk.SubspaceError, match="has 24 neurons on axis 1"):
        wrap(model, sk.Subspace({"layers.0.down_proj.weight": [24]}))


def test_packed_weights_of_other_layers_are_refused(toy):
    model = toy()
    model.table = nn.Module()
    model.table.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(sk.SubspaceError, match=r"torch\.int8: only floating-point weights, and quantised ones"):
        wrap(model, sk.Subspace({"table.weight": [0]}))


@pytest.mark.filterwarnings("ignore")
def test_torchaos_int8_weights_train_as_their_dequantised_twins(toy, batch, loss, subspace):
    torchao = pytest.importorskip("torchao.quantization")
    model = toy(torch.float32)
    plain = copy.deepcopy(model)
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), lambda module, name: name.endswith("down_proj")
    )  # fmt: skip
    for ordinary, layer in zip(plain.layers, model.layers, strict=True):
        ordinary.down_proj.weight.data = layer.down_proj.weight.dequantize().float()
        for linear in (ordinary.down_proj, layer.down_proj):
            linear.weight.requires_grad_(False)
    assert type(model.layers[0].down_proj.weight) is not nn.Parameter
    opt, other = wrap(model, subspace), wrap(plain, subspace, perturbation="delta")
    for step in range(3):
        update(opt, model, batch(step, torch.float32), loss)
        update(other, plain, batch(step, torch.float32), loss)
    assert opt.stats["grad_norm"] == pytest.approx(other.stats["grad_norm"], rel=1e-3)
    torch.testing.assert_close(model.head.weight, plain.head.weight, rtol=1e-3, atol=1e-4)
    with pytest.raises(sk.SubspaceError, match="is quantised"):
        wrap(model, subspace, perturbation="in_place")
