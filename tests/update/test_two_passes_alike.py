"""What must agree between the passes, and be counted once: dropout's masks, running statistics (requirement S17)."""

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from tests.support.updates import closure_for


class Masks(nn.Module):
    """Dropout that remembers what it let through."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3)
        self.seen = []

    def forward(self, x):
        kept = self.dropout(torch.ones(x.shape[0], 16))
        self.seen.append(kept)
        return self.last(torch.tanh(self.first(x)) * kept)


def build(**options):
    torch.manual_seed(0)
    model = Masks()
    subspace = sk.Subspace({"last.weight": [1, 2, 9]})
    return model, sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, subspace, rho=0.3, **options)


def drive(form, opt, model, data, loss):
    if form == "closure":
        opt.step(closure_for(opt, model, data, loss))
        return
    with opt.ascent():
        for _ in range(2):  # micro-batches
            opt.ascend(loss(model, data) / 2)
    if form == "context":
        with opt.perturbed():
            for _ in range(2):
                (loss(model, data) / 2).backward()
    else:
        opt.perturb()
        for _ in range(2):
            (loss(model, data) / 2).backward()
        opt.restore()
    opt.step()


@pytest.mark.parametrize("form", ["context", "closure", "perturb"])
@pytest.mark.parametrize("replay", [True, False])
def test_masks_agree_in_both_passes_and_differ_between_updates(batch, loss, form, replay):
    model, opt = build(replay_rng=replay)
    for step in range(2):
        drive(form, opt, model, batch(step, torch.float32), loss)
    half = len(model.seen) // 4
    first, second, third = (model.seen[i * half : (i + 1) * half] for i in range(3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) == replay
    assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    if form != "closure":
        assert not torch.equal(first[0], first[1])


def test_a_random_state_by_hand_serves_the_two_step_form(batch, loss):
    model, opt = build()
    data = batch(dtype=torch.float32)
    random = sk.RandomState(model)
    loss(model, data).backward()
    opt.first_step()
    random.restore()
    loss(model, data).backward()
    opt.second_step()
    assert torch.equal(*model.seen)


def test_replaying_what_began_unseen_is_refused(batch, loss):
    model, opt = build(replay_rng=True)
    loss(model, batch(dtype=torch.float32)).backward()
    with pytest.raises(RuntimeError, match=r"sk\.RandomState before pass 1"):
        opt.first_step()


def test_a_plain_update_replays_nothing(batch, loss):
    model, opt = build(replay_rng=True, interval=2)
    drive("closure", opt, model, batch(dtype=torch.float32), loss)
    drive("closure", opt, model, batch(dtype=torch.float32), loss)
    assert len(model.seen) == 3
    assert not torch.equal(model.seen[0], model.seen[1])
    assert torch.equal(model.seen[1], model.seen[2])


NORMS = {
    "batch": lambda: nn.BatchNorm1d(8),
    "cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "instance": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
}


@pytest.mark.parametrize("kind", NORMS)
def test_frozen_batch_norm_normalises_alike_and_counts_nothing(kind):
    torch.manual_seed(0)
    norm, twin = NORMS[kind](), NORMS[kind]()
    x = torch.randn(6, 8, 5) if kind == "instance" else torch.randn(6, 8)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with sk.frozen_batch_norm(norm):
        frozen = norm(x)
    assert torch.equal(frozen, twin(x))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(x)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in norm.state_dict().items())
    norm.eval()
    expected = norm(x)
    with sk.frozen_batch_norm(norm):
        assert torch.equal(norm(x), expected)
    with pytest.raises(KeyError), sk.frozen_batch_norm(norm.train()):
        raise KeyError
    assert norm.track_running_stats


@pytest.mark.parametrize("form", ["context", "closure"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_an_update_are_those_of_one_pass_at_the_weights(batch, form, momentum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Tanh(), nn.Linear(8, 3))
    plain = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=momentum))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k < "2"})
    subspace = sk.Subspace({"0.weight": [1, 2]})
    opt = sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, subspace, rho=5.0)
    x, y = batch(dtype=torch.float32)

    def closure():
        opt.zero_grad()
        if opt.is_perturbed:
            with sk.frozen_batch_norm(model):
                value = (model(x) - y).square().mean()
        else:
            value = (model(x) - y).square().mean()
        value.backward()
        return value

    for _ in range(3):
        if form == "closure":
            opt.step(closure)
        else:
            with opt.ascent():
                opt.ascend((model(x) - y).square().mean())
            with opt.perturbed(), sk.frozen_batch_norm(model):
                (model(x) - y).square().mean().backward()
            opt.step()
        plain(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(model[1], name), getattr(plain[1], name))
