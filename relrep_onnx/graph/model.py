"""Reading a model and writing one, whole or not at all.

External data keeps its layout: initializers that were external stay so, one data file per original one.  A data file's name holds
a hash of its content, so the model that is replaced stays whole until the new one is moved into its place, last.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto, TensorProto

from relrep_onnx.graph.external import initializers, location_of, read_external, stored_tensors
from relrep_onnx.graph.sound import make_sound
from relrep_onnx.graph.storage import is_large, without_data
from relrep_onnx.graph.tensors import content, refer, whole
from relrep_onnx.types import ConfigError, ModelError

HASH_LENGTH = 12

DATA_FIELDS: Final = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")

ModelSource = str | os.PathLike[str] | ModelProto
"""A path, or a model in memory."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory, all tensors inside but those left in files; `external` maps a tensor to the data file it came from."""

    model: ModelProto
    path: Path | None
    external: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path) if self.path else "the given model"

    @property
    def large(self) -> bool:
        """Whether it is too large for one message, so that copies of it should be few."""
        return is_large(self.model)


def load(source: ModelSource, *, lazily: bool = False) -> LoadedModel:
    """Loads a model; a ModelProto is copied, never changed.

    With `lazily`, initializers of a model over 2 GB stay in their files until they are read (see `graph/tensors.py`).

    Raises:
        ModelError: no such file, not ONNX or not sound, or external data that is missing or lies outside the model's folder.
    """
    if isinstance(source, ModelProto):
        model, path = deepcopy(source), None
    else:
        path = Path(source)
        try:
            if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe or a device may have no end
                raise ModelError(f"{str(path)!r} is not a regular file; give the path of an ONNX model")
            model = ModelProto.FromString(path.read_bytes())
        except OSError as error:
            raise ModelError(f"cannot read the model {str(path)!r}: {error.strerror}") from error
        except DecodeError as error:
            why = "an .ort file; give the .onnx it was made from" if path.suffix == ".ort" else "its bytes do not parse"
            raise ModelError(f"{str(path)!r} is not an ONNX model ({why})") from error
    where = str(path) if path else "the given model"
    if not model.graph.node and not model.graph.output:
        raise ModelError(f"{where!r} is not an ONNX model: it holds no graph")
    external = read_external(model, path, lazily=lazily)
    return LoadedModel(model, path, external, make_sound(model))


def serialized(model: ModelProto, what: str, instead: str) -> bytes:
    """The bytes of a model, the same each time.

    Raises:
        ModelError: they are more than one message can hold; `instead` says what to do.
    """
    try:
        return model.SerializeToString(deterministic=True)
    except EncodeError as error:
        raise ModelError(f"{what} is over 2 GB: {instead}") from error


class Staged:
    """An output on its way: write it, check it at `path`, then `commit`; without a commit nothing stays behind."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.relrep-{os.getpid()}.tmp")
        self._data: list[Path] = []

    def write(self, model: ModelProto, external: Mapping[str, str]) -> None:
        """Writes the model under its temporary name, external tensors beside it under their final ones.

        Raises:
            ModelError: the folder is missing or cannot be written, or the model is too large for one file.
        """
        copy = model
        with self._writing():
            if external:
                copy = without_data(model, external)
                self._write_external(model, copy, external)
            content = serialized(copy, "the model", "store its tensors as external data first")
        self.write_bytes(content)

    def write_bytes(self, content: bytes) -> None:
        """Writes a file of another format under the temporary name.

        Raises:
            ModelError: the folder is missing or cannot be written.
        """
        with self._writing():
            self.path.write_bytes(content)

    def _write_external(self, model: ModelProto, copy: ModelProto, external: Mapping[str, str]) -> None:
        """Writes the data of `model` and lets the tensors of `copy`, where they are still empty, refer to them."""
        files: dict[str, list[tuple[TensorProto, TensorProto]]] = {}
        for tensor, reference in zip(initializers(model), initializers(copy), strict=True):
            if tensor.name in external:
                files.setdefault(external[tensor.name], []).append((tensor, reference))
        for number, tensors in enumerate(files.values()):
            digest = hashlib.sha256()
            for tensor, _ in tensors:
                digest.update(content(tensor))
            suffix = f"-{number}" if number else ""
            final = self.target.with_name(f"{self.target.name}.{digest.hexdigest()[:HASH_LENGTH]}{suffix}.data")
            if not final.exists():
                temporary = final.with_name(f".{final.name}.relrep-{os.getpid()}.tmp")
                self._data.extend([final, temporary])
                with temporary.open("wb") as stream:
                    for tensor, _ in tensors:
                        stream.write(content(tensor))
                temporary.replace(final)
            offset = 0
            for tensor, reference in tensors:
                length = len(content(tensor))
                for kind in DATA_FIELDS:
                    reference.ClearField(kind)
                refer(reference, final.name, offset, length)
                offset += length

    def files(self) -> list[Path]:
        """The written model and its data files."""
        return [self.path, *data_files(self.target, self.path)]

    def size(self) -> int:
        """Bytes of all of them."""
        return sum(file.stat().st_size for file in self.files())

    def commit(self) -> None:
        """Moves the model into place, then removes data files that only the replaced model used.

        Raises:
            ModelError: the model cannot be moved into its place.
        """
        replaced = set(data_files(self.target)) - set(data_files(self.target, self.path))
        with self._writing():
            self.path.replace(self.target)
            self._data.clear()
            for file in replaced:
                file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes what was written and not committed."""
        for file in (self.path, *self._data):
            with contextlib.suppress(OSError):  # must not hide why the output was given up
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelError(f"cannot write {str(self.target)!r}: {error.strerror or error}") from error


