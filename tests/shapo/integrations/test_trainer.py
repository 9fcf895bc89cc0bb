"""ShaPO in transformers' Trainer, tiny models: equal to a loop written out, counted once (T1)."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

import shapo_kernels as sk
from shapo.integrations import ShaPOArguments

transformers = pytest.importorskip("transformers")
from tests.support.trainers import PlainTrainer, ShaPOTrainer, arguments, logged, neurons, rows, sgd  # noqa: E402


@pytest.mark.parametrize("interval", [1, 2])
def test_a_trainers_updates_equal_a_loop_written_out(tiny_llama, tmp_path, interval):
    by_hand = copy.deepcopy(tiny_llama)
    subspace = neurons(tiny_llama)
    trainer = ShaPOTrainer(
        tiny_llama,
        arguments(tmp_path),
        train_dataset=rows(),
        optimizers=sgd(tiny_llama),
        shapo=ShaPOArguments(subspace, rho=0.5, interval=interval),
    )
    trainer.train()

    opt = sk.ShaPOOptimizer(
        torch.optim.SGD(by_hand.parameters(), lr=0.1), by_hand, subspace, rho=0.5, interval=interval
    )
    data = torch.stack([row["input_ids"] for row in rows()])
    due = []
    for start in (0, 4, 8):
        micro = [data[start : start + 2], data[start + 2 : start + 4]]

        def loss(tokens):
            return by_hand(input_ids=tokens, labels=tokens).loss / 2

        due.append(opt.due)
        with opt.ascent():
            for tokens in micro:
                opt.ascend(loss(tokens))
        with opt.perturbed():
            for tokens in micro:
                loss(tokens).backward()
        opt.step()
        opt.zero_grad()
    for a, b in zip(tiny_llama.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert trainer._shapo_optimizer().updates == 3
    assert ["shapo/gap" in entry for entry in logged(trainer)] == due
    assert all(entry["shapo/gap"] > 0 for entry in logged(trainer) if "shapo/gap" in entry)


def test_the_gap_is_what_the_perturbation_adds(tiny_llama, tmp_path):
    trainer = ShaPOTrainer(
        tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5)
    )
    trainer.train()
    for entry in logged(trainer):
        assert entry["loss"] == pytest.approx(entry["shapo/ascent_loss"] + entry["shapo/gap"], abs=2e-4)


def test_a_warm_start_is_plain(tiny_llama, tmp_path):
    shapo = ShaPOArguments(neurons(tiny_llama), rho=0.5, plain_updates=2)
    trainer = ShaPOTrainer(tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=shapo)
    trainer.train()
    assert ["shapo/gap" in entry for entry in logged(trainer)] == [False, False, True]


def test_bfloat16_autocast_perturbs_beside_the_weights(tiny_llama, tmp_path):
    shapo = ShaPOArguments(neurons(tiny_llama), rho=1e-3)
    trainer = ShaPOTrainer(tiny_llama, arguments(tmp_path, bf16=True), train_dataset=rows(), shapo=shapo)
    trainer.train()
    assert all(entry["shapo/realised_cosine"] > 0.999 for entry in logged(trainer))


@pytest.mark.parametrize(
    "part", [{}, {"ascent_pairs": 1}, {"per_micro_batch": True, "ascent_fraction": 0.5, "rho_warmup": 6}], ids=str
)
def test_resuming_from_a_trainers_checkpoint_is_bit_exact(tiny_llama, tmp_path, part):
    def trainer(model, **options):
        shapo = ShaPOArguments(neurons(model), rho=0.5, interval=2, **part)
        return ShaPOTrainer(
            model,
            arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, learning_rate=0.01, **options),
            train_dataset=rows(),
            shapo=shapo,
        )

    again = copy.deepcopy(tiny_llama)
    trainer(tiny_llama).train()
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for a, b in zip(tiny_llama.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_exception_in_training_leaves_the_weights_restored(tiny_llama, tmp_path):
    before = [p.detach().clone() for p in tiny_llama.parameters()]

    def is_moved() -> bool:
        return not all(torch.equal(p, b) for p, b in zip(tiny_llama.parameters(), before, strict=True))

    class Failing(ShaPOTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 4:  # two micro-batches ascend, the second of the descent fails
                assert is_moved()
                raise KeyError("boom")
            return super().compute_loss(*args, **kwargs)

    trainer = Failing(
        tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5)
    )
    with pytest.raises(KeyError):
        trainer.train()
    assert not is_moved()


def test_a_shapo_optimizer_without_the_mixin_says_what_to_do(tiny_llama, tmp_path):
    opt = sk.ShaPOOptimizer(sgd(tiny_llama)[0], tiny_llama, neurons(tiny_llama), rho=0.5)
    trainer = PlainTrainer(tiny_llama, arguments(tmp_path), train_dataset=rows(), optimizers=(opt, None))
    with pytest.raises(RuntimeError, match="ShaPOTrainerMixin"):
        trainer.train()


def test_logs_can_be_written_as_json(tiny_llama, tmp_path):
    trainer = ShaPOTrainer(
        tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5)
    )
    trainer.train()
    assert json.loads(json.dumps(trainer.state.log_history)) == trainer.state.log_history


def tokens_of(update: int, micro_batch: int) -> torch.Tensor:
    """Rows of a micro-batch of 2, two of them an update."""
    start = 4 * update + 2 * micro_batch
    return torch.stack([row["input_ids"] for row in rows()[start : start + 2]])


def mean_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("part", [{"ascent_pairs": 1}, {"ascent_pairs": 3}, {"ascent_fraction": 0.5}], ids=str)
def test_an_ascent_on_drawn_rows_equals_a_loop_written_out(tiny_llama, tmp_path, part):
    by_hand, subspace = copy.deepcopy(tiny_llama), neurons(tiny_llama)
    shapo = ShaPOArguments(subspace, rho=0.5, seed=5, **part)
    trainer = ShaPOTrainer(
        tiny_llama, arguments(tmp_path), train_dataset=rows(), optimizers=sgd(tiny_llama), shapo=shapo
    )
    trainer.train()
    opt = sk.ShaPOOptimizer(torch.optim.SGD(by_hand.parameters(), lr=0.1), by_hand, subspace, rho=0.5)
    for update in range(3):
        drawn = shapo.part(shapo.seed).draw([2, 2], update)
        seen = torch.cat([tokens_of(update, micro)[chosen] for micro, chosen in enumerate(drawn)])
        with opt.ascent():
            ascent_loss = mean_loss(by_hand, seen)  # rows of one length: the mean over rows is the mean over tokens
            opt.ascend(ascent_loss)
        with opt.perturbed():
            for micro in range(2):
                (mean_loss(by_hand, tokens_of(update, micro)) / 2).backward()
        opt.step()
        opt.zero_grad()
        assert logged(trainer)[update]["shapo/ascent_loss"] == pytest.approx(ascent_loss.item(), rel=1e-4)
    for a, b in zip(tiny_llama.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_perturbation_for_each_micro_batch_equals_a_loop_written_out(tiny_llama, tmp_path):
    by_hand, subspace = copy.deepcopy(tiny_llama), neurons(tiny_llama)
    trainer = ShaPOTrainer(
        tiny_llama,
        arguments(tmp_path),
        train_dataset=rows(),
        optimizers=sgd(tiny_llama),
        shapo=ShaPOArguments(subspace, rho=0.5, per_micro_batch=True),
    )
    trainer.train()
    opt = sk.ShaPOOptimizer(torch.optim.SGD(by_hand.parameters(), lr=0.1), by_hand, subspace, rho=0.5)
    for update in range(3):
        before = 0.0
        for micro in range(2):
            tokens = tokens_of(update, micro)
            with opt.ascent():
                loss = mean_loss(by_hand, tokens)
                opt.ascend(loss)
                before += loss.item() / 2
            with opt.perturbed():
                (mean_loss(by_hand, tokens) / 2).backward()
        opt.step()
        opt.zero_grad()
        assert logged(trainer)[update]["shapo/ascent_loss"] == pytest.approx(before, rel=1e-4)
    for a, b in zip(tiny_llama.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_factor_on_a_raw_gradient_is_on_that_of_a_mean_whatever_the_ascent_sees(tiny_llama, tmp_path):
    """With norm="none" the scale of the ascent's loss matters: a part's mean, a micro-batch's own mean."""
    same_rows = [rows()[0]] * 16
    norms = []
    for part in ({}, {"ascent_pairs": 1}, {"ascent_pairs": 3}, {"per_micro_batch": True}):
        shapo = ShaPOArguments(neurons(tiny_llama), rho=1.0, norm="none", **part)
        model = copy.deepcopy(tiny_llama)
        trainer = ShaPOTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=same_rows, shapo=shapo)
        trainer.train()
        norms.append(logged(trainer)[0]["shapo/epsilon_norm"])
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-4)


