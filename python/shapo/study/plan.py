"""What a study does, in the order of what decides most: settings and the list of jobs.  No work is done here.

The names of subspaces say what they are:

    all, neurons                every parameter; every neuron
    gradient-P, probe-P         the share P (%) with the largest gradient of the preference loss; the published choice
    opposite-P                  the other end of the probe's ranking
    benign-P                    the largest gradient of a language-modelling loss on answers to harmless prompts
    random-P-S                  drawn over all layers with the seed S
    like-NAME-S                 as many of each layer as the subspace NAME has
    outliers                    the `OUTLIERS` neurons with the largest gradient of the preference loss
    gradient-P-rest             gradient-P without them
    layers-A-B                  all neurons of the layers A to B
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shapo.checked import checked
from shapo.study.queue import Job

__all__ = ["OUTLIERS", "PLANS", "Plan", "selection_jobs", "study_jobs"]

OUTLIERS = 2

# Without the standing system turn of SmolLM2's own template, which takes a quarter of a short text.
PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@checked
@dataclass(frozen=True)
class Plan:
    """Sizes and grids.

    Attributes:
        max_length, max_prompt_length: Tokens, of prompt and response and of the prompt.
        template: A chat template instead of the model's own.
        figure_pairs: Pairs of each of the two tests in domain and unseen, for Figure 1.
        match_pairs: Selection pairs at which radii are matched and the common yardstick is measured.
        watch_pairs: Selection pairs watched in training, for the choice of learning rate and stop.
        test_pairs: Of each test.
        train_pairs: Drawn anew by each seed.
        benign_texts: Answers to harmless prompts, half to select by and half to measure on.
        layers: Of the model, for the thirds of `figure_spaces`.
        figure_spaces, figure_rhos: Figure 1; the first spaces matter most.
        steps: Ascent steps of the adversary of several steps.
        targets: Loss increases (nats) that radii are matched at; the first one matters most.
        watch_every: Updates.
        yardstick: Radius in all parameters for the final models; 0 leaves it out.
        tuning_seeds: Draws of training pairs that the learning rate is chosen on, and nothing else; with them
            the plan is the small one of `_small`.
        wider: Larger loss increases, of which the selection split chooses one for a second round, as "NAME-wide".
        slower: Lower learning rates, tried for the plain method on the tuning draws; the rate that is best with them
            is a control for the wide round, as "NAME-slower".
        rewards: Also the reward level, as "NAME-reward": soft labels by a head fitted to the selection split.
        aligned: Figure 1 also at the first seed's models after DPO and after the gradient's ShaPO.
        answer_tokens: Of an answer, where the start and the first seed's models are to answer prompts; 0 for none.
    """

    max_length: int = 80
    max_prompt_length: int = 58
    figure_pairs: int = 12
    match_pairs: int = 8
    watch_pairs: int = 24
    test_pairs: int = 24
    train_pairs: int = 40
    benign_texts: int = 64
    layers: int = 30
    percent: float = 1.0
    figure_rhos: tuple[float, ...] = (0.03, 0.1, 0.3)
    steps: int = 3
    targets: tuple[float, ...] = (0.2, 0.05)
    batch_size: int = 8
    updates: int = 16
    watch_every: int = 8
    warmup: int = 4
    lrs: tuple[float, ...] = (1e-4, 3e-5)
    noises: tuple[float, ...] = (0.4, 0.2, 0.0)
    seeds: int = 5
    beta: float = 0.1
    yardstick: float = 0.01
    bf16: bool = True
    short: bool = False
    template: str | None = None
    tuning_seeds: tuple[int, ...] = ()
    wider: tuple[float, ...] = ()
    slower: tuple[float, ...] = ()
    rewards: bool = False
    aligned: bool = False
    answer_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan of which `as_dict` gave the values."""
        tuples: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**tuples)


PLANS = {
    "study": Plan(),
    "cpu": Plan(
        max_length=60,
        max_prompt_length=44,
        template=PLAIN_CHATML,
        train_pairs=32,
        targets=(0.2,),
        updates=8,
        watch_every=4,
        warmup=2,
        lrs=(2e-5, 1e-5),
        noises=(0.4,),
        seeds=4,
        yardstick=0.0,
        tuning_seeds=(100,),
        wider=(0.8, 2.0),
        slower=(5e-6, 2.5e-6),
        rewards=True,
        aligned=True,
        answer_tokens=40,
    ),
    "real": Plan(lrs=(3e-5,), noises=(0.3,), seeds=1, targets=(0.2,), short=True),
}

