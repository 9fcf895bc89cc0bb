"""Blocks below the selected layers are computed once an update, and no bit of it changes."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from benchmarks.measure import peak_extra_bytes
from tests.support.reused import (
    SUBSPACE,
    WAYS,
    assert_reuse_changes_no_bit,
    build,
    by_context,
    loss,
    tokens,
    trained,
)
from tests.support.updates import COMBINATIONS, wrap


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_reuse_changes_no_bit_in_any_form_of_the_update(way, ascent, perturbation):
    assert_reuse_changes_no_bit(build, way=WAYS[way], ascent=ascent, perturbation=perturbation)


@pytest.mark.parametrize("way", WAYS)
def test_each_block_below_runs_once_an_update_and_each_above_twice(way):
    model = build()
    runs = [0] * 4
    for number, block in enumerate(model.model.layers):
        own = block.mlp.act_fn.forward

        def counted(x, number=number, own=own):
            runs[number] += 1
            return own(x)

        block.mlp.act_fn = copy.deepcopy(block.mlp.act_fn)
        block.mlp.act_fn.forward = counted
    opt = wrap(model, SUBSPACE, reuse_prefix=True)
    WAYS[way](opt, model, [tokens(0)])
    assert runs == [1, 1, 2, 2]


def test_a_selection_from_the_lowest_block_on_reuses_nothing_and_is_taken():
    lowest = sk.Subspace({"model.layers.0.mlp.down_proj.weight": [1]})
    assert_reuse_changes_no_bit(build, lowest, blocks=0)
    assert_reuse_changes_no_bit(build, sk.Subspace.full(build()), blocks=0, perturbation="in_place")


def test_plain_updates_between_and_ascents_that_were_given_up_leave_nothing_behind():
    model, other = build(), build()
    opt, plain = (wrap(m, SUBSPACE, interval=2, reuse_prefix=r) for m, r in ((model, True), (other, False)))
    for one, m in ((opt, model), (plain, other)):
        for step in range(4):
            if step == 1:
                with pytest.raises(ZeroDivisionError), one.ascent():
                    one.ascend(loss(m, tokens(99)) / (1 // (step - 1)))
                with one.ascent():  # replaced by the next one
                    one.ascend(loss(m, tokens(98)))
            by_context(one, m, [tokens(step)]) if one.due else plain_update(one, m, tokens(step))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def plain_update(opt, model, batch):
    loss(model, batch).backward()
    opt.step()
    opt.zero_grad()


def test_a_perturbation_for_each_micro_batch_keeps_one_graph():
    def each(opt, model, batches, loss):
        for batch in batches:
            with opt.ascent():
                opt.ascend(loss(model, batch))
            with opt.perturbed():
                loss(model, batch).backward()
        opt.step()
        opt.zero_grad()

    kept = assert_reuse_changes_no_bit(build, way=each, micro_batches=3).stats["prefix_bytes"]
    together = assert_reuse_changes_no_bit(build, micro_batches=3).stats["prefix_bytes"]
    assert 2.9 * kept < together <= 3 * kept


def test_what_is_kept_is_counted():
    model = stack()
    opt = wrap(model, LAST, reuse_prefix=True)
    by_context(opt, model, [tokens(0, rows=5)], mean_square)
    # A linear layer keeps its input, a tanh its output: the batch, and what each of two layers puts out.
    assert opt.stats["prefix_bytes"] == 3 * 5 * 8 * 8


def test_dropout_is_replayed_above_the_blocks_that_are_reused():
    dropping = lambda: build(attention_dropout=0.2).train()  # noqa: E731
    assert_reuse_changes_no_bit(dropping, replay_rng=True, seed=3)


def test_dropout_before_the_blocks_is_replayed_or_refused():
    def gpt2():
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=16)  # drops 0.1 everywhere
        return GPT2LMHeadModel(config).double().train()

    upper = sk.Subspace({"transformer.h.2.mlp.c_proj.weight": [3, 4]}, axis=0)
    assert_reuse_changes_no_bit(gpt2, upper, replay_rng=True, seed=5)
    with pytest.raises(RuntimeError, match=r"^pass 2 gave .* another input .*replay_rng=True[^\n]*$"):
        trained(gpt2, upper, reuse_prefix=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast(dtype):
    def under(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return loss(model, batch)

    assert_reuse_changes_no_bit(lambda: build().float(), loss=under)


def test_with_a_grad_scaler():
    def scaled(opt, model, batches, loss):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with opt.ascent():
            for batch in batches:
                opt.ascend(loss(model, batch), scaler=scaler)
        with opt.perturbed():
            for batch in batches:
                scaler.scale(loss(model, batch)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    assert_reuse_changes_no_bit(build, way=scaled)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_reused(reentrant):
    def checkpointed():
        model = build().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    assert_reuse_changes_no_bit(checkpointed, ascent="grad" if reentrant else "selective")


def test_blocks_inside_torchs_checkpoint_wrapper_are_reused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped():
        model = build().train()
        for number, block in enumerate(model.model.layers):
            model.model.layers[number] = checkpoint_wrapper(block)
        return model

    assert_reuse_changes_no_bit(wrapped)


def test_an_adapter_below_is_trained_through_the_graph_that_is_reused():
    peft = pytest.importorskip("peft")

    def adapted(dropout=0.0):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=dropout)
        model = peft.get_peft_model(build(), config)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        return model.double()

    assert_reuse_changes_no_bit(adapted)
    model, _ = trained(adapted, reuse_prefix=True)
    below = {n: p for n, p in model.named_parameters() if "layers.0." in n and p.requires_grad}
    start = dict(adapted().named_parameters())
    assert below
    assert all(not torch.equal(p, start[n]) for n, p in below.items())
    assert_reuse_changes_no_bit(lambda: adapted(0.3), replay_rng=True, seed=1)


def test_frozen_blocks_below_without_anything_to_train_are_reused():
    def frozen():
        model = build()
        model.model.embed_tokens.requires_grad_(False)
        for block in model.model.layers[:2]:
            block.requires_grad_(False)
        return model

    assert_reuse_changes_no_bit(frozen)


def test_a_reference_in_the_same_base_is_not_replayed():
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(1)
        model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["v_proj"])).double()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        return model

    answers = []

    def way(opt, model, batches, loss):
        with opt.ascent():
            for batch in batches:
                opt.ascend(loss(model, batch))
        with opt.perturbed():
            for batch in batches:
                with opt.unperturbed(), model.disable_adapter():
                    answers.append(model(batch).logits)
                loss(model, batch).backward()
        opt.step()
        opt.zero_grad()

    assert_reuse_changes_no_bit(adapted, way=way, updates=2)
    assert len(answers) == 8
    for mine, other in zip(answers[:4], answers[4:], strict=True):
        assert torch.equal(mine, other)


def test_a_tied_embedding_gets_its_gradient_from_both_ends():
    assert_reuse_changes_no_bit(lambda: build(tie_word_embeddings=True))


def test_a_loss_over_hidden_states_of_every_layer_is_served():
    def probing(model, batch):
        put_out = model(batch, labels=batch, output_hidden_states=True)
        assert len(put_out.hidden_states) == 5
        return put_out.loss + sum(h.square().mean() for h in put_out.hidden_states)

    plain, _ = trained(build, loss=probing)
    reusing, _ = trained(build, loss=probing, reuse_prefix=True)
    for mine, other in zip(reusing.parameters(), plain.parameters(), strict=True):
        # The embedding's gradient comes over two graphs, in another order of sums.
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_the_cache_that_the_descent_fills_is_whole():
    caches = []

    def keeping(model, batch):
        put_out = model(batch, labels=batch, use_cache=True)
        caches.append(put_out.past_key_values)
        return put_out.loss

    trained(build, reuse_prefix=True, loss=keeping, updates=1, micro_batches=1)
    ascent, descent = caches
    assert len(descent.layers) == 4
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(ascent.layers[:2], descent.layers[:2], strict=True))


def test_keys_and_values_that_wait_for_the_descents_cache_take_no_memory_of_their_own():
    model = build()

    def most_bytes(*, reuse, cache):
        opt = wrap(model, SUBSPACE, reuse_prefix=reuse)

        def ascent():
            with opt.ascent():
                opt.ascend(model(tokens(0), labels=tokens(0), use_cache=cache).loss)

        ascent()
        gc.collect()
        most = peak_extra_bytes(ascent)
        opt.detach()
        return most

    of_reuse = {c: most_bytes(reuse=True, cache=c) - most_bytes(reuse=False, cache=c) for c in (True, False)}
    assert of_reuse[True] == of_reuse[False]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def stack():
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(3)))


LAST = sk.Subspace({"2.linear.weight": [0, 3]})


def mean_square(model, x):
    return model(x.double()[:, :8] / 64).square().mean()


@pytest.mark.parametrize("how", ["Module.compile", "torch.compile"])
# Without it dynamo takes one block's code for another's that has a hook, and the ascent says that no layer ran.
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
def test_compiled_blocks_are_reused_and_compiled_no_more_often(how):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def compiled():
        model = stack()
        for number, block in enumerate(model):
            if how == "torch.compile":
                model[number] = torch.compile(block, backend=counter)
            else:
                block.compile(backend=counter)
        return model

    torch._dynamo.reset()
    assert_reuse_changes_no_bit(compiled, LAST, loss=mean_square, updates=2)
    torch._dynamo.reset()
    model, opt = trained(compiled, LAST, reuse_prefix=True, loss=mean_square, updates=2)
    compiled_so_far = counter.frame_count
    by_context(opt, model, [tokens(77), tokens(78)], mean_square)
    assert counter.frame_count == compiled_so_far
    own = [block.__dict__.get("_compiled_call_impl") is not None for block in model]
    assert own == [how == "Module.compile"] * 3


@pytest.mark.parametrize("size", [1, 3])
def test_an_ascent_on_a_part_of_the_rows_runs_the_blocks_below_for_all_of_them(size):
    rows = torch.arange(size)

    def part(opt, model, batches, loss):
        with opt.ascent():
            for batch in batches:
                with opt.ascent_part(lambda batch=batch: model(batch), rows):
                    opt.ascend(loss(model, batch[rows]))
        with opt.perturbed():
            for batch in batches:
                loss(model, batch).backward()
        opt.step()
        opt.zero_grad()

    # A row's numbers may round otherwise beside others.
    plain, _ = trained(build, way=part)
    reusing, _ = trained(build, way=part, reuse_prefix=True)
    for mine, other in zip(reusing.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_the_blocks_below_run_for_a_micro_batch_that_no_row_is_drawn_from():
    def part(opt, model, batches, loss):
        with opt.ascent():
            with opt.ascent_part(lambda: model(batches[0]), torch.tensor([], dtype=torch.int64)):
                pass
            opt.ascend(loss(model, batches[1]))
        with opt.perturbed():
            for batch in batches:
                loss(model, batch).backward()
        opt.step()
        opt.zero_grad()

    assert_reuse_changes_no_bit(build, way=part)


def test_nothing_is_left_on_the_model_outside_of_an_update_and_copies_are_clean():
    model = build()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    opt = wrap(model, SUBSPACE, reuse_prefix=True)
    with opt.ascent():
        opt.ascend(loss(model, tokens(0)))
        pickled = pickle.dumps(model)
        copied = copy.deepcopy(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    other = copy.deepcopy(opt)  # between the passes: the copy begins its update anew
    with opt.perturbed():
        loss(model, tokens(0)).backward()
    opt.step()
    by_context(other, other.model, [tokens(0)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.model.parameters(), strict=True))
    for one in (copied, pickle.loads(pickled)):
        assert {name: set(module.__dict__) for name, module in one.named_modules()} == before
        loss(one, tokens(1)).backward()
    opt.detach()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
