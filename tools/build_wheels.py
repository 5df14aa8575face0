"""Builds what is published: an sdist, a wheel per processor with the sparse kernels, and one for every machine without them.

    python -m pip install '.[wheels]'
    python tools/build_wheels.py [--out dist] [--check]

The wheels come from the sdist, by `setup.py` and its flags, with zig as the compiler: for glibc 2.28, the oldest that the wheels
of ONNX Runtime run on, and with the C++ library inside.  What was compiled is then looked at: the processor, the symbols of
glibc, the libraries it asks for, the names it shows.  `--check` installs the sdist (by the system's compiler) and the wheels that
run here, each in a virtual environment of its own outside of the repository, and runs `tools/smoke.py` there.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import compiler

GLIBC: Final = (2, 28)
MACHINES: Final = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
LIBRARIES: Final = re.compile(r"lib(c|m|dl|rt|pthread)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")
"""What is part of glibc itself."""
NAMES: Final = {"RegisterCustomOps", "RelRepInstructionSets"}
SMOKE: Final = compiler.ROOT / "tools" / "smoke.py"


def build(kind: str, source: Path, out: Path, *options: str, **variables: str) -> Path:
    """Runs the package `build`; the file that it made."""
    command = [sys.executable, "-m", "build", f"--{kind}", f"--outdir={out}", *options, str(source)]
    before = set(out.glob("*"))
    subprocess.run(command, check=True, env={**os.environ, **variables}, stdout=subprocess.DEVNULL)
    (made,) = set(out.glob("*")) - before
    return made


def wheel(source: Path, machine: str, out: Path) -> Path:
    """A wheel with kernels for one processor."""
    target = f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    link = shlex.join([*compiler.zig(target), "-shared", "-s", f"-Wl,--version-script={compiler.FOLDER / 'exports.map'}"])
    commands = {"CC": shlex.join(compiler.zig(target, "cc")), "CXX": shlex.join(compiler.zig(target)), "LDSHARED": link}
    tag = f"--build-option=--plat-name=manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
    return build("wheel", source, out, f"-C{tag}", LDCXXSHARED=link, **commands)


def pure_wheel(source: Path, out: Path) -> Path:
    """The wheel of a machine without a compiler: one that always fails stands for none."""
    return build("wheel", source, out, CC="false", CXX="false")


def complaints(library: bytes, machine: str) -> list[str]:
    """What is wrong with a compiled library: a line each, none where the wheel's name tells the truth."""
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(library))
    needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
    versions = [v.name for _, known in elf.get_section_by_name(".gnu.version_r").iter_versions() for v in known]
    names = {s.name for s in elf.get_section_by_name(".dynsym").iter_symbols() if s["st_shndx"] != "SHN_UNDEF"}
    found = [] if elf["e_machine"] == MACHINES[machine] else [f"it is for {elf['e_machine']}"]
    found += [f"it needs {name}" for name in needed if not LIBRARIES.fullmatch(name)]
    for version in versions:
        numbers = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) > GLIBC:
            found.append(f"it needs {version}")
    return found + [f"it shows {name!r}" for name in sorted(names - NAMES)] + [f"it lacks {n!r}" for n in sorted(NAMES - names)]


def compiled(file: Path) -> bytes:
    """The library in a wheel.

    Raises:
        SystemExit: there is none: it was not compiled.
    """
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("librelrep_kernels.so"):
                return archive.read(name)
    raise SystemExit(f"{file.name}: the kernels were not compiled")


def check(file: Path, *, kernels: bool) -> None:
    """Installs one file where nothing else is, and uses it."""
    print(f"\nchecking {file.name}", flush=True)
    with tempfile.TemporaryDirectory(prefix="relrep-") as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        programs = Path(folder) / "venv" / "bin"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        for name, *options in (
            ("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(file.resolve())),
            ("relrep-onnx", "--version"),
            ("python", "-I", str(SMOKE), "with" if kernels else "without"),
        ):
            subprocess.run([str(programs / name), *options], check=True, cwd=folder, env=environment)


def main() -> None:
    """Builds everything, looks at it, and moves it into the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=compiler.ROOT / "dist")
    parser.add_argument("--check", action="store_true", help="install and use what runs on this machine")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=arguments.out) as folder:
        made = Path(folder)
        sdist = build("sdist", compiler.ROOT, made)
        wheels: dict[str, Path] = {}
        for machine in (*MACHINES, "any"):  # each from sources of its own: no object file of another processor
            with tempfile.TemporaryDirectory(prefix="relrep-") as place, tarfile.open(sdist) as archive:
                archive.extractall(place, filter="data")
                (source,) = Path(place).iterdir()
                wheels[machine] = pure_wheel(source, made) if machine == "any" else wheel(source, machine, made)
        for machine in MACHINES:
            wrong = complaints(compiled(wheels[machine]), machine)
            if wrong:
                raise SystemExit(f"{wheels[machine].name}: {'; '.join(wrong)}")
        for file in (sdist, *wheels.values()):
            file.replace(arguments.out / file.name)
            print(f"{(arguments.out / file.name).stat().st_size / 1e6:6.2f} MB  {file.name}")
    if arguments.check:
        check(arguments.out / sdist.name, kernels=True)
        check(arguments.out / wheels["any"].name, kernels=False)
        if platform.machine() in wheels:
            check(arguments.out / wheels[platform.machine()].name, kernels=True)


if __name__ == "__main__":
    main()
