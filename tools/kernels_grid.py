"""The kernels against plain loops, without ONNX Runtime, here or on an emulated processor.

    python tools/kernels_grid.py                  # the system's compiler, this machine
    python tools/kernels_grid.py aarch64          # zig (pip install '.[wheels]'), run by qemu-aarch64 (Debian: qemu-user)
    python tools/kernels_grid.py x86_64           # zig, run here
    python tools/kernels_grid.py --sanitizer thread

The program is `tests/native/`; it prints a line per instruction set.  Nothing here is timed: an emulator says what is right, not
what is fast.  The exit code is 0 when every answer was right.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import compiler

PROGRAM: Final = tuple(sorted((compiler.ROOT / "tests" / "native").glob("*.cpp")))
TARGETS: Final = ("host", "x86_64", "aarch64")
CASES: Final = 2000
SANITIZERS: Final = {
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}


def emulator(target: str) -> list[str]:
    """What runs a program of this target: nothing, or qemu.

    Raises:
        SystemExit: qemu is needed and not installed.
    """
    if target in ("host", platform.machine()):
        return []
    program = shutil.which(f"qemu-{target}")
    if program is None:
        raise SystemExit(f"qemu-{target} is not installed (Debian: apt-get install qemu-user)")
    return [program, "-cpu", "max"]


def build(target: str, output: Path, *flags: str) -> None:
    """Compiles the program with the kernels into one file; for an emulator with no library outside of it."""
    sources = [*PROGRAM, *compiler.SOURCES]
    if target == "host":
        compiler.build(compiler.host(), sources, output, "-pthread", *flags)
    else:
        compiler.build(compiler.zig(f"{target}-linux-musl"), sources, output, "-static", *flags)


def main() -> None:
    """Builds and runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=TARGETS, default="host")
    parser.add_argument("--cases", type=int, default=CASES, help="random convolutions beside the fixed cases")
    parser.add_argument("--sanitizer", choices=sorted(SANITIZERS), help="with the target host")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relrep-") as folder:
        program = Path(folder) / "grid"
        runner = emulator(arguments.target)
        build(arguments.target, program, *SANITIZERS.get(arguments.sanitizer, ()))
        raise SystemExit(subprocess.run([*runner, str(program), str(arguments.cases)], check=False).returncode)


if __name__ == "__main__":
    main()
