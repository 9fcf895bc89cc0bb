"""PEFT's LoRA: the base perturbed while adapters train, the adapters perturbed, and the reference in the same base."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import shapo_kernels as sk
from tests.support.updates import COMBINATIONS, bits, same_bits

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.support.llamas import llama  # noqa: E402

IDS = torch.arange(18).view(2, 9)
BASE = sk.Subspace({f"model.layers.{i}.mlp.down_proj.weight": [1, 5, 30] for i in range(2)})


def make(targets=("q_proj", "down_proj"), adapted=True, kind=peft.LoraConfig, **config):
    model = llama(vocab_size=40, num_key_value_heads=1, use_cache=False).double()
    if not adapted:
        return model
    model = peft.get_peft_model(model, kind(r=2, target_modules=list(targets), **config))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave lora_A without a gradient
            nn.init.normal_(parameter, std=0.2)
    return model


def wrap(model, subspace=BASE, **options):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return sk.ShaPOOptimizer(torch.optim.SGD(trainable, lr=0.1), model, subspace, **{"rho": 0.5, **options})


def loss(model):
    return model(input_ids=IDS, labels=IDS).loss


def logits(model):
    return model(input_ids=IDS).logits


ADAPTED = {"beside": {"targets": ["q_proj"]}, "on it": {}, "DoRA": {"use_dora": True}}


# A delta leaves the norms that DoRA takes for constants where they are.
@pytest.mark.parametrize(
    ("perturbation", "adapted"),
    [("in_place", "beside"), ("in_place", "on it"), ("in_place", "DoRA"), ("delta", "beside"), ("delta", "on it")],
)
def test_the_frozen_base_is_perturbed_along_its_own_gradient_while_adapters_train(perturbation, adapted):
    model = make(**ADAPTED[adapted])
    base = {n: p for n, p in model.named_parameters() if "lora" not in n}
    before = {n: p.detach().clone() for n, p in base.items()}
    opt = wrap(model, perturbation=perturbation)
    with opt.ascent():
        opt.ascend(loss(model))
    with opt.perturbed():
        value = loss(model)
        value.backward()
    opt.step()
    assert all(torch.equal(p, before[n]) for n, p in base.items())
    assert all(p.grad is None for p in base.values())
    # The same by hand, in a twin whose base takes gradients.
    twin = make(**ADAPTED[adapted]).requires_grad_(True)
    loss(twin).backward()
    named = dict(twin.named_parameters())
    selected = [next(p for n, p in named.items() if _plain(n) == name) for name in BASE]
    grads = [p.grad[:, BASE[name]].clone() for p, name in zip(selected, BASE, strict=True)]
    norm = torch.sqrt(sum(g.square().sum() for g in grads))
    assert opt.stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
    with torch.no_grad():
        for p, name, g in zip(selected, BASE, grads, strict=True):
            p[:, BASE[name]] += 0.5 * g / norm
    torch.testing.assert_close(loss(twin), value, rtol=1e-12, atol=1e-12)


def _plain(name):
    return name.replace("base_model.model.", "", 1).replace(".base_layer", "")


READERS = {
    "DoRA with dropout": {"use_dora": True, "lora_dropout": 0.5},
    "HiRA": {"kind": peft.HiraConfig},
    "GLoRA": {"kind": peft.GloraConfig},
}


@pytest.mark.parametrize("name", READERS)
def test_a_frozen_weight_that_its_adapter_computes_with_beside_its_layer_is_refused(name):
    with pytest.raises(sk.SubspaceError, match=rf"^'\S+' is frozen, and its adapter \({name}\) computes with it.*$"):
        wrap(make(**READERS[name]))
    wrap(make(targets=["q_proj"], **READERS[name]))  # not the selected weights' adapter


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_the_adapters_alone_are_perturbed(ascent, perturbation):
    model = make()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    shapes = dict(model.named_parameters())
    subspace = sk.Subspace({n: range(shapes[n].shape[0]) for n in names}, axis=0)
    opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    base = [p for p in model.parameters() if not p.requires_grad]
    before = [p.detach().clone() for p in base]
    loss(model).backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)).item()
    model.zero_grad()
    with opt.ascent():
        opt.ascend(loss(model))
    with opt.perturbed():
        assert all(torch.equal(p, b) for p, b in zip(base, before, strict=True))
        loss(model).backward()
    opt.step()
    assert opt.stats["grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert opt.stats["epsilon_norm"] == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_a_reference_pass_in_the_same_base_is_unperturbed_and_leaves_the_policys_graph_whole(perturbation):
    model = make()
    with model.disable_adapter(), torch.no_grad():
        reference = logits(model)
    opt = wrap(model, perturbation=perturbation)
    with opt.ascent():
        opt.ascend(loss(model))
    plain = logits(model)
    with opt.perturbed():
        policy = logits(model)
        with opt.unperturbed():
            with model.disable_adapter():
                assert torch.equal(logits(model), reference)
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), policy)
        assert not torch.allclose(policy, plain)
        ((policy - reference) ** 2).mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    # The same without a reference pass between forward and backward.
    twin = make()
    other = wrap(twin, perturbation=perturbation)
    with other.ascent():
        other.ascend(loss(twin))
    with other.perturbed():
        ((logits(twin) - reference) ** 2).mean().backward()
    expected = [p.grad for p in twin.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_a_reference_pass_of_the_perturbed_base_is_refused(perturbation):
    # Silently wrong anywhere else: the reference's log-probabilities would move with eps.
    model = make()
    model.add_adapter("ref", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    opt = wrap(model, perturbation=perturbation)
    with opt.ascent():
        opt.ascend(loss(model))
    before = bits(model)
    with opt.perturbed():
        loss(model).backward()
        with model.disable_adapter(), torch.no_grad(), pytest.raises(RuntimeError, match=r"opt\.unperturbed\(\)"):
            logits(model)
        model.set_adapter("ref")
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"opt\.unperturbed\(\)"):
            logits(model)
        model.set_adapter("default")
        logits(model)
    assert same_bits(model, before)
    with model.disable_adapter():
        logits(model)


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_it_is_refused_of_a_compiled_model_too_and_the_rest_compiles_once(toy, batch, loss, subspace, perturbation):
    torch._dynamo.reset()
    counter = CompileCounter()
    model = peft.get_peft_model(toy(), peft.LoraConfig(r=2, target_modules=["down_proj"]))
    seen = torch.compile(model, backend=counter)
    opt = wrap(model, subspace, perturbation=perturbation)
    counts = []
    for step in range(3):
        with opt.ascent():
            opt.ascend(loss(seen, batch(step)))
        with opt.perturbed():
            loss(seen, batch(step)).backward()
            with opt.unperturbed(), model.disable_adapter():
                seen(batch(step)[0])
        opt.step()
        opt.zero_grad()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]
    with opt.ascent():
        opt.ascend(loss(seen, batch()))
    with opt.perturbed(), model.disable_adapter(), pytest.raises(RuntimeError, match=r"opt\.unperturbed\(\)"):
        seen(batch()[0])


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_gradients_while_eps_is_put_aside_are_refused(perturbation):
    model = make()
    opt = wrap(model, perturbation=perturbation)
    with opt.ascent():
        opt.ascend(loss(model))
    before = logits(model)
    with opt.perturbed():
        with opt.unperturbed(), torch.enable_grad(), pytest.raises(RuntimeError, match="without gradients"):
            logits(model)
        with pytest.raises(KeyError), opt.unperturbed():
            raise KeyError
        assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), before)
    with opt.unperturbed():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_an_adapter_saved_in_a_descent_is_clean_or_refused(perturbation):
    model = make()
    opt = wrap(model, perturbation=perturbation)
    clean = {n: v.clone() for n, v in peft.get_peft_model_state_dict(model).items()}
    with opt.ascent():
        opt.ascend(loss(model))
    with opt.perturbed():
        if perturbation == "delta":
            saved = peft.get_peft_model_state_dict(model)
            assert all(torch.equal(saved[n], v) for n, v in clean.items())
        else:
            with pytest.raises(RuntimeError, match="are perturbed"):
                peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_adapters_merged_into_perturbed_weights_are_reported_and_delta_keeps_the_merge(perturbation):
    def merge_while_perturbed():
        with opt.perturbed():
            loss(model).backward()
            model.merge_adapter()

    model, merged = make(), make()
    opt = wrap(model, perturbation=perturbation)
    with opt.ascent():
        opt.ascend(loss(model))
    if perturbation == "in_place":
        with pytest.raises(RuntimeError, match="merged or unmerged inside"):
            merge_while_perturbed()
    else:
        merge_while_perturbed()
        merged.merge_adapter()
        assert torch.equal(logits(model), logits(merged))
