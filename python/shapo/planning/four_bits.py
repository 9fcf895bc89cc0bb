"""A model whose linear layers are held in 4 bits as `--qlora` holds them, without contents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shapo.errors import UserError
from shapo.libraries.bitsandbytes import keep_differentiable

# NF4 (arXiv:2305.14314): one scale in 8 bits for so many elements, and one in float32 for so many scales.
_BLOCK, _SCALES = 64, 256


def to_four_bits(model: Any, dtype: torch.dtype) -> None:
    """Gives every linear layer but the head two elements in a byte, on the meta device.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise UserError("a plan of qlora needs bitsandbytes: pip install bitsandbytes") from error
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            bias = layer.bias is not None
            packed: Any = Linear4bit(
                layer.in_features, layer.out_features, bias, dtype, quant_type="nf4", device="meta"
            )
            count = -(-layer.weight.numel() // 2)
            packed.weight = nn.Parameter(torch.empty(count, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
            packed.weight.compress_statistics, packed.weight.quant_type = True, "nf4"
            packed.requires_grad_(False)
            model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # PEFT asks
    keep_differentiable(model)


def add_scales(model: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
    """Gives every layer in 4 bits its scales, which are no parameters; yields them."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            blocks = -(-layer.in_features * layer.out_features // _BLOCK)
            scales = torch.empty(blocks, dtype=torch.uint8)
            outer, offset = torch.empty(-(-blocks // _SCALES)), torch.empty(())
            codes = torch.empty(16), torch.empty(256)
            second = QuantState(absmax=outer, code=codes[1], blocksize=_SCALES, dtype=torch.float32)
            weight: Any = layer.weight
            weight.quant_state = QuantState(
                absmax=scales,
                shape=torch.Size((layer.out_features, layer.in_features)),
                dtype=dtype,
                blocksize=_BLOCK,
                code=codes[0],
                quant_type="nf4",
                offset=offset,
                state2=second,
            )
            yield from (scales, outer, offset, *codes)
