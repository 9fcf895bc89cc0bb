"""A study on a model of random weights and generated pairs: the jobs of the real one, in seconds.

    python -m tests.support.tiny_study FOLDER

does the study's main jobs twice, once undisturbed and once with a worker that is killed in the middle of a training,
followed by two workers at once; it prints what each left behind, as JSON.

    python -m tests.support.tiny_study FOLDER again

does a part of the plan of one core, in a folder that `prepare` made, by workers of which each is killed after a while;
it prints how many were.
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from shapo.data import synthetic
from shapo.models.loading import save_model
from shapo.study.jobs import study_jobs
from shapo.study.plan import Plan
from shapo.study.queue import run_queue
from shapo.study.trial import Trial
from tests.support.llamas import llama

# What of a row differs from one run to the next.
TIMES = ("seconds", "cpu_seconds", "seconds_per_update")

PLAN = Plan(
    max_length=64,
    max_prompt_length=40,
    figure_pairs=3,
    match_pairs=4,
    watch_pairs=4,
    test_pairs=4,
    train_pairs=8,
    benign_texts=6,
    percent=10.0,
    figure_rhos=(0.1, 1.0),
    steps=2,
    targets=(0.02,),
    batch_size=4,
    updates=4,
    watch_every=2,
    warmup=1,
    lrs=(1e-3, 1e-2),
    noises=(0.4,),
    seeds=1,
    yardstick=0.1,
    bf16=False,
)

# The plan of one core: rates tuned on a draw of their own, a second round at a wider radius, and its controls.
SMALL = replace(
    PLAN,
    tuning_seeds=(100,),
    wider=(0.05, 0.1),
    slower=(3e-4, 3e-3),
    rewards=True,
    aligned=True,
    head=True,
    tuned_losses=True,
    noises=(0.4, 0.2, 0.0),
    answer_tokens=4,
    yardstick=0.0,
)


def prepare(folder):
    rows = synthetic.generate(0, sft=40, train=16, selection=16, test=6, test_unseen=6)
    examples = synthetic.sft_examples(rows["sft"], seed=0)
    tokenizer = synthetic.train_tokenizer((a + b for a, b in examples), 300)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    save_model(folder / "model", llama(**size, pad_token_id=tokenizer.pad_token_id), tokenizer)
    pairs = folder / "pairs"
    pairs.mkdir()
    splits = {split: rows[split] for split in ("train", "selection", "test", "test_unseen")}
    splits["test_attacks"] = rows["test"]
    splits["benign"] = [{"prompt": a, "response": b} for a, b in examples[:6]]
    for split, lines in splits.items():
        (pairs / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


JOBS = [
    *(
        "probe",
        "gradient",
        "figure1-all",
        "figure1-gradient-10",
        "match-0.02-gradient-10",
        "dpo-lr0.001-noise0.4-seed0",
    ),
    *("dpo-lr0.01-noise0.4-seed0", "choice", "shapo-gradient-10-noise0.4-seed0"),
]


def work(folder, output, jobs=None, plan=PLAN, **options):
    torch.set_num_threads(1)
    trial = Trial(str(folder / "model"), folder / "pairs", output, plan, device="cpu")
    chosen = [job for job in study_jobs(trial.plan) if jobs is None or job.name in jobs]
    return run_queue(chosen, output, trial, **options)


# Of `SMALL`: every kind of job, and what each needs.
PART = [
    *("probe", "gradient", "tune-dpo-lr0.001-seed100", "tune-dpo-lr0.01-seed100", "choice"),
    *("match-0.05-gradient-10", "match-0.1-gradient-10"),
    *("tune-shapo-gradient-10-rise0.05-seed100", "tune-shapo-gradient-10-rise0.1-seed100", "wider"),
    *("match-wide-all", "match-wide-head", "dpo-noise0.4-seed0", "shapo-head-wide-noise0.4-seed0"),
    *("shapo-all-wide-noise0-seed0", "answers-shapo-all-wide-noise0", "aligned-dpo-all"),
    *("tune-rdpo-0.2-seed100", "tune-rdpo-0.3-seed100", "tune-rdpo-0.4-seed100", "best-rdpo"),
    *("reward", "dpo-reward-noise0.4-seed0"),
]


def _forked(folder, output, log, jobs=JOBS, plan=PLAN):
    """The process of a worker, which adds a line a job to the file `log`."""
    pid = os.fork()
    if pid == 0:
        with open(log, "a") as file:
            work(folder, output, jobs, plan, log=lambda line: print(line, file=file, flush=True))
        os._exit(0)
    return pid


def killed_again_and_again(folder):
    """How many workers were killed, each a little later than the one before, until one came to the end."""
    output, patience, killed = folder / "again", 0.5, 0
    while True:
        worker = _forked(folder, output, folder / "again.log", PART, SMALL)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if os.waitpid(worker, os.WNOHANG)[0]:
                return killed
            time.sleep(0.002)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        killed, patience = killed + 1, 1.25 * patience


def killed_and_resumed(folder):
    prepare(folder)
    work(folder, folder / "undisturbed", JOBS, log=lambda line: None)
    output = folder / "disturbed"
    first = _forked(folder, output, folder / "first")
    while not list(output.glob("work/train-*/metrics.jsonl")):
        time.sleep(0.002)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    before = {path.name: path.read_text() for path in output.glob("rows/*.json")}
    for pid in [_forked(folder, output, folder / name) for name in ("second", "third")]:
        os.waitpid(pid, 0)
    after = {path.name: path.read_text() for path in output.glob("rows/*.json")}
    return {
        "before": sorted(before),
        "kept": all(after[name] == text for name, text in before.items()),
        "done": [line.split(":")[0] for name in ("first", "second", "third") for line in open(folder / name)],
        "undisturbed": {path.stem: json.loads(path.read_text()) for path in folder.glob("undisturbed/rows/*.json")},
        "disturbed": {name.removesuffix(".json"): json.loads(text) for name, text in after.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    done = killed_again_and_again if sys.argv[2:] == ["again"] else killed_and_resumed
    print(json.dumps(done(Path(sys.argv[1]))))
