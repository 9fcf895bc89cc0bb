"""Runs code on tensors without contents, and counts the bytes that are alive and the operations.

The tensors are PyTorch's fake ones: they lie on the meta device, so no weight is loaded and nothing is computed. What
runs is the code of a real update, so memory follows from the lifetimes of its tensors and not from a formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from shapo_kernels.ops.linear_tiles import CHUNK_BYTES, HeadOptions, Tiles, cut

WEIGHTS, GRADIENTS, STATES, ACTIVATIONS = "weights", "gradients", "optimizer states", "activations"
HEAD, PERTURBATION = "logits and head", "perturbation"
PARTS = (WEIGHTS, GRADIENTS, STATES, ACTIVATIONS, HEAD, PERTURBATION)


class Trace(TorchDispatchMode):
    """Counts, inside `with`, the bytes of all storages that are alive, by part, and keeps the counts of the peak.

    Args:
        vocabulary: Size of a model's head: tensors with such a last dimension are logits.
        labelled: Number of tokens of a batch that have a label, where the fused head computes.
        shares: Of a part, how much one rank holds of what is traced: its bytes count so much. 1 where nothing is said.

    Attributes:
        flops: Floating-point operations of products and attention, 2 for a multiplication with its addition.
        peak: Bytes by part when most were alive since `begin` or `next_peak`.
        largest: The most bytes of each part since `begin`, not all at the same time.
    """

    def __init__(self, vocabulary: int = 0, labelled: int = 0, shares: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self._vocabulary, self._labelled = vocabulary, labelled
        self._shares = dict.fromkeys(PARTS, 1.0) | dict(shares or {})
        self._live: dict[int, tuple[Any, int, str]] = {}
        self._new_keys: set[int] = set()
        self._now = dict.fromkeys(PARTS, 0.0)
        self._part = ACTIVATIONS
        self._any: Tensor | None = None
        self.flops = 0
        self.peak, self.largest = dict(self._now), dict(self._now)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, new storages belong to a part."""
        earlier, self._part = self._part, name
        try:
            yield
        finally:
            self._part = earlier

    @contextmanager
    def survivors(self, part: str) -> Iterator[None]:
        """What is made inside and still alive on leaving, and is in no part of its own, belongs to a part."""
        self._new_keys = set()
        yield
        for key in self._new_keys & self._live.keys():
            reference, _, current = self._live[key]
            storage = reference()
            if current == ACTIVATIONS and storage is not None:
                self._forget(key)
                self._add(storage, part)

    def put(self, tensor: Tensor, part: str) -> None:
        """A tensor belongs to a part, whatever it was taken for before."""
        storage = tensor.untyped_storage()
        self._forget(id(storage))
        self._add(storage, part)

    def count(self, part: str) -> int:
        """Bytes of a part that are alive now, before any share of a rank."""
        return sum(size for _, size, own in self._live.values() if own == part)

    def begin(self) -> None:
        """The peak and the operations are asked for from here on."""
        self.peak, self.largest, self.flops = dict(self._now), dict(self._now), 0

    def next_peak(self) -> dict[str, float]:
        """The peak so far; the next one is asked for from here on."""
        peak, self.peak = self.peak, dict(self._now)
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What checks ask of values. All is well: everything is as it should be, and nothing is otherwise.
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0] is not self._any if args[0].dtype == torch.bool else 1
        name = func.name()
        if name == "shapo_kernels::linear_token_logps":
            with self.part(HEAD):
                return self._head_forward(*args)
        if name == "shapo_kernels::linear_token_logps_gradient":
            with self.part(HEAD):
                return self._head_backward(*args)
        if name == "bitsandbytes::gemm_4bit":
            inputs, _, shape, *_ = args
            self._see(inputs.new_empty(shape))  # unpacked, unless there are only a few rows
            self.flops += 2 * inputs.numel() * shape[0]
        out = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.any:
            self._any = out
        count: Callable[..., int] | None = _FLOPS.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._live:
            logits = self._part == ACTIVATIONS and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
            self._add(storage, HEAD if logits else self._part)
            if sum(self._now.values()) > sum(self.peak.values()):
                self.peak = dict(self._now)
        return tensor

    def _add(self, storage: Any, part: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._new_keys.add(key)
        self._live[key] = (weakref.ref(storage, lambda _: self._forget(key)), size, part)
        self._now[part] += size * self._shares[part]
        self.largest[part] = max(self.largest[part], self._now[part])

    def _forget(self, key: int) -> None:
        found = self._live.pop(key, None)
        if found is not None:
            _, size, part = found
            self._now[part] -= size * self._shares[part]

    # -- the fused head, whose sizes depend on the labels: what it holds, as `shapo_kernels.ops.linear_head` has it

    def _head_forward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        *flat, keep_hidden, keep_weight = options
        tiles = self._tiles(weight, HeadOptions(*flat), keeps=keep_weight)
        (rows, length, width), count, new = hidden.shape, self._labelled, self._new(hidden)
        logps, per_token = new((rows, length), tiles.sum), new((3, count), tiles.sum)
        directions = new((count if keep_hidden else 0, width), tiles.sum)
        buffer, spare = self._buffers(hidden, tiles)
        inputs = new((count, width), tiles.factor)
        cast = new((tiles.columns_of_tile if tiles.factor != weight.dtype else 0, width), tiles.factor)
        self.flops += (2 + 2 * keep_hidden) * count * width * tiles.columns
        del inputs, cast, buffer
        kept = spare if keep_weight else new((0,), tiles.factor)
        index, plan = new((count,), torch.int64), new((4,), torch.int64)
        return logps, new((0, rows, length), tiles.sum), index, per_token, directions, kept, plan

    def _head_backward(
        self, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        *saved_and_flat, wants_hidden, wants_weight, wants_bias = rest
        tiles = self._tiles(weight, HeadOptions(*saved_and_flat[5:]), keeps=True)
        width, count, new = hidden.shape[2], self._labelled, self._new(hidden)
        to_hidden = new(tuple(hidden.shape) if wants_hidden else (0,), hidden.dtype)
        to_weight = new(tuple(weight.shape) if wants_weight else (0,), weight.dtype)
        to_bias = new((len(weight) if wants_bias else 0,), weight.dtype)
        if wants_weight:
            again = 1 - tiles.rows_of_tile * tiles.columns_of_tile / max(1, count * tiles.columns)
            inputs = new((2, count, width), tiles.factor)
            buffers = self._buffers(hidden, tiles) if again > 0 else ()
            self.flops += int((2 + 2 * max(0.0, again)) * count * width * tiles.columns)
            del inputs, buffers
        return to_hidden, to_weight, to_bias

    def _tiles(self, weight: Tensor, head: HeadOptions, *, keeps: bool) -> Tiles:
        # A stand-in on the meta device: what is planned does not depend on this machine's memory and instructions.
        like = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        return cut(self._labelled, like, head._replace(chunk_bytes=head.chunk_bytes or CHUNK_BYTES), keeps=keeps)

    def _buffers(self, hidden: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        buffer = self._new(hidden)((tiles.rows_of_tile * tiles.columns_of_tile,), tiles.tile)
        same = tiles.factor == tiles.tile
        return buffer, buffer if same else self._new(hidden)(tuple(buffer.shape), tiles.factor)

    def _new(self, like: Tensor) -> Callable[[tuple[int, ...], torch.dtype], Tensor]:
        return lambda shape, dtype: self._see(like.new_empty(shape, dtype=dtype))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FLOPS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
