"""Before a command starts: no output is an input, and nobody else writes into its folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shapo.errors import UserError
from shapo.storage.files import require_writable


def check_outputs(outputs: Sequence[tuple[str, Path]], inputs: Sequence[tuple[str, Path]]) -> None:
    """Refuses to write where something is read.

    Files are compared, not names: links and other spellings of a path are seen through.

    Args:
        outputs: Option and path of each file or folder that is replaced whole.
        inputs: Option and path of each file or folder that is read; what does not exist (a hub name) is passed over.

    Raises:
        UserError: An output is an input, lies in one, or holds one; two outputs are the same.
    """
    for number, (option, output) in enumerate(outputs):
        for other, read in inputs:
            if not os.path.lexists(read):
                continue
            if is_same(output, read) or (output.is_dir() and _lies_in(read, output)):
                raise UserError(f"{option} would overwrite {output}, which {other} reads; choose another output")
            if read.is_dir() and output.exists() and _lies_in(output, read):
                raise UserError(f"{option} would overwrite {output}, a part of {other} {read}; choose another output")
        for other, earlier in outputs[:number]:
            if is_same(output, earlier):
                raise UserError(f"{other} and {option} name the same file {output}; each needs one of its own")


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, be it there or not."""
    with suppress(OSError):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, `folder` is this process's to write in. It is made if need be, and removed again if nothing came in.

    Raises:
        UserError: Another process has it, or it cannot be written.
    """
    require_writable(folder, folder=True)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing to {folder}; wait for its end, or choose another output"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _lies_in(inner: Path, outer: Path) -> bool:
    return Path(os.path.realpath(outer)) in Path(os.path.realpath(inner)).parents
