"""Before a command starts: no output is an input, and nobody else writes there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shapo.errors import UserError
from shapo.storage.files import require_replaceable, require_writable


def check_outputs(outputs: Sequence[tuple[str, Path]], inputs: Sequence[tuple[str, Path]]) -> None:
    """Refuses to write where something is read.

    Files are compared, not names: links and other spellings of a path are seen through.

    Args:
        outputs: Option and path of each file or folder that is replaced whole.
        inputs: Option and path of each file or folder that is read; what does not exist (a hub name) is passed over.

    Raises:
        UserError: An output is an input, lies in one, or holds one; two outputs are the same; one is a device.
    """
    read = [(option, path) for name, given in inputs for option, path in _with_base(name, given)]
    for number, (option, output) in enumerate(outputs):
        for other, path in read:
            if not os.path.lexists(path):
                continue
            if is_same(output, path) or (output.is_dir() and _lies_in(path, output)):
                raise UserError(f"{option} would overwrite {output}, which {other} reads; choose another output")
            if path.is_dir() and output.exists() and (_lies_in(output, path) or _is_linked_in(output, path)):
                raise UserError(f"{option} would overwrite {output}, a part of {other} {path}; choose another output")
        for other, earlier in outputs[:number]:
            if is_same(output, earlier):
                raise UserError(f"{other} and {option} name the same file {output}; each needs one of its own")
        if not output.name:
            raise UserError(f"{option} is {str(output)!r}, which cannot be replaced whole; give it a name")
        require_replaceable(output)


def check_filled(folders: Sequence[tuple[str, Path]], inputs: Sequence[tuple[str, Path]]) -> None:
    """Refuses to add files to a folder that is read as a whole, a model's or a data set's.

    Raises:
        UserError: A folder that is filled is an input.
    """
    for option, folder in folders:
        for other, read in inputs:
            if read.is_dir() and is_same(folder, read):
                raise UserError(f"{option} is {folder}, the folder that {other} reads; choose another output")


def parts(folder: Path, names: Sequence[str]) -> list[Path]:
    """The paths of `names` in a folder; of a name with wildcards those that are there."""
    found: list[Path] = []
    for name in names:
        found += sorted(folder.glob(name)) if "*" in name else [folder / name]
    return found


def _with_base(option: str, path: Path) -> list[tuple[str, Path]]:
    """What is read with `path`: of a folder with an adapter, the model that it belongs to."""
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        return [(option, path), (f"the adapter of {option}", Path(base))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [(option, path)]  # none, or one that whoever reads it will complain of


def _is_linked_in(output: Path, folder: Path) -> bool:
    """Whether a file of the folder is a link to the output."""
    with suppress(OSError):
        return output.is_file() and any(entry.is_file() and is_same(output, entry) for entry in folder.iterdir())
    return False


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, be it there or not."""
    with suppress(OSError):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Inside, `folder` is this process's to write in. It is made if need be, and removed again if nothing came in.

    With `shared` it is that of all processes that say so.

    Raises:
        UserError: Another process has it, or it cannot be written.
    """
    require_writable(folder, folder=True)
    with _made(folder):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        try:
            _lock(handle, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Inside, `path`, a file or a folder that is replaced whole, is this process's to write.

    The lock is on a hidden file beside it, which is removed on leaving; that of a killed process is taken over.

    Raises:
        UserError: Another process has it, or its folder cannot be written.
    """
    name = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    lock = path.parent / f".shapo-{name}.lock"
    with _made(path.parent):
        handle = _open_locked(lock, path)
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
            os.close(handle)


def _open_locked(lock: Path, path: Path) -> int:
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        try:
            _lock(handle, path, fcntl.LOCK_EX)
            # Its last holder may have removed it between the two calls above: that lock keeps nobody out.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(lock)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path, kind: int) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {path}; wait for its end, or choose another output") from error
    except OSError:
        pass  # a file system without locks


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder; on leaving, what was made and is empty is removed."""
    made = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _lies_in(inner: Path, outer: Path) -> bool:
    return Path(os.path.realpath(outer)) in Path(os.path.realpath(inner)).parents
