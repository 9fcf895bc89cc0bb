"""Generated command lines over all commands: no traceback, no crash, no silent success, nothing overwritten.

    python tests/fuzz/run.py --cases 3000 --seed 1

Every case is one command line, or one damaged file, made from the seed and the number of the case alone; `--only N`
repeats case N and shows what it printed. All run in children of one process by fork, so that torch and transformers are
imported once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

SECONDS = 60

# What each command is given where nothing is wrong; {w} is the folder of the files, outputs go elsewhere.
LINES: dict[str, list[str]] = {
    "sft": ["--model", "{w}/model", "--data", "{w}/train.jsonl", "--limit", "4", "--updates", "1", "--batch-size", "2",
            "--warmup", "1", "--output", "out"],
    "probe": ["--model", "{w}/model", "--data", "{w}/train.jsonl", "--epochs", "1", "--output", "out"],
    "select": ["--model", "{w}/model", "--method", "probe", "--probe", "{w}/probe/probe.safetensors",
               "--output", "out.safetensors"],
    "select random": ["--model", "{w}/model", "--method", "random", "--like", "{w}/subspace.safetensors",
                      "--output", "out.safetensors"],
    "select gradient": ["--model", "{w}/model", "--method", "gradient", "--data", "{w}/test.jsonl", "--limit", "2",
                        "--output", "out.safetensors"],
    "train": ["--model", "{w}/model", "--data", "{w}/train.jsonl", "--limit", "4", "--updates", "1", "--batch-size",
              "2", "--warmup", "1", "--rho", "0.1", "--subspace", "{w}/subspace.safetensors", "--output", "out"],
    "train reward": ["--model", "{w}/model", "--data", "{w}/train.jsonl", "--limit", "2", "--updates", "1",
                     "--batch-size", "2", "--warmup", "1", "--loss", "reward_level", "--reward-model", "{w}/reward",
                     "--output", "out"],
    "train resume": ["--model", "{w}/model", "--data", "{w}/train.jsonl", "--limit", "4", "--updates", "2",
                     "--batch-size", "2", "--save-every", "1", "--warmup", "1", "--max-length", "64", "--resume",
                     "--output", "{w}/run"],
    "sharpness": ["--model", "{w}/model", "--data", "{w}/test.jsonl", "--limit", "2", "--rhos", "0.1", "--ratios",
                  "0.1", "--subspace", "{w}/subspace.safetensors", "--output", "out"],
    "evaluate": ["--model", "{w}/model", "--data", "{w}/test.jsonl", "--prompts", "{w}/prompts.jsonl", "--answers",
                 "answers.jsonl", "--max-new-tokens", "2", "--output", "out.json"],
    "evaluate verdicts": ["--verdicts", "{w}/verdicts.jsonl", "--comparisons", "{w}/comparisons.jsonl",
                          "--output", "out.json"],
    "judge": ["--answers", "{w}/answers.jsonl", "--judge", "refusal-substring", "--output", "out.jsonl"],
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
# More than this of these takes longer than a case may.
SLOW = {"--max-new-tokens", "--epochs", "--updates", "--repeats", "--random", "--layers", "--hidden", "--intermediate"}


@dataclass
class Case:
    """One command line, and what was done to the files before it."""

    number: int
    arguments: list[str]
    damage: list[str] = field(default_factory=list)
    must_fail: str | None = None


def make_case(number: int, seed: int, world: Path) -> Case:
    """The case of a number: the same for ever, whatever else is run."""
    generator = random.Random(f"{seed}/{number}")
    kind = generator.choice(sorted(LINES))
    case = Case(number, [kind.split()[0], *LINES[kind], *([] if kind.startswith("bench") else ["--quiet"])])
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        generator.choice((_value, _value, _option, _output, _bytes, _weights, _rows))(case, generator, world)
        if case.must_fail is not None:
            break  # what comes after could mend it
    case.arguments = [part.replace("{w}", str(world)) for part in case.arguments]
    return case


def _value(case: Case, generator: random.Random, world: Path) -> None:
    places = [n for n, part in enumerate(case.arguments) if n > 1 and case.arguments[n - 1].startswith("--")]
    place = generator.choice([n for n in places if not case.arguments[n].startswith("--")])
    numeric = case.arguments[place].replace(".", "").replace(",", "").isdigit()
    value = generator.choice(NUMBERS if numeric and generator.random() < 0.8 else NAMES)
    if value == "--" and generator.random() < 0.5:
        case.arguments[place - 1 : place + 1] = [f"{case.arguments[place - 1]}=--"]
    else:
        case.arguments[place] = value


def _option(case: Case, generator: random.Random, world: Path) -> None:
    import importlib

    from shapo.options import declared, typed

    module = importlib.import_module(f"shapo.commands.{case.arguments[0]}")
    table = generator.choice(module.OPTIONS).table
    name, (_, told) = generator.choice(sorted(declared(table).items()))
    if typed(name) in SLOW:
        return
    values = told.choices or (*NUMBERS, *NAMES, "1", "2", "0.5")
    case.arguments += [typed(name)] if generator.random() < 0.2 else [typed(name), generator.choice(values)]


def _output(case: Case, generator: random.Random, world: Path) -> None:
    places = [n + 1 for n, part in enumerate(case.arguments[:-1]) if part in ("--output", "--answers")]
    inputs = [part for part in case.arguments if part.startswith("{w}/") and part != "{w}/run"]
    if not places:
        return
    choice = generator.random()
    place = generator.choice(places)
    if inputs and choice < 0.6 and case.arguments[0] in ("select", "evaluate") and "--resume" not in case.arguments:
        case.arguments[place] = generator.choice(inputs)
        case.must_fail = "an output is an input"
    elif case.arguments[0] in ("sft", "train") and choice < 0.3 and "--resume" not in case.arguments:
        case.arguments[case.arguments.index("--output") + 1] = "{w}"
        case.must_fail = "the output holds the model"
    else:
        case.arguments[place] = generator.choice((*NAMES[:6], "here/is/none", "{w}/train.jsonl/below"))


def _bytes(case: Case, generator: random.Random, world: Path) -> None:
    named = [Path(part.replace("{w}", str(world))) for part in case.arguments if part.startswith("{w}/")]
    files = sorted(f for path in named if path.exists() for f in ([path] if path.is_file() else path.rglob("*")))
    files = [file for file in files if file.is_file()]
    if not files:
        return
    file = generator.choice(files)
    how = generator.choice(("cut", "flip", "empty", "text", "gone", "folder"))
    case.damage.append(f"{how} {file.relative_to(world)} {generator.random()}")


def _weights(case: Case, generator: random.Random, world: Path) -> None:
    models = [part for part in case.arguments if part in ("{w}/model", "{w}/reward")]
    if models:
        how = generator.choice(("missing", "renamed", "shape", "nan"))
        case.damage.append(f"weights {generator.choice(models)[4:]}/model.safetensors {how}")
        case.must_fail = "a model that is not whole"


def _rows(case: Case, generator: random.Random, world: Path) -> None:
    files = [part[4:] for part in case.arguments if part.startswith("{w}/") and part.endswith(".jsonl")]
    if files:
        case.damage.append(f"row {generator.choice(files)} {generator.random()}")


ROWS = ("null", "[]", "{}", '{"prompt": null}', '{"prompt": "\\ud800"}', "[" * 5000, "{", "NaN", '"\u2028"', "")


def damage(world: Path, told: str) -> None:
    """Does to a copy of the files what a case says."""
    how, name, value = told.split(" ")
    path = world / name
    if not path.is_file():
        return
    if how == "weights":
        from tests.fuzz.world import break_weights

        break_weights(path, value)
        return
    generator, content = random.Random(value), bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: generator.randrange(len(content) + 1)])
    elif how == "flip" and content:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    elif how == "row":
        lines = path.read_text(encoding="utf-8").split("\n")
        lines.insert(generator.randrange(len(lines)), generator.choice(ROWS))
        path.write_text("\n".join(lines), encoding="utf-8")
    elif how in ("empty", "text"):
        path.write_text("" if how == "empty" else "not this\n")
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()


def judge(
    case: Case, code: int, error: str, before: dict[str, str], after: dict[str, str], left: list[str]
) -> str | None:
    """What is wrong with how a case ended; None where nothing is."""
    if code < 0:
        return "ran too long" if -code == signal.SIGKILL else f"died of signal {-code}"
    if "Traceback" in error:
        return "a traceback: " + error.strip().splitlines()[-1]
    if code not in (0, 2):
        return f"exit code {code}"
    told = [line for line in error.splitlines() if line.startswith("shapo: error: ")]
    if code == 2 and len(told) != 1:
        return f"exit code 2 with {len(told)} error lines"
    if code == 0 and case.must_fail:
        return f"a silent success: {case.must_fail}"
    changed = sorted(name for name, digest in before.items() if after.get(name) != digest)
    if changed and not ("--resume" in case.arguments and all(name.startswith("run/") for name in changed)):
        return f"{changed[0]} was overwritten"
    return f"{left[0]} was left behind" if left else None


def run_case(case: Case, whole: Path) -> tuple[str | None, str]:
    """Runs one case in a copy of the files; what is wrong, and what it printed."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        world = whole.parent / "now"
        shutil.rmtree(world, ignore_errors=True)
        shutil.copytree(whole, world)
        for told in case.damage:
            damage(world, told)
        before, printed = read_by(case, digests(world), world), place / "printed"
        code = in_child(lambda: _command(case.arguments), place / "work", printed)
        error = printed.read_text(errors="replace")
        left = [str(path) for folder in (world, place) for path in folder.rglob(".shapo-*")]
        return judge(case, code, error, before, digests(world), left), error


