"""Loss scaling and autocast: a scaled update equals the plain one; an overflow in either pass skips exactly it (S8)."""

import pytest
import torch

import shapo_kernels as sk


def build(toy, subspace, **options):
    model = toy(torch.float32)
    opt = sk.ShaPOOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model, subspace, rho=0.3, **options)
    return model, opt


def scaled_update(opt, model, scaler, loss, spoil=None):
    with opt.ascent():
        opt.ascend(scaler.scale(loss(model)) * (float("inf") if spoil == "ascent" else 1))
    with opt.perturbed():
        (scaler.scale(loss(model)) * (float("inf") if spoil == "descent" else 1)).backward()
    scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


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


def test_an_overflow_in_the_ascent_perturbs_nothing_and_is_counted(toy, batch, loss, subspace):
    model, opt = build(toy, subspace)
    plain = toy(torch.float32)
    base = torch.optim.AdamW(plain.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batch(dtype=torch.float32)
    scaled_update(opt, model, scaler, lambda m: loss(m, data), spoil="ascent")
    loss(plain, data).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    base.step()
    assert opt.stats["skipped"] == 1
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
        return torch.cat([value.flatten() for value in opt._direction[1]])

    cosine = torch.nn.functional.cosine_similarity(direction(True), direction(False), dim=0)
    assert cosine > 0.999
