"""Loss scaling and autocast: a scaled update equals the plain one; an overflow in either pass skips exactly it (S8)."""

import contextlib

import pytest
import torch

import shapo_kernels as sk
from tests.support.updates import COMBINATIONS, wrap


def build(toy, subspace, **options):
    model = toy(torch.float32)
    opt = sk.ShaPOOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model, subspace, rho=0.3, **options)
    return model, opt


def scaled_update(opt, model, scaler, loss, spoil=None, value=float("inf"), clipped=True):
    with opt.ascent():
        opt.ascend(scaler.scale(loss(model)) * (value if spoil == "ascent" else 1))
    with opt.perturbed():
        (scaler.scale(loss(model)) * (value if spoil == "descent" else 1)).backward()
    if clipped:
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


def snapshot(model, opt):
    """Weights and state, comparable bit for bit."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {str(i): {k: str(v) for k, v in s.items()} for i, s in enumerate(opt.state.values())}
    return {n: t.numpy().tobytes() for n, t in tensors.items()}, state, opt.updates


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_a_grad_scaler_changes_nothing_but_rounding(toy, batch, loss, subspace, ascent, perturbation):
    scaled, opt = build(toy, subspace, ascent=ascent, perturbation=perturbation)
    plain, other = build(toy, subspace, ascent=ascent, perturbation=perturbation)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    off = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(5):
        data = batch(step, torch.float32)
        scaled_update(opt, scaled, scaler, lambda m, data=data: loss(m, data))
        scaled_update(other, plain, off, lambda m, data=data: loss(m, data))
        assert opt.stats["epsilon_norm"] == pytest.approx(0.3, rel=1e-5)
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_overflow_in_the_descent_skips_the_update_and_leaves_weights_and_counter(toy, batch, loss, subspace):
    model, opt = build(toy, subspace)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batch(dtype=torch.float32)
    scaled_update(opt, model, scaler, lambda m: loss(m, data))
    before = [p.detach().clone() for p in model.parameters()]
    scaled_update(opt, model, scaler, lambda m: loss(m, data), spoil="descent")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert opt.updates == 1
    assert scaler.get_scale() == 512
    scaled_update(opt, model, scaler, lambda m: loss(m, data))
    assert opt.updates == 2


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("spoil", ["ascent", "descent"])
@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_what_is_not_finite_in_either_pass_skips_exactly_that_update(
    toy, batch, loss, subspace, perturbation, spoil, value, clipped
):
    model, opt = build(toy, subspace, perturbation=perturbation)
    twin, other = build(toy, subspace, perturbation=perturbation)
    scaler, twins = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
    spoiled = [0, 2]  # the very first update, when no scaler has been seen yet, and a later one
    for step in range(4):
        data = batch(step, torch.float32)
        before = snapshot(model, opt)
        scaled_update(
            opt, model, scaler, lambda m, d=data: loss(m, d), spoil=spoil if step in spoiled else None,
            value=value, clipped=clipped,
        )  # fmt: skip
        if step in spoiled:
            assert snapshot(model, opt) == before
        else:
            scaled_update(other, twin, twins, lambda m, d=data: loss(m, d), clipped=clipped)
    assert opt.updates == 2
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    # A scale that is too large must come down, or every update would be skipped. Only where gradients are unscaled to
    # be clipped has the scaler looked at them before a first overflow in the ascent can be shown to it.
    lowered = 1 if spoil == "ascent" and clipped else 2
    assert scaler.get_scale() == 1024 / 2**lowered


def test_without_a_scaler_an_overflow_in_the_ascent_leaves_a_plain_update(toy, batch, loss, subspace):
    model, opt = build(toy, subspace)
    plain = toy(torch.float32)
    base = torch.optim.AdamW(plain.parameters(), lr=0.01)
    data = batch(dtype=torch.float32)
    scaled_update(opt, model, torch.amp.GradScaler("cpu", enabled=False), lambda m: loss(m, data), spoil="ascent")
    loss(plain, data).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    base.step()
    assert opt.stats["skipped"] == 1
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def scaled_closure(opt, model, data, loss, scaler):
    def closure():
        opt.zero_grad()
        value = loss(model, data)
        scaler.scale(value).backward()
        return value

    return closure


@pytest.mark.parametrize("norm", ["global", "none"])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_a_closure_and_its_scaler_given_to_step_equal_the_plain_closure(
    toy, batch, loss, subspace, ascent, interval, norm
):
    options = {"ascent": ascent, "interval": interval, "norm": norm}
    scaled, opt = build(toy, subspace, **options)
    plain, other = build(toy, subspace, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    off = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(4):
        data = batch(step, torch.float32)
        value = opt.step(scaled_closure(opt, scaled, data, loss, scaler), scaler=scaler)
        scaler.update()
        expected = other.step(scaled_closure(other, plain, data, loss, off))
        torch.testing.assert_close(value, expected)
    assert opt.updates == 4
    assert opt.stats["grad_norm"] == pytest.approx(other.stats["grad_norm"], rel=1e-4)
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_overflow_in_either_call_of_a_closure_skips_the_update(toy, batch, loss, subspace, fail_at):
    model, opt = build(toy, subspace)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batch(dtype=torch.float32)
    before = snapshot(model, opt)
    calls = 0

    def spoiled(m, d):
        nonlocal calls
        calls += 1
        return loss(m, d) * (float("inf") if calls == fail_at else 1)

    opt.step(scaled_closure(opt, model, data, spoiled, scaler), scaler=scaler)
    scaler.update()
    assert snapshot(model, opt) == before
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("earlier_gradients", [False, True])
def test_a_closure_by_way_of_a_scaler_is_refused_and_says_what_to_do(toy, batch, loss, subspace, earlier_gradients):
    # davda54/sam#97: gradients that such a closure computes are never unscaled, and the update is 1024 times too large.
    model, opt = build(toy, subspace)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    closure = scaled_closure(opt, model, batch(dtype=torch.float32), loss, scaler)
    scaler.scale(torch.zeros(()))  # without a scale, before its first loss, torch refuses in its own words
    if earlier_gradients:
        closure()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"opt\.step\(closure, scaler=scaler\)"):
        scaler.step(opt, closure)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):  # torch's own words
        scaler.step(opt, closure=closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(TypeError, match=r"call scaler\.step\(opt\)"):
        opt.step(scaler=scaler)


def test_raw_gradients_that_a_scaler_may_have_scaled_are_refused_or_unscaled(toy, batch, loss, subspace):
    model, opt = build(toy, subspace, norm="none")
    plain, other = build(toy, subspace, norm="none")
    data = batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pytest.raises(RuntimeError, match=r"opt\.ascend\(loss, scaler=scaler\)"):
        scaled_update(opt, model, scaler, lambda m: loss(m, data))
    for optimizer, of, by in ((opt, model, scaler), (other, plain, None)):
        with optimizer.ascent():
            optimizer.ascend(loss(of, data), scaler=by)
        with optimizer.perturbed():
            pass
    assert opt.stats["epsilon_norm"] == pytest.approx(other.stats["epsilon_norm"], rel=1e-5)
    with opt.ascent(), pytest.raises(RuntimeError, match="scaled alike"):  # noqa: PT012
        opt.ascend(loss(model, data), scaler=scaler)
        opt.ascend(loss(model, data))


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerates_optimizer_hands_closures_on(toy, batch, loss, subspace, precision, keyword):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model, opt = build(toy, subspace)
    plain, other = build(toy, subspace)
    model, prepared = accelerator.prepare(model, opt)
    for step in range(3):
        data = batch(step, torch.float32)

        def closure(data=data):
            prepared.zero_grad()
            value = loss(model, data)
            accelerator.backward(value)
            return value

        prepared.step(closure=closure) if keyword else prepared.step(closure)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            off = torch.amp.GradScaler("cpu", enabled=False)
            other.step(scaled_closure(other, plain, data, loss, off))
    assert opt.updates == 3
    for a, b in zip(accelerator.unwrap_model(model).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_accelerates_scaler_steps_after_the_passes_and_refuses_closures(toy, batch, loss, subspace):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt = build(toy, subspace)
    plain, other = build(toy, subspace)
    # What float16 makes Accelerate do on a GPU; it has no scaler for the CPU.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    prepared = accelerate.optimizer.AcceleratedOptimizer(opt, scaler=accelerator.scaler)
    data = batch(dtype=torch.float32)
    accelerator.scaler.scale(torch.zeros(()))
    with pytest.raises(RuntimeError, match=r"opt\.step\(closure, scaler=scaler\)"):
        prepared.step(scaled_closure(opt, model, data, loss, accelerator.scaler))
    with opt.ascent():
        opt.ascend(loss(model, data), scaler=accelerator.scaler)
    with opt.perturbed():
        accelerator.backward(loss(model, data))
    prepared.step()
    assert not prepared.step_was_skipped
    other.step(scaled_closure(other, plain, data, loss, torch.amp.GradScaler("cpu", enabled=False)))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_fused_base_is_unscaled_by_the_scaler_itself(toy, batch, loss, subspace):
    model = toy(torch.float32)
    opt = sk.ShaPOOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), model, subspace, rho=0.3, perturbation="delta"
    )
    plain, other = build(toy, subspace, perturbation="delta")
    data = batch(dtype=torch.float32)
    scaled_update(opt, model, torch.amp.GradScaler("cpu", init_scale=1024.0), lambda m: loss(m, data))
    scaled_update(other, plain, torch.amp.GradScaler("cpu", enabled=False), lambda m: loss(m, data))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_under_autocast_the_direction_is_that_of_float32_within_its_rounding(toy, batch, loss, subspace, ascent, dtype):
    def direction(autocast):
        model, opt = build(toy, subspace, ascent=ascent, perturbation="in_place")
        data = batch(dtype=torch.float32)
        with torch.autocast("cpu", dtype, enabled=autocast), opt.ascent():
            opt.ascend(loss(model, data))
        return torch.cat([value.flatten() for value in opt._update.direction[1]])

    cosine = torch.nn.functional.cosine_similarity(direction(True), direction(False), dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_training_under_autocast_goes_where_float32_goes(toy, batch, loss, subspace, ascent, perturbation, dtype):
    def movement(autocast):
        model = toy(torch.float32)
        start = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
        opt = sk.ShaPOOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            subspace,
            rho=0.3,
            ascent=ascent,
            perturbation=perturbation,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=autocast and dtype == torch.float16)
        for step in range(5):
            data = batch(step, torch.float32)

            def autocast_loss(m, data=data):
                with torch.autocast("cpu", dtype, enabled=autocast):
                    return loss(m, data)

            scaled_update(opt, model, scaler, autocast_loss)
        assert opt.updates == 5
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - start

    low, full = movement(True), movement(False)
    # A few roundings of relative size 2^-9 (bfloat16) or 2^-12 (float16) in each of five updates.
    assert (low - full).norm() / full.norm() < (0.03 if dtype == torch.bfloat16 else 0.004)


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_one_autocast_around_an_update_has_no_stale_copies_of_perturbed_weights(
    toy, batch, loss, subspace, ascent, perturbation
):
    def losses(around):
        model, found = toy(torch.float32), []
        opt = wrap(model, subspace, rho=2.0, ascent=ascent, perturbation=perturbation)

        def lower(enabled):
            return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

        def computed():
            with lower(True) if not around else contextlib.nullcontext():
                found.append(loss(model, batch(dtype=torch.float32)))
            return found[-1]

        with lower(around):
            with opt.ascent():
                opt.ascend(computed())
            with opt.perturbed():
                computed().backward()
                with opt.unperturbed():
                    computed()
                computed()
            computed()
        return [value.item() for value in found]

    expected = losses(around=False)
    assert losses(around=True) == expected
    theta, descent, aside, again, left = expected
    assert theta == aside == left
    assert descent == again != theta
