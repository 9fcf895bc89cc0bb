"""What the demo runs: sizes, radii, learning rates, and the methods side by side.  No work is done here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """How large everything is; see `SIZES`.  `percent` is of all neurons, radii are in weight units."""

    rows: dict[str, int]
    vocabulary: int = 1024
    hidden: int = 64
    intermediate: int = 256
    layers: int = 4
    sft_updates: int = 300
    probe_rows: int = 2000
    reward_updates: int = 150
    epochs: int = 5
    curve_pairs: int = 150
    sharpness_pairs: int = 100
    percent: float = 5.0


SIZES = {
    "full": Size({"sft": 5000, "train": 320, "selection": 300, "test": 400, "test_unseen": 300}),
    "small": Size(
        {"sft": 240, "train": 32, "selection": 32, "test": 32, "test_unseen": 32},
        vocabulary=400,
        hidden=32,
        intermediate=64,
        layers=2,
        sft_updates=20,
        probe_rows=100,
        reward_updates=10,
        epochs=2,
        curve_pairs=16,
        sharpness_pairs=8,
        percent=10.0,
    ),
}

NOISE = 0.3
BETA = 0.1
BETA_REWARD = 1.0
BATCH = 16
LR, SMALL_LR = 1e-3, 1e-4
RHO_NEURONS, RHO_UNIFORM = 2.0, 0.2
YARDSTICK_RHO = 0.1
RHOS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
RATIOS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Method:
    """One row of the table: `subspace` is a file name under subspaces/, "all" for every parameter, or None for plain
    training.
    """

    name: str
    slug: str
    reward_level: bool = False
    subspace: str | None = None
    rho: float = 0.0
    lr: float = LR


def methods() -> list[Method]:
    """DPO first: the sharpness curves are drawn at its end."""
    chosen = [
        ("critical by probe", "probe", RHO_NEURONS),
        ("critical by gradient", "gradient", RHO_NEURONS),
        ("random", "random", RHO_NEURONS),
        ("uniform", "all", RHO_UNIFORM),
    ]
    token = [Method(f"ShaPO, {name}", f"shapo-{key}", False, key, rho) for name, key, rho in chosen]
    reward = [replace(m, name=f"{m.name}, reward level", slug=f"{m.slug}-reward", reward_level=True) for m in token]
    return [
        Method("DPO", "dpo"),
        Method("DPO, smaller lr", "dpo-small-lr", lr=SMALL_LR),
        *token,
        Method("plain, reward level", "plain-reward", reward_level=True),
        *reward,
    ]


def describe(size: Size) -> dict[str, Any]:
    """Everything that a reader of the results must know, by name."""
    return {
        **size.rows,
        **{key: value for key, value in asdict(size).items() if key != "rows"},
        "noise": NOISE,
        "beta": BETA,
        "beta_reward": BETA_REWARD,
        "batch": BATCH,
        "yardstick_rho": YARDSTICK_RHO,
        "updates_an_epoch": -(-size.rows["train"] // BATCH),
    }