_ON_SELECTION = ("probe", "gradient", "benign", "match", "tune", "choice")


def selection_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Those up to the choice of the learning rate: none of them looks at a test pair."""
    chosen = [job for job in jobs if job.kind in _ON_SELECTION]
    last = next((number for number, job in enumerate(chosen) if job.kind == "choice"), -1)
    return chosen[: last + 1]


def study_jobs(plan: Plan) -> list[Job]:
    """All jobs, in the order of what decides most."""
    if plan.tuning_seeds:
        return _small(plan)
    p = f"{plan.percent:g}"
    critical = [f"gradient-{p}", f"probe-{p}", f"random-{p}-0"]
    scores = [Job("probe", "probe"), Job("gradient", "gradient")]
    benign = [Job("benign", "benign"), Job("shares", "shares", needs=("probe", "gradient", "benign"))]
    first = ["all", "neurons", *critical]
    if plan.short:
        spaces = [*first, f"opposite-{p}", f"like-gradient-{p}-0"]
        return [
            *scores,
            *_figure(plan, spaces),
            *_match(plan, plan.targets[:1], critical[:1]),
            *_tuning(plan),
            *_training(plan, plan.noises[0], 0, critical[:1]),
        ]
    third = plan.layers // 3
    second = ["outliers", f"gradient-{p}-rest", f"like-gradient-{p}-0"]
    more = [f"like-probe-{p}-0", f"opposite-{p}", "gradient-0.5"]
    rest = [f"benign-{p}", "gradient-0.1", "gradient-0.01", "gradient-5", f"random-{p}-1", f"random-{p}-2"]
    rest += [f"layers-{a}-{a + third - 1}" for a in range(0, 3 * third, max(1, third))]  # none where there are too few
    first_matched = ("all", f"gradient-{p}", f"random-{p}-0")
    return [
        *scores,
        *_figure(plan, [*first, *second]),
        *_match(plan, plan.targets[:1], first_matched),
        *benign,
        *_benign_figure(plan, ["all", f"benign-{p}", f"gradient-{p}", f"random-{p}-0", f"gradient-{p}-rest"]),
        *_tuning(plan),
        *_training(plan, plan.noises[0], 0, first_matched),
        *_figure(plan, more),
        *_steps(plan, ["all", f"gradient-{p}", f"random-{p}-0"]),
        *_match(plan, plan.targets[:1], (f"probe-{p}", f"gradient-{p}-rest")),
        *_training(plan, plan.noises[0], 0, (f"probe-{p}", f"gradient-{p}-rest")),
        *_figure(plan, rest),
        *_baselines(plan.noises[0], 0),
        *(job for seed in range(1, plan.seeds) for job in _all_methods(plan, plan.noises[0], seed)),
        *(job for seed in range(plan.seeds) for noise in plan.noises[1:] for job in _all_methods(plan, noise, seed)),
        *_match(plan, plan.targets[1:], first_matched),
    ]


def _small(plan: Plan) -> list[Job]:
    """Questions 2 to 4 alone: the rate tuned on draws of its own, then three seeds of the main methods, then others."""
    p, noise = f"{plan.percent:g}", plan.noises[0]
    tuning = _tuned(plan, noise, plan.lrs)
    scores = [Job("probe", "probe"), Job("gradient", "gradient")]
    jobs = [*scores, *tuning, Job("choice", "choice", {}, tuple(job.name for job in tuning))]
    main = (f"gradient-{p}", "all", f"probe-{p}")
    control = f"like-probe-{p}"
    jobs += _match(plan, plan.targets[:1], main)
    for seeds in (range(min(3, plan.seeds)), range(3, plan.seeds)):
        jobs += _match(plan, plan.targets[:1], [f"{control}-{seed}" for seed in seeds])  # a draw for each seed
        for seed in seeds:
            jobs.append(_plain(noise, seed, keep=True))
            jobs += [_shapo(plan, noise, seed, space, space, keep=True) for space in main]
        jobs += [_plain(noise, seed, early=True) for seed in seeds]
        jobs += [_shapo(plan, noise, seed, control, f"{control}-{seed}", keep=True) for seed in seeds]
        if plan.wider and 0 in seeds:
            jobs += _wider(plan, noise, seeds, [*main, control])
            if plan.slower:
                jobs += _slower(plan, noise, seeds, ("all", main[0]), tuning)
        jobs += [job for seed in seeds for job in _losses(noise, seed)]
        if plan.rewards and plan.wider and 0 in seeds:
            jobs.append(Job("reward", "reward"))
            jobs += [_rewarded(noise, seed, name) for name in ("", main[0]) for seed in seeds]
        if plan.aligned and 0 in seeds:
            jobs += _aligned(plan, noise)
        if plan.answer_tokens and 0 in seeds:
            jobs += _answers(noise, ["dpo", "shapo-all", f"shapo-{main[0]}"], slower=bool(plan.wider and plan.slower))
    return jobs


def _answers(noise: float, kept: Sequence[str], *, slower: bool) -> list[Job]:
    """Refusals of the start and of the first seed's models, those at the lower rate included where there are any."""
    lower = [f"{name}{'' if name == 'dpo' else '-wide'}-slower" for name in kept] if slower else []
    jobs = [Job("answers-start", "answers", {"kept": None})]
    for name in (*kept, *lower):
        jobs.append(Job(f"answers-{name}", "answers", {"kept": name}, (f"{name}-{_end(noise, 0)}",)))
    return jobs


