"""What is assumed of transformers' Trainer; a name that a release drops fails here by that name."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from shapo.libraries.transformers import TRAINER, check_trainer


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_has(name):
    assert callable(getattr(Trainer, name))


def test_they_take_the_arguments_that_they_are_given():
    parameters = {name: list(inspect.signature(getattr(Trainer, name)).parameters)[1:] for name in TRAINER}
    assert len(parameters["_prepare_inputs"]) == 1
    assert parameters["_get_num_items_in_batch"] == ["batch_samples", "device"]
    assert len(parameters["_save_optimizer_and_scheduler"]) == len(parameters["_load_optimizer_and_scheduler"]) == 1
    assert len(parameters["get_batch_samples"]) == 3


def test_a_trainer_without_one_of_them_is_refused_by_its_name():
    class Older:
        get_batch_samples = compute_loss_context_manager = _prepare_inputs = _load_optimizer_and_scheduler = print

    check_trainer(object.__new__(Trainer))
    with pytest.raises(ValueError, match="has no _get_num_items_in_batch, _save_optimizer_and_scheduler, which"):
        check_trainer(Older())
