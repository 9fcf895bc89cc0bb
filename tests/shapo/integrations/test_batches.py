"""The rows that an ascent on a part of a Trainer's batch is given."""

from __future__ import annotations

import pytest
import torch

from shapo.integrations.batches import Cutter

pytest.importorskip("transformers")
from tests.support.trainers import of_trl


class TestCutter:
    def test_a_pair_is_both_of_its_rows(self):
        cutter = Cutter(of_trl("DPOTrainer")())
        batch = {"input_ids": torch.arange(12).view(6, 2), "ref_chosen_logps": torch.arange(3.0), "other": "kept"}
        assert cutter.count(batch) == 3
        cut = cutter.take(batch, [0, 2])
        assert cut["input_ids"].tolist() == [[0, 1], [4, 5], [6, 7], [10, 11]]
        assert cut["ref_chosen_logps"].tolist() == [0.0, 2.0]
        assert cut["other"] == "kept"

    def test_rows_are_rows_of_a_trainer_without_pairs(self):
        cutter = Cutter(of_trl("SFTTrainer")())
        assert cutter.take({"input_ids": torch.arange(6).view(3, 2)}, [1])["input_ids"].tolist() == [[2, 3]]

    def test_a_layout_that_is_not_known_is_refused_and_one_that_cannot_be_cut(self):
        with pytest.raises(ValueError, match="how KTOTrainer lays out its batches is not known"):
            Cutter(of_trl("KTOTrainer")())
        cutter = Cutter(of_trl("SFTTrainer")())
        packed = {"input_ids": torch.zeros(4, 2), "pixel_values": torch.zeros(3, 5)}
        assert cutter.take(packed, [0, 1, 2, 3])["pixel_values"].shape == (3, 5)
        with pytest.raises(ValueError, match=r"tensors with \[3, 4\] rows cannot be cut"):
            cutter.take(packed, [0])
