"""What docs/security.md promises about files from anyone, promise by promise; `test_fuzz.py` looks for what nobody thought of."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from google.protobuf.message import EncodeError
from onnx import ModelProto, StringStringEntryProto, TensorProto

from relrep_onnx.data import arrays
from relrep_onnx.graph import check_external, load
from relrep_onnx.types import ModelError
from tests import models
from tools import fuzz

SECRET: Final = bytes(range(256)) * 64
posix = pytest.mark.skipif(os.name == "nt", reason="links, pipes and inotify of POSIX")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose weights lie beside it, a secret outside its folder, and samples."""
    folder = tmp_path / "models"
    folder.mkdir()
    models.save(models.convnet(), folder / "model.onnx", data="weights.bin")
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(folder / "weights.bin", tmp_path / "elsewhere" / "weights.bin")
    return folder / "model.onnx"


def point_to(model: Path, location: str) -> None:
    """Lets every tensor of the model lie at this location."""
    proto = ModelProto.FromString(model.read_bytes())
    for tensor in proto.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    model.write_bytes(proto.SerializeToString())


def linked(model: Path, target: str | Path) -> str:
    (model.parent / "link").symlink_to(target)
    return "link"


def piped(model: Path) -> str:
    os.mkfifo(model.parent / "pipe")
    return "pipe"


PLACES: Final[dict[str, Callable[[Path], str]]] = {
    "absolute": lambda model: str(model.parent.parent / "secret"),
    "above": lambda model: "../secret",
    "above, hidden": lambda model: "a/../../secret",
    "drive": lambda model: "C:\\secret",
    "share": lambda model: "\\\\server\\secret",
    "above, Windows": lambda model: "..\\secret",
    "nothing": lambda model: "",
    "end of a string": lambda model: "weights.bin\0",
    "the folder itself": lambda model: ".",
    "link out": lambda model: linked(model, model.parent.parent / "secret"),
    "link to a folder": lambda model: linked(model, model.parent.parent / "elsewhere") + "/weights.bin",
    "link to a device": lambda model: linked(model, "/dev/zero"),
    "link to itself": lambda model: linked(model, "link"),
    "pipe": piped,
}
COMMANDS: Final = ("inspect", "analyze", "optimize", "export", "compare", "refine", "benchmark")


def run(command: str, model: Path) -> tuple[int, str, str]:
    """One command on the model, whatever else it wants being in order."""
    other, out = model.with_name("other.onnx"), model.with_name("out.onnx")
    onnx.save(models.convnet(), other)
    samples = ("--calib", "random", "--num-samples", "16", "--batch-size", "4")
    calib = (*samples, "--min-size", "16")
    arguments: dict[str, tuple[str | Path, ...]] = {
        "inspect": (model,),
        "analyze": (model, *calib),
        "optimize": (model, out, *calib, "--allocate", "uniform"),
        "export": (model, out, "--to", "onnx"),
        "compare": (other, model, "--data", "random"),
        "refine": (other, model, out, *samples, "--epochs", "1"),
        "benchmark": (other, model, "--rounds", "1"),
    }
    return fuzz.command(command, *arguments[command])


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("offset", "999999999", "copy the whole file"),
        ("length", "999999999", "copy the whole file"),
        ("offset", "-1", "'-1', not a number of bytes"),
        ("length", "1e3", "'1e3', not a number of bytes"),
        ("length", "9" * 30, "not a number of bytes"),
    ],
)
def test_external_data_that_do_not_lie_where_they_say(model: Path, key: str, value: str, says: str) -> None:
    proto = ModelProto.FromString(model.read_bytes())
    tensor = proto.graph.initializer[0]
    kept = [entry for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    tensor.external_data.extend([*kept, StringStringEntryProto(key=key, value=value)])
    model.write_bytes(proto.SerializeToString())
    code, _, error = run("inspect", model)
    assert (code, says in error, tensor.name in error) == (1, True, True), error


def test_a_model_in_memory_has_no_files() -> None:
    proto = models.convnet()
    tensor = proto.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    with pytest.raises(ModelError, match="give the model's path instead of the object"):
        load(proto)


def test_sparse_constants_may_lie_outside_too(model: Path) -> None:
    proto = ModelProto.FromString(model.read_bytes())
    values = TensorProto(name="s", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    values.external_data.add(key="location", value="../secret")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "i")
    sparse = onnx.helper.make_sparse_tensor(values, indices, [4])
    proto.graph.node.append(onnx.helper.make_node("Constant", [], ["constant"], sparse_value=sparse))
    model.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"outside|folder"):
        check_external(model)


