"""What would be another update with the blocks below reused is refused in one line, and the weights stay whole."""

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from tests.support.reused import SUBSPACE, build, by_closure, by_context, loss, tokens, trained
from tests.support.updates import bits, refuses_in_one_line, same_bits, wrap


def passes(model, opt, first, second, *, loss=loss, between=lambda: None):
    with opt.ascent():
        for batch in first:
            opt.ascend(loss(model, batch))
    between()
    with opt.perturbed():
        for batch in second:
            loss(model, batch).backward()
    opt.step()


DIFFERENT = {
    "another batch": ([tokens(0)], [tokens(1)], "another input"),
    "one token": ([tokens(0)], [torch.where(torch.arange(9) == 4, (tokens(0) + 1) % 64, tokens(0))], "another input"),
    "some of the rows": ([tokens(0)], [tokens(0)[:2]], "another input"),
    "another order": ([tokens(0), tokens(1)], [tokens(1), tokens(0)], "another input"),
    "fewer micro-batches": ([tokens(0), tokens(1)], [tokens(0)], "fewer times"),
    "more micro-batches": ([tokens(0)], [tokens(0), tokens(1)], "more often"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_descent_on_anything_else_than_the_ascents_batch_is_refused(case):
    first, second, message = DIFFERENT[case]
    model = build()
    opt, before = wrap(model, SUBSPACE, reuse_prefix=True), bits(model)
    with refuses_in_one_line(message):
        passes(model, opt, first, second)
    assert same_bits(model, before)
    with refuses_in_one_line("this update is due and had no ascent"):
        opt.step()
    opt.zero_grad()
    by_context(opt, model, [tokens(2)])
    other = build()
    by_context(wrap(other, SUBSPACE), other, [tokens(2)])
    assert same_bits(model, bits(other))


def test_by_hand_a_descent_that_left_out_a_micro_batch_is_refused_before_every_step():
    model = build()
    opt, before = wrap(model, SUBSPACE, reuse_prefix=True), bits(model)
    with opt.ascent():
        for step in (0, 1):
            opt.ascend(loss(model, tokens(step)))
    opt.perturb()
    loss(model, tokens(0)).backward()
    opt.restore()
    for _ in range(2):
        with refuses_in_one_line("fewer times"):
            opt.step()
    assert same_bits(model, before)


def test_a_closure_that_draws_another_batch_each_time_is_refused():
    model, step = build(), iter(range(9))
    opt, before = wrap(model, SUBSPACE, reuse_prefix=True), bits(model)
    with refuses_in_one_line("another input"):
        by_closure(opt, model, [None], lambda model, _: loss(model, tokens(next(step))))
    assert same_bits(model, before)


def test_another_attention_mask_is_refused():
    model = build()
    opt = wrap(model, SUBSPACE, reuse_prefix=True)
    masks = iter([torch.ones(4, 9), torch.cat([torch.zeros(4, 2), torch.ones(4, 7)], dim=1)])
    with refuses_in_one_line("another input"):
        by_context(opt, model, [tokens(0)], lambda m, x: m(x, labels=x, attention_mask=next(masks).long()).loss)


def change_a_weight(model):
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(2)


CHANGES = {
    "a weight": change_a_weight,
    "train to eval": lambda model: model.eval(),
    "frozen": lambda model: model.model.layers[1].requires_grad_(False),
    "another parameter": lambda model: setattr(
        model.model.layers[0].mlp.up_proj, "weight", nn.Parameter(model.model.layers[0].mlp.up_proj.weight.clone())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_below_that_changed_between_the_passes_are_refused(change):
    model = build().train()
    opt = wrap(model, SUBSPACE, reuse_prefix=True)
    with refuses_in_one_line("has changed between the passes"):
        passes(model, opt, [tokens(0)], [tokens(0)], between=lambda: CHANGES[change](model))
    assert not opt.is_perturbed


def test_an_adapter_that_is_switched_between_the_passes_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    opt = wrap(model.double(), SUBSPACE, reuse_prefix=True)
    with refuses_in_one_line("has changed between the passes"):
        passes(model, opt, [tokens(0)], [tokens(0)], between=lambda: model.set_adapter("other"))


def test_another_autocast_in_the_descent_is_refused():
    model = build().float()
    opt = wrap(model, SUBSPACE, reuse_prefix=True, perturbation="delta")
    enabled = iter([True, False])

    def under(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=next(enabled)):
            return loss(model, batch)

    with refuses_in_one_line("another autocast"):
        by_context(opt, model, [tokens(0)], under)


@pytest.mark.parametrize("where", ["model.layers.0", "model.layers.1.mlp"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_others_on_what_is_reused_are_refused(where, kind):
    model = build()
    getattr(model.get_submodule(where), kind)(lambda *_: None)
    with refuses_in_one_line(f"'{where}' has a forward hook"):
        by_context(wrap(model, SUBSPACE, reuse_prefix=True), model, [tokens(0)])


def test_a_global_hook_is_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model = build()
    try:
        with refuses_in_one_line("a global forward hook"):
            by_context(wrap(model, SUBSPACE, reuse_prefix=True), model, [tokens(0)])
    finally:
        handle.remove()


def test_attentions_that_are_captured_are_refused_and_the_hooks_for_it_may_stay():
    model = build(attn_implementation="eager")
    opt = wrap(model, SUBSPACE, reuse_prefix=True)
    with refuses_in_one_line("'attentions' is captured"):
        by_context(opt, model, [tokens(0)], lambda m, x: m(x, labels=x, output_attentions=True).loss)
    by_context(opt, model, [tokens(0)])


def test_a_routers_loss_is_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        output_router_logits=True,
    )
    model = MixtralForCausalLM(config)
    last = sk.Subspace({"model.layers.1.self_attn.o_proj.weight": [1]})
    with refuses_in_one_line("'router_logits' is captured"):
        by_context(wrap(model, last, reuse_prefix=True), model, [tokens(0)])


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8)
        self.beside = None

    def forward(self, x):
        inner = torch.tanh(self.up_proj(x))
        self.beside = inner.square().mean()
        return x + self.down_proj(inner)


class Stack(nn.Module):
    def __init__(self, block=Mlp, count=3):
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return x


LAST = sk.Subspace({"blocks.2.down_proj.weight": [3]})
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def mean_square(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_a_loss_on_what_a_block_computes_beside_its_output_is_refused(ascent):
    def beside(model, x):
        return mean_square(model, x) + model.blocks[0].beside

    model = Stack()
    with refuses_in_one_line("beside their last output"):
        by_context(wrap(model, LAST, reuse_prefix=True, ascent=ascent), model, [X], beside)


def test_a_selected_weight_below_the_stack_is_refused():
    model = Stack()
    both = sk.Subspace({"inlet.weight": [2], "blocks.2.down_proj.weight": [3]})
    for perturbation, ascent in (("in_place", "selective"), ("delta", "selective"), ("in_place", "grad")):
        opt = wrap(model, both, reuse_prefix=True, perturbation=perturbation, ascent=ascent)
        with refuses_in_one_line("outside the stack"):
            by_context(opt, model, [X], mean_square)
        opt.detach()


def test_blocks_that_write_in_place_are_refused():
    class Writing(Mlp):
        def forward(self, x):
            return x.add_(self.down_proj(torch.tanh(self.up_proj(x))))

    model = Stack(Writing)
    with refuses_in_one_line("writes to its own input"):
        by_context(wrap(model, LAST, reuse_prefix=True), model, [X], mean_square)

    class WritingAbove(Stack):
        def forward(self, x):
            x = self.blocks[1](self.blocks[0](self.inlet(x)))
            x.mul_(2)
            return self.blocks[2](x)

    model = WritingAbove()
    with refuses_in_one_line("was written to in place"):
        by_context(wrap(model, LAST, reuse_prefix=True), model, [X], mean_square)


def test_an_input_that_is_written_to_between_the_passes_is_refused():
    model, x = nn.Sequential(*(Mlp() for _ in range(2))), X.clone()
    opt = wrap(model, sk.Subspace({"1.down_proj.weight": [0]}), reuse_prefix=True)
    with refuses_in_one_line("was written to since pass 1"):
        passes(model, opt, [x], [x], loss=mean_square, between=lambda: x.add_(1))


def test_arguments_and_outputs_that_two_calls_cannot_be_compared_by_are_refused():
    class Carrying(Mlp):
        def forward(self, x):
            x, carried = x if isinstance(x, tuple) else (x, object())
            return super().forward(x), carried

    class Unpacking(Stack):
        def forward(self, x):
            return super().forward(x)[0]

    model = Unpacking(Carrying)
    with refuses_in_one_line("put out a object"):
        by_context(wrap(model, LAST, reuse_prefix=True), model, [X], mean_square)


def test_a_cache_that_holds_keys_already_is_refused():
    from transformers import DynamicCache

    model = build()

    def continuing(model, batch):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(batch, past_key_values=cache)
        return model(batch, labels=batch, past_key_values=cache).loss

    with refuses_in_one_line("holds keys already"):
        by_context(wrap(model, SUBSPACE, reuse_prefix=True), model, [tokens(0)], continuing)


def test_a_model_that_is_compiled_as_a_whole_is_refused():
    model = torch.compile(Stack(), backend="eager")
    with refuses_in_one_line("compile its blocks one by one"):
        by_context(wrap(model, LAST, reuse_prefix=True), model, [X], mean_square)


def test_a_stack_that_cannot_be_found_is_named():
    torch.manual_seed(0)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Stack(), Stack()

        def forward(self, x):
            return self.one(x) + self.other(x)

    both = sk.Subspace({"one.blocks.2.down_proj.weight": [3], "other.blocks.2.down_proj.weight": [3]})
    with pytest.raises(ValueError, match=r"^[^\n]*several stacks of blocks, 'one.blocks' and 'other.blocks'[^\n]*$"):
        wrap(Pair(), both, reuse_prefix=True)
    assert wrap(Pair(), both, reuse_prefix="other.blocks").stats["prefix_blocks"] == 2
    plain = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(3, 3))})
    with pytest.raises(ValueError, match=r"^[^\n]*no stack of blocks[^\n]*$"):
        wrap(plain, sk.Subspace({"weight": [0]}), reuse_prefix=True)
    for name, message in (("one.layers", "no module of that name"), ("one.inlet", "without blocks")):
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            wrap(Pair(), both, reuse_prefix=name)
    model, other = Stack(), Stack()
    for one, reuse in ((model, "blocks"), (other, False)):
        opt = wrap(one, LAST, reuse_prefix=reuse)
        by_context(opt, one, [X], mean_square)
    assert same_bits(model, bits(other))


def test_nothing_is_written_where_an_update_is_refused_after_the_weights_have_moved():
    model = build()
    opt, before = wrap(model, SUBSPACE, reuse_prefix=True, perturbation="in_place"), bits(model)
    for message, second in (("another input", [tokens(1)]), ("fewer times", [])):
        with refuses_in_one_line(message):
            passes(model, opt, [tokens(0)], second)
        assert same_bits(model, before)
    trained(build, reuse_prefix=True)


class Blocks(nn.Module):
    """An embedding, three residual blocks with dropout and a buffer, and a head."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.5)
            self.register_buffer("bias", torch.zeros(8))

        def forward(self, x):
            return x + self.drop(self.down(torch.tanh(self.up(x)))) + self.bias

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.layers = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        for block in self.layers:
            x = block(x)
        return self.head(x)


def blocks(**options):
    torch.manual_seed(0)
    model = Blocks()
    subspace = sk.Subspace({"layers.2.down.weight": [1, 3]})
    return model, wrap(model, subspace, rho=0.05, **options), torch.randn(4, 8)


def squared(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("switched_in", ["ascent", "descent"])
def test_a_switch_to_evaluation_inside_one_pass_is_refused(switched_in):
    model, opt, x = blocks(reuse_prefix=True)
    with opt.ascent():
        model.train(switched_in != "ascent")
        opt.ascend(squared(model, x))
        model.train()
    with refuses_in_one_line("has changed between the passes"), opt.perturbed():
        model.train(switched_in != "descent")
        squared(model, x).backward()


def test_a_buffer_below_that_is_written_between_the_passes_is_refused():
    model, opt, x = blocks(reuse_prefix=True)
    model.eval()
    with opt.ascent():
        opt.ascend(squared(model, x))
    model.layers[0].bias.add_(1)
    with refuses_in_one_line("has changed between the passes"), opt.perturbed():
        squared(model, x).backward()


def test_after_a_failed_second_ascent_the_blocks_below_are_trained_as_ever():
    gradients = []
    for reuse in (False, True):
        model, opt, x = blocks(reuse_prefix=reuse)
        model.eval()
        with opt.ascent():
            opt.ascend(squared(model, x))
        with pytest.raises(ZeroDivisionError), opt.ascent():
            raise ZeroDivisionError
        with opt.perturbed():
            squared(model, x).backward()
        gradients.append([p.grad for p in model.parameters()])
        opt.step()
    for plain, reused in zip(*gradients, strict=True):
        assert torch.equal(plain, reused)


def test_a_plain_update_after_a_failed_descent_is_taken():
    model, opt, x = blocks(reuse_prefix=True)
    model.eval()
    with opt.ascent():
        opt.ascend(squared(model, x))
    with pytest.raises(ZeroDivisionError), opt.perturbed():
        raise ZeroDivisionError
    opt.rho = 0
    squared(model, x).backward()
    opt.step()
    assert opt.updates == 1


def test_weights_are_restored_where_the_comparison_itself_fails(monkeypatch):
    model, opt, x = blocks(reuse_prefix=True, perturbation="in_place")
    model.eval()
    before = bits(model)
    with opt.ascent():
        opt.ascend(squared(model, x))

    def fails():
        raise MemoryError

    with pytest.raises(MemoryError), opt.perturbed():  # noqa: PT012
        squared(model, x).backward()
        monkeypatch.setattr(opt._update.prefix._differences, "send", fails)
    assert same_bits(model, before)
    assert opt.phase is not sk.Phase.DESCENDING
