"""The one exception for what a user can put right: a path, a column, a name, a number out of range.

It is not for programming errors; those stay `TypeError`, `ValueError` and the like.
"""

__all__ = ["UserError", "explained", "first_line"]


class UserError(Exception):
    """Bad input, told in one clear line: what was given, what was expected, what to do.

    The command line prints `shapo: error: <line>` and exits with code 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# By name: the libraries are not imported for it.
_OF_FILES_AND_ARGUMENTS = frozenset(
    {"UserError", "SubspaceError", "SafetensorError", "TemplateError", "UnicodeError", "BadZipFile", "JSONDecodeError"}
)
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def explained(error: BaseException) -> str | None:
    """One line for an error that a file, an argument or the machine has caused; None for a mistake in the program."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds or _says(error, _OUT_OF_MEMORY):
        return f"out of memory: {first_line(error)}; lower the sizes or the batch"
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{': '.join([*names, error.strerror or first_line(error)])}"
    return str(error) if kinds & _OF_FILES_AND_ARGUMENTS else None


def _says(error: BaseException, texts: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
