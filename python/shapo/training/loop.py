"""What SFT and preference training share: positions, metrics, evaluation, checkpoints, resume, and leaving on Ctrl-C.

What one update is, the caller says; this module knows no loss. Of several ranks each runs it, and rank 0 writes.
"""

from __future__ import annotations

import math
import shutil
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
from shapo.ranks import Ranks
from shapo.tables import counted
from shapo.training.checkpoint import load, random_state, read_checkpoint, restore, save_checkpoint
from shapo.training.engine import Engine
from shapo.training.interrupt import Interruptible
from shapo.training.journal import Journal
from shapo.training.order import DataOrder

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
RUN = "run.json"
"""What a command writes once its run is finished."""
_PARTS = "checkpoint.parts-"

Update = Callable[[list[int]], dict[str, Any]]
Evaluate = Callable[[int], dict[str, Any]]
Save = Callable[[Any], object]


@dataclass
class Loop:
    """One run of training.

    Attributes:
        engine: Model and ranks.
        optimizer, scheduler: What a checkpoint holds beside the model. The optimizer is the engine's base or a
            `ShaPOOptimizer` around it.
        config: Length, batch, seed, and when to evaluate and save.
        examples: Number of examples in the data set.
        run: The fingerprint: what must be the same for a checkpoint to be resumed.
        output: Folder of `metrics.jsonl`, `checkpoint.pt` and those before it.
        about: What a report is to know of a run that does not get to its end; the first line of the metrics.
    """

    engine: Engine
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
        self._ranks = self.engine.ranks

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
        update that it fell into, be it the last; a second Ctrl-C leaves at once, without saving.  `save(model)` is
        called on rank 0 with the whole model as soon as the weights are final, before anything else can fail; `check()`
        gives their loss on some examples.

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
            if self._ranks.is_main:
                note(f"all {counted(self.total, 'update')} were made before: nothing is left to train")
            self._finish(save, check)
        self.engine.model.train(self.config.dropout)
        trackers, shown = self.config.report_to or (), progress and self._ranks.is_main
        with (
            Journal(
                self._ranks, self.output / METRICS, position=position, trackers=trackers, config=self.run
            ) as journal,
            Interruptible(launched=self._ranks.count > 1) as interrupt,
            tqdm(total=self.total, initial=done, desc=name, unit="update", disable=not shown) as bar,
        ):
            if self.about and done == 0:
                journal.write("start", {"update": 0, "updates": self.total, **self.about}, tracked=False)
            if evaluate and done == 0:
                journal.write("evaluation", {"update": 0, **evaluate(0)})
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
                journal.write("update", {"update": done, "lr": lr, **values, **times})
                bar.update()
                bar.set_postfix(_shown(values, times["seconds"]), refresh=False)
                if evaluate and (done == self.total or _due(done, self.config.eval_every)):
                    journal.write("evaluation", {"update": done, **evaluate(done)})
                stop = self._ranks.any(interrupt.requested)
                if _due(done, self.config.save_every) or stop:
                    self._save(done, journal.position)
                if stop:
                    raise KeyboardInterrupt(self._farewell(done))

    def _finish(self, save: Save | None, check: Callable[[], float] | None) -> None:
        if (broken := self.engine.broken_weight()) is not None:
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
            model = self.engine.whole_model()

            def write() -> None:
                save(model)

            self._ranks.on_main(write)

    def _start(self, state: dict[str, Any] | None) -> tuple[int, int]:
        # Masks of dropout are every rank's own; one process has rank 0's.
        torch.manual_seed((self.config.seed + self._ranks.rank * 1_000_003) % 2**63)
        if state is None:
            self._ranks.on_main(self._remove_checkpoints)
            return 0, 0
        model, optimizer = self.engine.states(self.optimizer)
        done = restore(
            state,
            model=model,
            optimizer=optimizer,
            scheduler=self.scheduler,
            order=self.order,
            updates=self.total,
            rank=self._ranks.rank,
            engine=self.engine.only,
        )
        self.engine.load_parts(self._parts(done))
        position, self._saved = int(state["metrics_position"]), done
        # As large as model and optimizer together: not to be held while training.
        state.clear()
        return done, position

    def _farewell(self, done: int) -> str:
        return f"update {done} of {self.total} is saved in {self.output / CHECKPOINT}; --resume goes on from there"

    def _save(self, done: int, position: int) -> None:
        model, optimizer = (stateful.state_dict() for stateful in self.engine.states(self.optimizer))
        random_states = self._ranks.gathered(random_state())
        self.engine.save_parts(self._parts(done))

        def write() -> None:
            self._keep_earlier()
            save_checkpoint(
                self.output / CHECKPOINT,
                run=self.run,
                update=done,
                model=model,
                optimizer=optimizer,
                scheduler=self.scheduler,
                order=self.order,
                metrics_position=position,
                random_states=random_states,
                engine=self.engine.only,
            )
            self._saved = done
            for path in _older(self.output)[: -self.config.keep + 1 or None]:
                path.unlink()
            self._remove_parts()

        self._ranks.on_main(write)

    def _keep_earlier(self) -> None:
        latest = self.output / CHECKPOINT
        if self.config.keep > 1 and self._saved is not None and latest.exists():
            # A second name of the same file: a kill in between leaves the latest checkpoint where it is.
            older = self.output / f"{latest.stem}-{self._saved}{latest.suffix}"
            older.unlink(missing_ok=True)
            older.hardlink_to(latest)

    def _parts(self, update: int) -> Path:
        """Where an engine keeps what only its ranks can read."""
        return self.output / f"{_PARTS}{update}"

    def _remove_parts(self) -> None:
        """Those of checkpoints that are gone."""
        kept = {self._saved, *(_update_of(path) for path in _older(self.output))}
        for folder in self.output.glob(f"{_PARTS}*"):
            if folder.name not in {f"{_PARTS}{update}" for update in kept}:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_checkpoints(self) -> None:
        # An earlier run's numbers would be taken for those of this one until it is finished.
        for path in [self.output / CHECKPOINT, self.output / RUN, *_older(self.output)]:
            path.unlink(missing_ok=True)
        self._saved = None
        self._remove_parts()


