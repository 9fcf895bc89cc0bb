"""Writing artefacts so that nobody ever reads half of one.

Every file and folder that a command leaves behind goes through `atomic_file` or `atomic_folder`: the content is written
under a temporary name in the same folder, flushed to the disk, and renamed over the old one.  A full disk, an exception
or Ctrl-C therefore leaves the previous version as it was.  This module knows nothing about what the artefacts contain.

Temporary names cannot be guessed and are made anew, so no symbolic link that lies there is followed.  They tell host
and process: what a killed run has left is removed by the next one that writes into the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shapo.errors import UserError

# What the zip writer of torch.save and the Rust writer of safetensors say instead of raising an OSError.
_WRITER_FAILURES = (
    "PytorchStreamWriter",
    "unexpected pos",
    "I/O error",
    "No space left",
    "enforce fail at inline_container",
)

_LEFTOVER = re.compile(r"\.shapo-(?P<host>[0-9a-f]{8})-(?P<process>\d+)-\w+\.(?:tmp|(?P<name>.+)\.old)")
_DAY = 24 * 3600
_in_use: set[str] = set()  # names of temporaries of this process


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on leaving, its content replaces `path` in one step.

    Raises:
        UserError: The content could not be written (disk full, no permission, not a folder).  `path` is then untouched.
    """
    target = Path(path)
    with _reported(target):
        require_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target) as temporary:
            temporary.touch(exist_ok=False, mode=0o600)
            yield temporary
            _finish(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
            _flush(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; on leaving, it replaces `path` whole.

    A folder cannot be renamed over a full one, so an old version is first moved aside and removed last; between the two
    renames (microseconds) there is no folder of that name, and never a half-written one.  A process that is killed just
    then leaves the old version aside, and the next one that writes there puts it back.

    Raises:
        UserError: The content could not be written, or `path` is a file.
    """
    target = Path(path)
    with _reported(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file, but a folder is to be written there; choose another output path")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target) as temporary, _temporary(target, f"{target.name}.old") as old:
            temporary.mkdir(mode=0o700)
            yield temporary
            mask = _umask()
            for file in temporary.rglob("*"):
                _finish(file, (0o666 if file.is_file() else 0o777) & ~mask)
            temporary.chmod(0o777 & ~mask)
            if target.is_symlink():
                target.unlink()  # the link alone: what it leads to is somebody else's
            elif target.exists():
                os.rename(target, old)
            try:
                os.rename(temporary, target)
            finally:
                if old.exists() and not target.exists():
                    os.rename(old, target)
            _flush(target.parent)


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes `value` as indented JSON, atomically.  NaN and infinity become null: strict readers refuse them."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` in UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_line(value: Mapping[str, Any]) -> str:
    """One line of a JSONL file, newline included."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n"


def require_writable(path: str | os.PathLike[str], *, folder: bool = False) -> Path:
    """Finds out before the work starts whether `path` can be written at its end; leaves nothing behind.

    Raises:
        UserError: The folder cannot be created or written, or `path` is of the other kind (file for folder, folder for
            file).
    """
    target = Path(path)
    with _reported(target):
        if folder and target.exists() and not target.is_dir():
            raise UserError(f"cannot write to {target}: it is a file, not a folder")
        if not folder and target.is_dir():
            raise UserError(f"cannot write {target}: it is a folder, give a file name")
        require_replaceable(target)
        existing = target if folder else target.parent
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"cannot write {target}: {existing} is not a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    return target


def require_replaceable(target: Path) -> None:
    """Raises UserError for a device or a pipe."""
    # Renaming over /dev/null as root would take it away from the whole machine.
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise UserError(f"cannot write {target}: it is a device or a pipe; give the name of a file")


@contextmanager
def _temporary(target: Path, ending: str = "tmp") -> Iterator[Path]:
    """A name beside `target` that nobody has; what is there on leaving is removed, and what killed runs have left."""
    _remove_leftovers(target.parent)
    name = f".shapo-{_host()}-{os.getpid()}-{os.urandom(8).hex()}.{ending}"
    path = target.with_name(name)
    _in_use.add(name)
    try:
        yield path
    finally:
        _in_use.discard(name)
        _remove(path)


def _host() -> str:
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def _remove_leftovers(folder: Path) -> None:
    for entry in os.scandir(folder):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or entry.name in _in_use or not _is_abandoned(match, entry):
            continue
        original = folder / match["name"] if match["name"] else None
        if original is not None and not original.exists():
            with contextlib.suppress(OSError):
                os.rename(entry.path, original)
        else:
            _remove(Path(entry.path))


def _is_abandoned(match: re.Match[str], entry: os.DirEntry[str]) -> bool:
    if match["host"] != _host():
        # Whether a process of another machine, or of a container that is gone, still writes cannot be asked.
        with contextlib.suppress(OSError):
            return time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY
        return False
    process = int(match["process"])
    if process == os.getpid():
        return True  # an earlier process of this number: ours are in use
    try:
        os.kill(process, 0)
    except PermissionError:
        return False
    except (OSError, OverflowError):
        return True
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _finish(path: Path, mode: int) -> None:
    # Some writers (safetensors) make a file that only its owner may read.
    path.chmod(mode)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    except Exception as error:
        if isinstance(error, UserError) or not any(text in str(error) for text in _WRITER_FAILURES):
            raise
        raise UserError(
            f"cannot write {target}: writing ended half-way (is the disk full?); what was there is kept"
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
