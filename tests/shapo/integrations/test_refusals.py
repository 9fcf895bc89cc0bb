"""What ShaPO in a Trainer cannot do is refused in one line when the trainer is made."""

from __future__ import annotations

import pytest

import shapo_kernels as sk
from shapo.integrations import ShaPOArguments, ShaPOTrainerMixin

transformers = pytest.importorskip("transformers")
from transformers import Trainer  # noqa: E402

from tests.support.trainers import ShaPOTrainer, arguments, neurons, of_trl, rows, sgd  # noqa: E402


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shapo": None}, TypeError, r"lacks subspace and rho: give shapo=ShaPOArguments"),
        ({"shapo": {"rho": 0.1}}, TypeError, r"lacks subspace"),
        ({"shapo": 0.1}, TypeError, "shapo is a float"),
        ({"shapo": {"ascent_pairs": 5}}, ValueError, "ascent_pairs is 5, but an ascent is over 4 pairs"),
        (
            {"shapo": {"ascent_pairs": 3, "per_micro_batch": True}},
            ValueError,
            "ascent_pairs is 3, but an ascent is over 2",
        ),
    ],
    ids=str,
)
def test_what_a_trainer_cannot_do_is_refused_in_one_line_when_it_is_made(tiny_llama, tmp_path, options, error, message):
    shapo = options["shapo"]
    if isinstance(shapo, dict):
        complete = {} if "rho" in shapo else {"subspace": neurons(tiny_llama), "rho": 0.1}
        shapo = ShaPOArguments(**complete, **shapo)
    with pytest.raises(error, match=message) as caught:
        ShaPOTrainer(tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=shapo)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"ascent_fraction": 0.0},
        {"ascent_fraction": 1.5},
        {"ascent_pairs": 0},
        {"plain_updates": -1},
        {"rho_warmup": -1},
    ],
)
def test_arguments_out_of_range_are_refused(tiny_llama, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ShaPOArguments(neurons(tiny_llama), rho=0.5, **options)


def test_a_ready_optimizer_under_deepspeed_is_refused_when_the_trainer_is_made(tiny_llama, tmp_path):
    class UnderDeepSpeed(ShaPOTrainer):
        def create_accelerator_and_postprocess(self) -> None:  # what a deepspeed config has it say
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    ready = sk.ShaPOOptimizer(sgd(tiny_llama)[0], tiny_llama, neurons(tiny_llama), rho=0.1)
    with pytest.raises(ValueError, match=r"^DeepSpeed takes an optimizer's parameters away: give the trainer its base"):
        UnderDeepSpeed(tiny_llama, arguments(tmp_path), train_dataset=rows(), optimizers=(ready, None))


def test_a_trainer_that_generates_its_batches_is_refused(tiny_llama, tmp_path):
    class Generating(ShaPOTrainerMixin, of_trl("GRPOTrainer", _prepare_inputs=lambda self, inputs: inputs), Trainer):
        pass

    with pytest.raises(ValueError, match="generates its batches"):
        Generating(tiny_llama, arguments(tmp_path), shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5))


def test_a_reference_that_would_run_in_both_passes_is_refused(tiny_llama, tmp_path):
    class Asking(ShaPOTrainerMixin, of_trl("KTOTrainer", precompute_ref_logps=False), Trainer):
        pass

    with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
        Asking(tiny_llama, arguments(tmp_path), shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5))
