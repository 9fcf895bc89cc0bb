"""The one exception for what a user can put right: a path, a column, a name, a number out of range.

It is not for programming errors; those stay `TypeError`, `ValueError` and the like.
"""

__all__ = ["UserError", "first_line"]


class UserError(Exception):
    """Bad input, told in one clear line: what was given, what was expected, what to do.

    The command line prints ``shapo: error: <line>`` and exits with code 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
