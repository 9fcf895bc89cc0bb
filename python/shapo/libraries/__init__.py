"""What is read of other libraries beside their public interfaces: one module for each library.

Each name stands in a table with what is assumed of it. `tests/shapo/libraries` checks every name against the installed
release and fails by that name. Where a name is missing at run time, the user gets a fallback or one line.
"""

from __future__ import annotations

from collections.abc import Mapping


def lacking(owner: object, names: Mapping[str, str]) -> list[str]:
    """The names of a table that `owner` does not have."""
    return [name for name in names if not hasattr(owner, name)]
