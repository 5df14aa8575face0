"""How the kernels' C++ is compiled outside of `setup.py`: by the system's compiler or by zig.

Sources and flags are in pyproject.toml, for `setup.py` too.  zig, from the package `ziglang`, compiles for other processors and
for a named version of glibc, with all it needs inside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
_KERNELS: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["relrep"]["kernels"]
FOLDER: Final = ROOT / _KERNELS["sources"]
SOURCES: Final = tuple(sorted(FOLDER.glob("*.cpp")))
FLAGS: Final[tuple[str, ...]] = tuple(_KERNELS["flags"])


def host() -> tuple[str, ...]:
    """The system's C++ compiler.

    Raises:
        SystemExit: there is none.
    """
    command = os.environ.get("CXX", "c++").split()
    if shutil.which(command[0]) is None:
        raise SystemExit(f"there is no C++ compiler {command[0]!r}; install one (such as g++) or name it in CXX")
    return tuple(command)


def zig(target: str, language: str = "c++") -> tuple[str, ...]:
    """The compiler for a target such as `aarch64-linux-gnu.2.28` or `aarch64-linux-musl`.

    Raises:
        SystemExit: the package is not installed.
    """
    if find_spec("ziglang") is None:
        raise SystemExit("zig is not installed: python -m pip install '.[wheels]'")
    return (sys.executable, "-m", "ziglang", language, "-target", target)


def build(compiler: Sequence[str], sources: Sequence[Path], output: Path, *flags: str) -> None:
    """Compiles and links in one step; later flags win over the kernels' own.

    Raises:
        subprocess.CalledProcessError: the compiler failed; it has said why.
    """
    command = [*compiler, *FLAGS, *flags, f"-I{FOLDER}", *map(str, sources), "-o", str(output)]
    subprocess.run(command, check=True)
