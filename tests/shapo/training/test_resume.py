"""A run that was stopped and resumed is the run that was not stopped, bit for bit; another run is refused."""

from __future__ import annotations

import copy
import errno
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data.formats import load_pairs
from shapo.data.synthetic import sft_examples
from shapo.errors import UserError
from shapo.scoring.logps import TokenizedPairs
from shapo.training.checkpoint import read_checkpoint
from shapo.training.metrics import read_metrics
from shapo.training.preference import train_preferences
from shapo.training.sft import train_sft
from shapo_kernels import Subspace

NEURONS = {f"model.layers.{layer}.mlp.down_proj.weight": [0, 5, 9] for layer in range(2)}
LOOP = LoopConfig(
    updates=6, batch_size=4, micro_batch_size=2, lr=1e-3, warmup=2, schedule="cosine", eval_every=2, dropout=True
)
SHAPO = ShaPOConfig(rho=(0.05, 0.2), norm="none", interval=2)


@pytest.fixture(autouse=True)
def _interruptible():
    """Ctrl-C arrives, also where the tests run in the background of a shell, which has it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def model(tiny_llama):
    # Dropout, and a radius drawn at random: the random states are part of what must come back.
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return tiny_llama


@pytest.fixture
def pairs(synthetic_rows, tiny_encoder):
    return TokenizedPairs(load_pairs(synthetic_rows["train"][:10]), tiny_encoder)


def train(model, pairs, folder, *, loop=LOOP, loss=None, shapo=SHAPO, resume=False, **options):
    return train_preferences(
        model,
        pairs,
        loss=loss or LossConfig(),
        loop=loop,
        shapo=shapo,
        subspace=Subspace(NEURONS) if shapo else None,
        evaluation=pairs,
        output=folder,
        resume=resume,
        progress=False,
        **options,
    )


def interrupt_in_update(model, number, passes_of):
    """Sends Ctrl-C during the first training pass of update `number`, counted from 1."""
    count = 0
    start = sum(passes_of(update) for update in range(1, number))

    def hook(*_):
        nonlocal count
        if torch.is_grad_enabled():
            count += 1
            if count == start + 1:
                signal.raise_signal(signal.SIGINT)

    return model.register_forward_hook(hook)


def without_times(path):
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in read_metrics(path)]


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_resumed_equals_uninterrupted_at_every_update(stop, optimizer, model, pairs, tmp_path):
    loop = LoopConfig(**{**LOOP.__dict__, "optimizer": optimizer})
    whole, first, second = model, copy.deepcopy(model), copy.deepcopy(model)
    train(whole, pairs, tmp_path / "whole", loop=loop)

    hook = interrupt_in_update(first, stop, lambda update: 4 if update % 2 == 0 else 2)
    with pytest.raises(KeyboardInterrupt):
        train(first, pairs, tmp_path / "parts", loop=loop)
    hook.remove()
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl", "update")[-1]["update"] == stop
    torch.manual_seed(12345)
    train(second, pairs, tmp_path / "parts", loop=loop, resume=True)

    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert without_times(tmp_path / "parts" / "metrics.jsonl") == without_times(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_draws_the_rows_and_takes_the_radii_of_the_uninterrupted_one(stop, model, pairs, tmp_path):
    shapo = ShaPOConfig(rho=0.2, interval=2, plain_updates=1, rho_warmup=4, ascent_pairs=1)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    train(model, pairs, tmp_path / "whole", shapo=shapo)
    hook = interrupt_in_update(first, stop, lambda update: 3 if update % 2 == 0 else 2)
    with pytest.raises(KeyboardInterrupt):
        train(first, pairs, tmp_path / "parts", shapo=shapo)
    hook.remove()
    train(second, pairs, tmp_path / "parts", shapo=shapo, resume=True)
    assert all(torch.equal(second.state_dict()[name], value) for name, value in model.state_dict().items())
    lines = without_times(tmp_path / "whole" / "metrics.jsonl")
    assert without_times(tmp_path / "parts" / "metrics.jsonl") == lines
    assert len({line["shapo"]["epsilon_norm"] for line in lines if "shapo" in line}) == 3


def test_lines_written_after_the_checkpoint_are_cut_off_on_resume(model, pairs, tmp_path):
    loop = LoopConfig(**{**LOOP.__dict__, "save_every": 4})
    start = copy.deepcopy(model)
    train(model, pairs, tmp_path, loop=loop)
    before = without_times(tmp_path / "metrics.jsonl")
    train(start, pairs, tmp_path, loop=loop, resume=True)
    assert without_times(tmp_path / "metrics.jsonl") == before
    assert all(torch.equal(start.state_dict()[name], value) for name, value in model.state_dict().items())


def test_sft_resumes_bit_for_bit(model, tiny_encoder, synthetic_rows, tmp_path):
    examples = sft_examples(synthetic_rows["sft"][:20], seed=0)
    other, again = copy.deepcopy(model), copy.deepcopy(model)
    options = {"config": LOOP, "held_out": examples[:4], "progress": False}
    train_sft(model, tiny_encoder, examples, output=tmp_path / "whole", **options)
    hook = interrupt_in_update(other, 3, lambda update: 2)
    with pytest.raises(KeyboardInterrupt):
        train_sft(other, tiny_encoder, examples, output=tmp_path / "parts", **options)
    hook.remove()
    train_sft(again, tiny_encoder, examples, output=tmp_path / "parts", resume=True, **options)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_second_interrupt_leaves_at_once_with_the_weights_as_they_were(model, pairs, tmp_path):
    train(model, pairs, tmp_path / "warm-up")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight, moved = model.get_parameter(next(iter(NEURONS))), []

    def twice(*_):
        if not torch.equal(weight, before[next(iter(NEURONS))]):  # in the first update's descent
            moved.append(True)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    hook = model.register_forward_hook(twice)
    with pytest.raises(KeyboardInterrupt):
        train(model, pairs, tmp_path / "run", shapo=ShaPOConfig(rho=0.2))
    hook.remove()
    assert moved == [True]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop": LoopConfig(**{**LOOP.__dict__, "lr": 2e-3})}, "lr was 0.001, now 0.002"),
        ({"loss": LossConfig(beta=0.2)}, "loss.beta was 0.1, now 0.2"),
        ({"shapo": ShaPOConfig(rho=0.1, interval=2)}, "shapo.norm was none, now global"),
        ({"shapo": None}, "shapo.ascent was selective, now None"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_naming_what_differs(changes, message, model, pairs, tmp_path):
    start = copy.deepcopy(model)
    train(model, pairs, tmp_path, loop=LoopConfig(**{**LOOP.__dict__, "save_every": 3}))
    with pytest.raises(UserError, match=message):
        train(start, pairs, tmp_path, resume=True, **changes)


def test_other_data_or_another_model_is_another_run(model, pairs, synthetic_rows, tiny_encoder, tmp_path):
    start = copy.deepcopy(model)
    train(model, pairs, tmp_path, loop=LoopConfig(**{**LOOP.__dict__, "save_every": 3}))
    other = TokenizedPairs(load_pairs(synthetic_rows["test"][:10]), tiny_encoder)
    with pytest.raises(UserError, match="data was"):
        train(start, other, tmp_path, resume=True)
    with pytest.raises(UserError, match="model was"):
        train(model, pairs, tmp_path, resume=True)


def test_saving_more_often_is_the_same_run(model, pairs, tmp_path):
    start = copy.deepcopy(model)
    train(model, pairs, tmp_path, loop=LoopConfig(**{**LOOP.__dict__, "save_every": 3}))
    train(start, pairs, tmp_path, loop=LoopConfig(**{**LOOP.__dict__, "save_every": 1}), resume=True)


def test_a_missing_or_damaged_checkpoint_is_told_in_one_line(model, pairs, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        train(model, pairs, tmp_path, resume=True)
    start = copy.deepcopy(model)
    train(model, pairs, tmp_path, loop=LoopConfig(**{**LOOP.__dict__, "save_every": 3}))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        train(start, pairs, tmp_path, resume=True)


def test_a_disk_that_fills_while_saving_leaves_the_previous_checkpoint(model, pairs, tmp_path, monkeypatch):
    save = torch.save

    def full(state, path):
        if state["update"] == 4:
            path.write_bytes(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint\.pt: No space left on device"):
        train(model, pairs, tmp_path, loop=LoopConfig(**{**LOOP.__dict__, "save_every": 2}))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["update"] == 2
    assert not list(tmp_path.glob(".*"))


# In an interpreter of its own: the limit lasts for a process, and one forked from here may wait for ever for threads
# that OpenMP started before.
SAVE_BEYOND_THE_LIMIT = """
import resource, sys
from pathlib import Path

