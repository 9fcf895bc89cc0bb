"""The work of each kind of job: one model held in memory, put back to its initial weights after each training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shapo.study.measuring import Measuring
from shapo.study.plan import Plan
from shapo.study.queue import Job, Row
from shapo.study.runs import Training
from shapo.study.subject import Subject


class Trial:
    """Does jobs; see `plan` for what their settings mean, and `Subject` for the arguments."""

    def __init__(self, model: str, pairs: Path, folder: Path, plan: Plan, *, device: str = "auto") -> None:
        self.subject = Subject(model, pairs, folder, plan, device=device)
        self.plan = self.subject.plan
        self.measuring = Measuring(self.subject)
        self._training = Training(self.subject, self.measuring.rewards)

    def __call__(self, job: Job, needs: Mapping[str, Row]) -> Row:
        if job.kind in self.measuring.kinds:
            return self.measuring.kinds[job.kind](job.settings, needs)
        self.measuring.forget()  # a gradient of all parameters
        return self._training.kinds[job.kind](job.settings, needs)
