"""Norm, perturb and restore of all layers, against the ways to do it without kernels of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.bench import SECTOR, Bench
from shapo_kernels import backends, ops

RHO = 0.05


class Update:
    """Gradients and weights of down-projections, and the ways to perturb some of their neurons and to restore them."""

    def __init__(self, bench: Bench, dtype: torch.dtype) -> None:
        self.layers, hidden, intermediate = (2, 24, 640) if bench.small else (28, 3072, 8192)
        self.bench, self.device, self.dtype = bench, bench.device, dtype
        generator = torch.Generator(bench.device).manual_seed(0)
        make = lambda: torch.randn(hidden, intermediate, generator=generator, device=bench.device)  # noqa: E731
        self.weights = [make().mul_(0.02).to(dtype) for _ in range(self.layers)]
        self.gradients = [make().to(dtype) for _ in range(self.layers)]
        count = max(1, intermediate // 100)
        order = [torch.randperm(intermediate, generator=generator, device=bench.device) for _ in self.weights]
        self.indices = [o[:count].sort().values for o in order]
        self.axes = [1] * self.layers
        self.rho = torch.full((self.layers,), RHO, dtype=torch.float64, device=bench.device)
        self.masks = [torch.zeros(intermediate, dtype=dtype, device=bench.device) for _ in self.weights]
        for mask, index in zip(self.masks, self.indices, strict=True):
            mask[index] = 1
        self.original = [w.clone() for w in self.weights]

    def sector_bytes(self) -> int:
        """The gradient's sectors are read, the weights' read and written by perturbing and by restoring: five times."""
        size = torch.tensor([], dtype=self.dtype).element_size()
        sectors = sum(torch.unique(i * size // SECTOR).numel() for i in self.indices)
        return 5 * SECTOR * sectors * self.weights[0].shape[0]

    def kernels(self, backend: str) -> Callable[[], None]:
        def perturb() -> None:
            values, squares = ops.gather(self.gradients, self.indices, self.axes)
            scale = ops.perturbation_scale(squares, self.rho)
            self.backups = [torch.empty_like(v, dtype=self.dtype) for v in values]
            ops.perturb_(self.weights, self.indices, self.axes, values, scale, self.backups)

        def restore() -> None:
            ops.restore_(self.weights, self.indices, self.axes, self.backups)

        return self._both(perturb, restore, backend)

    def indexed(self) -> Callable[[], None]:
        def perturb() -> None:
            values = [g.index_select(1, i).float() for g, i in zip(self.gradients, self.indices, strict=True)]
            scale = RHO / torch.stack([v.norm() for v in values]).norm()
            self.backups = [w.index_select(1, i) for w, i in zip(self.weights, self.indices, strict=True)]
            for weight, index, value, old in zip(self.weights, self.indices, values, self.backups, strict=True):
                weight.index_copy_(1, index, (old + scale * value).to(self.dtype))

        def restore() -> None:
            for weight, index, old in zip(self.weights, self.indices, self.backups, strict=True):
                weight.index_copy_(1, index, old)

        return self._both(perturb, restore)

    def dense(self) -> Callable[[], None]:
        return self._both(self._dense_perturb, self._dense_restore)

    def dense_compiled(self) -> Callable[[], None]:
        return self._both(self.bench.compile(self._dense_perturb), self.bench.compile(self._dense_restore))

    def _dense_perturb(self) -> None:
        self.eps = [g * m for g, m in zip(self.gradients, self.masks, strict=True)]
        norm = torch.stack([e.norm(dtype=torch.float32) for e in self.eps]).norm()
        for weight, eps in zip(self.weights, self.eps, strict=True):
            weight.add_(eps.mul_((RHO / norm).to(eps.dtype)))

    def _dense_restore(self) -> None:
        for weight, eps in zip(self.weights, self.eps, strict=True):
            weight.sub_(eps)

    def foreach(self) -> Callable[[], None]:
        def perturb() -> None:
            self.eps = list(torch._foreach_mul(self.gradients, self.masks))
            norm = torch.stack(torch._foreach_norm(self.eps, dtype=torch.float32)).norm()
            torch._foreach_mul_(self.eps, (RHO / norm).to(self.dtype))
            torch._foreach_add_(self.weights, self.eps)

        return self._both(perturb, lambda: torch._foreach_sub_(self.weights, self.eps))

    def through_the_host(self) -> Callable[[], None]:
        """What the published code does: masked float32 gradients go to host memory layer by layer, and come back."""

        def perturb() -> None:
            masked = [(g.float() * m).cpu() for g, m in zip(self.gradients, self.masks, strict=True)]
            norm = torch.stack([m.norm() for m in masked]).norm()
            self.moved = [m.mul_(RHO / norm) for m in masked]
            for weight, moved in zip(self.weights, self.moved, strict=True):
                weight.add_(moved.to(self.device, self.dtype))

        def restore() -> None:
            for weight, moved in zip(self.weights, self.moved, strict=True):
                weight.sub_(moved.to(self.device, self.dtype))

        return self._both(perturb, restore)

    def _both(
        self, perturb: Callable[[], Any], restore: Callable[[], Any], backend: str | None = None
    ) -> Callable[[], None]:
        def update() -> None:
            with backends.use(backend or "reference"):
                perturb()
                self.perturbed = [w[:, i] for w, i in zip(self.weights, self.indices, strict=True)] if self.keep else []
                restore()

        return update

    keep = False

    def check(self, update: Callable[[], None], *, exact: bool) -> Callable[[], None]:
        """The perturbed weights are float64's to the dtype's precision, the restored ones the old ones if ``exact``."""

        def check() -> None:
            self.keep = True
            try:
                update()
            finally:
                self.keep = False
            chosen = [g[:, i].double() for g, i in zip(self.gradients, self.indices, strict=True)]
            scale = RHO / torch.stack([c.norm() for c in chosen]).norm()
            unit = torch.finfo(self.dtype).eps
            for number, got in enumerate(self.perturbed):
                old = self.original[number][:, self.indices[number]].double()
                truth = old + scale * chosen[number]
                bound = unit * (truth.abs() + (scale * chosen[number]).abs() * 4)
                if not bool(((got.double() - truth).abs() <= bound).all()):
                    raise AssertionError(f"layer {number} is not at theta + eps")
            for weight, old in zip(self.weights, self.original, strict=True):
                if exact and not torch.equal(weight, old):
                    raise AssertionError("the weights were not restored to the bit")
                weight.copy_(old)

        return check


def subspace_update(bench: Bench) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        problem = Update(bench, dtype)
        ways = {f"shapo_kernels, {name}": (problem.kernels(name), True) for name in bench.backends}
        ours = next(iter(ways))
        ways |= {
            "index_select": (problem.indexed(), True),
            "dense": (problem.dense(), False),
            "dense, foreach": (problem.foreach(), False),
            "dense, compiled": (problem.dense_compiled(), False),
            "through the host": (problem.through_the_host(), False),
        }
        shape = [problem.layers, *problem.weights[0].shape]
        bench.compare(
            "gpu_subspace_update",
            f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}, 1 % of columns",
            {name: (update, problem.check(update, exact=exact)) for name, (update, exact) in ways.items()},
            ours,
            dtype=str(dtype).removeprefix("torch."),
            shape=shape,
            bytes=problem.sector_bytes(),
        )
        del problem
