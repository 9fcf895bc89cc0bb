"""The perturbation: what is moved, in which precision, and how it comes back bit for bit (requirements S1-S5, S16)."""

import warnings

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from tests.support.updates import COMBINATIONS, bits, same_bits, update, wrap


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
    with pytest.warns(UserWarning, match="lost to rounding") as warned:
        update(opt, model, batch(dtype=torch.bfloat16), loss)
    assert warned[0].filename == update.__code__.co_filename
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


@pytest.mark.parametrize("bias", [False, True])
def test_delta_writes_through_no_view_which_autograd_would_copy_gradients_for(bias):
    """`nn.Linear` gives a view of its product where it has a bias and more than two dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, bias=bias))
    opt = wrap(model, sk.Subspace({"1.weight": [1, 2]}), perturbation="delta")
    inputs = torch.randn(2, 5, 4)
    with opt.ascent():
        opt.ascend(model(inputs).square().mean())
    with opt.perturbed():
        nodes, seen = [model(inputs).grad_fn], []
    while nodes:
        node = nodes.pop()
        seen.append(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert any("NeuronUpdate" in name for name in seen)
    assert not [name for name in seen if "CopySlices" in name]


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


class Halved(nn.Module):
    """One of two layers computes in bfloat16, the other has float64 weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = nn.Linear(8, 6), nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.tanh(self.low(x.float()))
        return self.high(x.double())


def test_delta_is_measured_in_the_dtype_that_each_layer_computes_in(batch, loss):
    model = Halved()
    opt = wrap(model, sk.Subspace({"low.weight": [1, 5, 7], "high.weight": [0, 4]}), perturbation="delta")
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    gradients = dict(zip(opt._update.direction[0], opt._update.direction[1], strict=True))
    norm = torch.cat([g.double().flatten() for g in gradients.values()]).norm()
    low, high = (0.3 * g.double() / norm for g in gradients.values())
    with opt.perturbed():
        loss(model, batch()).backward()
    arrived = torch.cat([low.bfloat16().double().flatten(), high.flatten()])
    assert opt.stats["realised_norm"] == pytest.approx(arrived.norm().item(), rel=1e-6)
    assert opt.stats["epsilon_norm"] == pytest.approx(0.3, rel=1e-6)
    assert arrived.norm().item() != pytest.approx(0.3, rel=1e-6)


def test_extra_memory_is_a_few_times_the_selected_elements(loss):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
    s = sk.Subspace({f"{i}.weight": list(range(0, 512, 50)) for i in range(4)})
    opt = wrap(model, s, perturbation="in_place", ascent="grad")
    selected = s.count * 512 * 4

    def held():
        active = opt._update.bound.active
        tensors = [*(active._backups if active else []), *(opt._update.direction or ([], []))[1]]
        tensors += [buffer for target in opt._update.bound.targets for buffer in target._buffers.values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    x, places = torch.randn(4, 512), []
    for _ in range(3):
        with opt.ascent():
            opt.ascend(model(x).square().mean())
        with opt.perturbed():
            assert held() <= 3 * selected
            places.append([backup.data_ptr() for backup in opt._update.bound.active._backups])
            model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    assert opt._update.bound.active is None
    assert opt._update.direction is None
    assert held() <= 2 * selected
    assert places[0] == places[1] == places[2]


def test_nothing_is_kept_between_updates_where_whole_weights_are_selected(toy, batch, loss):
    model = toy()
    opt = wrap(model, sk.Subspace.full(model), perturbation="in_place", ascent="grad")
    update(opt, model, batch(0), loss)
    assert all(not target._buffers for target in opt._update.bound.targets)


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