def read_state(output: Path, run: Mapping[str, Any], ranks: Ranks, *, resume: bool) -> dict[str, Any] | None:
    """The checkpoint of the run in `output` where it is to be resumed, else None; on every rank (a collective).

    To be called before anything is written: what is refused here leaves the folder as it is.

    Raises:
        UserError: There is nothing to resume, or it is another run's.
    """
    if not resume:
        return None
    path, several = output / CHECKPOINT, ranks.count > 1
    state = None

    def read() -> None:
        nonlocal state
        state = read_checkpoint(path, run, mapped=several)

    ranks.on_main(read)
    return state if state is not None else load(path, mapped=True)


def _older(output: Path) -> list[Path]:
    """The checkpoints before the latest one, the oldest first."""
    stem, suffix = CHECKPOINT.split(".")
    found = {path: _update_of(path) for path in output.glob(f"{stem}-*.{suffix}")}
    return sorted((path for path, update in found.items() if update >= 0), key=lambda path: found[path])


def _update_of(path: Path) -> int:
    """The update of an older checkpoint by its name, -1 for another file."""
    text = path.stem.rpartition("-")[2]
    return int(text) if text.isdecimal() else -1


def _shown(values: Mapping[str, Any], seconds: float) -> dict[str, str]:
    """What stands behind the progress bar."""
    shown = {name: f"{values[name]:.{digits}f}" for name, digits in (("loss", 4), ("accuracy", 2)) if name in values}
    return {**shown, "tokens/s": f"{values['tokens'] / max(seconds, 1e-9):.0f}"} if "tokens" in values else shown


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
