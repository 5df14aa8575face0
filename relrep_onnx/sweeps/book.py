"""The folder of a sweep: which points are finished, and their models.

FOLDER/points/NAME/point.json    the figures, under a key of all they depend on; written last, so that what has one is whole
FOLDER/points/NAME/model.onnx    where models are kept
FOLDER/picked/                   a copy of the picked point
FOLDER/statistics/               the dense network's, while points are left to do
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from relrep_onnx.files import Named, write_text
from relrep_onnx.results import Figures
from relrep_onnx.types import ConfigError

TABLES: Final = ("table.json", "table.csv", "table.md")


def written_in(folder: Path) -> list[Named]:
    """What a sweep writes over in its folder."""
    return [("OUT_FOLDER", folder / name) for name in ("points", "picked", "statistics", *TABLES)]


class Book:
    """Finished points on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            (self.folder / "points").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use the folder {str(folder)!r}: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else may use the folder meanwhile; a killed process leaves no lock behind.

        Raises:
            ConfigError: another sweep is using it.
        """
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another sweep is writing to {str(self.folder)!r}; wait for it, or give another folder"
                ) from error
            yield

    def model(self, name: str, file: str) -> Path:
        """Where a point's model is, if it is kept."""
        return self.folder / "points" / name / file

    def find(self, name: str, key: str) -> Figures | None:
        """A finished point; None where there is none, or one of another model, data or settings."""
        try:
            record = json.loads(self._record(name).read_text(encoding="utf-8"))
            return Figures(**record["figures"]) if record["key"] == key else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def put(self, name: str, key: str, figures: Figures) -> None:
        """Notes a finished point."""
        self._record(name).parent.mkdir(exist_ok=True)
        record = {"key": key, "figures": dataclasses.asdict(figures)}
        write_text(self._record(name), json.dumps(record, indent=2, allow_nan=False) + "\n")

    def clear(self, name: str) -> None:
        """Forgets a point, and whatever is left of it."""
        shutil.rmtree(self._record(name).parent, ignore_errors=True)

    def drop_models(self, name: str) -> None:
        """Keeps a point's figures only."""
        for path in self._record(name).parent.iterdir():
            if path != self._record(name):
                path.unlink()

    def copy_picked(self, name: str) -> Path:
        """Copies a point to `picked`, in place of an older one."""
        target, temporary = self.folder / "picked", self.folder / ".picked.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(self._record(name).parent, temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except OSError as error:
            raise ConfigError(f"cannot write {str(target)!r}: {error.strerror}") from error
        return target

    def _record(self, name: str) -> Path:
        return self.folder / "points" / name / "point.json"


def key_of(*parts: str) -> str:
    """One word for all a point depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
