"""Checks shared by operators and losses. They read metadata only and never wait for a device.

`check_*` raises. A wrong dtype is a TypeError; a wrong shape, device or value is a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..interop.torch_private import assert_on_device, is_fake
from ._memory import remembered

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_INT = 2**63 - 1


def compute_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor of `dtype` is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: expected a tensor")


def check_floating(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} is {tensor.dtype}: expected float32, bfloat16, float16 or float64")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is {tensor.layout}: expected a dense tensor (torch.strided)")


def check_all_floating(name: str, tensors: Sequence[Tensor]) -> None:
    for position, tensor in enumerate(tensors):
        # Names are put together where something is wrong: an update has hundreds of tensors.
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING or tensor.layout != torch.strided:
            check_floating(f"{name}[{position}]", tensor)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {other.device}: expected one device")


def check_all_on_one_device(name: str, tensors: Sequence[Tensor], other_name: str, others: Sequence[Tensor]) -> None:
    """All of `tensors` are on the device of the first of `others`."""
    device = others[0].device if tensors else None
    for position, tensor in enumerate(tensors):
        if tensor.device != device:
            check_device(f"{name}[{position}]", tensor, f"{other_name}[0]", others[0])


def check_lengths(lists: Mapping[str, Sequence[Any]]) -> None:
    lengths = {name: len(items) for name, items in lists.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"got {found}: expected as many of each")


def check_index(name: str, index: Tensor, neurons: int, *, distinct: bool = False) -> None:
    """int64 `[k]`; on the CPU, also in `[0, neurons)`, and with `distinct` each number once."""
    check_tensor(name, index)
    if index.dtype != torch.int64:
        raise TypeError(f"{name} is {index.dtype}: expected torch.int64")
    if index.dim() != 1:
        raise ValueError(f"{name} has shape {list(index.shape)}: expected [neurons]")
    readable = index.device.type == "cpu" and not is_fake(index) and not torch.compiler.is_compiling()
    if readable and index.numel():
        low, high, twice = remembered(index, "contents", lambda: _contents(index))
        if low < 0 or high >= neurons:
            raise IndexError(f"{name} holds {low if low < 0 else high}: expected neurons in [0, {neurons})")
        if distinct and twice:
            raise ValueError(f"{name} holds a neuron twice: pass each neuron once")


def _contents(index: Tensor) -> tuple[int, int, bool]:
    """Of an index on the CPU that is not empty: its smallest and largest number, and whether one comes twice."""
    numbers = index.tolist()
    return min(numbers), max(numbers), len(set(numbers)) < len(numbers)


def check_axis(name: str, axis: int) -> None:
    check_whole(name, axis)
    if axis not in (0, 1):
        raise ValueError(f"{name} is {axis!r}: expected 0 (neurons are rows) or 1 (columns)")


def check_written(name: str, tensor: Tensor) -> None:
    """A tensor that is written to holds each element once."""
    if may_overlap(tensor):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}, so that elements share "
            "memory: pass a copy (.contiguous())"
        )


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements of a tensor may share memory (expanded, unfolded, `as_strided`)."""
    if torch.compiler.is_compiling():  # which can sort no sizes that vary
        return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    if tensor.is_contiguous() or not tensor.numel():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def check_labels(labels: Tensor, name: str, inputs: Tensor) -> None:
    """Integers `[B, T]` beside `inputs`. Their values are checked by `check_label_values`."""
    check_tensor("labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels is {labels.dtype}: expected an integer tensor, usually int64")
    if labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"labels has shape {list(labels.shape)}: expected {list(inputs.shape[:2])}, one label for each of {name}"
        )
    check_device("labels", labels, name, inputs)


def check_label_values(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Each label is `ignore_index` or in `[0, vocabulary)`: raises on the CPU, else the device asserts it."""
    if labels.device.type == "meta":
        return
    allowed = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    expected = f"expected {ignore_index} (ignored) or a token in [0, {vocabulary})"
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        assert_on_device(allowed.all(), f"labels contains another value than {expected}")
    elif not allowed.all():
        raise ValueError(f"labels contains {labels[~allowed][0].item()}: {expected}")


def check_ignore_index(ignore_index: int) -> None:
    check_whole("ignore_index", ignore_index)
    if not -_MAX_INT <= ignore_index <= _MAX_INT:
        raise ValueError(f"ignore_index is {ignore_index}: expected a 64-bit integer, usually -100")


def check_switches(**switches: bool) -> None:
    """Each is True or False itself: a text such as "false" is true to `if`, and None or 0 may mean the default."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}: expected True or False")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")


def check_whole(name: str, value: int, *, least: int | None = None) -> None:
    """An int that is no bool, `least` or more; anything else is a ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        raise ValueError(
            f"{name} is {value!r}: expected a whole number" + ("" if least is None else f", {least} or more")
        )


def check_number(name: str, value: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a Python number")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: expected a finite number above 0")


def check_finite(name: str, value: float) -> None:
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: expected a finite number")


def check_not_negative(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}: expected a finite number, 0 or more")


def check_first_order(name: str, instead: str) -> None:
    """Called in a backward pass that autograd cannot differentiate: refuses `create_graph=True`.

    torch's `once_differentiable` raises only if the incoming gradient has a graph of its own. Otherwise terms of the
    second derivative would be missing without an error. Compiled backward passes refuse second derivatives themselves.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} can be differentiated once, so not with create_graph=True: {instead}")
