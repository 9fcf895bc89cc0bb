"""Writing artefacts so that nobody ever reads half of one.

Every file and folder that a command leaves behind goes through `atomic_file` or `atomic_folder`: the content is written
under a temporary name in the same folder, flushed to the disk, and renamed over the old one.  A full disk, an exception
or Ctrl-C therefore leaves the previous version as it was.  This module knows nothing about what the artefacts contain.
"""

from __future__ import annotations

import json
import os
import shutil
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


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on leaving, its content replaces `path` in one step.

    Raises:
        UserError: The content could not be written (disk full, no permission, not a folder).  `path` is then untouched.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    _require_replaceable(target)
    with _reported(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            _finish(temporary, mode)
            os.replace(temporary, target)
            _flush(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; on leaving, it replaces `path` whole.

    A folder cannot be renamed over a full one, so an old version is first moved aside and removed last; between the two
    renames (microseconds) there is no folder of that name, and never a half-written one.

    Raises:
        UserError: The content could not be written, or `path` is a file.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    with _reported(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file, but a folder is to be written there; choose another output path")
        temporary.mkdir(parents=True)
        try:
            yield temporary
            mode = temporary.stat().st_mode & 0o666
            for file in temporary.rglob("*"):
                _finish(file, mode if file.is_file() else file.stat().st_mode)
            if target.exists():
                os.rename(target, old)
            os.rename(temporary, target)
            _flush(target.parent)
        finally:
            if old.exists() and not target.exists():
                os.rename(old, target)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes `value` as indented JSON, atomically.  NaN and infinity become null: strict readers refuse them."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


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
    if folder and target.exists() and not target.is_dir():
        raise UserError(f"cannot write to {target}: it is a file, not a folder")
    if not folder and target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder, give a file name")
    _require_replaceable(target)
    existing = target if folder else target.parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"cannot write {target}: {existing} is not a folder")
    probe = existing / f".shapo-{os.getpid()}.probe"
    with _reported(target):
        try:
            probe.write_bytes(b"")
        finally:
            if probe.exists():
                probe.unlink()
    return target


def _require_replaceable(target: Path) -> None:
    # Renaming over /dev/null as root would take it away from the whole machine.
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise UserError(f"cannot write {target}: it is a device or a pipe; give the name of a file")


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
