"""What SFT and preference training share: positions, metrics, evaluation, checkpoints, resume, and leaving on Ctrl-C.

What one update is, the caller says; this module knows no loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shapo.config import LoopConfig
from shapo.errors import UserError
from shapo.notes import note
from shapo.tables import counted
from shapo.training.checkpoint import read_checkpoint, restore, save_checkpoint
from shapo.training.interrupt import Interruptible
from shapo.training.metrics import MetricsLog
from shapo.training.order import DataOrder
from shapo.training.trackers import Trackers

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
RUN = "run.json"
"""What a command writes once its run is finished."""

Update = Callable[[list[int]], dict[str, Any]]
Evaluate = Callable[[int], dict[str, Any]]
Save = Callable[[], object]


@dataclass
class Loop:
    """One run of training.

    Attributes:
        model, optimizer, scheduler: What a checkpoint holds.  The optimizer may be a `ShaPOOptimizer`.
        config: Length, batch, seed, and when to evaluate and save.
        examples: Number of examples in the data set.
        run: The fingerprint: what must be the same for a checkpoint to be resumed.
        output: Folder of `metrics.jsonl`, `checkpoint.pt` and those before it.
        about: What a report is to know of a run that does not get to its end; the first line of the metrics.
    """

    model: torch.nn.Module
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LRScheduler
    config: LoopConfig
    examples: int
    run: Mapping[str, Any]
    output: Path
    about: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.order = DataOrder(self.examples, self.config.batch_size, self.config.seed)
        self.total = self.config.total_updates(self.examples)
        self._saved: int | None = None

    def train(
        self,
        update: Update,
        evaluate: Evaluate | None = None,
        *,
        state: dict[str, Any] | None = None,
        save: Save | None = None,
        check: Callable[[], float] | None = None,
        progress: bool = True,
        name: str = "train",
    ) -> None:
        """Runs the updates that are left: all, or those after the checkpoint `state` (see `read_state`).

        `update(indices)` makes one update of the weights from the examples `indices` and returns what to log;
        `evaluate(done)` is called before the first update, every `eval_every` updates and after the last, with the
        number of updates made.  A checkpoint is written every `save_every` updates and on the first Ctrl-C, after the
        update that it fell into, be it the last; a second Ctrl-C leaves at once, without saving.  `save()` is called
        as soon as the weights are final, before anything else can fail; `check()` gives their loss on some examples.

        Raises:
            UserError: The final weights or their loss are not finite; no room to write.
            KeyboardInterrupt: After Ctrl-C.
        """
        done, position = self._start(state)
        for option, value, effect in (
            ("warmup", self.config.warmup, "lr is never reached"),
            ("save_every", self.config.save_every, "no checkpoint is written"),
        ):
            if value > self.total:
                note(f"{option} is {value}, but the run has {counted(self.total, 'update')}: {effect}")
        if done == self.total:
            self._finish(save, check)
        self.model.train(self.config.dropout)
        with (
            # First, so that a tracker that does not start leaves no metrics.jsonl, which would pass for a run.
            Trackers(self.config.report_to or (), self.output, self.run) as trackers,
            MetricsLog(self.output / METRICS, position=position) as log,
            Interruptible() as interrupt,
            tqdm(total=self.total, initial=done, desc=name, unit="update", disable=not progress) as bar,
        ):

            def write(kind: str, values: dict[str, Any]) -> None:
                log.write(kind, {"update": done, **values})
                trackers.log(kind, values, done)

            if self.about and done == 0:
                log.write("start", {"update": 0, "updates": self.total, **self.about})
            if evaluate and done == 0:
                write("evaluation", evaluate(0))
            while done < self.total:
                started, cpu_started = time.perf_counter(), time.process_time()
                lr = self.optimizer.param_groups[0]["lr"]
                values = update(self.order.batch(done))
                self.scheduler.step()
                done += 1
                # The process's own time tells what an update costs where other work shares the cores; a GPU's it does
                # not see.
                times = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
                if done == self.total:
                    self._finish(save, check)
                write("update", {"lr": lr, **values, **times})
                bar.update()
                bar.set_postfix(_shown(values, times["seconds"]), refresh=False)
                if evaluate and (done == self.total or _due(done, self.config.eval_every)):
                    write("evaluation", evaluate(done))
                if _due(done, self.config.save_every) or interrupt.requested:
                    self._save(done, log.position)
                if interrupt.requested:
                    raise KeyboardInterrupt(self._farewell(done))

    def _finish(self, save: Save | None, check: Callable[[], float] | None) -> None:
        broken = next((name for name, p in self.model.named_parameters() if not p.isfinite().all()), None)
        if broken is not None:
            raise UserError(
                f"training has diverged: {broken} has values that are NaN or infinite; no model is saved, "
                "lower the learning rate or rho"
            )
        if save is not None and check is not None and not math.isfinite(loss := check()):
            raise UserError(
                f"training has diverged: the loss of the final weights is {loss}; no model is saved, "
                "lower the learning rate or rho"
            )
        if save is not None:
            save()

    def _start(self, state: dict[str, Any] | None) -> tuple[int, int]:
        if state is None:
            torch.manual_seed(self.config.seed)
            # An earlier run's numbers would be taken for those of this one until it is finished.
            for path in [self.output / CHECKPOINT, self.output / RUN, *_older(self.output)]:
                path.unlink(missing_ok=True)
            return 0, 0
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        done = restore(state, **parts, order=self.order, updates=self.total)
        position, self._saved = int(state["metrics_position"]), done
        # As large as model and optimizer together: not to be held while training.
        state.clear()
        return done, position

    def _farewell(self, done: int) -> str:
        return f"update {done} of {self.total} is saved in {self.output / CHECKPOINT}; --resume goes on from there"

    def _save(self, done: int, position: int) -> None:
        latest = self.output / CHECKPOINT
        if self.config.keep > 1 and self._saved is not None and latest.exists():
            # A second name of the same file: a kill in between leaves the latest checkpoint where it is.
            older = self.output / f"{latest.stem}-{self._saved}{latest.suffix}"
            older.unlink(missing_ok=True)
            older.hardlink_to(latest)
        save_checkpoint(
            self.output / CHECKPOINT,
            run=self.run,
            update=done,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            order=self.order,
            metrics_position=position,
        )
        self._saved = done
        for path in _older(self.output)[: -self.config.keep + 1 or None]:
            path.unlink()


def read_state(output: Path, run: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """The checkpoint of the run in `output` where it is to be resumed, else None.

    To be called before anything is written: what is refused here leaves the folder as it is.

    Raises:
        UserError: There is nothing to resume, or it is another run's.
    """
    return read_checkpoint(output / CHECKPOINT, run) if resume else None


def _older(output: Path) -> list[Path]:
    """The checkpoints before the latest one, the oldest first."""
    stem, suffix = CHECKPOINT.split(".")
    found = {path: path.stem.removeprefix(f"{stem}-") for path in output.glob(f"{stem}-*.{suffix}")}
    return sorted((path for path, update in found.items() if update.isdecimal()), key=lambda path: int(found[path]))


def _shown(values: Mapping[str, Any], seconds: float) -> dict[str, str]:
    """What stands behind the progress bar."""
    shown = {name: f"{values[name]:.{digits}f}" for name, digits in (("loss", 4), ("accuracy", 2)) if name in values}
    return {**shown, "tokens/s": f"{values['tokens'] / max(seconds, 1e-9):.0f}"} if "tokens" in values else shown


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
