"""S1 to S6 and S16: what happens to the weights."""

import contextlib
import warnings

import torch
from torch import nn

import shapo_kernels as sk
from tests.requirements import peers
from tests.requirements.registry import requirement
from tests.requirements.small import SELECTED, assert_close, bits, flat, loss_of, mlp, same_bits
from tests.requirements.wrappers import LR, RHO, OursByDelta, PytorchOptimizer


@requirement("S1", missed_by=(peers.SubtractsEps, peers.RebindsData), met_by=(PytorchOptimizer, peers.DenseMask))
def a_step_with_learning_rate_zero_changes_no_bit_and_moves_no_storage(wrapper):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = mlp(dtype)
        model[2].weight.data = model[2].weight.data.t().contiguous().t()  # columns lie together
        before, places = bits(model), [p.data_ptr() for p in model.parameters()]
        wrapped = wrapper(model, lr=0.0)
        for step in range(3):
            wrapped.update(loss_of(model, step))
        assert same_bits(model, before), dtype
        assert [p.data_ptr() for p in model.parameters()] == places


def allocations(run):
    """(largest single allocation, most memory in use beyond the start) on the CPU, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    largest = held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        largest, held = max(largest, event.nbytes()), held + event.nbytes()
        most = max(most, held)
    return largest, most


@requirement("S2", missed_by=(PytorchOptimizer, peers.DenseMask, peers.SubtractsEps), met_by=(OursByDelta,))
def moving_takes_the_memory_of_the_selected_columns_and_no_full_size_buffer(wrapper):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 512))
    columns = list(range(0, 1024, 100))
    wrapped = wrapper(model, only={"2.weight": columns})
    x = torch.randn(4, 64)
    selected = 512 * len(columns) * 4
    for _ in range(2):
        wrapped.find(lambda: model(x).square().mean())
        largest, most = allocations(wrapped.move)
        assert largest <= selected, f"{largest} bytes at once, {selected} are selected"
        assert most <= 3 * selected + 16384
        wrapped.descend(lambda: model(x).square().mean())
        largest, _ = allocations(wrapped.finish)
        assert largest <= selected


@requirement("S3", missed_by=(PytorchOptimizer, peers.DenseMask))
def unselected_weights_are_never_written(wrapper):
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, 2] = -0.0  # adding a zero would make it +0
    before = bits(model)
    weight = model[2].weight.detach().clone()
    wrapped = wrapper(model, only=SELECTED)
    wrapped.find(loss_of(model))
    wrapped.move()
    moved = bits(model)
    for i, (name, _) in enumerate(model.named_parameters()):
        assert name == "2.weight" or torch.equal(moved[i], before[i]), f"{name} has moved"
    now = model[2].weight.detach()
    changed = (now != weight).any(0) | (now.signbit() != weight.signbit()).any(0)
    assert changed.nonzero().flatten().tolist() == SELECTED["2.weight"]


@requirement("S4", missed_by=(PytorchOptimizer, peers.DenseMask))
def the_norm_of_eps_is_rho_over_the_selected_gradient_alone(wrapper):
    model = mlp(torch.float64)
    before = model[2].weight.detach().clone()
    wrapped = wrapper(model, only=SELECTED)
    wrapped.find(loss_of(model))
    wrapped.move()
    moved = (model[2].weight.detach() - before)[:, SELECTED["2.weight"]].norm().item()
    assert abs(moved / RHO - 1) < 1e-9, moved


@requirement("S4", missed_by=(peers.SumsInHalf,), met_by=(PytorchOptimizer, peers.SubtractsEps))
def norms_of_float16_gradients_are_accumulated_wider(wrapper):
    model = nn.Linear(512, 8, bias=False).half()
    with torch.no_grad():
        model.weight.zero_()
    wrapped = wrapper(model, rho=1.0)
    x = torch.full((1, 512), 300.0, dtype=torch.float16)
    wrapped.find(lambda: model(x).sum())  # 4096 gradients of 300: their norm is 19200, the sum of squares 3.7e8
    wrapped.move()
    assert abs(flat(model.parameters()).norm().item() - 1) < 1e-3


@requirement("S4", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def what_reaches_the_forward_pass_is_reported_and_warned_of(wrapper):
    for rho, lost in ((1e-4, True), (1.0, False)):
        model = mlp(torch.bfloat16)
        wrapped = wrapper(model, rho=rho)
        before = flat(model.parameters())
        wrapped.find(loss_of(model))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped.move()
        realised = (flat(model.parameters()) - before).norm().item()
        wrapped.descend(loss_of(model))
        wrapped.finish()
        stats = wrapped.stats()
        assert abs(stats["realised_norm"] - realised) < 1e-3 * rho
        assert (stats["realised_cosine"] < 0.9) == lost
        assert any("lost to rounding" in str(w.message) for w in caught) == lost


@requirement("S5", missed_by={peers.SubtractsEps: RuntimeError}, met_by=(PytorchOptimizer,))  # a norm of no gradients
def nothing_to_climb_perturbs_nothing_and_is_no_error(wrapper):
    model = mlp()
    before = bits(model)
    wrapped = wrapper(model, only={} if wrapper.__name__.startswith("Ours") else None)
    zero = lambda: loss_of(model)() * 0  # noqa: E731
    wrapped.find(zero)
    wrapped.move()
    assert same_bits(model, before)
    wrapped.descend(zero)
    wrapped.finish()
    assert same_bits(model, before)
    # No gradients at all, in the form that asks for none.
    by_hand = wrapper(model, only=SELECTED)
    by_hand.optimizer.first_step()
    by_hand.optimizer.second_step()
    assert same_bits(model, before)


@requirement("S5", missed_by=(PytorchOptimizer, peers.SubtractsEps), met_by=(peers.WaitsForTheDevice,))
def a_norm_that_is_not_finite_perturbs_nothing(wrapper):
    for value in (float("inf"), float("nan")):
        model = mlp()
        before = bits(model)
        wrapped = wrapper(model)
        wrapped.find(lambda model=model, value=value: loss_of(model)() * value)
        wrapped.move()
        assert all(p.isfinite().all() for p in model.parameters())
        assert same_bits(model, before)
        wrapped.descend(loss_of(model))
        wrapped.finish()
        assert all(p.isfinite().all() for p in model.parameters())


@requirement("S5", missed_by=(PytorchOptimizer, peers.WaitsForTheDevice))
def a_skipped_perturbation_is_counted(wrapper):
    model = mlp()
    wrapped = wrapper(model)
    for value in (float("inf"), 1.0, float("nan")):
        wrapped.find(lambda value=value: loss_of(model)() * value)
        wrapped.move()
        wrapped.descend(loss_of(model))
        wrapped.finish()
    assert wrapped.stats()["skipped"] == 2


@requirement("S6", missed_by=(PytorchOptimizer, peers.RebindsData))
def an_exception_between_the_passes_restores_the_weights(wrapper):
    for error in (ValueError, KeyboardInterrupt):
        for fails_at in (1, 2):
            model = mlp()
            before = bits(model)
            wrapped = wrapper(model)
            calls = []

            def closure(wrapped=wrapped, model=model, calls=calls, fails_at=fails_at, error=error):
                calls.append(0)
                wrapped.optimizer.zero_grad()
                value = loss_of(model)()
                value.backward()
                if len(calls) == fails_at:
                    raise error
                return value

            with contextlib.suppress(error):
                wrapped.update_by_closure(closure)
            assert same_bits(model, before), f"{error.__name__} in pass {fails_at}"


@requirement("S6", missed_by=(peers.RebindsData,), met_by=(PytorchOptimizer, peers.SubtractsEps))
def a_gradient_missing_in_either_pass_leaves_nothing_perturbed(wrapper):
    for first, second in ((0, 4), (4, 0)):
        model = mlp(torch.float64)
        before = flat(model.parameters())
        wrapped = wrapper(model, lr=0.0)

        def part(layer, model=model):
            return lambda: model[layer](torch.ones(1, model[layer].in_features, dtype=torch.float64)).square().sum()

        wrapped.find(part(first))
        wrapped.move()
        wrapped.descend(part(second))
        wrapped.finish()
        assert (flat(model.parameters()) - before).abs().max() < 1e-12


# -- S16: radii


@requirement("S16", missed_by=(peers.ByName,), met_by=(PytorchOptimizer, peers.SubtractsEps))
def groups_carry_their_own_radius_and_zero_moves_nothing(wrapper):
    model = mlp(torch.float64)
    groups = [
        {"params": model[0].parameters(), "rho": 0.0},
        {"params": model[2].parameters(), "rho": 0.5},
        {"params": model[4].parameters()},
    ]
    wrapped = wrapper(model, groups=groups)
    gradients = torch.autograd.grad(loss_of(model)(), list(model.parameters()))
    norm = flat(gradients).norm()
    before = [p.detach().clone() for p in model.parameters()]
    wrapped.find(loss_of(model))
    wrapped.move()
    for i, (p, old, g) in enumerate(zip(model.parameters(), before, gradients, strict=True)):
        radius = (0.0, 0.0, 0.5, 0.5, RHO, RHO)[i]
        torch.testing.assert_close(p.detach() - old, radius * g / norm, rtol=1e-6, atol=1e-9)


@requirement("S16", missed_by=(peers.ByName,), met_by=(PytorchOptimizer,))
def a_radius_rises_from_a_plain_warm_start(wrapper):
    model, plain = mlp(torch.float64), mlp(torch.float64)
    wrapped = wrapper(model, groups=[{"params": model.parameters(), "rho": 0.0}], rho=0.0)
    base = torch.optim.SGD(plain.parameters(), lr=LR)
    for step in range(2):
        wrapped.update(loss_of(model, step))
        loss_of(plain, step)().backward()
        base.step()
        base.zero_grad()
    assert_close(model, plain)
    for radius in (0.1, 0.2):
        wrapped.optimizer.param_groups[0]["rho"] = radius
        before = flat(model.parameters())
        wrapped.find(loss_of(model))
        wrapped.move()
        assert abs((flat(model.parameters()) - before).norm().item() / radius - 1) < 1e-6
        wrapped.descend(loss_of(model))
        wrapped.finish()


@requirement("S16", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def maximising_a_loss_is_minimising_its_negative(wrapper):
    up, down = mlp(torch.float64), mlp(torch.float64)
    wrapper(up, maximize=True).update(loss_of(up))
    wrapper(down).update(lambda: -loss_of(down)())
    assert_close(up, down)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))[:, :3]


@requirement("S16", missed_by=(peers.ByName,), met_by=(PytorchOptimizer, peers.SubtractsEps))
def a_tied_weight_is_perturbed_once(wrapper):
    model = Tied()
    before = flat(model.parameters())
    wrapped = wrapper(model)
    wrapped.find(loss_of(model))
    wrapped.move()
    assert abs((flat(model.parameters()) - before).norm().item() / RHO - 1) < 1e-6


@requirement("S16", missed_by=(peers.ByName,), met_by=(peers.DenseMask,))
def a_neuron_named_twice_is_refused_or_moved_once(wrapper):
    moved = []
    for columns in ([1, 5], [1, 5, 5]):
        model = mlp(torch.float64)
        before = model[2].weight.detach().clone()
        try:
            wrapped = wrapper(model, only={"2.weight": columns})
        except sk.SubspaceError:
            return
        wrapped.find(loss_of(model))
        wrapped.move()
        moved.append(model[2].weight.detach() - before)
    torch.testing.assert_close(*moved)
