"""ShaPOOptimizer: what an update leaves behind, whatever happens in it (requirements S1-S7, S13, S16, S18)."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import shapo_kernels as sk

COMBINATIONS = list(itertools.product(["selective", "grad"], ["in_place", "delta"]))


def wrap(model, subspace, *, base=torch.optim.SGD, lr=0.1, rho=0.3, **options):
    return sk.ShaPOOptimizer(base(model.parameters(), lr=lr), model, subspace, rho=rho, **options)


def update(opt, model, data, loss):
    with opt.ascent():
        opt.ascend(loss(model, data))
    with opt.perturbed():
        loss(model, data).backward()
    opt.step()
    opt.zero_grad()


def bits(model):
    return [p.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8) for p in model.parameters()]


def same_bits(model, before):
    return all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
@pytest.mark.filterwarnings("ignore:the perturbation is lost")
def test_a_step_with_learning_rate_zero_changes_no_bit_and_moves_no_storage(
    toy, batch, loss, subspace, dtype, ascent, perturbation
):
    model = toy(dtype)
    model.layers[0].down_proj.weight.data = model.layers[0].down_proj.weight.data.t().contiguous().t()
    before, pointers = bits(model), [p.data_ptr() for p in model.parameters()]
    opt = wrap(model, subspace, lr=0.0, ascent=ascent, perturbation=perturbation)
    for step in range(3):
        update(opt, model, batch(step, dtype), loss)
    assert same_bits(model, before)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_unselected_weights_are_never_written(toy, batch, loss, subspace):
    model = toy()
    weight = model.layers[0].down_proj.weight
    before = weight.detach().clone()
    opt = wrap(model, subspace)
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    with opt.perturbed():
        changed = (weight.detach() != before).any(0).nonzero().flatten()
    assert changed.tolist() == subspace["layers.0.down_proj.weight"].tolist()


def test_the_norm_of_epsilon_is_rho_over_the_selected_gradient_only(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, rho=0.25)
    update(opt, model, batch(), loss)
    stats = opt.stats
    assert stats["epsilon_norm"] == pytest.approx(0.25, rel=1e-9)
    assert stats["realised_norm"] == pytest.approx(0.25, rel=1e-9)
    assert stats["realised_cosine"] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_gradients_of_an_update_are_those_of_the_descent_alone(toy, batch, loss, subspace, ascent, perturbation):
    model = toy()
    opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    assert all(p.grad is None for p in model.parameters())
    earlier = torch.ones_like(model.head.bias)
    model.head.bias.grad = earlier.clone()
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    assert torch.equal(model.head.bias.grad, earlier)


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_an_exception_in_either_pass_leaves_the_weights_as_they_were(
    toy, batch, loss, subspace, error, ascent, perturbation
):
    model = toy(torch.float32)
    data = batch(dtype=torch.float32)
    opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    before, output = bits(model), model(data[0]).detach().clone()
    with pytest.raises(error), opt.ascent():  # noqa: PT012
        opt.ascend(loss(model, data))
        raise error
    with opt.ascent():
        opt.ascend(loss(model, data))
    with pytest.raises(error), opt.perturbed():  # noqa: PT012
        assert not torch.equal(model(data[0]), output)
        raise error
    assert same_bits(model, before)
    assert torch.equal(model(data[0]), output)
    for fail_at in (1, 2):
        calls = itertools.count(1)

        def closure(calls=calls, fail_at=fail_at):
            opt.zero_grad()
            value = loss(model, data)
            value.backward()
            if next(calls) == fail_at:
                raise error
            return value

        with pytest.raises(error):
            opt.step(closure)
        assert same_bits(model, before)
        assert torch.equal(model(data[0]), output)
    assert opt.updates == 0
    opt.zero_grad()
    update(opt, model, data, loss)
    assert opt.updates == 1


@pytest.mark.parametrize("after_writing", [False, True])
def test_an_interrupt_inside_perturb_is_undone_whether_or_not_it_had_written(
    toy, batch, loss, subspace, monkeypatch, after_writing
):
    model = toy(torch.float32)
    opt = wrap(model, subspace, perturbation="in_place")
    before = bits(model)
    real = sk.ops.perturb_

    def interrupted(*args, **kwargs):
        if after_writing:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr("shapo_kernels.perturbation.ops.perturb_", interrupted)
    with opt.ascent():
        opt.ascend(loss(model, batch(dtype=torch.float32)))
    with pytest.raises(KeyboardInterrupt), opt.perturbed():
        pytest.fail("the block must not run")
    assert same_bits(model, before)


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_a_missing_gradient_or_a_zero_one_perturbs_nothing(toy, batch, subspace, ascent, perturbation):
    model = toy()
    before = bits(model)
    opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    data = batch()
    with opt.ascent():
        opt.ascend((model(data[0]) * 0).sum())
    with opt.perturbed():
        assert same_bits(model, before)
        (model(data[0]) * 0).sum().backward()
    opt.step()
    assert same_bits(model, before)
    assert opt.stats["epsilon_norm"] == 0
    assert opt.stats["skipped"] == 0
    # Only one of the two layers takes part in this loss.
    part = model.layers[1].down_proj.weight.detach().clone()
    with opt.ascent():
        opt.ascend(model.layers[0](data[0]).square().sum())
    with opt.perturbed():
        assert torch.equal(model.layers[1].down_proj.weight, part)


def test_grad_none_in_one_pass_and_not_in_the_other_restores(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, lr=0.0)
    before = bits(model)
    loss(model, batch()).backward()
    model.layers[0].down_proj.weight.grad = None
    opt.first_step()
    opt.second_step()
    assert same_bits(model, before)
    opt.first_step()  # no gradient at all
    opt.second_step()
    assert same_bits(model, before)


def test_an_empty_subspace_is_a_plain_update(toy, batch, loss):
    ours, plain = toy(), toy()
    opt = wrap(ours, sk.Subspace({}))

    def closure():
        opt.zero_grad()
        value = loss(ours, batch())
        value.backward()
        return value

    opt.step(closure)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    loss(plain, batch()).backward()
    base.step()
    assert same_bits(ours, bits(plain))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_a_norm_that_is_not_finite_skips_the_perturbation_and_counts(
    toy, batch, loss, subspace, value, ascent, perturbation
):
    model = toy(torch.float32)
    data = batch(dtype=torch.float32)
    opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    before, output = bits(model), model(data[0]).detach().clone()
    with opt.ascent():
        opt.ascend(loss(model, data) * value)
    with opt.perturbed():
        assert torch.equal(model(data[0]), output)
        assert same_bits(model, before)
    assert same_bits(model, before)
    assert opt.stats["skipped"] == 1


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_an_interval_costs_exactly_its_passes(toy, batch, loss, subspace, interval):
    model = toy()
    opt = wrap(model, subspace, interval=interval)
    calls = 0
    for step in range(10):

        def closure(step=step):
            nonlocal calls
            calls += 1
            opt.zero_grad()
            value = loss(model, batch(step))
            value.backward()
            return value

        assert opt.due == ((step + 1) % interval == 0)
        opt.step(closure)
    assert calls == 10 + 10 // interval


def test_step_with_a_closure_returns_the_first_passs_loss_positional_and_keyword(toy, batch, loss, subspace):
    for keyword in (False, True):
        model = toy()
        opt = wrap(model, subspace)
        expected = loss(model, batch()).item()
        values = []

        def closure(model=model, opt=opt, values=values):
            opt.zero_grad()
            value = loss(model, batch())
            value.backward()
            values.append(value.item())
            return value

        returned = opt.step(closure=closure) if keyword else opt.step(closure)
        assert returned.item() == expected == values[0]
        assert values[1] > values[0]


def test_forgetting_the_ascent_is_an_error_that_says_what_to_do(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace)
    with pytest.raises(RuntimeError, match=r"opt\.ascent"), opt.perturbed():
        pass
    loss(model, batch()).backward()
    with pytest.raises(RuntimeError, match="pass a closure"):
        opt.step()
    with opt.ascent(), pytest.raises(RuntimeError, match="depends on no selected neuron"):
        opt.ascend((model.head.weight**2).sum())
    with pytest.raises(RuntimeError, match=r"inside `with opt.ascent"):
        opt.ascend(loss(model, batch()))
    with opt.ascent(), pytest.raises(RuntimeError, match="does not require grad"):
        opt.ascend(loss(model, batch()).detach())


def test_stepping_or_perturbing_while_perturbed_is_refused(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace)
    loss(model, batch()).backward()
    opt.perturb()
    for forbidden in (opt.step, opt.perturb, lambda: opt.load_state_dict(opt.state_dict())):
        with pytest.raises(RuntimeError, match="perturbed"):
            forbidden()
    opt.restore()


def test_an_update_that_is_not_due_is_plain_in_every_form(toy, batch, loss, subspace):
    plain = toy()
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    loss(plain, batch()).backward()
    base.step()
    expected = bits(plain)
    for way in ("context", "hand", "closure"):
        model = toy()
        opt = wrap(model, subspace, interval=2)
        if way == "context":
            update(opt, model, batch(), loss)
        elif way == "hand":
            loss(model, batch()).backward()
            opt.first_step()
            loss(model, batch()).backward()
            opt.second_step()
        else:

            def closure(model=model, opt=opt):
                opt.zero_grad()
                value = loss(model, batch())
                value.backward()
                return value

            opt.step(closure)
        assert same_bits(model, expected)


def test_groups_carry_their_own_rho_and_zero_perturbs_nothing(toy, batch, loss, subspace):
    model = toy()
    first, second = model.layers[0].parameters(), model.layers[1].parameters()
    base = torch.optim.SGD(
        [{"params": first, "rho": 0.0}, {"params": second}, {"params": model.head.parameters()}], lr=0.1
    )
    opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.3)
    before = [layer.down_proj.weight.detach().clone() for layer in model.layers]
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    with opt.perturbed():
        assert torch.equal(model.layers[0].down_proj.weight, before[0])
        assert not torch.equal(model.layers[1].down_proj.weight, before[1])
    base.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match=r"rho is -1.0"):
        _ = opt.due


def test_a_radius_may_be_scheduled_from_a_plain_warm_start(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, rho=0.0)
    dues = []
    for step in range(4):
        opt.rho = 0.0 if step < 2 else 0.1 * step
        dues.append(opt.due)
        update(opt, model, batch(step), loss)
    assert dues == [False, False, True, True]
    assert opt.stats["epsilon_norm"] == pytest.approx(0.3)


def test_raw_factors_are_drawn_from_their_range_and_resume(toy, batch, loss, subspace):
    def norms(opt, model, steps):
        found = []
        for step in steps:
            update(opt, model, batch(step), loss)
            found.append(opt.stats["epsilon_norm"] / opt.stats["grad_norm"])
        return found

    model = toy()
    opt = wrap(model, subspace, rho=(0.2, 0.4), norm="none")
    first = norms(opt, model, range(3))
    assert all(0.2 <= factor <= 0.4 for factor in first)
    assert len(set(first)) == 3
    again = wrap(toy(), subspace, rho=(0.2, 0.4), norm="none")
    again.load_state_dict(opt.state_dict())
    assert norms(again, again.model, range(3, 6)) == pytest.approx(norms(opt, model, range(3, 6)), rel=1e-9)


def test_maximize_moves_the_weights_up(toy, batch, loss, subspace):
    model = toy()
    opt = sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, maximize=True), model, subspace, rho=0.01)
    start = loss(model, batch()).item()
    for _ in range(3):
        update(opt, model, batch(), loss)
    assert loss(model, batch()).item() > start


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False, dtype=torch.float64)
        self.b = nn.Linear(8, 8, bias=False, dtype=torch.float64)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.b(torch.tanh(self.a(x))))


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_tied_weights_are_perturbed_once_along_the_sum_of_their_gradients(batch, loss, ascent, perturbation):
    torch.manual_seed(0)
    model = Tied()
    s = sk.Subspace({"a.weight": [1, 2], "b.weight": [2, 3]})
    opt = wrap(model, s, ascent=ascent, perturbation=perturbation)
    loss(model, batch()).backward()
    g = model.a.weight.grad[:, [1, 2, 3]].clone()
    model.zero_grad()
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    before = model.a.weight.detach().clone()
    x = torch.eye(8, dtype=torch.float64)
    with opt.perturbed():
        moved = (model.b(x).t() - before).detach()
    expected = torch.zeros_like(before)
    expected[:, [1, 2, 3]] = 0.3 * g / g.norm()
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


def test_a_frozen_weight_is_perturbed_by_the_selective_ascent(toy, batch, loss, subspace):
    model = toy()
    reference = toy()
    loss(reference, batch()).backward()
    for layer in model.layers:
        layer.down_proj.weight.requires_grad_(False)
    opt = sk.ShaPOOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model, subspace, rho=0.3
    )
    update(opt, model, batch(), loss)
    norm = torch.sqrt(
        sum(dict(reference.named_parameters())[n].grad[:, i].square().sum() for n, i in subspace.items())
    ).item()
    assert opt.stats["grad_norm"] == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("name", ["embedding.weight", "norm.weight"])
def test_delta_refuses_weights_that_are_no_linear_layers(name):
    model = nn.Module()
    model.embedding, model.norm = nn.Embedding(4, 4), nn.LayerNorm(4)
    with pytest.raises(sk.SubspaceError, match="in_place"):
        wrap(model, sk.Subspace({name: [0]}, axis=0), perturbation="delta")
    wrap(model, sk.Subspace({name: [0]}, axis=0))


def test_detach_leaves_the_model_as_it_was_found(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, perturbation="delta")
    before = bits(model)
    loss(model, batch()).backward()
    opt.perturb()
    opt.detach()
    assert same_bits(model, before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_hooks_with_kwargs
        assert not module._state_dict_pre_hooks


def test_a_perturbation_lost_to_rounding_warns_once(toy, batch, loss, subspace):
    model = toy(torch.bfloat16)
    opt = wrap(model, subspace, rho=1e-4, perturbation="in_place")
    with pytest.warns(UserWarning, match="lost to rounding"):
        update(opt, model, batch(dtype=torch.bfloat16), loss)
    assert opt.stats["realised_cosine"] < 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(opt, model, batch(dtype=torch.bfloat16), loss)


def test_delta_keeps_a_small_perturbation_in_bfloat16_and_auto_chooses_it(toy, batch, loss, subspace):
    for perturbation in ("delta", "auto"):
        model = toy(torch.bfloat16)
        opt = wrap(model, subspace, rho=1e-4, perturbation=perturbation)
        update(opt, model, batch(dtype=torch.bfloat16), loss)
        assert opt.stats["realised_cosine"] > 0.999
        assert opt.stats["realised_norm"] == pytest.approx(1e-4, rel=1e-2)


def test_autocast_is_the_dtype_that_the_perturbation_is_measured_and_chosen_in(toy, batch, loss, subspace):
    data = batch(dtype=torch.float32)

    def autocast_update(opt, model):
        with torch.autocast("cpu", torch.bfloat16):
            with opt.ascent():
                opt.ascend(loss(model, data))
            with opt.perturbed():
                loss(model, data).backward()
        opt.step()

    model = toy(torch.float32)
    opt = wrap(model, subspace, rho=1e-4, perturbation="in_place")
    with pytest.warns(UserWarning, match="lost to rounding"):
        autocast_update(opt, model)
    model = toy(torch.float32)
    opt = wrap(model, subspace, rho=1e-4)
    autocast_update(opt, model)
    assert opt.stats["realised_cosine"] > 0.999


def test_extra_memory_is_a_few_times_the_selected_elements(loss):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
    s = sk.Subspace({f"{i}.weight": list(range(0, 512, 50)) for i in range(4)})
    opt = wrap(model, s, perturbation="in_place")
    selected = s.count * 512 * 4
    held = lambda: sum(  # noqa: E731
        tensor.untyped_storage().nbytes() for tensor in [*opt._active._backups, *(opt._direction or ([], []))[1]]
    )
    x = torch.randn(4, 512)
    with opt.ascent():
        opt.ascend(model(x).square().mean())
    with opt.perturbed():
        assert held() <= 3 * selected
    assert opt._active is None
    assert opt._direction is None
