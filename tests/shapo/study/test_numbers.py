"""Intervals, matched radii, ascents of several steps, and the plan's names."""

import math

import numpy as np
import pytest
import torch

from shapo.errors import UserError
from shapo.study.intervals import clustered, crossed
from shapo.study.jobs import selection_jobs, study_jobs
from shapo.study.losses import climb
from shapo.study.plan import PLANS
from shapo.study.radius import match_radius
from shapo_kernels import Subspace


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    rng = np.random.default_rng(0)
    values = rng.normal(2.0, 3.0, 400)
    value, low, high = clustered([values], range(400), lambda mean: mean)
    assert value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half)


def test_pairs_of_one_prompt_count_as_one_case():
    values = np.repeat([1.0, 2.0, 3.0, 4.0], 50)
    groups = np.repeat(range(4), 50)
    _, low, high = clustered([values], groups, lambda mean: mean)
    _, low_alone, high_alone = clustered([[1.0, 2.0, 3.0, 4.0]], range(4), lambda mean: mean)
    assert (low, high) == pytest.approx((low_alone, high_alone))
    assert high - low > 1.5


def test_a_ratio_of_proportional_columns_has_no_width():
    found = clustered([[1.0, 2.0, 5.0], [2.0, 4.0, 10.0]], range(3), lambda a, b: a / b)
    assert found == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_over_runs_and_prompts_adds_up_their_variances():
    rng = np.random.default_rng(0)
    runs, prompts = rng.normal(0, 1.0, (30, 1)), rng.normal(0, 1.0, (1, 200))
    value, low, high = crossed(runs + prompts, range(200))
    assert value == pytest.approx(runs.mean() + prompts.mean())
    half = 1.96 * math.sqrt(runs.var() / 30 + prompts.var() / 200)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_one_run_leaves_the_interval_over_prompts():
    values = np.random.default_rng(1).normal(size=60)
    groups = [i // 3 for i in range(60)]
    assert crossed([values], groups)[1:] == pytest.approx(clustered([values], groups, lambda m: m)[1:], abs=0.05)


@pytest.mark.parametrize("law", [lambda r: 0.3 * r, lambda r: r**2, lambda r: math.expm1(r), lambda r: r**2 - 0.01])
def test_a_matched_radius_reaches_the_wanted_rise(law):
    rho, rise, _ = match_radius(law, 0.2)
    assert rise == law(rho)
    assert rise == pytest.approx(0.2, rel=0.1)


def test_a_rise_that_no_radius_reaches_is_an_error():
    with pytest.raises(UserError, match="no radius"):
        match_radius(lambda rho: 0.1 * math.tanh(rho), 0.2)


class Quadratic:
    """x^T A x / 2 + b^T x of one weight of two numbers; the worst point of a ball is known."""

    def __init__(self):
        self.model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.model.weight.zero_()
        self.a, self.b = torch.tensor([1.0, 9.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)

    def per_item(self):
        x = self.model.weight.detach()[0]
        return (0.5 * self.a * x * x + self.b * x).sum()[None]

    def gradient(self):
        x = self.model.weight.detach()[0]
        return {"weight": (self.a * x + self.b)[None]}


def test_one_step_goes_along_the_gradient_and_more_steps_find_a_worse_point():
    loss = Quadratic()
    full, first = Subspace.full(loss.model), loss.gradient()
    angles = torch.linspace(0, 2 * math.pi, 10001, dtype=torch.float64)
    ball = 2.0 * torch.stack([angles.cos(), angles.sin()])
    worst = (0.5 * loss.a[:, None] * ball * ball + loss.b[:, None] * ball).sum(0).max()
    direction = 2.0 * loss.b / loss.b.norm()
    once = climb(loss, full, 2.0, steps=1, first=first)
    assert once.item() == pytest.approx((0.5 * loss.a * direction**2 + loss.b * direction).sum().item())
    many = climb(loss, full, 2.0, steps=40, first=first)
    assert once.item() < many.item() <= worst.item() + 1e-9
    assert many.item() == pytest.approx(worst.item(), rel=0.03)
    assert not loss.model.weight.any()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_names_each_job_once_and_needs_only_its_own(plan):
    jobs = study_jobs(plan)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert {need for job in jobs for need in job.needs} <= set(names)


def test_the_first_jobs_need_no_training():
    kinds = [job.kind for job in study_jobs(PLANS["study"])]
    assert "train" not in kinds[: kinds.index("match")]


def test_what_is_done_before_a_test_is_looked_at_ends_with_the_choice_of_the_rate():
    jobs = study_jobs(PLANS["cpu"])
    first = selection_jobs(jobs)
    assert first[-1].kind == "choice"
    assert not {job.kind for job in first} & {"train", "figure", "steps"}
    assert first == jobs[: len(first)]


def test_the_small_plan_tunes_on_draws_that_no_method_is_measured_on():
    jobs = study_jobs(PLANS["cpu"])
    tuned, measured = ({job.settings["seed"] for job in jobs if job.kind == kind} for kind in ("tune", "train"))
    assert tuned
    assert not tuned & measured


def test_the_small_plan_has_three_seeds_of_each_main_method_before_any_other_run():
    runs = [job for job in study_jobs(PLANS["cpu"]) if job.kind == "train"]
    assert {job.settings["seed"] for job in runs[:18]} == {0, 1, 2}
    assert len({(job.settings["method"].split("-")[0], job.settings.get("early")) for job in runs[:18]}) == 6
