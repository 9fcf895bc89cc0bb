"""One-line remarks on stderr: what was done otherwise than one might expect, where nothing is wrong."""

from __future__ import annotations

import sys


def note(message: str) -> None:
    """Prints `shapo: note: <message>`."""
    print("shapo: note: " + " ".join(message.split()), file=sys.stderr, flush=True)