def test_a_warm_start_is_plain_then_the_radius_rises(tiny_llama, tmp_path):
    shapo = ShaPOArguments(neurons(tiny_llama), rho=0.4, relative=True, plain_updates=1, rho_warmup=2)
    trainer = ShaPOTrainer(
        tiny_llama, arguments(tmp_path, max_steps=4, learning_rate=1e-6), train_dataset=rows(), shapo=shapo
    )
    trainer.train()
    radii = [entry.get("shapo/relative_radius", 0.0) for entry in logged(trainer)]
    assert radii == pytest.approx([0.0, 0.2, 0.4, 0.4], rel=1e-4)


def test_a_callbacks_own_schedule_of_the_radius_is_followed(tiny_llama, tmp_path):
    class Halving(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer.optimizer.rho = 0.8 / 2**state.global_step

    trainer = ShaPOTrainer(
        tiny_llama,
        arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[Halving()],
        shapo=ShaPOArguments(neurons(tiny_llama), rho=0.1),
    )
    trainer.train()
    assert [entry["shapo/epsilon_norm"] for entry in logged(trainer)] == pytest.approx([0.8, 0.4, 0.2], rel=1e-4)


def test_a_ready_shapo_optimizer_is_taken_as_it_is(tiny_llama, tmp_path):
    other, subspace = copy.deepcopy(tiny_llama), neurons(tiny_llama)
    ready = sk.ShaPOOptimizer(sgd(tiny_llama)[0], tiny_llama, subspace, rho=0.5, interval=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(ready, lambda update: 1.0)
    trainer = ShaPOTrainer(tiny_llama, arguments(tmp_path), train_dataset=rows(), optimizers=(ready, scheduler))
    trainer.train()
    assert trainer._shapo_optimizer() is ready
    shapo = ShaPOArguments(subspace, rho=0.5, interval=2)
    ShaPOTrainer(other, arguments(tmp_path), train_dataset=rows(), optimizers=sgd(other), shapo=shapo).train()
    for a, b in zip(tiny_llama.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_ready_shapo_optimizer_may_be_given_the_trainers_options_alone(tiny_llama, tmp_path):
    def trainer(**options: Any) -> ShaPOTrainer:
        ready = sk.ShaPOOptimizer(sgd(tiny_llama)[0], tiny_llama, neurons(tiny_llama), rho=0.5)
        return ShaPOTrainer(
            tiny_llama,
            arguments(tmp_path),
            train_dataset=rows(),
            optimizers=(ready, None),
            shapo=ShaPOArguments(**options),
        )

    warm = trainer(plain_updates=2)
    warm.train()
    assert ["shapo/gap" in entry for entry in logged(warm)] == [False, False, True]
    with pytest.raises(ValueError, match=r"which has its own rho, interval: leave them out"):
        trainer(rho=0.5, interval=2)


def test_training_twice_wraps_the_optimizer_once(tiny_llama, tmp_path):
    shapo = ShaPOArguments(neurons(tiny_llama), rho=0.5)
    trainer = ShaPOTrainer(tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=shapo)
    trainer.train()
    trainer.train()
    assert type(trainer._shapo_optimizer().base) is torch.optim.AdamW
    assert trainer._shapo_optimizer().updates == 6
    assert "shapo/gap" in logged(trainer)[-1]


def test_gradients_are_clipped_once_and_in_the_second_pass(tiny_llama, tmp_path):
    before, calls = copy.deepcopy(tiny_llama), []
    trainer = ShaPOTrainer(
        tiny_llama,
        arguments(tmp_path, max_steps=1, max_grad_norm=1e-3, learning_rate=1.0),
        train_dataset=rows(),
        optimizers=(torch.optim.SGD(tiny_llama.parameters(), lr=1.0), None),
        shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5),
    )
    clip = trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda model: calls.append(trainer._shapo_optimizer().stats["grad_norm"]) or clip(model)
    trainer.train()
    moved = sum(
        (a - b).double().square().sum() for a, b in zip(tiny_llama.parameters(), before.parameters(), strict=True)
    )
    assert moved.sqrt().item() == pytest.approx(1e-3, rel=1e-2)
    assert len(calls) == 1
    assert logged(trainer)[0]["shapo/grad_norm"] > 1e-2  # the ascent's gradient is not clipped


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluation_while_training_and_after_an_update_given_up_is_at_the_weights_themselves(
    tiny_llama, tmp_path, strategy
):
    class StopAfterTheFirstMicroBatchOfAnUpdate(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    unmoved: list[bool] = []

    class Watching(ShaPOTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            found = [p.detach().clone() for p in self.model.parameters()]
            self._shapo_optimizer().restore()
            unmoved.append(all(torch.equal(a, b) for a, b in zip(self.model.parameters(), found, strict=True)))
            return super().evaluate(*args, **kwargs)

    trainer = Watching(
        tiny_llama,
        arguments(tmp_path, eval_strategy=strategy, eval_steps=1),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[StopAfterTheFirstMicroBatchOfAnUpdate()],
        shapo=ShaPOArguments(neurons(tiny_llama), rho=5.0),
    )
    trainer.train()
    assert unmoved == [True] * (2 if strategy == "steps" else 1)


def test_activation_checkpointing_changes_nothing_and_its_reentrant_form_is_refused(tiny_llama, tmp_path):
    def train(model, **options: Any) -> None:
        ShaPOTrainer(
            model,
            arguments(tmp_path, **options),
            train_dataset=rows(),
            optimizers=sgd(model),
            shapo=ShaPOArguments(neurons(model), rho=0.5),
        ).train()

    other, third = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    train(tiny_llama)
    train(other, gradient_checkpointing=True)
    assert other.is_gradient_checkpointing
    for a, b in zip(tiny_llama.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        train(third, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


def test_a_compiled_model_trains_as_an_eager_one(tiny_llama, tmp_path):
    ends = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = copy.deepcopy(tiny_llama)
        shapo = ShaPOArguments(neurons(model), rho=0.5, interval=2)
        ShaPOTrainer(
            model, arguments(tmp_path, **options), train_dataset=rows(), optimizers=sgd(model), shapo=shapo
        ).train()
        ends.append(list(model.parameters()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
