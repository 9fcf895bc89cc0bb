"""Options of another kind than their annotation's: refused everywhere in the library, by one check."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch

from shapo.ascents import AscentPart, RhoSchedule
from shapo.checked import checked
from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.integrations import ShaPOArguments

# Whose functions a user's own program calls.
MODULES = (
    *("answers.writing", "ascents", "attack", "config", "data.formats", "data.mixture", "data.noise", "data.tokens"),
    *("evaluation", "integrations.arguments", "judges.files", "models.loading", "probe", "scoring.logps"),
    *("scoring.reward_head", "scoring.rewards", "selection", "sharpness", "study.plan"),
    *("training.preference", "training.sft"),
)
# Records, and what the library alone calls.
INNER = {"ProbeExample", "UpdateOptions", "response_logps", "cached_logps", "verdict_row"}


def with_switches():
    """Public functions and classes of those modules that have an option which is True or False."""
    for module in MODULES:
        for name, found in vars(importlib.import_module(f"shapo.{module}")).items():
            own = getattr(found, "__module__", None) == f"shapo.{module}" and not name.startswith("_")
            if own and (inspect.isfunction(found) or inspect.isclass(found)) and name not in INNER:
                given = inspect.get_annotations(found.__init__ if inspect.isclass(found) else found)
                if any("bool" in str(kind).split(" | ") for option, kind in given.items() if option != "return"):
                    yield name, found


def test_every_function_with_a_switch_is_checked():
    found = dict(with_switches())
    made = {name: f.__init__ if inspect.isclass(f) else f for name, f in found.items()}
    assert len(made) > 20
    assert [name for name, function in made.items() if not hasattr(function, "__wrapped__")] == []


@checked
def brew(leaves: str, minutes: int = 3, *, cold: bool = False, sugar: float | None = None, spare: bool | str = False):
    return leaves, minutes, cold, sugar, spare


@checked
@dataclass(frozen=True)
class Tea:
    leaves: str
    cold: bool = False


def test_what_is_of_its_kind_is_taken():
    assert brew("green", np.int64(4), cold=True, sugar=np.float32(1), spare="cup") == ("green", 4, True, 1, "cup")
    assert brew("green", sugar=2) == ("green", 3, False, 2, False)
    assert Tea("green", True) == Tea(leaves="green", cold=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leaves": 1}, "leaves is 1: expected a text"),
        ({"minutes": True}, "minutes is True: expected a whole number"),
        ({"minutes": 3.0}, "minutes is 3.0: expected a whole number"),
        ({"minutes": "3"}, "minutes is '3': expected a whole number"),
        ({"cold": None}, "cold is None: expected True or False"),
        ({"cold": 0}, "cold is 0: expected True or False"),
        ({"cold": "false"}, "cold is 'false': expected True or False"),
        ({"cold": np.True_}, "cold is .*: expected True or False"),
        ({"cold": torch.tensor(True)}, "cold is tensor.*: expected True or False"),
        ({"sugar": "1"}, "sugar is '1': expected a number or None"),
        ({"sugar": False}, "sugar is False: expected a number or None"),
        ({"spare": None}, "spare is None: expected True or False or a text"),
    ],
)
def test_what_is_not_is_refused(options, message):
    with pytest.raises(TypeError, match=message):
        brew(**{"leaves": "green"} | options)
    if "cold" in options:
        with pytest.raises(TypeError, match=message):
            Tea("green", **options)


@pytest.mark.parametrize("table", [LossConfig, ShaPOConfig, LoopConfig, ShaPOArguments, AscentPart, RhoSchedule])
def test_the_tables_of_options_refuse_every_switch_and_number_of_another_kind(table):
    needed = {"rho": 0.1} if "rho" in {field.name for field in fields(table)} else {}
    table(**needed)
    tried = 0
    for field in fields(table):
        for kind, wrong in (("bool", "false"), ("int", True), ("float", "1"), ("str", 1)):
            if set(str(field.type).split(" | ")) <= {kind, "None"}:
                tried += 1
                with pytest.raises(TypeError, match=f"{field.name} is"):
                    table(**needed | {field.name: wrong})
    assert tried
