"""Arrays from .npy and .npz files that may come from anyone: no pickles, and nothing is unpacked that the memory cannot hold.

What a file says about itself is held against its size before NumPy allocates anything: a header must not promise more than the
file has, and packed arrays (.npz) must not unpack to more than is free, however small they are on disk.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from relrep_onnx.memory import free_memory
from relrep_onnx.types import Array, CalibrationError

LONGEST_HEADER = 10_000
"""Bytes; NumPy's own limit for headers that it reads safely."""


def read_arrays(path: Path) -> Array | Mapping[str, Array]:
    """The array of a .npy file, or those of an .npz by name, each read when it is asked for.

    Raises:
        CalibrationError: it promises more than it holds, or than the memory does.
        ValueError, OSError, ...: it is broken; see `samples.BROKEN`.
    """
    if path.suffix.lower() == ".npz" or zipfile.is_zipfile(path):
        return _Archive(path)
    with path.open("rb") as file:
        return _read(file, path.stat().st_size)


class _Archive(Mapping[str, Array]):
    """The arrays of an .npz file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive:
            self._members = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if not i.is_dir()}

    def __getitem__(self, name: str) -> Array:
        member, free = self._members[name], free_memory()
        if member.file_size > free:
            raise CalibrationError(
                f"its array {name!r} unpacks from {member.compress_size} to {member.file_size} bytes, and {free} are free; "
                "give fewer samples"
            )
        with zipfile.ZipFile(self._path) as archive, archive.open(member) as file:
            return _read(file, member.file_size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def _read(file: IO[bytes], held: int) -> Array:
    """One array from a stream of `held` bytes."""
    form = np.lib.format
    version = form.read_magic(file)
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    header = file.read(min(length, LONGEST_HEADER))
    if b"/" in header or b"\\" in header:  # NumPy divides by the 0 of a type 'M8[s/0]', which ends the process
        raise CalibrationError("its header names a type that is no number; save it anew")
    file.seek(form.MAGIC_LEN)
    if version == (1, 0):
        shape, _, dtype = form.read_array_header_1_0(file, max_header_size=LONGEST_HEADER)
    else:
        shape, _, dtype = form.read_array_header_2_0(file, max_header_size=LONGEST_HEADER)
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > held:
        raise CalibrationError(f"its header promises {dtype}{list(shape)}, {needed} bytes, but it holds {held}; save it anew")
    file.seek(0)
    return np.asarray(form.read_array(file, allow_pickle=False, max_header_size=LONGEST_HEADER))