def _aligned(plan: Plan, noise: float) -> list[Job]:
    """Figure 1 at the start, after DPO and after ShaPO in the gradient's neurons, all in the same subspaces."""
    p, jobs = f"{plan.percent:g}", []
    for kept in (None, "dpo", f"shapo-gradient-{p}"):
        for space in ("all", "neurons", f"gradient-{p}", f"probe-{p}", f"like-gradient-{p}-0", f"random-{p}-0"):
            settings = {"space": space, "rhos": list(plan.figure_rhos[:2]), "loss": "preference", "kept": kept}
            needs = _scored(space) if kept is None else (f"{kept}-{_end(noise, 0)}", *_scored(space))
            jobs.append(Job(f"aligned-{kept or 'start'}-{space}", "figure", settings, needs))
    return jobs


def _wider(plan: Plan, noise: float, seeds: Sequence[int], spaces: Sequence[str]) -> list[Job]:
    """A larger rise, chosen for the gradient's neurons on the tuning draws, and the methods at it."""
    tuned, seed = spaces[0], plan.tuning_seeds[0]
    tuning = []
    for target in plan.wider:
        matched = f"match-{target:g}-{tuned}"
        settings = {"method": tuned, "match": matched, "target": target, "noise": noise, "seed": seed}
        needs = ("choice", matched, *_scored(tuned))
        tuning.append(Job(f"tune-shapo-{tuned}-rise{target:g}-seed{seed}", "tune", settings, needs))
    jobs = [*_match(plan, plan.wider, (tuned,)), *tuning, Job("wider", "wider", {}, tuple(job.name for job in tuning))]
    for name in spaces:
        for run in seeds:
            space = f"{name}-{run}" if name.startswith("like") else name
            matched = f"match-wide-{space}"
            if matched not in [job.name for job in jobs]:
                jobs.append(Job(matched, "match", {"space": space, "target": None}, ("wider", *_scored(space))))
            settings = {"method": space, "match": matched, "noise": noise, "seed": run}
            needs = ("choice", matched, *_scored(space))
            jobs.append(Job(f"shapo-{name}-wide-{_end(noise, run)}", "train", settings, needs))
    return jobs


def _slower(plan: Plan, noise: float, seeds: Sequence[int], spaces: Sequence[str], tuning: Sequence[Job]) -> list[Job]:
    """A lower learning rate, chosen for the plain method; then that method and the wide perturbations at it."""
    lower, choice = _tuned(plan, noise, plan.slower), "choice-slower"
    jobs = [*lower, Job(choice, "choice", {}, tuple(job.name for job in [*tuning, *lower]))]
    for name in ("", *spaces):
        for seed in seeds:
            jobs.append(_at(noise, seed, name, "slower", choice, {"rate": choice}))
    return jobs


def _rewarded(noise: float, seed: int, name: str) -> Job:
    """The reward level, plain or with a wide perturbation."""
    return _at(noise, seed, name, "reward", "choice", {"loss": "reward_level"}, ("reward",))


def _at(
    noise: float, seed: int, name: str, what: str, choice: str, more: dict[str, Any], needs: tuple[str, ...] = ()
) -> Job:
    """A run of the plain method, or of a wide perturbation in the subspace `name`, that differs in one thing."""
    method = f"shapo-{name}-wide-{what}" if name else f"dpo-{what}"
    settings = {"method": name or "plain", "noise": noise, "seed": seed, **more, **_kept(True, seed, method)}
    needs = (choice, *needs)
    if name:
        settings["match"] = f"match-wide-{name}"
        needs = (*needs, settings["match"], *_scored(name))
    return Job(f"{method}-{_end(noise, seed)}", "train", settings, needs)


