"""Sparse kernels for the unmodified ONNX Runtime: a small library of custom operators, and how to load it.

    options = onnxruntime.SessionOptions()
    relrep_onnx.kernels.register(options)
    session = onnxruntime.InferenceSession("sparse.onnx", options)

A file made for them (`export.sparse_ort`) runs without the library too, dense.  From C and C++ give `library_path()` to
`RegisterCustomOpsLibrary_V2`.  The environment variable `RELREP_KERNELS_ISA` forces one of `instruction_sets()`; it is read when
a session is made.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final, Protocol

from relrep_onnx.types import ConfigError

LIBRARY: Final = Path(__file__).with_name("librelrep_kernels.so")


class SessionOptions(Protocol):
    """What is needed of `onnxruntime.SessionOptions`."""

    def register_custom_ops_library(self, path: str, /) -> None:
        """Adds the operators of a library to the sessions made with these options."""


def available() -> bool:
    """True where the library was built when the package was installed."""
    return LIBRARY.is_file()


def library_path() -> Path:
    """The library's file.

    Raises:
        ConfigError: it was not built.
    """
    if not available():
        raise ConfigError(
            f"the sparse kernels are not there: {str(LIBRARY)!r} was not built because the installation found no working C++17 "
            "compiler; install one (such as g++) and install relrep-onnx again"
        )
    return LIBRARY


def register(session_options: SessionOptions) -> None:
    """Makes the kernels known to every session made with these options; ONNX Runtime 1.17 or newer.

    Raises:
        ConfigError: the library was not built.
    """
    path = library_path()
    session_options.register_custom_ops_library(str(path))


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this machine can run, widest first: the first is used.

    Raises:
        ConfigError: the library was not built.
    """
    names = ctypes.CDLL(str(library_path())).RelRepInstructionSets
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split(","))
