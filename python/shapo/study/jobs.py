"""What a study does, in the order of what decides most.  No work is done here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shapo.study.plan import Plan
from shapo.study.queue import Job

__all__ = ["selection_jobs", "study_jobs"]

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
    control, seeds, later = f"like-probe-{p}", range(min(3, plan.seeds)), range(3, plan.seeds)
    jobs += _match(plan, plan.targets[:1], main)
    jobs += _first_radius(plan, noise, seeds, main, control)
    if plan.wider:
        jobs += _wider(plan, noise, seeds, [*main, control])
        if plan.slower:
            jobs += _slower(plan, noise, seeds, ("all", main[0]), tuning)
    jobs += [job for seed in seeds for job in _losses(noise, seed)]
    if plan.rewards and plan.wider:
        jobs.append(Job("reward", "reward"))
        jobs += [_rewarded(noise, seed, name) for name in ("", main[0]) for seed in seeds]
    if plan.aligned:
        jobs += _aligned(plan, noise)
    if plan.answer_tokens:
        jobs += _answers(noise, ["dpo", "shapo-all", f"shapo-{main[0]}"], slower=bool(plan.wider and plan.slower))
    head = ("head",) if plan.head else ()
    if plan.wider:
        if head:
            jobs += [_match_wide("head"), *(_wide(noise, seed, "head") for seed in seeds)]
        for other in plan.noises[1:]:
            jobs += _other_noise(plan, other, seeds, ("all", main[0], control))
        for seed in later[:1]:
            jobs += _later_seed(noise, seed, ("all", main[0], control), (main[2], *head))
    if plan.tuned_losses:
        jobs += _tuned_losses(plan, noise, seeds)
    if plan.wider:
        for seed in later[1:]:
            jobs += _later_seed(noise, seed, ("all", main[0], control), (main[2], *head))
    have = {job.name for job in jobs}
    rest = [*_first_radius(plan, noise, later, main, control), *(job for seed in later for job in _losses(noise, seed))]
    return [*jobs, *(job for job in rest if job.name not in have)]


def _first_radius(plan: Plan, noise: float, seeds: Sequence[int], main: Sequence[str], control: str) -> list[Job]:
    """The plain method and every subspace at the radius that was planned first."""
    jobs = _match(plan, plan.targets[:1], [f"{control}-{seed}" for seed in seeds])  # a draw for each seed
    for seed in seeds:
        jobs.append(_plain(noise, seed, keep=True))
        jobs += [_shapo(plan, noise, seed, space, space, keep=True) for space in main]
    jobs += [_plain(noise, seed, early=True) for seed in seeds]
    return [*jobs, *(_shapo(plan, noise, seed, control, f"{control}-{seed}", keep=True) for seed in seeds)]


def _other_noise(plan: Plan, noise: float, seeds: Sequence[int], spaces: Sequence[str]) -> list[Job]:
    """The methods that decide most at another noise rate, seed by seed; without noise, refusals in answers too."""
    jobs, kept = [], ("dpo", f"shapo-{spaces[0]}-wide") if noise == 0 and plan.answer_tokens else ()
    for seed in seeds:
        runs = [_plain(noise, seed), *(_wide(noise, seed, name) for name in spaces)]
        if noise > 0:  # without it rDPO is DPO
            runs += _losses(noise, seed, ("rdpo",))
        for job in runs:
            method = job.name.removesuffix(f"-{_end(noise, seed)}")
            jobs.append(_keeping(job, f"{method}-noise{noise:g}") if seed == 0 and method in kept else job)
    jobs += [_plain(noise, seed, early=True) for seed in seeds]
    for method in kept:
        name = f"{method}-noise{noise:g}"
        jobs.append(Job(f"answers-{name}", "answers", {"kept": name}, (f"{method}-{_end(noise, 0)}",)))
    return jobs


def _later_seed(noise: float, seed: int, spaces: Sequence[str], more: Sequence[str]) -> list[Job]:
    """One more seed of the methods that decide most."""
    like = [f"{name}-{seed}" for name in spaces if name.startswith("like")]
    return [
        *(_match_wide(space) for space in like),
        _plain(noise, seed),
        *(_wide(noise, seed, name) for name in spaces),
        *_losses(noise, seed, ("rdpo",)),
        _plain(noise, seed, early=True),
        *(_wide(noise, seed, name) for name in more),
    ]


def _tuned_losses(plan: Plan, noise: float, seeds: Sequence[int]) -> list[Job]:
    """rDPO without being told the noise rate, and Dr.DPO: a parameter chosen on the tuning draws, then the runs."""
    jobs = []
    for loss, key, values in (("rdpo", "epsilon", (0.2, 0.3, 0.4)), ("drdpo", "beta_prime", (0.25, 0.5, 1.0))):
        same = {"method": "plain", "loss": loss, "noise": noise}
        tuning = [
            Job(f"tune-{loss}-{value:g}-seed{seed}", "tune", {**same, "seed": seed, key: value}, ("choice",))
            for seed in plan.tuning_seeds
            for value in values
        ]
        best = Job(f"best-{loss}", "best", {"key": key}, tuple(job.name for job in tuning))
        settings = {**same, "parameter": best.name}
        runs = [
            Job(f"{loss}-tuned-{_end(noise, seed)}", "train", {**settings, "seed": seed}, ("choice", best.name))
            for seed in seeds
        ]
        jobs += [*tuning, best, *runs]
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
            job = _match_wide(f"{name}-{run}" if name.startswith("like") else name)
            if job.name not in [one.name for one in jobs]:
                jobs.append(job)
            jobs.append(_wide(noise, run, name))
    return jobs


def _match_wide(space: str) -> Job:
    return Job(f"match-wide-{space}", "match", {"space": space, "target": None}, ("wider", *_scored(space)))


def _wide(noise: float, seed: int, name: str) -> Job:
    """A run at the wider rise; random neurons are drawn anew for each seed."""
    space = f"{name}-{seed}" if name.startswith("like") else name
    matched = f"match-wide-{space}"
    settings = {"method": space, "match": matched, "noise": noise, "seed": seed}
    return Job(f"shapo-{name}-wide-{_end(noise, seed)}", "train", settings, ("choice", matched, *_scored(space)))


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


def _keeping(job: Job, name: str) -> Job:
    return replace(job, settings={**job.settings, "keep": name})


def _kept(keep: bool, seed: int, name: str) -> dict[str, Any]:
    """The first seed's model is kept, in a folder of this name."""
    return {"keep": name} if keep and seed == 0 else {}


def _losses(noise: float, seed: int, names: Sequence[str] = ("rdpo", "drdpo", "cdpo")) -> list[Job]:
    same = {"method": "plain", "noise": noise, "seed": seed}
    return [Job(f"{loss}-{_end(noise, seed)}", "train", {**same, "loss": loss}, ("choice",)) for loss in names]


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
