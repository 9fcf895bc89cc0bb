"""What is timed for the GPU is checked first: a wrong result is neither hidden nor timed."""

import pytest
import torch

from benchmarks.gpu import logps, model, steps, subspace, updates
from benchmarks.gpu.bench import Bench, Case, Variant, agrees
from benchmarks.gpu.checks import SkipCheckError
from benchmarks.gpu.suites import Suite

OURS = "shapo_kernels"


def bench(**options):
    return Bench(torch.device("cpu"), small=True, rounds=2, backends=["default", "reference"], **options)


def right(inputs, run):
    pass


def wrong(inputs, run):
    raise AssertionError("the result is wrong")


def variant(name, calls=None, check=right, **options):
    return Variant(name, lambda _: lambda: calls is not None and calls.append(name), check, **options)


def compare(found, *variants, **options):
    found.compare(Case("suite", "case", lambda number: number, 1 << 30, variants, **options))
    return [(row["variant"], "refused" in row) for row in found.rows]


def test_a_variant_whose_check_fails_is_refused_and_not_timed():
    calls, found = [], bench()
    assert compare(found, variant(OURS), variant("baseline", calls, wrong)) == [("baseline", True), (OURS, False)]
    assert "the result is wrong" in found.rows[0]["refused"]
    assert not calls
    assert not found.wrong()


def test_where_our_own_check_fails_nothing_is_timed_and_the_step_fails(tmp_path, monkeypatch):
    found = bench()
    assert compare(found, variant(OURS, check=wrong), variant("baseline")) == [(OURS, True)]
    assert found.wrong() == [f"{OURS}: AssertionError: the result is wrong"]

    def suite(given):
        compare(given, variant(OURS), variant("shapo_kernels, reference", check=wrong))

    monkeypatch.setattr(Suite, "function", lambda self: suite)
    run = steps.Run(tmp_path, True, 2, float("inf"))
    with pytest.raises(AssertionError, match="shapo_kernels, reference: AssertionError: the result is wrong"):
        steps.run_suite(run, Suite("any", "any", ()), ["default", "reference"], later=False)


def test_a_suite_without_a_backend_or_without_time_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(Suite, "function", lambda self: lambda given: compare(given, variant(OURS)))
    for run, backends, why in (
        (steps.Run(tmp_path, True, 2, float("inf")), [], "no backend"),
        (steps.Run(tmp_path, True, 2, 0.0), ["default"], "no time"),
    ):
        with pytest.raises(SkipCheckError, match=why):
            steps.run_suite(run, Suite("any", "any", ()), backends, later=False)


@pytest.mark.parametrize(
    ("half", "timed", "recorded"),
    [
        ("first", {OURS, "plain", "now"}, [OURS, "plain", "now"]),
        ("second", {OURS, "plain", "late"}, ["late"]),
        ("both", {OURS, "plain", "now", "late"}, [OURS, "plain", "now", "late"]),
    ],
)
def test_what_comes_later_is_timed_beside_ours_and_each_variant_has_one_row(half, timed, recorded):
    calls, found = [], bench(half=half)
    variants = [
        variant(OURS, calls),
        variant("plain", calls),
        variant("now", calls),
        variant("late", calls, later=True),
    ]
    assert [name for name, _ in compare(found, *variants, against="plain")] == recorded
    assert set(calls) == timed
    assert all(row["ratio_to_plain"] > 0 and row["times_ours"] > 0 for row in found.rows)


def test_calls_go_round_copies_of_the_inputs_that_together_exceed_the_cache():
    seen, found = [], bench()
    ours = Variant(OURS, lambda number: lambda: seen.append(number), right)
    found.compare(Case("suite", "small", lambda number: number, found.l2, [ours]))
    assert found.rows[-1]["copies"] == len(set(seen)) == 4
    assert "warm_ms" in found.rows[-1]
    seen.clear()
    found.compare(Case("suite", "large", lambda number: number, 4 * found.l2, [ours]))
    assert found.rows[-1]["copies"] == len(set(seen)) == 1
    assert "warm_ms" not in found.rows[-1]


