"""Accelerate's states, which it keeps once a process, made anew for each case of a test."""

import os
from contextlib import contextmanager

from accelerate.state import AcceleratorState, GradientState


@contextmanager
def accelerate_anew():
    """Accelerate and TrainingArguments keep what they were given in one state a process, and in the environment."""
    environment = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)
