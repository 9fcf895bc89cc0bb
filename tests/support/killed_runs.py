"""Runs of preference training that are killed at random moments and resumed; what each left behind, as JSON.

    python killed_runs.py folder kills

Runs are forked from this process, which has imported everything and computes with one thread, so that starting one is
cheap. Half of the signals are SIGKILL, half SIGINT; a run is resumed from what the last one left until it is done, then
another begins. Every checkpoint found is compared with the uninterrupted run's at that update, bit for bit.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data import synthetic
from shapo.data.formats import load_pairs
from shapo.data.tokens import PairEncoder
from shapo.scoring.logps import TokenizedPairs
from shapo.training import loop as training_loop
from shapo.training.preference import train_preferences
from shapo_kernels import Subspace
from tests.support.llamas import llama

UPDATES = 10
LOOP = LoopConfig(updates=UPDATES, batch_size=4, micro_batch_size=2, lr=1e-2, save_every=1, dropout=True)
# Every second update is a ShaPO update, with a radius drawn at random; far from rounding, so that a perturbed weight
# in a checkpoint would differ.
SHAPO = ShaPOConfig(rho=(0.5, 2.0), norm="none", interval=2)
SUBSPACE = Subspace({f"model.layers.{layer}.mlp.down_proj.weight": [0, 5, 9] for layer in range(2)})


def prepare():
    rows = synthetic.generate(0, sft=40, train=16, selection=2, test=2, test_unseen=2)
    tokenizer = synthetic.train_tokenizer((a + b for a, b in synthetic.sft_examples(rows["sft"], seed=0)), 300)
    pairs = TokenizedPairs(load_pairs(rows["train"][:8]), PairEncoder(tokenizer, max_length=64, max_prompt_length=40))
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1}
    return llama(**size, attention_dropout=0.2, pad_token_id=tokenizer.pad_token_id), pairs


def train(model, pairs, folder):
    random.seed(0)  # saved with a checkpoint, though no part of this training draws from it
    resume = (folder / "checkpoint.pt").exists()
    options = {"loss": LossConfig(), "loop": LOOP, "shapo": SHAPO, "subspace": SUBSPACE}
    train_preferences(model, pairs, output=folder, resume=resume, progress=False, **options)


def forked(run):
    """The process that calls `run()`; an exception of its own is exit code 1."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def flat(value, name=""):
    """Every tensor and number of a nested state under its path; times of day and the like are none of it."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}/{i}").items()}
    return {name: value}


def differences(a, b):
    """The paths under which two checkpoints differ; where in the metrics' file they end tells of times of day."""
    a, b = ({k: v for k, v in flat(s).items() if k != "/metrics_position"} for s in (a, b))
    return sorted(a.keys() ^ b.keys()) + [
        k for k, v in a.items() if k in b and not (torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k])
    ]


def main(folder, kills):
    torch.set_num_threads(1)
    model, pairs = prepare()
    save = training_loop.save_checkpoint

    def kept(path, **state):
        save(path, **state)
        shutil.copy(path, path.with_name(f"{state['update']}.pt"))

    def uninterrupted():
        training_loop.save_checkpoint = kept
        train(model, pairs, folder / "whole")

    started = time.perf_counter()
    assert os.waitpid(forked(uninterrupted), 0)[1] == 0
    took = time.perf_counter() - started
    expected = {n: torch.load(folder / "whole" / f"{n}.pt", weights_only=True) for n in range(1, UPDATES + 1)}

    generator, report, runs = random.Random(0), [], 0
    while len(report) < kills:
        runs += 1
        run = folder / f"run-{runs}"
        while True:
            kind = signal.SIGKILL if generator.random() < 0.5 else signal.SIGINT
            pid = forked(lambda run=run: train(model, pairs, run))
            time.sleep(generator.random() * took * 0.6)
            os.kill(pid, kind)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            checkpoint = run / "checkpoint.pt"
            state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
            update = state["update"] if state else 0
            report.append(
                {
                    "signal": kind.name,
                    "code": code,
                    "update": update,
                    "differences": differences(state, expected[update]) if state else [],
                }
            )
            if update == UPDATES:
                break
        shutil.rmtree(run)
    print(json.dumps({"kills": report, "runs": runs, "seconds": took}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
