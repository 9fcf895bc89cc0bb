"""ShaPOOptimizer as an optimizer: its base's groups and state, schedulers, hooks, copies, checkpoints (S9-S11)."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import shapo_kernels as sk
from tests.support.updates import closure_for


def make(toy, subspace, seed=0, **options):
    model = toy(seed=seed)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, sk.ShaPOOptimizer(base, model, subspace, **{"rho": 0.3, **options})


def run(opt, model, batch, loss, steps):
    for step in steps:
        opt.step(closure_for(opt, model, batch(step), loss))


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_groups_and_state_are_the_bases_own_objects(toy, batch, loss, subspace):
    model, opt = make(toy, subspace)

    def same():
        return opt.param_groups is opt.base.param_groups and opt.state is opt.base.state

    assert same()
    run(opt, model, batch, loss, range(2))
    opt.load_state_dict(opt.state_dict())
    assert same()
    extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt.add_param_group({"params": [extra], "lr": 0.5, "rho": 0.1})
    assert same()
    assert opt.param_groups[-1]["params"][0] is extra
    assert isinstance(opt, torch.optim.Optimizer)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resuming_at_any_step_is_bit_exact_and_loads_with_weights_only(toy, batch, loss, subspace, interval, stop):
    model, opt = make(toy, subspace, interval=interval)
    run(opt, model, batch, loss, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    run(opt, model, batch, loss, range(stop, 8))

    other, resumed = make(toy, subspace, seed=5, interval=interval)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    assert resumed.updates == stop
    run(resumed, other, batch, loss, range(stop, 8))
    assert equal(model, other)


def test_a_base_optimizers_state_loads_too(toy, batch, loss, subspace):
    model, opt = make(toy, subspace)
    run(opt, model, batch, loss, range(2))
    other, fresh = make(toy, subspace)
    fresh.load_state_dict(opt.base.state_dict())
    assert torch.equal(fresh.state[other.head.weight]["exp_avg"], opt.state[model.head.weight]["exp_avg"])
    assert fresh.updates == 0


def test_a_state_of_another_version_is_refused_before_anything_is_loaded(toy, batch, loss, subspace):
    model, opt = make(toy, subspace)
    run(opt, model, batch, loss, range(2))
    state = opt.state_dict()
    state["shapo"]["version"] = 99
    _, fresh = make(toy, subspace)
    with pytest.raises(ValueError, match="version 99"):
        fresh.load_state_dict(state)
    assert not fresh.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.pop("draws"), "has no 'draws'"),
        (lambda own: own.update(norm="l1"), "norm is 'l1'"),
        (lambda own: own.update(rho=-1.0), "rho is -1.0"),
        (lambda own: own.update(rho=(0.1, 0.2)), "only norm='none'"),
        (lambda own: own.update(norm="none", relative=True), "needs a norm"),
        (lambda own: own.update(relative="no"), "relative is 'no': expected True or False"),
        (lambda own: own.update(version=torch.ones(2)), "is of version tensor"),
        (lambda own: own.update(draws="x"), r"draws are damaged \(str\)"),
        (lambda own: own.update(draws=torch.zeros(5, dtype=torch.uint8)), r"draws are damaged \(torch.uint8, \[5\]\)"),
        (lambda own: own.update(draws=own["draws"].float()), r"draws are damaged \(torch.float32"),
        (lambda own: own.update(skipped=None), "skipped is None: expected a whole number, 0 or more"),
        (lambda own: own.update(skipped=-1), "skipped is -1"),
        (lambda own: own.update(roundings="x"), "roundings is 'x': expected a whole number"),
        (lambda own: own.update(updates=1.5), "updates is 1.5"),
    ],
)
def test_a_damaged_state_is_refused_before_anything_is_loaded(toy, batch, loss, subspace, change, message):
    model, opt = make(toy, subspace)
    state = opt.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    change(state["shapo"])
    run(opt, model, batch, loss, range(1))
    before = str(opt.state_dict())
    for load, given in ((opt.load_state_dict, state), (opt.load_shapo_state_dict, state["shapo"])):
        with pytest.raises(ValueError, match=message):
            load(given)
        assert str(opt.state_dict()) == before
    run(opt, model, batch, loss, range(1, 2))


@pytest.mark.parametrize("own", [[1], "x", 3, False])
def test_a_state_that_is_no_mapping_is_refused_before_anything_is_loaded(toy, batch, loss, subspace, own):
    _, opt = make(toy, subspace)
    before, state = str(opt.state_dict()), opt.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    for load, given in ((opt.load_state_dict, {**state, "shapo": own}), (opt.load_shapo_state_dict, own)):
        with pytest.raises(ValueError, match=rf"the state is a {type(own).__name__}: expected"):
            load(given)
        assert str(opt.state_dict()) == before


def test_a_groups_range_does_not_come_under_a_norm_that_draws_none(toy, subspace):
    _, drawing = make(toy, subspace, norm="none")
    _, opt = make(toy, subspace)
    drawing.param_groups[0]["rho"] = (0.1, 0.2)
    with pytest.raises(ValueError, match="only norm='none'"):
        drawing.load_shapo_state_dict(opt.shapo_state_dict())
    assert drawing.norm == "none"
    with pytest.raises(ValueError, match="only norm='none'"):
        opt.load_state_dict({**drawing.state_dict(), "shapo": opt.shapo_state_dict()})
    opt.load_state_dict(drawing.state_dict())
    assert opt.norm == "none"
    assert opt.param_groups[0]["rho"] == (0.1, 0.2)


def test_loading_replaces_radius_norm_and_interval_and_leaves_the_other_options(toy, subspace):
    _, saved = make(toy, subspace, rho=0.7, relative=True, norm="layer", interval=3, eta=1e-3)
    _, opt = make(toy, subspace, rho=0.3, replay_rng=True, eta=1e-6)
    opt.load_state_dict(saved.state_dict())
    assert (opt.rho, opt.relative, opt.norm, opt.interval) == (0.7, True, "layer", 3)
    assert (opt.replay_rng, opt.eta) == (True, 1e-6)


def test_another_number_of_groups_is_refused_before_anything_is_loaded(toy, subspace):
    (_, opt), other = make(toy, subspace, rho=0.3), toy()
    groups = [{"params": [p]} for p in other.parameters()]
    state = sk.ShaPOOptimizer(torch.optim.SGD(groups, lr=0.1), other, subspace, rho=0.7).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(state)
    assert opt.rho == 0.3


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_a_state_dict_taken_while_perturbed_is_clean_or_raises(toy, batch, loss, subspace, perturbation):
    model, opt = make(toy, subspace, perturbation=perturbation)
    clean = copy.deepcopy(model.state_dict())
    before = opt.state_dict()
    loss(model, batch()).backward()
    opt.perturb()
    assert str(opt.state_dict()) == str(before)
    if perturbation == "in_place":
        with pytest.raises(RuntimeError, match=r"layers\.0\.down_proj.* are perturbed"):
            model.state_dict()
    else:
        assert all(torch.equal(clean[name], value) for name, value in model.state_dict().items())
    opt.restore()
    assert all(torch.equal(clean[name], value) for name, value in model.state_dict().items())


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
}


def test_the_list_of_schedulers_is_torchs():
    known = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_on_the_wrapper_act_as_on_a_bare_optimizer_and_warn_of_nothing(toy, batch, loss, subspace, name):
    def rates(opt, model, steps=4):
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*epoch parameter.*")  # torch's own schedulers, chained
            scheduler = SCHEDULERS[name](opt)
            for step in range(steps):
                opt.step(closure_for(opt, model, batch(step), loss))
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                found.append(opt.param_groups[0]["lr"])
        return found

    model, opt = make(toy, subspace)
    bare = toy()
    assert rates(opt, model) == rates(torch.optim.AdamW(bare.parameters(), lr=0.01), bare)


def test_hooks_fire_once_and_in_torchs_order(toy, batch, loss, subspace):
    def events(opt, model):
        seen = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
            opt.register_step_pre_hook(lambda *_: seen.append("pre")),
            opt.register_step_post_hook(lambda *_: seen.append("post")),
            register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        ]

        def closure():
            seen.append("closure")
            return closure_for(opt, model, batch(), loss)()

        opt.step(closure)
        for handle in handles:
            handle.remove()
        opt.step(closure_for(opt, model, batch(), loss))
        return seen

    model, opt = make(toy, subspace)
    bare = toy()
    expected = events(torch.optim.AdamW(bare.parameters()), bare)
    ours = events(opt, model)
    assert [e for i, e in enumerate(ours) if e != "closure" or ours[i - 1] != "closure"] == expected
    assert ours.count("closure") == 2


def test_state_dict_hooks_run_on_the_wrapper(toy, subspace):
    _, opt = make(toy, subspace)
    opt.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    assert opt.state_dict()["mark"] == 1
    seen = []
    opt.register_load_state_dict_pre_hook(lambda _, state: seen.append(sorted(state)))
    opt.load_state_dict({k: v for k, v in opt.state_dict().items() if k != "mark"})
    assert seen == [["param_groups", "state"]]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_a_deep_copy_of_model_and_optimizer_trains_on_alike(toy, batch, loss, subspace, perturbation, scheduled):
    model, opt = make(toy, subspace, perturbation=perturbation, interval=2)
    if scheduled:
        lr_scheduler.StepLR(opt, 1)
    run(opt, model, batch, loss, range(3))
    other, copied = copy.deepcopy((model, opt))
    assert copied.model is other
    assert copied.base is not opt.base
    assert copied.param_groups[0]["params"][0] is next(other.parameters())
    run(opt, model, batch, loss, range(3, 6))
    run(copied, other, batch, loss, range(3, 6))
    assert equal(model, other)
    copied.detach()
    assert not any(m._forward_hooks for m in other.modules())
    assert any(m._forward_hooks for m in model.modules())


def test_a_pickled_optimizer_trains_on_alike(toy, batch, loss, subspace):
    model, opt = make(toy, subspace)
    run(opt, model, batch, loss, range(2))
    data = pickle.dumps(opt)
    again = pickle.loads(data)
    run(opt, model, batch, loss, range(2, 4))
    run(again, again.model, batch, loss, range(2, 4))
    assert equal(model, again.model)


def test_a_copy_of_the_model_alone_is_not_moved_with_the_original(toy, batch, loss, subspace):
    model, opt = make(toy, subspace, perturbation="delta", rho=10.0)
    reference = copy.deepcopy(model)
    x = batch()[0]
    before = reference(x).detach()
    loss(model, batch()).backward()
    opt.perturb()
    assert torch.equal(reference(x), before)
    assert not torch.allclose(model(x), before)
    opt.restore()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), before)


def test_copying_while_perturbed_is_refused(toy, batch, loss, subspace):
    model, opt = make(toy, subspace)
    loss(model, batch()).backward()
    opt.perturb()
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="perturbed"):
            copier(opt)
    opt.restore()


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (torch.optim.SGD, TypeError, "pass an instance"),
        ("adamw", TypeError, "expected an instance"),
        (lambda p: torch.optim.LBFGS(p), TypeError, "LBFGS cannot be wrapped"),
        (lambda p: torch.optim.SparseAdam(p), TypeError, "SparseAdam cannot be wrapped"),
    ],
)
def test_bases_that_cannot_be_wrapped_are_refused(toy, subspace, base, error, message):
    model = toy()
    if callable(base) and not isinstance(base, type):
        base = base(list(model.parameters()))
    with pytest.raises(error, match=message):
        sk.ShaPOOptimizer(base, model, subspace, rho=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho is -0.1"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"rho": float("inf")}, "rho is inf"),
        ({"rho": "0.1"}, "rho is '0.1'"),
        ({"rho": (0.1, 0.2)}, "norm='none'"),
        ({"rho": (0.3, 0.2), "norm": "none"}, "low <= high"),
        ({"interval": 0}, "interval is 0"),
        ({"interval": 1.5}, "interval is 1.5"),
        ({"ascent": "full"}, "ascent is 'full'"),
        ({"perturbation": "inplace"}, "perturbation is 'inplace'"),
        ({"norm": "l1"}, "norm is 'l1'"),
    ],
)
def test_options_out_of_range_are_refused_and_leave_no_hook(toy, subspace, options, message):
    model = toy()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        sk.ShaPOOptimizer(base, model, subspace, **{"rho": 0.1, **options})
    assert not any(m._forward_hooks for m in model.modules())


def test_adadeltas_own_rho_is_left_alone(toy, batch, loss, subspace):
    model = toy()
    opt = sk.ShaPOOptimizer(torch.optim.Adadelta(model.parameters()), model, subspace, rho=0.05)
    run(opt, model, batch, loss, range(1))
    assert opt.stats["epsilon_norm"] == pytest.approx(0.05)
    assert opt.param_groups[0]["rho"] == 0.9
    opt.param_groups[0]["shapo_rho"] = 0.2
    run(opt, model, batch, loss, range(1, 2))
    assert opt.stats["epsilon_norm"] == pytest.approx(0.2)


@pytest.mark.parametrize("form", ["by hand", "selective", "grad"])
def test_sparse_gradients_are_refused_in_one_line(form):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {} if form == "by hand" else {"ascent": form}
    opt = sk.ShaPOOptimizer(base, model, sk.Subspace.full(model), rho=0.1, **options)
    with pytest.raises(TypeError, match=r"^[^\n]*dense gradients[^\n]*$"):  # noqa: PT012
        if form == "by hand":
            model(torch.tensor([1, 2])).sum().backward()
            opt.perturb()
        with opt.ascent():
            opt.ascend(model(torch.tensor([1, 2])).sum())