def _tuned(plan: Plan, noise: float, lrs: Sequence[float]) -> list[Job]:
    """The plain method at some learning rates, watched on the selection split, on the tuning draws."""
    return [
        Job(f"tune-dpo-lr{lr:g}-seed{seed}", "tune", {"method": "plain", "lr": lr, "noise": noise, "seed": seed})
        for seed in plan.tuning_seeds
        for lr in lrs
    ]


def _plain(noise: float, seed: int, *, early: bool = False, keep: bool = False) -> Job:
    name = "dpo-early" if early else "dpo"
    settings: dict[str, Any] = {"method": "plain", "noise": noise, "seed": seed, **({"early": True} if early else {})}
    return Job(f"{name}-{_end(noise, seed)}", "train", {**settings, **_kept(keep, seed, name)}, ("choice",))


def _shapo(plan: Plan, noise: float, seed: int, name: str, space: str, *, keep: bool = False) -> Job:
    matched = f"match-{plan.targets[0]:g}-{space}"
    settings = {"method": space, "match": matched, "noise": noise, "seed": seed, **_kept(keep, seed, f"shapo-{name}")}
    return Job(f"shapo-{name}-{_end(noise, seed)}", "train", settings, ("choice", matched, *_scored(space)))


def _kept(keep: bool, seed: int, name: str) -> dict[str, Any]:
    """The first seed's model is kept, in a folder of this name."""
    return {"keep": name} if keep and seed == 0 else {}


def _losses(noise: float, seed: int) -> list[Job]:
    same = {"method": "plain", "noise": noise, "seed": seed}
    return [
        Job(f"{loss}-{_end(noise, seed)}", "train", {**same, "loss": loss}, ("choice",))
        for loss in ("rdpo", "drdpo", "cdpo")
    ]


def _scored(space: str) -> tuple[str, ...]:
    """The jobs whose scores a subspace is made of."""
    method = space.removeprefix("like-").split("-")[0]
    return {"gradient": ("gradient",), "outliers": ("gradient",), "probe": ("probe",), "opposite": ("probe",)}.get(
        method, ("benign",) if method == "benign" else ()
    )


def _figure(plan: Plan, spaces: list[str]) -> list[Job]:
    return [
        Job(f"figure1-{s}", "figure", {"space": s, "rhos": list(plan.figure_rhos), "loss": "preference"}, _scored(s))
        for s in spaces
    ]


def _benign_figure(plan: Plan, spaces: list[str]) -> list[Job]:
    return [
        Job(f"benign-{s}", "figure", {"space": s, "rhos": list(plan.figure_rhos), "loss": "benign"}, _scored(s))
        for s in spaces
    ]


def _steps(plan: Plan, spaces: list[str]) -> list[Job]:
    return [
        Job(f"steps-{s}", "steps", {"space": s, "rho": plan.figure_rhos[1], "steps": plan.steps}, _scored(s))
        for s in spaces
    ]


def _match(plan: Plan, targets: Sequence[float], spaces: Sequence[str]) -> list[Job]:
    return [Job(f"match-{t:g}-{s}", "match", {"space": s, "target": t}, _scored(s)) for t in targets for s in spaces]


def _tuning(plan: Plan) -> list[Job]:
    """DPO at every learning rate; the one that the selection split chooses is the baseline of this noise and seed."""
    noise, seed = plan.noises[0], 0
    tuning = [
        Job(
            f"dpo-lr{lr:g}-{_end(noise, seed)}",
            "train",
            {"method": "plain", "lr": lr, "noise": noise, "seed": seed, "watch": True},
        )
        for lr in plan.lrs
    ]
    return [*tuning, Job("choice", "choice", {}, tuple(job.name for job in tuning))]


def _training(plan: Plan, noise: float, seed: int, spaces: Sequence[str]) -> list[Job]:
    return [_shapo(plan, noise, seed, space, space) for space in spaces]


def _baselines(noise: float, seed: int) -> list[Job]:
    return [_plain(noise, seed, early=True), *_losses(noise, seed)]


def _all_methods(plan: Plan, noise: float, seed: int) -> list[Job]:
    p = f"{plan.percent:g}"
    spaces = (f"gradient-{p}", f"random-{p}-0", "all", f"probe-{p}", f"gradient-{p}-rest")
    return [_plain(noise, seed), *_training(plan, noise, seed, spaces), *_baselines(noise, seed)]


def _end(noise: float, seed: int) -> str:
    return f"noise{noise:g}-seed{seed}"
