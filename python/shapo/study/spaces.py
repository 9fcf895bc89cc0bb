"""Subspaces by their names in a plan, made of scores that are kept in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapo import selection
from shapo.storage.files import atomic_file
from shapo.study.plan import OUTLIERS
from shapo.study.queue import Row
from shapo_kernels import Subspace

__all__ = ["Spaces", "by_layer", "common", "largest"]


class Spaces:
    """The subspaces of one model.

    Args:
        model: At the weights that the scores are of.
        folder: Where scores are kept, a file each.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self._model, self._folder = model, folder

    def __call__(self, name: str) -> Subspace:
        """A subspace by its name; see `plan`."""
        method, *rest = name.split("-")
        vectors = selection.value_vectors(self._model)
        if method == "all":
            return Subspace.full(self._model)
        if method == "head":
            return Subspace.head(self._model)
        if method == "neurons":
            return selection.full_neurons(self._model)
        if method == "random":
            return selection.random_subspace(self._model, float(rest[0]), seed=int(rest[1]))
        if method == "like":
            return selection.random_like(self._model, self("-".join(rest[:-1])), seed=int(rest[-1]))
        if method == "layers":
            chosen = vectors.names[int(rest[0]) : int(rest[1]) + 1]
            return Subspace({n: torch.arange(vectors.sizes[n]) for n in chosen}, vectors.axis)
        if method == "outliers":
            percent = 100 * OUTLIERS / sum(vectors.sizes.values())
            return Subspace.top(self.scores("gradient"), percent, largest=True, axis=vectors.axis)
        scores = self.scores("probe" if method == "opposite" else method)
        chosen_space = Subspace.top(scores, float(rest[0]), largest=method != "probe", axis=vectors.axis)
        return _without(chosen_space, self("outliers")) if rest[1:] == ["rest"] else chosen_space

    def scores(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self._folder / f"{name}.safetensors")

    def save(self, name: str, scores: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with atomic_file(self._folder / f"{name}.safetensors") as temporary:
            save_file({key: value.contiguous().cpu() for key, value in scores.items()}, temporary)


def largest(scores: Mapping[str, Tensor], count: int) -> list[Row]:
    """The neurons with the largest scores, and their shares of the sum of squares."""
    names, joined = list(scores), torch.cat([value.double() for value in scores.values()])
    total, position, found = float(joined.square().sum()), 0, []
    offsets = {}
    for name in names:
        offsets[name] = position
        position += scores[name].numel()
    for index in joined.topk(min(count, joined.numel())).indices.tolist():
        name = next(n for n in reversed(names) if offsets[n] <= index)
        found.append({"weight": name, "neuron": index - offsets[name], "share": float(joined[index] ** 2) / total})
    return found


def by_layer(scores: Mapping[str, Tensor]) -> list[float]:
    squares = [float(value.double().square().sum()) for value in scores.values()]
    return [value / sum(squares) for value in squares]


def common(a: Subspace, b: Subspace) -> int:
    return sum(len(set(a[name].tolist()) & set(b[name].tolist())) for name in a.names if name in b.names)


def _without(space: Subspace, left_out: Subspace) -> Subspace:
    kept = {
        name: [i for i in space[name].tolist() if name not in left_out.names or i not in left_out[name].tolist()]
        for name in space.names
    }
    return Subspace(kept, space.axis(space.names[0]))
