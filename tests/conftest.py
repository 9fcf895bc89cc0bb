"""Small models and losses that the core's tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shapo_kernels as sk

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model and row is made here: no test waits for a network

# Programs that tests start import the packages of tests by the same names.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: for tensors this small one thread each is faster than threads that wait for one another.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: the small ones then fill up the workers' time to the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


class Block(nn.Module):
    """A residual MLP block with the names of a Llama's: `down_proj` columns are its neurons' value vectors."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Toy(nn.Module):
    """Two blocks and a head."""

    def __init__(self, hidden: int = 8, intermediate: int = 24) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden, intermediate) for _ in range(2))
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def toy() -> Callable[..., Toy]:
    def make(dtype: torch.dtype = torch.float64, seed: int = 0) -> Toy:
        torch.manual_seed(seed)
        return Toy().to(dtype)

    return make


@pytest.fixture
def subspace() -> sk.Subspace:
    return sk.Subspace({"layers.0.down_proj.weight": [1, 5, 20], "layers.1.down_proj.weight": [0, 23]})


@pytest.fixture
def batch() -> Callable[..., tuple[Tensor, Tensor]]:
    def make(step: int = 0, dtype: torch.dtype = torch.float64, rows: int = 12) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(rows, 8, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randn(rows, 3, generator=generator, dtype=torch.float64).to(dtype)
        return x, y

    return make


def mse(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return (model(data[0]) - data[1]).square().mean()


@pytest.fixture
def loss() -> Callable[..., Tensor]:
    return mse
