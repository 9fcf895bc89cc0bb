"""S7 to S11, S13, S17 and S18: what an update is to whoever drives it, saves it, schedules it or counts its passes."""

import contextlib
import copy
import io
import pickle
import warnings

import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.requirements import peers
from tests.requirements.registry import requirement
from tests.requirements.small import assert_close, batch, bits, closure_of, flat, loss_of, mlp, same_bits
from tests.requirements.wrappers import LR, PytorchLookSAM, PytorchOptimizer

MOMENTUM = {"momentum": 0.9}


def counted(wrapped, model, updates=1, start=0):
    """How often the closure was called in so many updates by closure, its values, and what the last step returned."""
    values, returned = [], None
    for step in range(start, start + updates):
        run = closure_of(wrapped, loss_of(model, step))

        def closure(run=run):
            value = run()
            values.append(value.item())
            return value

        returned = wrapped.update_by_closure(closure)
    return values, returned


@requirement("S7", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def step_runs_the_closure_twice_and_returns_the_first_loss(wrapper):
    model = mlp()
    values, returned = counted(wrapper(model), model)
    assert len(values) == 2
    assert returned is not None
    assert returned.item() == values[0] < values[1]
    again = mlp()
    wrapped = wrapper(again)
    wrapped.optimizer.step(closure=closure_of(wrapped, loss_of(again)))  # by keyword
    assert_close(model, again)


@requirement("S18", missed_by=(PytorchLookSAM,))
def an_interval_costs_exactly_its_passes(wrapper):
    for interval in (2, 5):
        model = mlp()
        wrapped = wrapper(model, settings={"interval": interval})
        values, _ = counted(wrapped, model, updates=20)
        assert len(values) == 20 + 20 // interval


@requirement("S8", met_by=(PytorchOptimizer,), missed_by=(peers.Unscaled,))
def a_scaled_update_equals_the_plain_one(wrapper):
    scaled, plain = mlp(), mlp()
    wrapped, other = wrapper(scaled), wrapper(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        wrapped.update_scaled(scaler, loss_of(scaled, step), loss_of(scaled, step))
        other.update(loss_of(plain, step))
    assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


@requirement("S8", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def what_is_not_finite_in_either_pass_skips_the_update_and_lowers_the_scale(wrapper):
    for spoiled in (0, 1):
        model = mlp()
        wrapped = wrapper(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = bits(model)
        losses = [loss_of(model), loss_of(model)]
        losses[spoiled] = lambda loss=losses[spoiled]: loss() * float("inf")
        wrapped.update_scaled(scaler, *losses)
        assert same_bits(model, before)
        assert scaler.get_scale() == 512.0


def trained(wrapper, updates, **options):
    model = mlp()
    wrapped = wrapper(model, base=torch.optim.SGD, **MOMENTUM, **options)
    for step in range(updates):
        wrapped.update_by_closure(closure_of(wrapped, loss_of(model, step)))
    wrapped.optimizer.zero_grad()
    return model, wrapped


@requirement("S9", missed_by=(peers.ForgetsMomentum,), met_by=(PytorchOptimizer,))
def a_run_resumes_to_the_bit(wrapper):
    expected, _ = trained(wrapper, 5)
    model, wrapped = trained(wrapper, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": wrapped.optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    model, wrapped = trained(wrapper, 0)
    model.load_state_dict(loaded["model"])
    wrapped.optimizer.load_state_dict(loaded["optimizer"])
    for step in (3, 4):
        wrapped.update_by_closure(closure_of(wrapped, loss_of(model, step)))
    assert same_bits(model, bits(expected))


@requirement("S9", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def a_run_resumes_in_the_middle_of_an_interval(wrapper):
    expected, _ = trained(wrapper, 7, settings={"interval": 3})
    for stop in (1, 2, 4):
        model, wrapped = trained(wrapper, stop, settings={"interval": 3})
        state = copy.deepcopy(wrapped.optimizer.state_dict())
        calls, _ = counted(wrapped, model, updates=7 - stop, start=stop)
        assert len(calls) == 7 - stop + 7 // 3 - stop // 3
        again, _ = trained(wrapper, stop, settings={"interval": 3})
        fresh = wrapper(again, **MOMENTUM, settings={"interval": 3})
        fresh.optimizer.load_state_dict(state)
        for step in range(stop, 7):
            fresh.update_by_closure(closure_of(fresh, loss_of(again, step)))
        assert same_bits(again, bits(expected))


@requirement("S9", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def what_is_saved_while_perturbed_is_clean_or_raises(wrapper):
    model, wrapped = trained(wrapper, 1)
    clean = {name: p.clone() for name, p in model.state_dict().items()}
    sizes = sum(t.numel() for s in wrapped.optimizer.state_dict()["state"].values() for t in s.values())
    wrapped.find(loss_of(model))
    wrapped.move()
    with contextlib.suppress(RuntimeError):  # a refusal will do
        assert all(torch.equal(value, clean[name]) for name, value in model.state_dict().items())
    state = wrapped.optimizer.state_dict()["state"]
    assert sum(t.numel() for s in state.values() for t in s.values()) == sizes


@requirement("S10", missed_by=(peers.OwnGroups, peers.ForgetsMomentum), met_by=(PytorchOptimizer,))
def groups_and_state_are_the_bases_own_objects(wrapper):
    model, wrapped = trained(wrapper, 1)
    optimizer = wrapped.optimizer
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    base = getattr(optimizer, "base", None) or optimizer.base_optimizer
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    for group in optimizer.param_groups:  # as a scheduler does
        group["lr"] = 0.0
    before = bits(model)
    wrapped.update(loss_of(model))
    assert same_bits(model, before)


@requirement("S10", missed_by={PytorchOptimizer: KeyError, peers.OwnGroups: AssertionError})
def a_group_that_is_added_later_is_trained(wrapper):
    model = mlp()
    wrapped = wrapper(model, groups=[{"params": model[0].parameters()}])
    wrapped.update(loss_of(model))
    head = model[4].weight.detach().clone()
    wrapped.optimizer.add_param_group({"params": list(model[4].parameters()), "lr": LR})
    wrapped.update(loss_of(model))
    assert not torch.equal(model[4].weight, head)


@requirement("S11", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def a_scheduler_on_the_wrapper_warns_of_nothing(wrapper):
    one_cycle = {"max_lr": 1.0, "total_steps": 9}
    for kind, options in ((lr_scheduler.StepLR, {"step_size": 1}), (lr_scheduler.OneCycleLR, one_cycle)):
        model = mlp()
        wrapped = wrapper(model, **MOMENTUM)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler = kind(wrapped.optimizer, **options)
            rates = []
            for step in range(3):
                wrapped.update(loss_of(model, step))
                scheduler.step()
                rates.append(wrapped.optimizer.param_groups[0]["lr"])
        assert not caught, str(caught[0].message)
        assert len(set(rates)) == 3


# torch.optim.Optimizer copies and pickles its groups, defaults and state: what a subclass adds is lost.
@requirement("S11", missed_by={PytorchOptimizer: AttributeError, peers.SubtractsEps: AttributeError})
def a_deep_copy_and_a_pickle_train_on_alike(wrapper):
    for copier in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        model, wrapped = trained(wrapper, 2)
        other, optimizer = copier((model, wrapped.optimizer))
        twin = wrapper.__new__(wrapper)
        twin.model, twin.optimizer = other, optimizer
        for step in (2, 3):
            wrapped.update(loss_of(model, step))
            twin.update(loss_of(other, step))
        assert same_bits(model, bits(other))


@requirement("S11", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def hooks_on_the_wrapper_fire_once_around_the_step(wrapper):
    model = mlp()
    wrapped = wrapper(model)
    seen = []
    before = bits(model)
    wrapped.optimizer.register_step_pre_hook(lambda *_: seen.append(("before", same_bits(model, before))))
    wrapped.optimizer.register_step_post_hook(lambda *_: seen.append(("after", same_bits(model, before))))
    wrapped.update(loss_of(model))
    assert seen == [("before", True), ("after", False)]


@requirement("S13", missed_by=(peers.ClosureClears,), met_by=(PytorchOptimizer, peers.SubtractsEps))
def micro_batches_equal_one_batch(wrapper):
    whole, parts = mlp(torch.float64), mlp(torch.float64)
    one, many = wrapper(whole), wrapper(parts)
    for step in range(2):
        one.update(loss_of(whole, step))
        x, y = (t.chunk(3) for t in batch(step, dtype=torch.float64))
        many.update(*(lambda x=x, y=y: (parts(x) - y).square().mean() for x, y in zip(x, y, strict=True)))
    assert_close(whole, parts, rtol=1e-6, atol=1e-8)


@requirement("S13", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def each_micro_batch_may_have_its_own_perturbation_before_one_step(wrapper):
    model = mlp(torch.float64)
    losses = [loss_of(model, step) for step in range(3)]
    expected = []
    for loss in losses:
        twin = wrapper(mlp(torch.float64), lr=1.0)
        start = flat(twin.model.parameters())
        own = loss_of(twin.model, losses.index(loss))
        twin.update(own)
        expected.append(start - flat(twin.model.parameters()))  # the gradient, at a learning rate of 1
    wrapped = wrapper(model, lr=1.0)
    start = flat(model.parameters())
    wrapped.each_its_own(*losses)
    torch.testing.assert_close(start - flat(model.parameters()), sum(expected) / 3, rtol=1e-6, atol=1e-9)


class Noisy(nn.Module):
    """Dropout, whose masks are kept."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.dropout, self.masks = layers, nn.Dropout(0.5), []

    def forward(self, x):
        self.masks.append(self.dropout(torch.ones_like(x)) > 0)
        return self.layers(x * self.masks[-1])


@requirement("S17", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def dropout_agrees_in_both_passes(wrapper):
    model = Noisy(mlp())
    wrapped = wrapper(model, settings={"replay_rng": True})
    for step in range(2):
        wrapped.update(loss_of(model, step))
    first, second, third, fourth = model.masks
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)


@requirement("S17", missed_by=(PytorchOptimizer, peers.SubtractsEps))
def a_helper_lets_batch_norm_count_a_batch_once(wrapper):
    for momentum in (0.1, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=momentum), nn.Linear(6, 3))
        once = copy.deepcopy(model)
        loss_of(once)()
        wrapped = wrapper(model, lr=0.0)
        wrapped.find(loss_of(model))
        wrapped.move()
        with wrapped.normalisation_frozen():
            wrapped.descend(loss_of(model))
        wrapped.finish()
        for name, buffer in once.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
