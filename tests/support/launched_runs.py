"""Commands started as torchrun starts them, without its and their minutes of imports: ranks are forked from here.

    python launched_runs.py folder

Each run is a command line and what happens in it: a signal to one rank, an error in one. As torchrun does, the process
here holds the store, and ends the other ranks by SIGTERM when one has failed.
"""

import contextlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from shapo import cli
from shapo.data import synthetic
from shapo.training import update as training_update
from shapo_kernels import Subspace
from tests.support.accelerate_state import accelerate_anew
from tests.support.llamas import llama

TOKENS = ["--max-length", "96", "--max-prompt-length", "64"]


def files(folder):
    """A model, pairs, a subspace and prompts; the arguments that name the first two."""
    rows = synthetic.generate(0, sft=40, train=24, selection=2, test=9, test_unseen=2)
    tokenizer = synthetic.train_tokenizer((a + b for a, b in synthetic.sft_examples(rows["sft"], seed=0)), 300)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    llama(**size, **ids, max_position_embeddings=128).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    prompts = [{"prompt": row["prompt"], "id": str(number)} for number, row in enumerate(rows["test"])]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    Subspace({"model.layers.0.mlp.down_proj.weight": [1, 2, 30]}).save(folder / "subspace.safetensors")
    return ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), *TOKENS]


def store_process():
    """A process that holds the store of a run, as torchrun's does, and its port."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode() + b"\n")
        signal.pause()
    with os.fdopen(reading) as file:
        port = int(file.readline())
    os.close(writing)
    return pid, port


def happens(event, rank):
    """Arranges for `event` in one rank's update number 2, counted from 0."""
    if not event or rank != event["rank"]:
        return
    made, count = training_update.PreferenceUpdate.__call__, iter(range(1000))

    def update(self, indices):
        if next(count) == 2:
            if event["what"] == "raise":
                raise MemoryError("not enough memory: you tried to allocate 1 byte")
            if event["what"] == "mistake":
                raise KeyError("mine")
            if event["what"] == "full":  # for the checkpoint, which is larger than that
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
                return made(self, indices)
            for _ in range(event.get("times", 1)):
                os.kill(os.getpid(), getattr(signal, event["what"]))
        return made(self, indices)

    training_update.PreferenceUpdate.__call__ = update


def launch(folder, name, arguments, event=None, world=2):
    """Exit codes and what each rank printed; `seconds` from the first end to the last."""
    holder, port = store_process()
    pids = []
    for rank in range(world):
        for stream in ("out", "err"):
            (folder / f"{name}.{stream}.{rank}").touch()
        pid = os.fork()
        if pid == 0:
            for number, stream in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{name}.{stream}.{rank}", os.O_WRONLY), number)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
            }
            os.environ |= {
                "MASTER_PORT": str(port),
                "LOCAL_WORLD_SIZE": str(world),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            signal.signal(signal.SIGINT, signal.default_int_handler)
            happens(event, rank)
            code = cli.main(arguments)
            os._exit(code if world == 1 else 99)  # one of several ranks leaves in main
        pids.append(pid)
    codes, first = {}, None
    while len(codes) < world:
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if first is None and codes[pid] != 0:
                    first = time.monotonic()
                    for other in set(pids) - set(codes):
                        os.kill(other, signal.SIGTERM)
        time.sleep(0.05)
    seconds = 0.0 if first is None else time.monotonic() - first
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    printed = {s: [(folder / f"{name}.{s}.{rank}").read_text() for rank in range(world)] for s in ("out", "err")}
    return {"codes": [codes[pid] for pid in pids], "seconds": seconds, **printed}


def main(folder):
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    named = files(folder)
    train = ["train", *named, "--rho", "0.5", "--subspace", str(folder / "subspace.safetensors"), "--interval", "1"]
    train += ["--updates", "5", "--batch-size", "5", "--accumulate", "2", "--lr", "0.05", "--optimizer", "sgd"]
    if importlib.util.find_spec("tensorboard"):
        train += ["--report-to", "tensorboard"]
    train += ["--warmup", "0", "--save-every", "1", "--eval-data", str(folder / "test.jsonl"), "--quiet"]

    def output(name):
        return ["--output", str(folder / name)]

    evaluate = ["evaluate", *named, "--reference", str(folder / "model"), "--temperature", "1", "--max-new-tokens", "4"]
    evaluate += ["--prompts", str(folder / "prompts.jsonl"), "--quiet"]
    select = ["select", *named, "--method", "gradient", "--percent", "10", "--quiet"]
    probe = ["probe", *named, "--epochs", "2", "--cache", "--quiet"]
    shared = {
        "train": [*train],
        "sft": ["sft", *named, "--updates", "3", "--batch-size", "5", "--held-out", "3", "--lr", "1e-3", "--quiet"],
        "probe": probe,
        "select": select,
        "evaluate": evaluate,
    }
    report = {}
    for name, arguments in shared.items():
        own = {kind: [*arguments, *output(f"{name}-{kind}")] for kind in ("alone", "ranks")}
        for kind in own if name == "evaluate" else ():
            own[kind] += ["--answers", str(folder / f"answers-{kind}.jsonl")]
        # In this process, so that the ranks find imported what their command imports.
        with open(folder / f"{name}.alone", "w") as file, contextlib.redirect_stdout(file), accelerate_anew():
            report[f"{name} alone"] = cli.main(own["alone"])
        report[name] = launch(folder, name, own["ranks"])
    one = {"rank": 1}
    for name, event in {
        "interrupted": {**one, "what": "SIGINT"},
        "interrupted twice at once": {"rank": 0, "what": "SIGINT", "times": 2},
        "killed": {**one, "what": "SIGKILL"},
        "out of memory": {**one, "what": "raise"},
        "mistaken": {**one, "what": "mistake"},
        "full disk": {"rank": 0, "what": "full"},
    }.items():
        report[name] = launch(folder, name, [*train, *output(name)], event)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    report["one rank"] = launch(folder, "one rank", [*train, *output("one rank")], world=1)
    del os.environ["ACCELERATE_USE_FSDP"]
    shutil.copytree(folder / "interrupted", folder / "resumed")
    report["resumed"] = launch(folder, "resumed", [*train, *output("resumed"), "--resume"])
    report["no such file"] = launch(folder, "missing", [*train, *output("missing"), "--eval-data", "nowhere.jsonl"])
    report["there already"] = launch(folder, "there", [*train, *output("train-ranks")])
    report["misspelt"] = launch(folder, "misspelt", ["train", "--modle", "x"])
    report["four bits"] = launch(folder, "four bits", [*train, *output("four bits"), "--qlora", "r=2"])
    report["alone only"] = launch(folder, "alone", ["data", "check", str(folder / "train.jsonl")])
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