@contextlib.contextmanager
def staged(target: Path | None) -> Iterator[Staged]:
    """A temporary output beside `target`, discarded unless committed; with no target, in a folder that goes away."""
    if target is None:
        with tempfile.TemporaryDirectory(prefix="relrep-") as folder, staged(Path(folder) / "model.onnx") as stage:
            yield stage
        return
    _remove_stale(target)
    stage = Staged(target)
    try:
        yield stage
    finally:
        stage.discard()


@contextlib.contextmanager
def input_files(loaded: LoadedModel) -> Iterator[list[Path]]:
    """The files of a model; one given as an object is written to a folder that goes away."""
    if loaded.path is not None:
        yield [loaded.path, *(loaded.path.parent / name for name in sorted(set(loaded.external.values())))]
        return
    with staged(None) as stage:
        stage.write(loaded.model, {})
        yield stage.files()


def files_of(source: ModelSource) -> list[Path]:
    """The files that a model at a path says it lies in, itself first; none of a model in memory."""
    if isinstance(source, ModelProto):
        return []
    path = Path(source)
    try:
        model = ModelProto.FromString(path.read_bytes() if path.is_file() else b"")
    except (OSError, DecodeError):
        return [path]
    return [path, *(path.parent / name for name in sorted({location_of(t) or "" for t in stored_tensors(model)} - {""}))]


def data_files(target: Path, model: Path | None = None) -> list[Path]:
    """The files we wrote beside an output that the model there refers to, or another model; nobody else's are ever touched."""
    path = model or target
    ours = re.compile(rf"{re.escape(target.name)}\.[0-9a-f]{{{HASH_LENGTH}}}(-[0-9]+)?\.data")
    return [file for file in files_of(path)[1:] if file.parent == path.parent and ours.fullmatch(file.name)]


def check_target(target: Path) -> None:
    """Refuses an output that is no name for a file, or lies in no folder.

    Raises:
        ConfigError: with the reason.
    """
    if target.is_dir():
        raise ConfigError(f"the output {str(target)!r} is a folder; give a file name")
    if not target.parent.is_dir():
        raise ConfigError(f"the output folder {str(target.parent)!r} does not exist")


def _remove_stale(target: Path) -> None:
    """Removes temporaries that runs on this target left when they were killed."""
    for file in target.parent.glob(f".{glob.escape(target.name)}*.relrep-*.tmp"):
        owner = file.name.removesuffix(".tmp").rpartition("-")[2]
        if not (owner.isdecimal() and _alive(int(owner))):
            with contextlib.suppress(OSError):  # if the folder cannot be written, writing will say so
                file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def model_hash(model: ModelProto) -> str:
    """sha256 of the model with all its tensors, hexadecimal."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(whole(tensor).raw_data)
    digest.update(without_data(model, {tensor.name for tensor in model.graph.initializer}).SerializeToString(deterministic=True))
    return digest.hexdigest()