import torch
from shapo.training.checkpoint import random_state, save_checkpoint
from shapo.training.order import DataOrder

model = torch.nn.Linear(100, 100)
optimizer = torch.optim.SGD(model.parameters())
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_checkpoint(
        Path(sys.argv[1]), run={}, update=1, model=model.state_dict(), optimizer=optimizer.state_dict(),
        scheduler=scheduler, order=DataOrder(4, 2, 0), metrics_position=0, random_states=[random_state()],
    )
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_file_that_the_operating_system_refuses_to_extend_is_told_in_one_line(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"the previous one")
    done = subprocess.run(
        [sys.executable, "-c", SAVE_BEYOND_THE_LIMIT, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"UserError cannot write {path}")
    assert len(done.stdout.splitlines()) == 1
    assert path.read_bytes() == b"the previous one"
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_is_read_with_weights_only(model, pairs, tmp_path):
    train(model, pairs, tmp_path, loop=LoopConfig(**{**LOOP.__dict__, "save_every": 5}))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert read_checkpoint(tmp_path / "checkpoint.pt", state["run"])["update"] == 5


@pytest.mark.parametrize("content", [b"", b"junk" * 99, b"\x80\x02."], ids=["empty", "junk", "pickle"])
def test_bytes_that_are_no_checkpoint_are_refused_in_one_line(content, model, pairs, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint.pt is damaged or no checkpoint") as error:
        train(model, pairs, tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_a_flipped_bit_is_refused_wherever_it_is(model, pairs, tmp_path):
    loop = LoopConfig(**{**LOOP.__dict__, "save_every": 2, "updates": 2})
    train(model, pairs, tmp_path, loop=loop)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    with zipfile.ZipFile(tmp_path / "checkpoint.pt") as file:
        records = [file.read(info) for info in file.infolist() if info.file_size >= 64]
    assert len(records) > 20
    for number, record in enumerate(records[:: max(1, len(records) // 12)]):
        damaged = bytearray(whole)
        damaged[whole.index(record) + len(record) * number // 24] ^= 1 << number % 8
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(tmp_path / "checkpoint.pt", state["run"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("scheduler"), "scheduler is missing or of another type"),
        (lambda state: state.update(update="2"), "update is missing or of another type"),
        (lambda state: state.update(update=99), "the checkpoint is of update 99, and the run has 2"),
        (lambda state: state["model"].popitem(), "does not fit this run"),
        (lambda state: state["random"].pop("torch"), "does not fit this run"),
        (lambda state: state["order"].update(epoch="0"), "does not fit this run"),
    ],
    ids=["missing", "mistyped", "too far", "a tensor missing", "no random state", "no epoch"],
)
def test_a_checkpoint_that_is_not_whole_is_one_line(edit, message, model, pairs, tmp_path):
    loop = LoopConfig(**{**LOOP.__dict__, "save_every": 2, "updates": 2})
    start = copy.deepcopy(model)
    train(model, pairs, tmp_path, loop=loop)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    edit(state)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=message):
        train(start, pairs, tmp_path, loop=loop, resume=True)
