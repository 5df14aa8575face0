"""Where a stored tensor's bytes are: in the tensor, or still in a file beside the model.

The initializers of a model over 2 GB may stay in their files until they are asked for.  Such a tensor names its file by an
absolute path, which was checked when the model was loaded; `content` and `whole` read any tensor.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from onnx import TensorProto, numpy_helper

from relrep_onnx.types import ModelError


@dataclass(frozen=True)
class Place:
    """Bytes of a file."""

    file: Path
    offset: int
    length: int


def is_outside(tensor: TensorProto) -> bool:
    """Whether a tensor's bytes are in a file."""
    return tensor.data_location == TensorProto.EXTERNAL


def refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Lets a tensor say that its bytes are in a file."""
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def forget_file(tensor: TensorProto) -> None:
    """Empties a tensor whose bytes are in a file."""
    tensor.ClearField("data_location")
    del tensor.external_data[:]


def bring_in(tensor: TensorProto, place: Place) -> None:
    """Reads a tensor's bytes into it.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        with place.file.open("rb") as stream:
            stream.seek(place.offset)
            tensor.raw_data = stream.read(place.length)
    except OSError as error:
        raise unreadable(tensor, place.file.name, error) from error
    forget_file(tensor)


def place_of(tensor: TensorProto) -> Place:
    """Where the bytes of a tensor are that `refer` sent to a file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return Place(Path(entries["location"]), int(entries["offset"]), int(entries["length"]))


def whole(tensor: TensorProto) -> TensorProto:
    """The tensor itself where it holds its bytes, else a copy that does; raises as `bring_in` does."""
    if not is_outside(tensor):
        return tensor
    copy = deepcopy(tensor)
    bring_in(copy, place_of(tensor))
    return copy


def content(tensor: TensorProto) -> bytes:
    """A tensor's bytes, however it stores them; raises as `bring_in` does."""
    tensor = whole(tensor)
    return tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data


def unreadable(tensor: TensorProto, location: str, error: Exception) -> ModelError:
    """The error about a file that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ModelError(f"the external data {location[:200]!r} of tensor {tensor.name!r} cannot be read: {reason}")
