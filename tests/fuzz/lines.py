"""Command lines made of a seed and a number: a good one of each command, with one to three things wrong."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

# What each command is given where nothing is wrong; {w} is the folder of the files, outputs go elsewhere.
_MODEL = ["--model", "{w}/model"]
_TRAINED = ["--limit", "4", "--updates", "1", "--batch-size", "2", "--warmup", "1"]
LINES: dict[str, list[str]] = {
    "sft": [*_MODEL, "--data", "{w}/train.jsonl", *_TRAINED, "--output", "out"],
    "probe": [*_MODEL, "--data", "{w}/train.jsonl", "--epochs", "1", "--output", "out"],
    "reward": [*_MODEL, "--data", "{w}/train.jsonl", "--betas", "1", "--max-length", "64", "--output", "out"],
    "select": [*_MODEL, "--method", "probe", "--probe", "{w}/probe/probe.safetensors", "--output", "out.safetensors"],
    "select random": [*_MODEL, "--method", "random", "--like", "{w}/subspace.safetensors",
                      "--output", "out.safetensors"],
    "select gradient": [*_MODEL, "--method", "gradient", "--data", "{w}/test.jsonl", "--limit", "2",
                        "--output", "out.safetensors"],
    "train": [*_MODEL, "--data", "{w}/train.jsonl", *_TRAINED, "--rho", "0.1", "--subspace",
              "{w}/subspace.safetensors", "--output", "out"],
    "train reward": [*_MODEL, "--data", "{w}/train.jsonl", *_TRAINED, "--loss", "reward_level", "--reward-model",
                     "{w}/reward", "--output", "out"],
    "train adapter": ["--model", "{w}/adapter", "--data", "{w}/train.jsonl:0.5", "--data", "{w}/test.jsonl:0.5",
                      *_TRAINED, "--lora", "r=2", "--output", "out"],
    "train resume": [*_MODEL, "--data", "{w}/train.jsonl", "--limit", "4", "--updates", "2", "--batch-size", "2",
                     "--save-every", "1", "--warmup", "1", "--max-length", "64", "--resume", "--output", "{w}/run"],
    "sharpness": [*_MODEL, "--data", "{w}/test.jsonl", "--limit", "2", "--rhos", "0.1", "--ratios", "0.1",
                  "--subspace", "{w}/subspace.safetensors", "--output", "out"],
    "evaluate": [*_MODEL, "--data", "{w}/test.jsonl", "--prompts", "{w}/prompts.jsonl", "--answers", "answers.jsonl",
                 "--max-new-tokens", "2", "--output", "out.json"],
    "evaluate verdicts": ["--verdicts", "{w}/verdicts.jsonl", "--comparisons", "{w}/comparisons.jsonl",
                          "--against", "{w}/verdicts.jsonl", "--output", "out.json"],
    "judge": ["--answers", "{w}/answers.jsonl", "--judge", "refusal-substring", "--output", "out.jsonl"],
    "judge probe": ["--answers", "{w}/answers.jsonl", "--judge", "probe", "--probe", "{w}/probe/probe.safetensors",
                    *_MODEL, "--max-length", "64", "--output", "out.jsonl"],
    "attack": [*_MODEL, "--data", "{w}/train.jsonl", "--prompts", "{w}/prompts.jsonl", "--judge", "refusal-substring",
               "--steps", "1", "--examples", "2", "--held-out", "1", "--every", "1", "--seeds", "1", "--batch-size",
               "2", "--max-new-tokens", "1", "--output", "out"],
    "data": ["check", "{w}/train.jsonl", "--against", "{w}/test.jsonl", *_MODEL, "--output", "out.json"],
    "report": ["{w}/run", "{w}/evaluation.json", "--output", "out.html"],
    "import-gguf": ["{w}/tiny.gguf", "--output", "out"],
    "safety-pairs": ["--refusal-direction", "{w}/refusal_direction", "--jailbreakbench", "{w}/artifacts",
                     "--output", "out"],
    "study": [*_MODEL, "--pairs", "{w}/pairs", "--plan", "real", "--hours", "1e-5", "--output", "out"],
    "demo": ["--size", "small", "--jobs", "1", "--output", "out"],
    "plan": [*_MODEL, "--batch-size", "2", "--length", "16", "--device", "cpu", "--json", "out.json"],
    "bench": ["--layers", "1", "--hidden", "8", "--intermediate", "8", "--repeats", "1", "--percent", "50",
              "--device", "cpu", "--output", "out.json"],
}  # fmt: skip
NUMBERS = ("0", "-1", "nan", "inf", "1e308", "-1e308", "1e-320", "99999999999999999999", "--", "", "x", "1,2", "0x1")
NAMES = (
    "",
    "nowhere",
    "/dev/null",
    "a\0b",
    "\udc80",
    "x" * 300,
    "{w}",
    "{w}/train.jsonl",
    "{w}/model",
    "out/x/y",
    "é\u2028",
)
RECIPES = (
    "limit: [1]",
    "limit: {a: b}",
    "quiet: 3",
    "quiet: 'yes'",
    "- a",
    "a: &a [*a]",
    "seed: !!python/object/apply:os.getcwd []",
    "limit: 0x10",
    "? [1, 2]\n: 3",
    "limit: 2020-01-01",
    "batch_size: .nan",
    "limit: 99999999999999999999",
    "output: null",
    "data: [[a]]",
    "\t",
    "%YAML 9.9\n---\nlimit: 1",
    'model: "\\ud800"',
    "limit: 1\nlimit: 2",
    "limit: " + "[" * 3000,
    "config: x",
    "",
    "null",
    "limit: 2",
    "x" * 3000,
    "limit: 1_0",
    "\ufeffmodel: m",
)
ROWS = ("null", "[]", "{}", '{"prompt": null}', '{"prompt": "\\ud800"}', "[" * 5000, "{", "NaN", '"\u2028"', "")
# More than this of these takes longer than a case may.
SLOW = {"--max-new-tokens", "--epochs", "--updates", "--repeats", "--random", "--layers", "--hidden", "--intermediate",
        "--steps", "--seeds", "--jobs", "--hours", "--size"}  # fmt: skip
NOT_QUIET = ("bench", "data", "plan", "report", "import-gguf", "safety-pairs", "study")
OUTPUTS = ("--output", "--answers", "--json")


@dataclass
class Case:
    """One command line, and what was done to the files before it."""

    number: int
    arguments: list[str]
    damage: list[str] = field(default_factory=list)
    must_fail: str | None = None

    @property
    def command(self) -> str:
        return self.arguments[0]


def kinds() -> list[str]:
    """The kinds of good lines whose command there is."""
    from shapo.cli import COMMANDS

    return sorted(kind for kind in LINES if kind.split()[0] in COMMANDS)


def make_case(number: int, seed: int, world: Path) -> Case:
    """The case of a number: the same for ever, whatever else is run."""
    generator = random.Random(f"{seed}/{number}")
    kind = generator.choice(kinds())
    command = kind.split()[0]
    case = Case(number, [command, *LINES[kind], *([] if command in NOT_QUIET else ["--quiet"])])
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        generator.choice((_value, _value, _option, _output, _bytes, _weights, _rows, _entry, _recipe))(case, generator)
        if case.must_fail is not None:
            break  # what comes after could mend it
    case.arguments = [part.replace("{w}", str(world)) for part in case.arguments]
    return case


def _value(case: Case, generator: random.Random) -> None:
    places = [n for n, part in enumerate(case.arguments) if n > 1 and not part.startswith("--")]
    place = generator.choice(places)
    numeric = case.arguments[place].replace(".", "").replace(",", "").isdigit()
    value = generator.choice(NUMBERS if numeric and generator.random() < 0.8 else NAMES)
    if value == "--" and generator.random() < 0.5:
        case.arguments[place - 1 : place + 1] = [f"{case.arguments[place - 1]}=--"]
    else:
        case.arguments[place] = value


def _option(case: Case, generator: random.Random) -> None:
    from shapo.cli import _groups
    from shapo.options import declared, typed

    table = generator.choice(_groups(case.command)).table
    name, (_, told) = generator.choice(sorted(declared(table).items()))
    if typed(name) in SLOW or told.positional:
        return
    values = told.choices or (*NUMBERS, *NAMES, "1", "2", "0.5")
    value = generator.choice(values)
    case.arguments += [typed(name)] if generator.random() < 0.2 else [typed(name), value]


def _output(case: Case, generator: random.Random) -> None:
    outputs = OUTPUTS[:1] if case.command == "judge" else OUTPUTS
    places = [n + 1 for n, part in enumerate(case.arguments[:-1]) if part in outputs]
    inputs = [part for part in case.arguments if part.startswith("{w}/") and part != "{w}/run" and ":0" not in part]
    if not places:
        return
    choice, place = generator.random(), generator.choice(places)
    if "--resume" in case.arguments:
        case.arguments[place] = generator.choice((*NAMES[:6], "here/is/none"))
    elif inputs and choice < 0.5:
        case.arguments[place] = generator.choice(inputs)
        case.must_fail = "an output is an input"
    elif case.command in ("sft", "train", "reward") and choice < 0.7:
        case.arguments[place] = "{w}"
        case.must_fail = "the output holds the model"
    else:
        case.arguments[place] = generator.choice((*NAMES[:6], "here/is/none", "{w}/train.jsonl/below"))


def _bytes(case: Case, generator: random.Random) -> None:
    how = generator.choice(("cut", "flip", "empty", "text", "gone", "folder"))
    case.damage.append(f"{how} {_named(case, generator)} {generator.random()}")


def _weights(case: Case, generator: random.Random) -> None:
    given = zip(case.arguments, case.arguments[1:], strict=False)
    models = [part for option, part in given if option.endswith("-model") and part in ("{w}/model", "{w}/reward")]
    if models and case.command not in ("data", "plan"):  # which read no weight
        how = generator.choice(("missing", "renamed", "shape", "nan"))
        case.damage.append(f"weights {generator.choice(models)[4:]}/model.safetensors {how}")
        # At once, and not where the study's time is up before a job begins.
        case.must_fail = None if case.command == "study" else "a model that is not whole"


def _rows(case: Case, generator: random.Random) -> None:
    files = [part[4:].partition(":")[0] for part in case.arguments if part.startswith("{w}/") and ".jsonl" in part]
    if files:
        case.damage.append(f"row {generator.choice(files)} {generator.random()}")


def _entry(case: Case, generator: random.Random) -> None:
    """An entry of a JSON file, or of a tensor file and its header, gone or of another type."""
    case.damage.append(f"entry {_named(case, generator)} {generator.random()}")


def _recipe(case: Case, generator: random.Random) -> None:
    from shapo import recipe

    if case.command in recipe.COMMANDS:
        case.damage.append(f"recipe recipe.yaml {generator.randrange(len(RECIPES))}")
        case.arguments += ["--config", "{w}/recipe.yaml"]


def _named(case: Case, generator: random.Random) -> str:
    """A file or folder of the command line; of a folder the file is drawn when the damage is done."""
    named = [part[4:].partition(":0")[0] for part in case.arguments if part.startswith("{w}/")]
    return generator.choice(named or ["train.jsonl"])


def damage(world: Path, told: str) -> None:
    """Does to a copy of the files what a case says."""
    from tests.fuzz.world import break_entry, break_weights

    how, name, value = told.split(" ")
    path, generator = world / name, random.Random(value)
    if how == "recipe":
        path.write_text(RECIPES[int(value)], encoding="utf-8")
        return
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        fitting = [file for file in files if file.suffix in (".json", ".safetensors")] if how == "entry" else files
        path = generator.choice(fitting or files or [path])
    if not path.is_file():
        return
    if how == "weights":
        break_weights(path, value)
    elif how == "entry":
        break_entry(path, generator)
    else:
        _break_bytes(path, how, generator)


def _break_bytes(path: Path, how: str, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: generator.randrange(len(content) + 1)])
    elif how == "flip" and content:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    elif how == "row":
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        lines.insert(generator.randrange(len(lines)), generator.choice(ROWS))
        path.write_text("\n".join(lines), encoding="utf-8")
    elif how in ("empty", "text"):
        path.write_text("" if how == "empty" else "not this\n")
    elif how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()


def told(case: Case) -> str:
    """A case in two lines."""
    return f"{json.dumps(case.arguments)}\n  {case.damage}"
