"""Builds the optional C++ kernels. Everything else about the package stands in pyproject.toml."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "src/foveate/core/kernels"
SOURCES = [f"{FOLDER}/rows.cpp", f"{FOLDER}/back.cpp", f"{FOLDER}/selective.cpp", f"{FOLDER}/pack.cpp"]
HEADERS = [f"{FOLDER}/tiles.hpp"]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    # gcc's own AVX-512 headers trip these.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]


def variants() -> dict[str, list[str]]:
    """One library per instruction set; `foveate.core.native` picks one at run time."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return {"rows_v4": ["-march=x86-64-v4"], "rows_v3": ["-march=x86-64-v3"]}
    return {"rows_generic": []}


class BuildKernels(build_ext):
    """Builds plain shared libraries: no Python symbols, no Python version in the file name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        # All variants come from one source: each needs a folder of its own for the object file.
        objects = self.compiler.compile(
            ext.sources,
            output_dir=str(Path(self.build_temp) / ext.name),
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=ext.extra_link_args,
            build_temp=self.build_temp,
            target_lang="c++",
        )


class PlatformWheel(bdist_wheel):
    """The kernel binds to the machine but to no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


kernels = [
    Extension(
        f"foveate.core.kernels.{name}",
        SOURCES,
        depends=HEADERS,
        extra_compile_args=FLAGS + flags,
        extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],
        optional=True,
    )
    for name, flags in variants().items()
]

setup(
    package_dir={"": "src"},
    ext_modules=[] if sys.platform == "win32" else kernels,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
