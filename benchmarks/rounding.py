"""How much of eps survives being added to bfloat16 weights, and how much when it is kept beside them.

    python benchmarks/rounding.py

Weights are N(0, 0.02^2) rounded to bfloat16 and eps is N(0, size^2), two million elements. ``share`` is
<realised, eps> / ||eps||^2: to first order, the share of the loss increase that is left. No timing; one seed.
"""

import torch

ELEMENTS = 2_000_000
WEIGHT_STD = 0.02
SIZES = (
    (1e-7, ""),
    (4e-6, ""),
    (1.9e-5, "rho = 0.05 over 7 million elements"),
    (6e-5, ""),
    (1e-4, ""),
    (5e-4, ""),
)


def realised(weights: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return (weights.float() + eps).bfloat16().float() - weights.float()


def main() -> None:
    torch.manual_seed(0)
    weights = (torch.randn(ELEMENTS) * WEIGHT_STD).bfloat16()
    unit = torch.randn(ELEMENTS)
    print("| std of eps | in_place: cosine | norm | share | delta: cosine | |")
    print("|---|---|---|---|---|---|")
    for size, note in SIZES:
        eps = unit * size
        columns = []
        for got in (realised(weights, eps), eps.bfloat16().float()):
            got, want = got.double(), eps.double()
            dot = (got * want).sum()
            columns.append((dot / (got.norm() * want.norm()), got.norm() / want.norm(), dot / want.square().sum()))
        (cosine, norm, share), (beside, _, _) = columns
        print(f"| {size:.1e} | {cosine:.2f} | {norm:.2f} | {share:.2f} | {beside:.5f} | {note} |")


if __name__ == "__main__":
    main()
