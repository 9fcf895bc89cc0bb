"""Subspace: which neurons of which weights are perturbed. It holds indices, no weights and no model."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SubspaceError
from .interop.names import aliases, module_aliases, owners, parameter_aliases, parameters_by_name
from .interop.quantised import acting_shape, is_quantised
from .ops._checks import check_number, check_switches, check_whole

FORMAT = "shapo-subspace"


class Subspace(Mapping[str, Tensor]):
    """A set of neurons: parameter name -> sorted int64 indices along that parameter's neuron axis.

    A mapping: `len(s)` counts weights, `s[name]` is an index tensor `[neurons]` on the CPU, `s.count` counts
    neurons. A weight without a selected neuron is left out.

    `Subspace.top` selects by scores, `random` and `random_like` make controls of the same size, `full` selects
    every parameter. `save` and `load` use safetensors. See ShaPO (arXiv:2602.07340) for what the neurons are.

    Args:
        indices: name of a weight in the unwrapped model -> indices of its selected neurons (tensor or sequence of
            ints).
        axis: the axis that neurons lie on: 1 for the columns of an `nn.Linear` down-projection `[hidden,
            intermediate]`, 0 for the rows of a `Conv1D` weight `[intermediate, hidden]`; or a mapping name -> 0 |
            1.
        metadata: strings to keep beside the indices, saved with them; not compared by `==`.
        own_layer: names whose weight is perturbed in the layer of that name only, where it is tied to others.

    Raises:
        SubspaceError: an index that is negative, repeated or not an integer; an axis other than 0 or 1; metadata other
            than strings.
    """

    def __init__(
        self,
        indices: Mapping[str, Any],
        axis: int | Mapping[str, int] = 1,
        *,
        metadata: Mapping[str, str] | None = None,
        own_layer: Collection[str] = (),
    ) -> None:
        checked = {name: _sorted_indices(name, values) for name, values in indices.items()}
        self._indices = {name: index for name, index in checked.items() if index.numel()}
        self._axes = {name: _axis_of(axis, name) for name in self._indices}
        if isinstance(axis, Mapping) and (extra := set(axis) - set(indices)):
            raise SubspaceError(f"axis names {sorted(extra)[0]!r}, which has no indices: name selected weights only")
        self.metadata: dict[str, str] = dict(metadata or {})
        _check_metadata(self.metadata)
        if unknown := set(own_layer) - set(indices):
            raise SubspaceError(f"own_layer names {sorted(unknown)[0]!r}, which has no indices")
        self._own_layer = frozenset(own_layer) & set(self._indices)

    # -- what it holds

    def __getitem__(self, name: str) -> Tensor:
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Subspace):
            return NotImplemented
        same_use = self._axes == other._axes and self._own_layer == other._own_layer
        return same_use and all(torch.equal(index, other[name]) for name, index in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Subspace({self.count} neurons of {len(self)} weights)"

    @property
    def names(self) -> tuple[str, ...]:
        """The weights, in the order they were given."""
        return tuple(self._indices)

    @property
    def count(self) -> int:
        """The number of selected neurons over all weights."""
        return sum(index.numel() for index in self._indices.values())

    def axis(self, name: str) -> int:
        """The neuron axis of a weight."""
        return self._axes[name]

    def own_layer(self, name: str) -> bool:
        """Whether the weight is perturbed in the layer of that name only, and not where it is tied to others."""
        return name in self._own_layer

    # -- how it is made

    @classmethod
    def top(
        cls,
        scores: Mapping[str, Tensor],
        percent: float,
        *,
        largest: bool = False,
        axis: int | Mapping[str, int] = 1,
    ) -> Subspace:
        """The neurons with the lowest (or largest) scores, a percentage of all names together.

        Args:
            scores: name -> `[neurons]`, one score for each neuron. For a probe: cosine with the unsafe direction, the
                lowest of which are the critical neurons. Ties go to the earlier name, then the lower index.
            percent: 0 < percent <= 100; the count is rounded to the nearest neuron, at least one.
            largest: take the largest scores instead.

        Raises:
            SubspaceError: no scores, a NaN among them, a percentage out of range.
        """
        check_switches(largest=largest)
        names = list(scores)
        flat = [scores[name].detach().cpu().double().flatten() for name in names]
        for name, values in zip(names, flat, strict=True):
            if values.isnan().any():
                raise SubspaceError(
                    f"the scores of {name!r} contain NaN: check the weights and the direction they came from"
                )
        sizes = {name: values.numel() for name, values in zip(names, flat, strict=True)}
        count = _share(sum(sizes.values()), percent)
        order = torch.sort(torch.cat(flat), descending=largest, stable=True).indices[:count]
        return cls(_split(order, sizes), _restrict(axis, names))

    @classmethod
    def random(
        cls,
        sizes: Mapping[str, int],
        percent: float,
        *,
        seed: int,
        axis: int | Mapping[str, int] = 1,
        match: str = "total",
    ) -> Subspace:
        """The same number of neurons drawn at random, without replacement.

        Args:
            sizes: name -> number of neurons.
            percent: 0 < percent <= 100, of all names together.
            seed: of the draw.
            match: "total" draws over all neurons together; "layer" takes the same share of each name (what rounding
                leaves over goes to the names with the largest remainders, so that the total is the same).

        Raises:
            SubspaceError: no neurons, a percentage out of range, another `match`.
        """
        if match not in ("total", "layer"):
            raise SubspaceError(f"match is {match!r}: expected 'total' or 'layer'")
        check_whole("seed", seed)
        total = sum(sizes.values())
        count = _share(total, percent)
        generator = torch.Generator().manual_seed(seed)
        if match == "total":
            return cls(_split(torch.randperm(total, generator=generator)[:count], sizes), _restrict(axis, list(sizes)))
        counts = _apportion(sizes, count)
        return cls(_draw(sizes, counts, generator), _restrict(axis, list(sizes)))

    @classmethod
    def random_like(cls, subspace: Subspace, sizes: Mapping[str, int], *, seed: int) -> Subspace:
        """As many neurons of each weight as `subspace` has, drawn at random: the layer-matched control.

        Raises:
            SubspaceError: a name of the subspace that `sizes` lacks, or has fewer neurons for.
        """
        for name, index in subspace.items():
            if name not in sizes:
                raise SubspaceError(f"sizes has no {name!r}, which the subspace selects from")
            if sizes[name] < index.numel():
                raise SubspaceError(
                    f"{name!r} has {sizes[name]} neurons, but the subspace selects {index.numel()} of it: "
                    "is it for another model?"
                )
        check_whole("seed", seed)
        counts = {name: index.numel() for name, index in subspace.items()}
        generator = torch.Generator().manual_seed(seed)
        return cls(_draw({name: sizes[name] for name in subspace}, counts, generator), dict(subspace._axes))

    @classmethod
    def full(cls, model: nn.Module) -> Subspace:
        """Every floating-point parameter, whole: the uniform control, ordinary SAM. Tied parameters are named once."""
        names = parameters_by_name(model)
        seen: set[int] = set()
        indices = {}
        for name, parameter in names.items():
            _check_initialised(name, parameter)
            if parameter.is_floating_point() and parameter.numel() and id(parameter) not in seen:
                seen.add(id(parameter))
                indices[name] = torch.arange(parameter.shape[0] if parameter.dim() else 1)
        return cls(indices, axis=0, metadata={"method": "full"})

    @classmethod
    def head(cls, model: nn.Module, name: str | None = None) -> Subspace:
        """The whole output projection, where it gives the logits: a tied embedding is not moved.

        SAM on the output layer alone (logits-SAM, arXiv:2603.18258). With `reuse_prefix=True` an update computes
        every block once.

        Args:
            model: transformers' models say which layer it is (`get_output_embeddings`).
            name: of the layer, in other models.

        Raises:
            SubspaceError: no such layer.
        """
        modules = module_aliases(model)
        if name is not None and name not in modules:
            raise SubspaceError(f"the model has no layer {name!r}")
        head = modules[name] if name is not None else _output_embeddings(model)
        own = name or next((n for n, module in modules.items() if module is head), None)
        weight = getattr(head, "weight", None)
        if own is None or head is None or not isinstance(weight, Tensor):
            raise SubspaceError(
                "the model names no output projection with a weight: give its layer, Subspace.head(model, 'head')"
            )
        rows = (acting_shape(weight, [(head, "weight")]) or tuple(weight.shape))[0]
        unwrapped = aliases(f"{own}.weight")[-1]
        return cls({unwrapped: torch.arange(rows)}, axis=0, metadata={"method": "head"}, own_layer=[unwrapped])

    # -- how it is kept

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the indices as int64 tensors, axes and metadata in its header. Atomic.

        Raises:
            SubspaceError: metadata other than strings, which could not be loaded.
        """
        from safetensors.torch import save_file  # here, so that the kernels need torch alone

        path = Path(path)
        _check_metadata(self.metadata)
        header = {
            "format": FORMAT,
            "version": "1",
            "axis": json.dumps(self._axes),
            "order": json.dumps(list(self._indices)),
            "own_layer": json.dumps(sorted(self._own_layer)),
            "metadata": json.dumps(self.metadata),
        }
        # Beside its target, so that the rename stays on one file system and a full disk leaves an older file as it was.
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            save_file(dict(self._indices), temporary, metadata=header)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Subspace:
        """Read what :meth:`save` wrote.

        Raises:
            SubspaceError: the file is missing, is not safetensors, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise SubspaceError(f"cannot read a subspace from {os.fspath(path)!r}: {error}") from error
        if header.get("format") != FORMAT:
            raise SubspaceError(
                f"{os.fspath(path)!r} is a safetensors file, but no subspace: write one with Subspace.save"
            )
        try:
            axes, order = json.loads(header["axis"]), json.loads(header["order"])
            metadata, own_layer = json.loads(header["metadata"]), json.loads(header.get("own_layer", "[]"))
            if not all(isinstance(text, str) for text in (*order, *own_layer, *metadata, *metadata.values())):
                raise ValueError("names and metadata are not all text")
            return cls({name: tensors[name] for name in order}, axes, metadata=metadata, own_layer=own_layer)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise SubspaceError(f"{os.fspath(path)!r} is a damaged subspace file: {error}") from error

    # -- how it meets a model

    def validate(self, model: nn.Module) -> None:
        """Check that every name, axis and index fits the model.

        Raises:
            SubspaceError: one line naming the first thing that does not fit.
        """
        self.resolve(model)

    def resolve(
        self, model: nn.Module, *, shape_of: Callable[[Tensor], tuple[int, ...]] | None = None
    ) -> dict[str, nn.Parameter]:
        """Each selected weight's parameter in `model`, wrapped or not.

        Args:
            shape_of: the shape of the whole weight where a parameter's own may be that of a part of it.

        Raises:
            SubspaceError: as :meth:`validate`.
        """
        parameters = parameter_aliases(model)
        owner_of = owners(model)
        resolved = {}
        for name, index in self.items():
            parameter = parameters.get(name)
            if parameter is None:
                close = difflib.get_close_matches(name, parameters, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise SubspaceError(f"the model has no parameter {name!r}{hint}")
            _check_initialised(name, parameter)
            shape = acting_shape(parameter, owner_of[id(parameter)])
            if shape is None:
                raise SubspaceError(
                    f"{name!r} is a {type(parameter).__name__} of {parameter.dtype}: only floating-point weights, and "
                    "quantised ones of linear layers, have neurons to perturb"
                )
            if shape_of is not None and not is_quantised(parameter):
                shape = shape_of(parameter)
            self._check_range(name, index, shape or (1,))
            resolved[name] = parameter
        return resolved

    def _check_range(self, name: str, index: Tensor, shape: tuple[int, ...]) -> None:
        axis = self._axes[name]
        if axis >= len(shape) or (axis == 1 and len(shape) > 2):
            raise SubspaceError(f"{name!r} has shape {list(shape)}: its neurons cannot lie on axis {axis}")
        if (largest := int(index[-1])) >= shape[axis]:
            raise SubspaceError(
                f"{name!r} has {shape[axis]} neurons on axis {axis} of {list(shape)}, "
                f"but the subspace selects neuron {largest}: is it for another model, or is the axis the other one?"
            )


def _check_metadata(metadata: Mapping[Any, Any]) -> None:
    for entry in itertools.chain(metadata, metadata.values()):
        if not isinstance(entry, str):
            raise SubspaceError(f"metadata has {entry!r}, a {type(entry).__name__}: expected strings")


def _check_initialised(name: str, parameter: Tensor) -> None:
    if nn.parameter.is_lazy(parameter):
        raise SubspaceError(f"{name!r} has no shape yet: run a forward pass through its lazy layer first")


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        asked = getattr(type(module), "get_output_embeddings", None)
        if asked is not None and isinstance(found := asked(module), nn.Module):
            return found
    return None


def _sorted_indices(name: str, values: Any) -> Tensor:
    index = torch.as_tensor(values, device="cpu") if not (isinstance(values, (list, tuple)) and not values) else None
    if index is None:
        return torch.empty(0, dtype=torch.int64)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise SubspaceError(f"the indices of {name!r} are {index.dtype}: expected integers")
    if index.dim() != 1:
        raise SubspaceError(f"the indices of {name!r} have shape {list(index.shape)}: expected one dimension")
    index = index.to(torch.int64).sort().values
    if index.numel() and index[0] < 0:
        raise SubspaceError(f"the indices of {name!r} contain {int(index[0])}: expected neurons counted from 0")
    if (index[1:] == index[:-1]).any():
        twice = int(index[1:][index[1:] == index[:-1]][0])
        raise SubspaceError(f"the indices of {name!r} contain {twice} twice: a neuron is perturbed once")
    return index.clone().contiguous()


def _axis_of(axis: int | Mapping[str, int], name: str) -> int:
    if isinstance(axis, Mapping):
        if name not in axis:
            raise SubspaceError(f"axis names no {name!r}: give one for each weight, or one number for all")
        axis = axis[name]
    if not isinstance(axis, Integral) or isinstance(axis, bool) or axis not in (0, 1):
        raise SubspaceError(f"axis is {axis!r}: expected 0 (neurons are rows) or 1 (columns)")
    return int(axis)


def _restrict(axis: int | Mapping[str, int], names: list[str]) -> int | Mapping[str, int]:
    return {name: _axis_of(axis, name) for name in names} if isinstance(axis, Mapping) else axis


def _share(total: int, percent: float) -> int:
    check_number("percent", percent)
    if not 0 < percent <= 100:
        raise SubspaceError(f"percent is {percent}: expected a number above 0, up to 100")
    if not total:
        raise SubspaceError("there are no neurons to select from")
    return max(1, math.floor(total * percent / 100 + 0.5))


def _split(order: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Positions among all neurons together -> indices in each name."""
    indices, start = {}, 0
    for name, size in sizes.items():
        indices[name] = order[(order >= start) & (order < start + size)] - start
        start += size
    return indices


def _apportion(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Shares of `count` in proportion to `sizes`, by largest remainder; the earlier name wins a tie."""
    total = sum(sizes.values())
    counts = {name: count * size // total for name, size in sizes.items()}
    remainders = sorted(sizes, key=lambda name: -(count * sizes[name] % total))
    for name in remainders[: count - sum(counts.values())]:
        counts[name] += 1
    return counts


def _draw(sizes: Mapping[str, int], counts: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randperm(size, generator=generator)[: counts[name]] for name, size in sizes.items()}


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
