"""The phase of an update, and the transitions that are legal.

::

    IDLE --> ASCENDING --> ASCENDED --> DESCENDING --> DESCENDED --> IDLE
                                                                     ^ step()
"""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    IDLE = "no pass of this update has run"
    ASCENDING = "inside an ascent"
    ASCENDED = "the direction is known"
    DESCENDING = "the weights are at theta + eps"
    DESCENDED = "the weights are restored, and the descent's gradients complete"
    DETACHED = "the optimizer was detached from its model"


_P = Phase
#: From each phase, the phases that may follow.
NEXT: dict[Phase, frozenset[Phase]] = {
    # By hand, from .grad, a descent needs no ascent before it.
    _P.IDLE: frozenset({_P.ASCENDING, _P.DESCENDING, _P.IDLE, _P.DETACHED}),
    # An ascent that fails leaves the phase that it found.
    _P.ASCENDING: frozenset({_P.ASCENDED, _P.IDLE, _P.DESCENDED, _P.DETACHED}),
    # A second ascent replaces the first one's direction.
    _P.ASCENDED: frozenset({_P.ASCENDING, _P.DESCENDING, _P.IDLE, _P.DETACHED}),
    # A descent that fails gives no update. An engine may step inside one.
    _P.DESCENDING: frozenset({_P.DESCENDED, _P.IDLE, _P.DETACHED}),
    # One perturbation for each micro-batch: the next ascent follows a descent.
    _P.DESCENDED: frozenset({_P.ASCENDING, _P.DESCENDING, _P.IDLE, _P.DETACHED}),
    _P.DETACHED: frozenset(),
}


class PhaseError(RuntimeError):
    """A pass out of order."""


class Progress:
    """The phase that one optimizer's update is in."""

    def __init__(self) -> None:
        self.phase = Phase.IDLE

    def enter(self, phase: Phase) -> None:
        """Raises PhaseError for a transition that is not in :data:`NEXT`."""
        if phase not in NEXT[self.phase]:
            if self.phase is Phase.DETACHED:
                raise PhaseError("this optimizer was detached from its model: make a new one around its base")
            raise PhaseError(f"{phase.name} cannot follow {self.phase.name} ({self.phase.value})")
        self.phase = phase

    def check_between_passes(self, what: str) -> None:
        """Raises PhaseError inside an ascent or a descent.

        Args:
            what: that is about to be done, for the message.
        """
        if self.phase is Phase.ASCENDING:
            raise PhaseError(f"cannot {what} inside an ascent: leave its `with opt.ascent():` first")
        if self.phase is Phase.DESCENDING:
            raise PhaseError(
                f"cannot {what} while the weights are perturbed: "
                "leave `with opt.perturbed():` or call opt.restore() first"
            )

    def check_complete(self) -> None:
        """Raises PhaseError where a ShaPO update has not had both of its passes."""
        if self.phase is Phase.ASCENDED:
            raise PhaseError(
                "this update had an ascent and no descent after it: take the gradients inside `with opt.perturbed():`"
            )
        if self.phase is not Phase.DESCENDED:
            raise PhaseError(
                "this update is due and had no ascent: use `with opt.ascent(): opt.ascend(loss)` and "
                "`with opt.perturbed(): …` before opt.step(), or pass a closure; "
                "in a transformers or trl trainer, use shapo.integrations.ShaPOTrainerMixin"
            )
