"""Files on disk: written whole or not at all, and never over what is read."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

from relrep_onnx.types import ConfigError

Named = tuple[str, Path]
"""What a user calls a file, such as --json, and its path."""


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Writes under a temporary name and moves into place.

    Raises:
        OSError: the file cannot be written; an old one stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.relrep-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(parts)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it is in its place, or there is nothing to remove it from
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes text in the same way.

    Raises:
        ConfigError: the file cannot be written; an old one stays.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for what is no text."""
    try:
        write(path, content)
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}") from error


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths mean one file, whatever links and dots are on the way; of a missing one its place counts."""
    return os.path.realpath(one) == os.path.realpath(other) or (_identity(one) or one) == (_identity(other) or other)


def check_separate(outputs: Iterable[Named], inputs: Iterable[Named]) -> None:
    """Refuses outputs that would replace an input, or each other.

    Args:
        outputs: files that are written, and folders that are replaced as a whole.
        inputs: files that are read; not asked for where no output is there yet.

    Raises:
        ConfigError: naming both, and the path; or an output is a device.
    """
    written = list(outputs)
    for (first, one), (second, other) in combinations(written, 2):
        if same_file(one, other) or _holds(one, other) or _holds(other, one):
            raise ConfigError(f"{first} and {second} would both write {str(other)!r}; give another name to one of them")
    for name, path in written:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{name} {str(path)!r} is not a regular file; give another name")
    there = {identity: output for output in written if (identity := _identity(output[1])) is not None}
    folders = [output for output in there.values() if output[1].is_dir()]
    for source, path in inputs if there else ():
        hit = there.get(_identity(path)) or next((output for output in folders if _holds(output[1], path)), None)
        if hit is not None:
            raise ConfigError(f"{hit[0]} {str(hit[1])!r} would replace {source}, {str(path)!r}; give another name")


def _identity(path: Path) -> object:
    """The same for all names of a file; None where there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # the latter for what is no file name
        return None
    return found.st_dev, found.st_ino


def _holds(folder: Path, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
