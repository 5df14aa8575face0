"""Stored tensors of a model, and the files beside it that some of them lie in.

A model may come from anyone, and its tensors may name any file.  Only regular files inside the model's own folder are read, links
followed, and never more of them than the memory holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from relrep_onnx.graph.index import subgraphs
from relrep_onnx.memory import free_memory
from relrep_onnx.types import ModelError


def stored_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model stores, those of subgraphs, attributes, functions and sparse tensors included."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for item in node.attribute:
            if item.HasField("t"):
                yield item.t
            yield from item.tensors
            for sparse in (*([item.sparse_tensor] if item.HasField("sparse_tensor") else []), *item.sparse_tensors):
                yield from (sparse.values, sparse.indices)
        for inner in subgraphs(node):
            yield from _of_graph(inner)


def location_of(tensor: TensorProto) -> str | None:
    """The file that a tensor says its data are in, or None where it holds them itself."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    return location if isinstance(location, str) else ""  # bytes are what protobuf gives for what is no UTF-8


def read_external(model: ModelProto, path: Path | None) -> dict[str, str]:
    """Brings all external data into the model, and tells the file that each tensor came from.

    Raises:
        ModelError: a file is missing, too short, or not one inside the model's folder; or all together do not fit into memory.
    """
    external: dict[str, str] = {}
    left = free_memory()
    for tensor in stored_tensors(model):
        location = location_of(tensor)
        if location is None:
            continue
        if path is None:
            raise ModelError(f"tensor {tensor.name!r} lies in an external file; give the model's path instead of the object")
        tensor.name = tensor.name or f"external_{len(external)}"  # unnamed ones could not be told apart when they are saved
        try:
            tensor.raw_data = _read(tensor, path.parent, location, left)
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise _unreadable(tensor, location, reason) from error
        left -= len(tensor.raw_data)
        tensor.ClearField("data_location")
        del tensor.external_data[:]
        external[tensor.name] = location
    return external


def check_external(path: Path) -> None:
    """Refuses a model file whose external data lie outside its folder, without reading them; what is no model is let through.

    Raises:
        ModelError: naming the tensor and the file.
    """
    try:
        model = ModelProto.FromString(path.read_bytes())
    except (OSError, DecodeError):
        return
    for tensor in stored_tensors(model):
        location = location_of(tensor)
        try:
            _ = None if location is None else _inside(path.parent, location)
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreadable(tensor, str(location), error) from error


def _unreadable(tensor: TensorProto, location: str, reason: object) -> ModelError:
    return ModelError(f"the external data {location[:200]!r} of tensor {tensor.name!r} cannot be read: {reason}")


def _read(tensor: TensorProto, folder: Path, location: str, most: int) -> bytes:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = _inside(folder, location)
    held = file.stat().st_size
    offset = _number(entries, "offset", 0)
    length = _number(entries, "length", max(0, held - offset))
    if offset + length > held:
        raise ValueError(f"it holds {held} bytes, not the {length} from {offset} on; copy the whole file")
    if length > most:
        raise ValueError(f"it asks for {length} bytes, and {most} are free; use a machine with more memory")
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def _inside(folder: Path, location: str) -> Path:
    """The regular file that a location means, links followed; it must lie in the folder itself."""
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if not location or "\0" in location:
        raise ValueError("that is no file name; export the model anew")
    if posix.is_absolute() or windows.drive or windows.root or ".." in {*posix.parts, *windows.parts}:
        raise ValueError("it would lie outside the model's folder; move it into that folder and name it there")
    file = (folder / location).resolve(strict=True)
    if not file.is_relative_to(folder.resolve()):
        raise ValueError("it is a link to outside the model's folder; copy the file itself there")
    if not file.is_file():
        raise ValueError("it is not a regular file; export the model anew")
    return file


def _number(entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"its {key} is {text[:40]!r}, not a number of bytes; export the model anew")
    return int(text)
