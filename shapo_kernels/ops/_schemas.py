"""Every operator: its schema, and its fake, which gives torch.compile the shapes and dtypes of the results.

What an operator computes is documented at its public function in this folder. Lists hold one entry for each layer, so
that an update is one call whatever the number of layers.

Three libraries register implementations under these schemas: `shapo_kernels` holds the compiled operators, whose
schemas `csrc/register.cpp` repeats (a test compares the two), and the head's, written in Python. `shapo_triton`
holds Triton's. The reference is plain functions with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ._checks import compute_dtype_of
from .linear_tiles import HeadOptions, capacity, dtypes


class Operator(NamedTuple):
    name: str
    signature: str
    fake: Callable[..., Any]

    @property
    def compiled(self) -> bool:
        """Whether a C++ library implements it. The head's are Python."""
        return not self.name.startswith("linear_")


OPERATORS: dict[str, Operator] = {}


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    name, parenthesis, rest = schema.partition("(")

    def note(fake: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS[name] = Operator(name, parenthesis + rest, fake)
        return fake

    return note


# -- the subspace update


@_operator(
    "gather_into(Tensor[] sources, Tensor[] indices, int[] axes, Tensor(a!)[] values, Tensor(b!) squared_norms) -> ()"
)
def _(sources: list[Tensor], indices: list[Tensor], axes: list[int], values: list[Tensor], squares: Tensor) -> None:
    return None


@_operator("squared_norms(Tensor[] values) -> Tensor")
def _(values: list[Tensor]) -> Tensor:
    return values[0].new_empty(len(values), dtype=torch.float64)


@_operator("selected_squared_norms(Tensor[] sources, Tensor[] indices, int[] axes) -> Tensor")
def _(sources: list[Tensor], indices: list[Tensor], axes: list[int]) -> Tensor:
    return sources[0].new_empty(len(sources), dtype=torch.float64)


@_operator(
    "perturbation_scale(Tensor squared_norms, Tensor rho, Tensor? weight_squared_norms, str norm, float eta) -> Tensor"
)
def _(squared_norms: Tensor, rho: Tensor, weight_squared_norms: Tensor | None, norm: str, eta: float) -> Tensor:
    return torch.empty_like(squared_norms)


@_operator(
    "perturb_(Tensor(a!)[] weights, Tensor[] indices, int[] axes, Tensor[] directions, Tensor scale, "
    "Tensor(b!)[] backups, ScalarType? compute_dtype) -> Tensor"
)
def _(weights: list[Tensor], indices: Any, axes: Any, directions: Any, scale: Tensor, *_: Any) -> Tensor:
    return scale.new_empty(len(weights), 3)


@_operator("restore_(Tensor(a!)[] weights, Tensor[] indices, int[] axes, Tensor[] backups) -> ()")
def _(weights: list[Tensor], indices: list[Tensor], axes: list[int], backups: list[Tensor]) -> None:
    return None


# -- the cosine


@_operator("column_cosine(Tensor weight, Tensor direction, int axis) -> Tensor")
def _(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    return weight.new_empty(weight.shape[axis], dtype=compute_dtype_of(weight.dtype))


# -- log-probabilities from logits


@_operator(
    "token_logps(Tensor logits, Tensor labels, int ignore_index, int shift, int first, int vocabulary, bool entropy) "
    "-> (Tensor, Tensor, Tensor)"
)
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, shift: int, first: int, vocabulary: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, _ = logits.shape
    dtype = compute_dtype_of(logits.dtype)
    return (
        logits.new_empty(rows, length, dtype=dtype),
        logits.new_empty(2, rows, length, dtype=dtype),
        logits.new_empty(rows if entropy else 0, length, dtype=dtype),
    )


@_operator(
    "token_logps_gradient(Tensor logits, Tensor labels, Tensor logps, Tensor normalizers, Tensor grad, "
    "int ignore_index, int shift, int first) -> Tensor"
)
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


@_operator(
    "token_logps_gradient_(Tensor(a!) logits, Tensor labels, Tensor logps, Tensor normalizers, Tensor grad, "
    "int ignore_index, int shift, int first) -> ()"
)
def _(logits: Tensor, *_: Any) -> None:
    return None


# -- log-probabilities from hidden states. The options are linear_tiles.HeadOptions, in its order.

_HEAD = (
    "int ignore_index, int shift, ScalarType dtype, float scale, float? softcap, SymInt? chunk_bytes, str? group, "
    "bool statistics, bool padded"
)


@_operator(
    f"linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, {_HEAD}, bool keep_hidden, "
    "bool keep_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *flat, keep_hidden, keep_weight = options
    head = HeadOptions(*flat)
    rows, length, width = hidden.shape
    room = rows * length if head.padded else torch.library.get_ctx().new_dynamic_size()
    factor, _, sums = dtypes(weight.device, head.dtype)
    new = hidden.new_empty
    return (
        new((rows, length), dtype=sums),
        new((3 if head.statistics else 0, rows, length), dtype=sums),
        labels.new_empty(room, dtype=torch.int64),
        new((3, room), dtype=sums),
        new((room if keep_hidden else 0, width), dtype=sums),
        new(capacity(room, weight, head) if keep_weight else 0, dtype=factor),
        torch.empty(4, dtype=torch.int64, device="cpu"),
    )


@_operator(
    "linear_token_logps_gradient(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor index, "
    f"Tensor per_token, Tensor directions, Tensor slopes, Tensor plan, {_HEAD}, bool wants_hidden, bool wants_weight, "
    "bool wants_bias) -> (Tensor, Tensor, Tensor)"
)
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, wants_hidden, wants_weight, wants_bias = others
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        weight.new_empty(len(weight) if wants_bias else 0),
    )


native.load()
if native.has_cpu or native.has_cuda:
    for _each in OPERATORS.values():
        if _each.compiled:
            torch.library.register_fake(f"shapo_kernels::{_each.name}", _each.fake)
