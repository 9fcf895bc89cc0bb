"""What is told beside metrics.jsonl: trackers, kept checkpoints, the progress bar, the model card, the hub."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from shapo.cli import main
from shapo.config import LoopConfig
from shapo.errors import UserError
from shapo.models.loading import load_model
from shapo.training.loop import _shown
from shapo.training.metrics import read_metrics
from shapo.training.trackers import Trackers
from tests.support.folders import write_training_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, _tiny_llama, tiny_tokenizer, synthetic_rows):
    return write_training_folder(
        tmp_path_factory.mktemp("trackers"), _tiny_llama, tiny_tokenizer, synthetic_rows["train"]
    )


@pytest.fixture
def train(files, tmp_path, monkeypatch, capsys):
    """Trains for five updates; gives exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    data = ["--model", files / "model", "--data", files / "train.jsonl", "--limit", 12, "--max-length", 96]
    short = ["--updates", 5, "--batch-size", 4, "--eval-data", files / "train.jsonl", "--eval-limit", 4]

    def run(*more: object) -> tuple[int, str]:
        code = main([str(text) for text in ["train", *data, *short, "--output", "out", "--quiet", *more]])
        return code, capsys.readouterr().err

    return run


def test_tensorboards_event_file_has_every_number_of_the_metrics(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("--report-to", "tensorboard")[0] == 0
    events = EventAccumulator("out/tensorboard")
    events.Reload()
    for kind, number in {"update": "loss", "evaluation": "margin"}.items():
        rows = read_metrics("out/metrics.jsonl", kind)
        seen = [(event.step, event.value) for event in events.Scalars(f"{kind}/{number}")]
        assert seen == [(row["update"], pytest.approx(row[number], rel=1e-6)) for row in rows]


def test_wandb_writes_a_run_without_a_network(train, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train("--report-to", "wandb")[0] == 0
    (run,) = Path("out/wandb").glob("offline-run-*/*.wandb")
    content = run.read_bytes()
    assert b"update/loss" in content
    assert b"evaluation/margin" in content


def test_trackio_keeps_a_run_on_this_machine(train, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    import sqlite3

    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    assert train("--report-to", "trackio")[0] == 0
    (database,) = (tmp_path / "trackio").rglob("shapo*.db")
    rows = sqlite3.connect(database).execute("select step, metrics from metrics").fetchall()
    seen = {step: json.loads(metrics) for step, metrics in rows if b"update/loss" in bytes(metrics)}
    wanted = {row["update"]: row["loss"] for row in read_metrics("out/metrics.jsonl", "update")}
    assert {step: values["update/loss"] for step, values in seen.items()} == pytest.approx(wanted)


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(tmp_path, capsys):
    class Failing:
        name = "failing"
        calls = 0

        def log(self, values, step):
            self.calls += 1
            raise OSError("no route to host")

    failing = Failing()
    trackers = Trackers((), tmp_path, {})
    trackers._running.append(failing)
    trackers.log("update", {"loss": 1.0}, 1)
    trackers.log("update", {"loss": 1.0}, 2)
    assert failing.calls == 1
    assert "no route to host" in capsys.readouterr().err


def test_a_tracker_starts_where_nothing_else_has_set_up_accelerate(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from accelerate import PartialState

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    PartialState._reset_state()
    with Trackers(["wandb"], tmp_path, {}) as trackers:
        trackers.log("update", {"loss": 1.0}, 1)
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_tracker_that_does_not_start_leaves_no_run_in_the_way_of_the_next(train, monkeypatch):
    pytest.importorskip("tensorboard")

    def refuse(self, name):
        raise OSError("no key")

    with monkeypatch.context() as patched:
        patched.setattr(Trackers, "_start", refuse)
        code, error = train("--report-to", "tensorboard")
    assert code == 2
    assert "--report-to tensorboard does not start: no key" in error
    assert train()[0] == 0


@pytest.mark.parametrize(("name", "told"), [("wandb", True), ("trackio", False)])
def test_a_wandb_that_does_not_start_is_told_of_its_offline_mode(name, told, tmp_path, monkeypatch):
    def refuse(self, name):
        raise OSError("no key")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(Trackers, "_start", refuse)
    with pytest.raises(UserError, match=f"{name} does not start: no key") as caught, Trackers([name], tmp_path, {}):
        pass
    assert ("WANDB_MODE=offline keeps the run in the output folder" in str(caught.value)) == told


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused(monkeypatch):
    with pytest.raises(UserError, match="unknown tracker 'clearml'"):
        LoopConfig(report_to=("clearml",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        LoopConfig(report_to=("wandb",))


def test_the_last_checkpoints_are_kept_and_each_can_be_gone_on_from(train):
    assert train("--save-every", 1, "--keep", 3)[0] == 0
    whole = load_model("out/model").state_dict()
    assert sorted(path.name for path in Path("out").glob("*.pt")) == [
        "checkpoint-3.pt",
        "checkpoint-4.pt",
        "checkpoint.pt",
    ]
    Path("out/checkpoint-3.pt").replace("out/checkpoint.pt")
    assert train("--save-every", 1, "--keep", 3, "--resume")[0] == 0
    assert len(read_metrics("out/metrics.jsonl", "update")) == 5
    again = load_model("out/model").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert train("--overwrite")[0] == 0
    assert not list(Path("out").glob("*.pt"))


def test_the_bar_shows_loss_accuracy_and_speed():
    assert _shown({"loss": 0.5, "accuracy": 0.75, "tokens": 300}, 2.0) == {
        "loss": "0.5000",
        "accuracy": "0.75",
        "tokens/s": "150",
    }
    assert _shown({"loss": 0.5}, 2.0) == {"loss": "0.5000"}


def test_the_model_card_says_what_the_model_is_made_of(train, files):
    from huggingface_hub import ModelCard

    assert train("--beta", 0.25)[0] == 0
    card = ModelCard.load("out/model/README.md")
    assert card.data.library_name == "transformers"
    assert "shapo" in card.data.tags
    for text in (f"Base model: `{files}/model`", f"`{files}/train.jsonl`", "| accuracy |", "beta: 0.25", "## Limits"):
        assert text in card.text, text


@pytest.fixture
def online(monkeypatch):
    """The tests' own ban on the network is lifted: this machine's servers alone are asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch, online):
    """The hub's HTTP interface, as far as an upload of small files asks it; gives what was committed."""
    committed: dict[str, bytes] = {}
    asked: list[tuple[str, str]] = []
    created: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            asked.append((self.path, self.headers.get("authorization", "")))
            if self.path == "/api/repos/create":
                made = json.loads(body)
                created.append(made.get("visibility") or ("private" if made.get("private") else "public"))
                answer: object = {"url": f"{address}/{made['organization']}/{made['name']}"}
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                answer = {"files": files}
            elif "/commit/" in self.path:
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        committed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                answer = {"commitUrl": f"{address}/me/x/commit/1", "commitOid": "1" * 40, "success": True}
            else:
                answer = {}
            self._answer(answer)

        def do_GET(self) -> None:
            self._answer({"sha": "0" * 40, "id": "me/x", "siblings": []})

        def _answer(self, value: object) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import HfApi

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=address, token="hf_test"))
    yield committed, asked, created
    server.shutdown()
    server.server_close()


def test_push_to_hub_uploads_the_models_folder(train, hub):
    committed, asked, created = hub
    code, error = train("--push-to-hub", "me/x")
    assert code == 0, error
    assert committed == {path.name: path.read_bytes() for path in Path("out/model").iterdir() if path.is_file()}
    assert {"model.safetensors", "README.md", "config.json"} <= set(committed)
    assert all(authorization == "Bearer hf_test" for _, authorization in asked)
    assert created == ["private"]
    assert "push_to_hub" not in Path("out/recipe.yaml").read_text()


def test_a_hub_that_cannot_be_reached_keeps_the_model_and_says_how_to_go_on(train, online, monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_test"))
    code, error = train("--push-to-hub", "me/x")
    assert (code, error.count("shapo: error:")) == (2, 1)
    assert "cannot push to me/x" in error
    assert load_model("out/model")
