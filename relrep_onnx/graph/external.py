"""Stored tensors of a model, and the files beside it that some of them lie in.

A model may come from anyone, and its tensors may name any file.  Only regular files inside the model's own folder are read, links
followed, and never more of them than the memory holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from relrep_onnx.graph.index import graphs_in, subgraphs, with_bodies
from relrep_onnx.graph.tensors import Place, bring_in, is_outside, refer, unreadable
from relrep_onnx.memory import free_memory
from relrep_onnx.types import ModelError

MESSAGE: Final = 2**31 - 2**20
"""Bytes of tensors that still fit into one message, with some room for the nodes."""
SMALL: Final = 1 << 16
"""Bytes of a tensor that is read at once in any case: it may be a shape, which others want to see."""


def stored_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model stores, those of subgraphs, attributes, functions and sparse tensors included."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_attributes(function.attribute_proto)
        yield from _of_nodes(function.node)


def initializers(model: ModelProto) -> Iterator[TensorProto]:
    """Those that graphs store under a name, in bodies too; only they can be in files for every reader."""
    yield from model.graph.initializer
    for node in with_bodies(model.graph.node):
        for inner in subgraphs(node):
            yield from inner.initializer


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Sequence[AttributeProto]) -> Iterator[TensorProto]:
    for item in attributes:
        if item.HasField("t"):
            yield item.t
        yield from item.tensors
        for sparse in (*([item.sparse_tensor] if item.HasField("sparse_tensor") else []), *item.sparse_tensors):
            yield from (sparse.values, sparse.indices)
    for item in attributes:
        for inner in graphs_in(item):
            yield from _of_graph(inner)


def location_of(tensor: TensorProto) -> str | None:
    """The file that a tensor says its data are in, or None where it holds them itself."""
    if not is_outside(tensor):
        return None
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    return location if isinstance(location, str) else ""  # bytes are what protobuf gives for what is no UTF-8


def read_external(model: ModelProto, path: Path | None, *, lazily: bool = False) -> dict[str, str]:
    """Brings external data into the model, and tells the file that each tensor came from, by its name where it is the only one.

    Args:
        model: what is changed in place.
        path: the file it was read from.
        lazily: leave large initializers in their files where all together are too large for one message.

    Raises:
        ModelError: a file is missing, too short, or not one inside the model's folder; or all together do not fit into memory.
    """
    external: dict[str, str] = {}
    places: list[tuple[TensorProto, Place, bool]] = []
    left = free_memory()
    for number, tensor in enumerate(stored_tensors(model)):  # initializers first
        location = location_of(tensor)
        if location is None:
            continue
        if path is None:
            raise ModelError(f"tensor {tensor.name!r} lies in an external file; give the model's path instead of the object")
        if not isinstance(tensor.name, str):
            raise ModelError(f"the tensor's name {tensor.name!r} is not UTF-8 text; export the model again")
        try:
            place = _place(tensor, path.parent, location, left)
        except (OSError, ValueError, RuntimeError) as error:
            raise unreadable(tensor, location, error) from error
        left -= place.length
        places.append((tensor, place, lazily and number < len(model.graph.initializer) and place.length > SMALL))
        taken = not tensor.name or tensor.name in external  # by an initializer: they come first
        external[f"external_{len(external)}" if taken else tensor.name] = location
    large = sum(place.length for _, place, _ in places) > MESSAGE
    for tensor, place, may_wait in places:
        if large and may_wait:
            refer(tensor, str(place.file), place.offset, place.length)
        else:
            bring_in(tensor, place)
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
            raise unreadable(tensor, str(location), error) from error


def _place(tensor: TensorProto, folder: Path, location: str, most: int) -> Place:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = _inside(folder, location)
    held = file.stat().st_size
    offset = _number(entries, "offset", 0)
    length = _number(entries, "length", max(0, held - offset))
    if offset + length > held:
        raise ValueError(f"it holds {held} bytes, not the {length} from {offset} on; copy the whole file")
    if length > most:
        raise ValueError(f"it asks for {length} bytes, and {most} are free; use a machine with more memory")
    return Place(file, offset, length)


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