@posix
@pytest.mark.parametrize("place", PLACES)
def test_data_outside_the_folder_is_refused_and_not_read(model: Path, place: str) -> None:
    point_to(model, PLACES[place](model))
    secret, watch = model.parent.parent / "secret", fuzz.Watch()
    with watch.on(secret):
        code, problem, said = run("inspect", model)
        assert not watch.seen()
    assert (code, problem) == (1, "")
    assert "cannot be read: " in said


@posix
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it(model: Path, command: str) -> None:
    point_to(model, linked(model, model.parent.parent / "secret"))
    secret, watch = model.parent.parent / "secret", fuzz.Watch()
    with watch.on(secret):
        code, problem, said = run(command, model)
        assert not watch.seen()
    assert (code, problem) == (1, "")
    assert "it is a link to outside the model's folder" in said
    assert not model.with_name("out.onnx").exists()


@posix
def test_a_link_inside_the_folder_is_followed(model: Path) -> None:
    point_to(model, linked(model, "weights.bin"))
    assert run("inspect", model) == (0, "", "")


@posix
@pytest.mark.parametrize("path", ["pipe", "/dev/zero"])
def test_a_model_that_is_no_regular_file(model: Path, path: str) -> None:
    assert piped(model) == "pipe"
    code, problem, said = run("inspect", model.parent / path)
    assert (code, problem) == (1, "")
    assert "is not a regular file" in said


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def header(shape: object, kind: str = "<f4") -> bytes:
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x.npy", content)
    return stream.getvalue()


def calibrate(model: Path, name: str, content: bytes) -> tuple[int, str, str]:
    (model.parent / name).write_bytes(content)
    return fuzz.command("analyze", model, "--calib", model.parent / name, "--batch-size", "4")


@pytest.mark.parametrize("packed", [False, True])
def test_pickles_are_never_read(model: Path, packed: bool) -> None:
    sprung = model.with_name("sprung")
    pickled = pickle.dumps(Trap(sprung))
    pickle.loads(pickled)
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    content = header((1,), "|O") + pickled
    code, problem, said = calibrate(model, *(("x.npz", archive(content)) if packed else ("x.npy", content)))
    assert (code, problem) == (1, "")
    assert said
    assert not sprung.exists()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(2**40, 3, 8, 8), (2**62, 4), (2**31, 2**31, 2**31)])
def test_a_header_that_promises_more_than_the_file_holds(model: Path, packed: bool, shape: tuple[int, ...]) -> None:
    content = header(shape) + bytes(64)
    fuzz.reset_peak()
    before = fuzz.peak()
    code, problem, said = calibrate(model, *(("x.npz", archive(content)) if packed else ("x.npy", content)))
    assert (code, problem) == (1, "")
    assert "its header promises" in said
    assert fuzz.peak() - before < 1 << 28


def test_an_archive_that_unpacks_beyond_the_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "free_memory", lambda: 1 << 20)
    code, problem, said = calibrate(model, "x.npz", archive(header((1 << 19,)) + bytes(1 << 21)))
    assert (code, problem) == (1, "")
    assert "1048576 are free; give fewer samples" in said


def test_a_tensor_file_that_does_not_fit_into_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relrep_onnx.graph.external.free_memory", lambda: 100)
    code, problem, said = run("inspect", model)
    assert (code, problem) == (1, "")
    assert "100 are free; use a machine with more memory" in said


def test_an_image_of_too_many_pixels(model: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="the images extra is not installed")
    stream = io.BytesIO()
    image.new("RGB", (8, 8)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = struct.pack(">II", 50_000, 50_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    code, problem, said = calibrate(model, "x.png", bytes(content))
    assert (code, problem) == (1, "")
    assert "pixels" in said


def test_a_model_that_is_too_large_for_one_message(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: object) -> object:
        raise EncodeError("Failed to serialize proto")

    monkeypatch.setattr("relrep_onnx.steps.graphs.without_data", too_large)
    code, problem, said = run("optimize", model)
    assert (code, problem) == (1, "")
    assert "it is over 2 GB; `optimize` without --refine" in said