def test_shares_of_the_floor_and_of_the_copy_follow_from_bytes():
    found = bench()
    compare(found, variant(OURS), columns={"bytes": 1000, "bytes_64": 2000})
    (row,) = found.rows
    floor_ms = 1000 / row["copy_gb_per_s"] / 1e6
    assert row["of_floor"] == pytest.approx(row["p50_ms"] / floor_ms)
    assert row["of_floor_64"] == pytest.approx(row["of_floor"] / 2)
    assert row["percent_of_copy"] == pytest.approx(100 * row["gb_per_s"] / row["copy_gb_per_s"])


def test_a_variant_that_is_too_slow_is_timed_as_often_as_it_says():
    calls, found = [], bench()
    compare(found, variant(OURS), variant("slow", calls, host=True, rounds=1))
    assert len(calls) == 1
    assert found.rows[-1]["rounds"] == 1


def test_the_check_of_one_result_notices_an_error_and_a_nan():
    truth = torch.randn(5, dtype=torch.float64)
    check = agrees(lambda inputs: truth, 1e-3)
    check(None, lambda: truth + 1e-4 * truth.abs().max())
    for got in (truth + 1e-2 * truth.abs().max(), truth * torch.nan):
        with pytest.raises(AssertionError, match="relative error"):
            check(None, lambda got=got: got)


def test_the_check_of_an_update_notices_a_wrong_step_and_weights_that_stay_perturbed():
    problem = subspace.Update(bench(), subspace.SMALL[1])

    def far():
        for weight in problem.weights:
            weight.add_(1)
        problem.perturbed = [w[:, i].clone() for w, i in zip(problem.weights, problem.indices, strict=True)]

    with pytest.raises(AssertionError, match=r"not at theta \+ eps"):
        subspace.exact(problem, far)
    for weight, old in zip(problem.weights, problem.original, strict=True):
        weight.copy_(old)
    correct = problem.indexed()

    def unrestored():
        correct()
        problem.weights[0][0, 0] += 1

    with pytest.raises(AssertionError, match="not restored"):
        subspace.exact(problem, unrestored)


def test_the_check_of_a_delta_forward_notices_a_model_that_is_not_moved_or_moved_elsewhere():
    torch.manual_seed(0)
    before, change = torch.randn(8, 4), torch.randn(8, 4)
    model.moves_as(lambda: before + 1.01 * change, before, change)
    for outputs in (before, before + 2 * change, before - change, before + torch.randn(8, 4)):
        with pytest.raises(AssertionError, match="outputs move with cosine"):
            model.moves_as(lambda outputs=outputs: outputs, before, change)


def test_the_check_of_log_probabilities_notices_a_wrong_gradient():
    truth = (torch.randn(3), torch.randn(3, 4).double())
    check = logps.close_to(lambda inputs: truth, 1e-5)
    check(None, lambda: (truth[0], truth[1].float()))
    with pytest.raises(AssertionError, match="result 1 is wrong"):
        check(None, lambda: (truth[0], 1.1 * truth[1]))
    with pytest.raises(AssertionError, match="result 0 is wrong"):
        check(None, lambda: (torch.full((3,), torch.nan), truth[1]))


def test_the_check_of_a_whole_update_notices_another_direction_and_weights_that_moved():
    pytest.importorskip("transformers")
    training = updates.Training(bench())
    form = updates.FORMS[0]
    update, opt = training.shapo(form)
    update()
    before = [p.detach().clone() for p in training.model.parameters()]
    updates.check_update(training, form, opt, before)
    with pytest.raises(AssertionError, match="not restored"):
        updates.check_update(training, form, opt, [b + 1 for b in before])
    other = updates.Form("another part of the batch", pairs=0.5)
    with pytest.raises(AssertionError, match="the ascent found a gradient of norm"):
        updates.check_update(training, other, opt, before)
