"""Hostile calibration data for `tools/fuzz.py`: every file is a pure function of its seed."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Final

import numpy as np
from onnx import TensorProto, numpy_helper

from tools.hostile import NAMES, ODD, flip_bytes, pick
from tools.hostile_bases import Random

SHAPE: Final = (3, 6, 6)
"""A sample of what `conv` reads."""
PACKED: Final = 40_000
"""The first seed that may also damage archives packed in the ways that NumPy does not use; those before make what they made."""


def _npy(shape: object, kind: str = "<f4", payload: bytes = b"", version: bytes = b"\x01\x00", order: bool = False) -> bytes:
    header = repr({"descr": kind, "fortran_order": order, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + payload


def _npz(members: dict[str, bytes], compress: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)  # `writestr` refuses an empty name on some versions of Python, and writes the hour
            entry.compress_type = compress
            with archive.open(entry, "w") as member:
                member.write(content)
    return stream.getvalue()


def _bomb(rng: Random) -> bytes:
    """A few kilobytes that say they are gigabytes: a header that promises, and a member that keeps it, up to a point."""
    stream, size = io.BytesIO(), int(pick(rng, [2**24, 2**26]))
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w", force_zip64=True) as member:
        member.write(_npy((2**40, *SHAPE)))
        for _ in range(size // 2**20):
            member.write(bytes(2**20))
    content = bytearray(stream.getvalue())
    if rng.random() < 0.5:  # the directory may lie about what is packed
        place = content.rfind(b"PK\x01\x02") + 24
        content[place : place + 4] = struct.pack("<I", int(pick(rng, [0, 100, 2**31, 2**32 - 2])))
    return bytes(content)


def _array_file(rng: Random) -> tuple[str, bytes, str]:
    x = rng.standard_normal((12, *SHAPE)).astype(np.float32)
    stream = io.BytesIO()
    what = str(
        pick(rng, ["pickle", "dtype", "shape", "header", "bomb", "nan", "members", "flip", "flip", "flip", "text", "empty"])
    )
    if what == "pickle":
        np.savez(stream, x=np.array([{"a": 1}, "os.system"], dtype=object))
    elif what == "dtype":
        kind = pick(
            rng, ["<f8", "<i8", "|u1", "?", "<c16", "<U3", "|S4", "|V8", "<M8[s]", ">f4", "<f2", "|O", "<i0", [("a", "<f4")]]
        )
        stream.write(_npy((4, *SHAPE), kind, bytes(4 * 108 * 16)))
    elif what == "shape":
        shape = [int(v) for v in rng.integers(0, 9, int(rng.integers(0, 6)))]
        stream.write(_npy(tuple(shape), payload=bytes(4 * int(np.prod(shape)))))
    elif what == "header":
        shape = pick(
            rng, [(2**40, *SHAPE), (2**62, 4), (-1, *SHAPE), (2**31, 2**31, 2**31), (0, *SHAPE), "x", None, (1.5,), (True, 3), ()]
        )
        version = pick(rng, [b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"])
        stream.write(_npy(shape, payload=bytes(432), version=version, order=bool(rng.integers(2))))
    elif what == "bomb":
        return "data.npz", _bomb(rng), what
    elif what == "nan":
        x[int(rng.integers(12))] = pick(rng, [np.nan, np.inf, -np.inf, 3e38])
        np.save(stream, x)
    elif what == "members":
        plain = io.BytesIO()
        np.save(plain, x)
        names = ["x.npy", "y.npy", "x", "../x.npy", "/etc/x.npy", "\x1b[2J.npy", "x.npy/", "", "n" * 400]
        members = {
            str(pick(rng, names)): pick(rng, [plain.getvalue(), b"", b"PK", _npy((1,))]) for _ in range(int(rng.integers(0, 4)))
        }
        return "data.npz", _npz(members, int(pick(rng, [0, 8, 12, 14]))), what
    elif what == "text":
        stream.write(pick(rng, [b"1,2,3\n", b"\x80\x04\x95.", b"PK\x03\x04", b"\x93NUMPY", b"[" * 100000]))
    elif what == "flip":
        (np.savez_compressed if rng.random() < 0.5 else np.savez)(stream, x=x) if rng.random() < 0.6 else np.save(stream, x)
        return f"data{pick(rng, ['.npz', '.npy'])}", flip_bytes(rng, stream.getvalue()), what
    content = stream.getvalue()
    if content[:2] != b"PK" and rng.random() < 0.5:
        return "data.npz", _npz({"x.npy": content}), what
    return f"data{pick(rng, ['.npz', '.npy'])}", content, what


def _image(rng: Random) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    mode = str(pick(rng, ["RGB", "L", "1", "P", "RGBA", "CMYK", "I;16", "LA"]))
    size = (6, 6) if rng.random() < 0.8 else (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
    format_ = "PNG" if mode != "CMYK" else "JPEG"
    Image.new(mode, size).save(stream, format_)
    content = bytearray(stream.getvalue())
    if format_ == "PNG" and rng.random() < 0.3:
        content[16:24] = struct.pack(
            ">II", int(pick(rng, [2**15, 2**31 - 1, 0, 30000])), int(pick(rng, [2**15, 2**31 - 1, 30000]))
        )
    return flip_bytes(rng, bytes(content)) if rng.random() < 0.2 else bytes(content)


def write_data(seed: int, folder: Path) -> tuple[Path, str]:
    """A damaged data file, or a folder with damaged ones, and what was done."""
    rng = np.random.default_rng([2, seed])
    what = int(rng.integers(5 if seed < PACKED else 6))
    if what == 5:
        array = io.BytesIO()
        np.save(array, rng.standard_normal((12, *SHAPE)).astype(np.float32))
        path, packed = folder / "data.npz", _npz({"x.npy": array.getvalue()}, int(pick(rng, [12, 14])))
        path.write_bytes(flip_bytes(rng, packed))
        return path, "packed otherwise"
    if what < 3:
        name, content, done = _array_file(rng)
        (folder / name).write_bytes(content)
        return folder / name, done
    data = folder / "data"
    data.mkdir()
    if what == 3:
        for number in range(int(rng.integers(1, 13))):
            (data / f"{number}{pick(rng, ['.png', '.jpg', '.bmp', '.webp', '.png'])}").write_bytes(_image(rng))
        name = str(pick(rng, ["pipe.npy", "link.png", "hole.npz", "folder.png", "\x1b[2J.png"]))
        if name == "pipe.npy":
            os.mkfifo(data / name)
        elif name == "folder.png":
            (data / name).mkdir()
        elif name == "link.png":
            (data / name).symlink_to(pick(rng, ["/dev/zero", "/dev/random", name, "/proc/self/mem"]))
        else:
            (data / name).write_bytes(b"")
        return data, f"a folder of images and {name!r}"
    for number in range(int(rng.integers(1, 9))):
        (inner := data / f"test_data_set_{number}").mkdir()
        tensor = numpy_helper.from_array(rng.standard_normal((1, *SHAPE)).astype(np.float32), str(pick(rng, ["x", "", *NAMES])))
        if rng.random() < 0.5:
            tensor.dims[int(rng.integers(4))] = pick(rng, ODD)
        if rng.random() < 0.3:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="/dev/zero")
        content = tensor.SerializeToString()
        (inner / "input_0.pb").write_bytes(flip_bytes(rng, content) if rng.random() < 0.5 else content)
    return data, "ONNX Runtime test data"
