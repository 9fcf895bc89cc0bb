"""The output projection alone: logits-SAM, and an embedding that is tied to it stays where it is."""

import copy
import itertools

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from tests.support.reused import WAYS, build, by_context, tokens
from tests.support.updates import bits, refuses_in_one_line, same_bits, wrap

RHO, LR = 0.4, 0.05


def cross_entropy(logits, batch):
    """In float64, which transformers' own is not."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def loss(model, batch):
    return cross_entropy(model(batch).logits, batch)


def logits_sam(model, batch):
    """One update of logits-SAM by SGD, from arXiv:2603.18258: the hidden states are computed once, W moves to
    W + rho g / ||g|| with g the gradient on the output layer's weight alone, and every parameter takes the gradient of
    the loss there.
    """
    hidden = model.model(batch).last_hidden_state
    weight = model.lm_head.weight

    def loss_at(head, hidden):
        return cross_entropy(nn.functional.linear(hidden, head), batch)

    head = weight.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(head, hidden.detach()), head)
    eps = RHO * gradient / gradient.norm()
    loss_at(weight + eps, hidden).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LR * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("way", "reuse"), itertools.product(["contexts", "closure", "hand"], [False, True]))
def test_an_update_is_that_of_logits_sam(tied, way, reuse):
    model = build(tie_word_embeddings=tied)
    theirs = copy.deepcopy(model)
    opt = wrap(model, sk.Subspace.head(model), lr=LR, rho=RHO, reuse_prefix=reuse)
    for step in range(4):
        WAYS[way](opt, model, [tokens(step)], loss)
        logits_sam(theirs, tokens(step))
    if reuse:
        assert opt.stats["prefix_blocks"] == 4
    for (name, mine), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12, msg=name)
    assert opt.stats["epsilon_norm"] == pytest.approx(RHO, rel=1e-9)


def test_only_the_logits_move():
    model = build(tie_word_embeddings=True)
    opt, before = wrap(model, sk.Subspace.head(model)), bits(model)
    with opt.ascent():
        opt.ascend(loss(model, tokens(0)))
    hidden, logits = model.model(tokens(0)).last_hidden_state, model(tokens(0)).logits
    with opt.perturbed():
        assert same_bits(model, before)
        assert torch.equal(model.model(tokens(0)).last_hidden_state, hidden)
        assert not torch.allclose(model(tokens(0)).logits, logits)
        assert model.lm_head._parameters["weight"] is model.model.embed_tokens.weight
        with opt.unperturbed():
            assert torch.equal(model(tokens(0)).logits, logits)
        loss(model, tokens(0)).backward()
    assert "weight" not in model.lm_head.__dict__
    assert torch.equal(model(tokens(0)).logits, logits)


@pytest.mark.parametrize("tied", [True, False])
def test_in_low_precision_no_eps_is_lost(tied):
    model = build(tie_word_embeddings=tied).bfloat16()
    opt = wrap(model, sk.Subspace.head(model), rho=0.02)
    by_context(opt, model, [tokens(0)], loss)
    assert opt.stats["realised_cosine"] > 0.999


def test_a_head_may_be_selected_beside_neurons():
    model = build(tie_word_embeddings=True)
    head = sk.Subspace.head(model)
    both = sk.Subspace(
        {**head, "model.layers.3.mlp.down_proj.weight": [1, 2]},
        axis={name: head.axis(name) for name in head} | {"model.layers.3.mlp.down_proj.weight": 1},
        own_layer=list(head),
    )
    other = copy.deepcopy(model)
    opt = wrap(model, both, reuse_prefix=True)
    by_context(opt, model, [tokens(0)], loss)
    assert opt.stats["prefix_blocks"] == 3
    by_context(wrap(other, both), other, [tokens(0)], loss)
    assert same_bits(model, bits(other))
    whole = sk.Subspace({"model.norm.weight": range(16), **head}, axis=0, own_layer=list(head))
    with pytest.raises(sk.SubspaceError, match=r"^[^\n]*takes a delta[^\n]*$"):
        wrap(model, whole)


def test_what_cannot_move_a_tied_heads_use_alone_is_refused():
    model = build(tie_word_embeddings=True)
    head = sk.Subspace.head(model)
    for options in ({"ascent": "grad"}, {"perturbation": "in_place"}):
        with pytest.raises(sk.SubspaceError, match=r"^[^\n]*in its own layer only[^\n]*$"):
            wrap(model, head, **options)
    opt = wrap(model, head)
    loss(model, tokens(0)).backward()
    with refuses_in_one_line("in one layer only"):
        opt.perturb()
    both = sk.Subspace({"model.embed_tokens.weight": [1], **head}, axis=0, own_layer=list(head))
    with pytest.raises(sk.SubspaceError, match=r"^[^\n]*one of them in its own layer only[^\n]*$"):
        wrap(model, both)


def test_the_head_is_found_inside_wrappers_and_named_elsewhere(toy, tmp_path):
    model = build(tie_word_embeddings=True)
    head = sk.Subspace.head(model)
    assert head.names == ("lm_head.weight",)
    assert head.own_layer("lm_head.weight")
    assert sk.Subspace.head(nn.DataParallel(model)) == head
    head.save(tmp_path / "head.safetensors")
    assert sk.Subspace.load(tmp_path / "head.safetensors") == head
    assert head != sk.Subspace(dict(head), axis=0)
    assert sk.Subspace.head(toy(), "head").names == ("head.weight",)
    with pytest.raises(sk.SubspaceError, match=r"^[^\n]*names no output projection[^\n]*$"):
        sk.Subspace.head(toy())
    with pytest.raises(sk.SubspaceError, match=r"^[^\n]*no layer 'lm_head'[^\n]*$"):
        sk.Subspace.head(toy(), "lm_head")