def _command(arguments: Sequence[str]) -> int:
    from shapo.cli import main

    try:
        return main(arguments)
    except SystemExit as leave:
        return int(leave.code or 0)


def in_child(call: Callable[[], int], folder: Path, printed: Path) -> int:
    """The exit code of `call` in a child with a folder of its own; negative for a signal."""
    folder.mkdir()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            handle = os.open(printed, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            signal.alarm(SECONDS)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            code = call()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def read_by(case: Case, files: dict[str, str], world: Path) -> dict[str, str]:
    """Those of the files that a command line reads: another file is replaced where --output names it."""
    after = zip(["", *case.arguments], case.arguments, strict=False)
    read = [
        Path(part) for before, part in after if before not in ("--output", "--answers") and part.startswith(str(world))
    ]
    return {
        name: d for name, d in files.items() if any(path in ((world / name), *(world / name).parents) for path in read)
    }


def digests(folder: Path) -> dict[str, str]:
    """Name -> digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(cases: int, seed: int, *, only: int | None = None) -> Iterator[tuple[Case, str | None, str]]:
    """Runs cases one after the other and yields each with what is wrong with it, and what it printed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from tests.fuzz import world

    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        # In the folder that every case sees, so that an adapter's base model is found there.
        made = Path(name) / "now"
        printed = Path(name) / "printed"
        code = in_child(lambda: world.make(made) or 0, Path(name) / "making", printed)
        if code:
            raise RuntimeError(printed.read_text(errors="replace"))
        shutil.copytree(made, whole)
        for number in range(cases) if only is None else [only]:
            case = make_case(number, seed, made)
            yield case, *run_case(case, whole)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="run case N alone, and show what it printed")
    asked = parser.parse_args(arguments)
    started, failures = time.monotonic(), 0
    for case, wrong, printed in run(asked.cases, asked.seed, only=asked.only):
        if wrong is not None or asked.only is not None:
            failures += wrong is not None
            print(f"case {case.number}: {wrong}\n  {json.dumps(case.arguments)}\n  {case.damage}", flush=True)
        if asked.only is not None:
            print(printed)
    print(f"{failures} failures, {time.monotonic() - started:.0f} s")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
