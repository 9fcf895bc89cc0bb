"""The table of options: what the command line, the trainer's mixin and the optimizer take from it."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import MISSING, dataclass, fields

import pytest

from shapo.cli import COMMANDS, build_parser
from shapo.config import LoopConfig, LossConfig, ShaPOConfig, UpdateOptions
from shapo.integrations import ShaPOArguments
from shapo.options import Group, add, declared, given, option, read
from shapo_kernels import ShaPOOptimizer


@dataclass(frozen=True)
class Tea:
    leaves: str = option("which leaves", metavar="NAME")
    minutes: int = option("how long", 3)
    cold: bool = option("with ice", False, flag="with_ice")
    sugar: float | None = option("spoons", None, of=("green", "black"), parse=float, absent="none")
    cups: list[str] = option("whose", repeated=True, metavar="WHO")


def parse(group: Group, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add(parser, [group])
    return parser.parse_args(arguments)


def test_a_dataclass_is_read_from_a_command_line():
    given_all = ["--leaves", "green", "--minutes", "5", "--with-ice", "--sugar", "1.5", "--cups", "a", "--cups", "b"]
    assert read(Tea, parse(Group(Tea), *given_all)) == Tea("green", 5, True, 1.5, ["a", "b"])
    assert read(Tea, parse(Group(Tea), "--leaves", "green")) == Tea("green", 3, False, None, [])


def test_a_command_may_have_a_default_of_its_own_and_tell_what_was_given():
    assert parse(Group(Tea, defaults={"minutes": 4}), "--leaves", "x").minutes == 4
    told = parse(Group(Tea, given_only=True, optional=True), "--with-ice")
    assert (told.minutes, told.with_ice) == (None, True)
    assert given(Tea, told) == ["--with-ice"]
    with pytest.raises(argparse.ArgumentError):
        parse(Group(Tea), "--leaves", "x", "--minutes", "soon")


def test_help_says_default_meaning_of_absence_and_who_uses_an_option():
    parser = argparse.ArgumentParser()
    add(parser, [Group(Tea)])
    text = " ".join(parser.format_help().split())
    assert "how long (default: 3)" in text
    assert "green, black: spoons (default: none)" in text
    assert "with ice (default" not in text


def test_the_optimizers_keyword_arguments_are_the_tables():
    """Name and default of each; a value that one refuses the other refuses (see the tests of both)."""
    parameters = inspect.signature(ShaPOOptimizer).parameters
    own = {field.name: field for field, told in declared(ShaPOArguments).values() if told.optimizers}
    for name, field in own.items():
        wanted = parameters[name].default
        assert field.default == (None if wanted is inspect.Parameter.empty else wanted), name
    # Of the optimizer alone: what no loop here has a use for.
    left = set(parameters) - set(own) - {"base_optimizer", "model", "seed"}
    assert left == {"eta", "replay_rng", "stochastic_rounding"}


def test_the_mixin_and_the_command_take_the_same_options_of_an_update():
    shared = {field.name: field for field in fields(UpdateOptions)}
    for table in (ShaPOConfig, ShaPOArguments):
        assert shared.items() <= {field.name: field for field in fields(table)}.items()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_a_help_text_and_a_default_that_can_be_typed(command):
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for action in commands.choices[command]._actions:
        assert action.help, action.dest
        if action.choices and action.default is not None:
            assert action.default in action.choices, action.dest


@pytest.mark.parametrize("table", [LossConfig, LoopConfig, UpdateOptions])
def test_every_field_of_a_configuration_is_an_option(table):
    assert {field.name for field, _ in declared(table).values()} == {field.name for field in fields(table)}
    assert all(field.default is not MISSING for field in fields(table))
