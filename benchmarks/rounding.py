"""How much of eps survives being added to bfloat16 weights, and how much when it is kept beside them.

    python -m benchmarks.rounding

Weights are N(0, 0.02^2) rounded to bfloat16 and eps is N(0, size^2), two million elements. `share` is
<realised, eps> / ||eps||^2: to first order, the share of the loss increase that is left. The published perturbation is
W += gamma * g without a norm, gamma in [2e-6, 4e-6]: its size follows the gradient's, so rows are given for gradients
whose elements have standard deviation 1e-3, 1e-1 and 1. No timing; one seed.
"""

import torch

from shapo_kernels.reference.rounding import round_stochastically

ELEMENTS = 2_000_000
WEIGHT_STD = 0.02
SIZES = (
    (4e-9, "published, gamma 4e-6: gradients of 1e-3"),
    (4e-7, "published, gamma 4e-6: gradients of 0.1"),
    (2e-6, "published, gamma 2e-6: gradients of 1"),
    (4e-6, "published, gamma 4e-6: gradients of 1"),
    (1.9e-5, "SAM, rho = 0.05 over 7 million elements"),
    (6e-5, ""),
    (1e-4, ""),
    (5e-4, ""),
)


def realised(weights: torch.Tensor, eps: torch.Tensor) -> dict[str, torch.Tensor]:
    """What reaches a bfloat16 forward pass, by way of the perturbation."""
    moved = weights.float() + eps
    return {
        "in_place": moved.bfloat16().float() - weights.float(),
        "stochastic": round_stochastically(moved, torch.bfloat16, key=1).float() - weights.float(),
        "delta": eps.bfloat16().float(),
    }


def measured(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float, float]:
    """Cosine, ratio of norms, share."""
    got, want = got.double(), want.double()
    dot = (got * want).sum()
    cosine = dot / (got.norm() * want.norm()) if got.any() else dot
    return cosine.item(), (got.norm() / want.norm()).item(), (dot / want.square().sum()).item()


def rows() -> list[tuple[float, str, dict[str, tuple[float, float, float]]]]:
    torch.manual_seed(0)
    weights = (torch.randn(ELEMENTS) * WEIGHT_STD).bfloat16()
    unit = torch.randn(ELEMENTS)
    return [
        (size, note, {way: measured(got, unit * size) for way, got in realised(weights, unit * size).items()})
        for size, note in SIZES
    ]


def main() -> None:
    print("| std of eps | in_place: cosine | norm | share | stochastic: cosine | norm | share | delta: cosine | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size, note, found in rows():
        numbers = " | ".join(f"{value:.2f}" for way in ("in_place", "stochastic") for value in found[way])
        print(f"| {size:.1e} | {numbers} | {found['delta'][0]:.5f} | {note} |")


if __name__ == "__main__":
    main()
