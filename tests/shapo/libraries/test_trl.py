"""What is assumed of trl's trainers; a name that a release drops fails here by that name."""

from __future__ import annotations

import inspect
from collections import defaultdict
from types import SimpleNamespace

import pytest

from shapo.libraries.trl import FUSED, METRICS, OF_PAIRS, REFERENCE, asks_for_logps, metrics_kept

trl = pytest.importorskip("trl")


@pytest.mark.parametrize("name", [*METRICS, *REFERENCE, *FUSED])
def test_the_dpo_trainer_has(name):
    assert name in inspect.getsource(inspect.getmodule(trl.DPOTrainer))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_its_trainers_of_pairs_have_collators_that_put_chosen_above_rejected(name):
    module = inspect.getmodule(getattr(trl, name))
    collator = next(kind for kind in vars(module).values() if getattr(kind, "__name__", "") == COLLATORS[name])
    batch = collator(pad_token_id=0)([PAIR, PAIR])
    assert batch["input_ids"][:, 0].tolist() == [1, 1, 2, 2]


COLLATORS = {"DPOTrainer": "DataCollatorForPreference", "RewardTrainer": "DataCollatorForPreference"}
PAIR = {"prompt_ids": [], "chosen_ids": [1, 5], "rejected_ids": [2, 6, 7]}


def test_a_model_that_trl_has_patched_can_be_asked(tiny_llama):
    from trl.trainer.utils import add_fused_lm_head

    assert not asks_for_logps(tiny_llama)
    add_fused_lm_head(tiny_llama)
    assert asks_for_logps(tiny_llama)


def test_what_is_counted_inside_is_forgotten_and_what_was_counted_before_is_not():
    lists = defaultdict(list, loss=[1.0])
    trainer = SimpleNamespace(_metrics={"train": lists}, _total_train_tokens=5)
    with metrics_kept(trainer):
        trainer._metrics["train"]["loss"].append(2.0)
        trainer._total_train_tokens += 3
        assert trainer._metrics["train"]["loss"] == [2.0]
    assert trainer._metrics["train"]["loss"] == [1.0]
    assert trainer._total_train_tokens == 5
