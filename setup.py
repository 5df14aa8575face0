"""Builds the sparse kernels; without a compiler the package installs without them.  All else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("relrep_onnx/kernels/src")


class Library(build_ext):
    """A plain shared library that ONNX Runtime loads: no module of Python's, so no version of Python in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's path in the package."""
        return f"{fullname.replace('.', '/')}.so"


setup(
    cmdclass={"build_ext": Library},
    ext_modules=[
        Extension(
            "relrep_onnx.kernels.librelrep_kernels",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, [*SOURCES.glob("*.h"), *SOURCES.glob("*.inl")])),
            language="c++",
            # Products may fuse with the sums that follow; wide vectors are passed between inlined functions only.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"],
            optional=True,
        )
    ],
)
