"""The phases of an update: where each form of it stands, and what is refused there."""

import pytest
import torch

import shapo_kernels as sk
from shapo_kernels.update.phase import NEXT, Phase, PhaseError, Progress
from tests.support.updates import wrap


def test_only_the_written_transitions_are_legal():
    for first in Phase:
        for second in Phase:
            progress = Progress()
            progress.phase = first
            if second in NEXT[first]:
                progress.enter(second)
                assert progress.phase is second
            else:
                with pytest.raises(PhaseError, match=r"cannot follow|detached"):
                    progress.enter(second)
                assert progress.phase is first


def test_an_update_by_contexts_goes_through_every_phase(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, rho=0.1)
    seen = [opt.phase]
    with opt.ascent():
        seen.append(opt.phase)
        opt.ascend(loss(model, batch()))
    seen.append(opt.phase)
    with opt.perturbed():
        seen.append(opt.phase)
        loss(model, batch()).backward()
    seen.append(opt.phase)
    opt.step()
    assert [*seen, opt.phase] == [
        Phase.IDLE,
        Phase.ASCENDING,
        Phase.ASCENDED,
        Phase.DESCENDING,
        Phase.DESCENDED,
        Phase.IDLE,
    ]


def test_a_failed_ascent_leaves_the_phase_and_the_direction_that_it_found(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, rho=0.1)
    for expected in (Phase.IDLE, Phase.ASCENDED):
        with pytest.raises(ZeroDivisionError), opt.ascent():
            raise ZeroDivisionError
        assert opt.phase is expected
        with opt.ascent():
            opt.ascend(loss(model, batch()))
    with opt.perturbed():
        loss(model, batch()).backward()
    opt.step()
    assert opt.stats["epsilon_norm"] == pytest.approx(0.1)


def test_a_failed_descent_gives_no_update(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, rho=0.1)
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    with pytest.raises(ZeroDivisionError), opt.perturbed():
        raise ZeroDivisionError
    assert opt.phase is Phase.IDLE
    with pytest.raises(PhaseError, match="had no ascent"):
        opt.step()


def test_a_closures_passes_are_phases_too(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, rho=0.1)
    seen = []

    def closure():
        seen.append(opt.phase)
        opt.zero_grad()
        value = loss(model, batch())
        value.backward()
        return value

    opt.step(closure)
    assert seen == [Phase.ASCENDING, Phase.DESCENDING]
    assert opt.phase is Phase.IDLE


def test_a_step_inside_a_closures_ascent_is_refused(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, rho=0.1)

    def closure():
        loss(model, batch()).backward()
        opt.step()

    with pytest.raises(PhaseError, match="cannot step inside an ascent"):
        opt.step(closure)
    assert opt.phase is Phase.IDLE


@pytest.mark.parametrize("zero_grad", [True, False])
def test_first_step_clears_gradients_as_asked(toy, batch, loss, subspace, zero_grad):
    model = toy()
    opt = wrap(model, subspace, rho=0.1, ascent="grad")
    loss(model, batch()).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    opt.first_step(zero_grad=zero_grad)
    for name, p in model.named_parameters():
        assert p.grad is None if zero_grad else torch.equal(p.grad, before[name])
    opt.zero_grad()
    loss(model, batch()).backward()
    opt.second_step(zero_grad=True)
    assert all(p.grad is None for p in model.parameters())


def test_a_detached_optimizer_starts_no_update(toy, subspace):
    opt = wrap(toy(), subspace, rho=0.1)
    opt.detach()
    opt.detach()
    assert opt.phase is Phase.DETACHED
    with pytest.raises(RuntimeError, match="detached from its model"), opt.ascent():
        pass
    assert isinstance(opt, sk.ShaPOOptimizer)


def test_a_failed_second_ascent_keeps_the_firsts_random_state_and_scaler(toy, batch, loss, subspace):
    model = toy(torch.float32)
    opt = wrap(model, subspace, rho=1e-3, norm="none")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batch(dtype=torch.float32)
    with opt.ascent():
        opt.ascend(loss(model, data), scaler=scaler)
    with pytest.raises(ZeroDivisionError), opt.ascent():
        raise ZeroDivisionError
    with opt.perturbed():
        loss(model, data).backward()
    assert opt.stats["epsilon_norm"] == pytest.approx(1e-3 * opt.stats["grad_norm"], rel=1e-5)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss(model, data), [named[n] for n in subspace])
    selected = [g[:, i] for g, i in zip(gradients, subspace.values(), strict=True)]
    assert opt.stats["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in selected]).norm().item(), rel=1e-4)


def test_detaching_inside_an_ascent_does_not_hide_the_exception_in_flight(toy, subspace):
    opt = wrap(toy(), subspace, rho=0.1)
    with pytest.raises(KeyboardInterrupt), opt.ascent():  # noqa: PT012
        opt.detach()
        raise KeyboardInterrupt
    assert opt.phase is Phase.DETACHED
