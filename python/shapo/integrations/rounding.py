"""What `shapo.training.rounding` measures, in a trainer: how much of a step arrives in 16-bit weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from shapo.training.rounding import StepRounding

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the real one comes in beside the mixin


class RoundingMixin(Trainer):
    """Logs `moved`, the share of a 16-bit model's elements that a step moves, once the warm-up has ended.

    Warns where most of the step is lost. Under DeepSpeed nothing is measured: its engine keeps weights in float32.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rounding = _Watch()
        if not self.is_deepspeed_enabled:
            self.add_callback(self._rounding)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._rounding.taken()
        super().log(logs, *args, **kwargs)


class _Watch(TrainerCallback):
    def __init__(self) -> None:
        self._steps: StepRounding | None = None
        self._shares: list[float] = []

    def taken(self) -> dict[str, float]:
        """The mean since the last call."""
        shares, self._shares = self._shares, []
        return {"moved": sum(shares) / len(shares)} if shares else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            warmup = args.get_warmup_steps(state.max_steps)
            self._steps = StepRounding(kwargs["model"].parameters(), warmup=warmup, total=state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            self._steps.before(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            self._shares += self._steps.after().values()
