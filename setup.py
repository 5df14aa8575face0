"""Builds the sparse kernels; without a compiler the package installs without them.  All else is in pyproject.toml."""

import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["relrep"]["kernels"]
SOURCES = Path(KERNELS["sources"])


class Library(build_ext):
    """A plain shared library that ONNX Runtime loads: no module of Python's, so no version of Python in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's path in the package."""
        return f"{fullname.replace('.', '/')}.so"


class Wheel(bdist_wheel):
    """A wheel for every Python: of one platform with the library, of all where it could not be built."""

    def run(self) -> None:
        """Builds first: what comes of it decides where the files go and what the wheel is called."""
        self.run_command("build")
        self.root_is_pure = not any(Path(made).exists() for made in self.get_finalized_command("build_ext").get_outputs())
        if self.root_is_pure:
            self.distribution.ext_modules = []
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Python's, its ABI's and the platform's part of the name."""
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


setup(
    cmdclass={"build_ext": Library, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            "relrep_onnx.kernels.librelrep_kernels",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, [*SOURCES.glob("*.h"), *SOURCES.glob("*.inl")])),
            language="c++",
            extra_compile_args=KERNELS["flags"],
            optional=True,
        )
    ],
)
