"""Products of 16-bit factors into wider sums, whatever this release of PyTorch can add to them."""

import pytest
import torch

from shapo_kernels.ops import products


@pytest.fixture(autouse=True)
def asked_anew():
    products._adds_to_wider.cache_clear()
    yield
    products._adds_to_wider.cache_clear()


def integers(*shape):
    """Small, so that products and sums are exact in every dtype."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_added_to_a_float32_sum(dtype):
    total, a, b = integers(5, 7), integers(5, 4), integers(4, 7)
    expected = total + a @ b
    products.add_product_(total, a.to(dtype), b.to(dtype))
    assert torch.equal(total, expected)


def test_a_pytorch_that_adds_16_bit_factors_to_float32_is_asked_to_do_so(monkeypatch):
    calls = []

    def addmm(total, a, b, *, out_dtype, out):
        calls.append(a.shape)
        assert out is total
        assert out_dtype == torch.float32
        return out.add_(a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    total, a, b = integers(5, 7), integers(5, 4), integers(4, 7)
    expected = total + a @ b
    products.add_product_(total, a.bfloat16(), b.bfloat16())
    assert torch.equal(total, expected)
    assert calls == [(16, 16), (5, 4)]


def test_a_pytorch_that_wants_one_dtype_gets_a_product_and_a_sum(monkeypatch):
    def addmm(total, a, b, *, out_dtype, out):
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    monkeypatch.setattr(torch, "addmm", addmm)
    total, a, b = integers(5, 7), integers(5, 4), integers(4, 7)
    expected = total + a @ b
    products.add_product_(total, a.bfloat16(), b.bfloat16())
    assert torch.equal(total, expected)
