"""Builds libsightline.so, and libsightline_cuda.so where nvcc is found, with CMake and Ninja. Everything else about the
package stands in pyproject.toml.

The libraries use torch's stable ABI and no symbol of Python, so one wheel (py3-none-<platform>) serves every Python and
every torch from 2.10. torch is looked up, never imported, and only when something is compiled.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("libsightline.so", "libsightline_cuda.so")


def tool(name: str) -> str:
    """The program `name`: of its Python package, of this environment (which need not be on PATH), or of the system."""
    spec = importlib.util.find_spec(name)
    packaged = [str(Path(folder, "data", "bin")) for folder in (spec.submodule_search_locations or [] if spec else [])]
    places = [*packaged, str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise SystemExit(f"sightline: {name} is missing: pip install {name}")
    return found


def torch_folder() -> Path:
    """The folder of an installed torch that has the stable ABI's headers."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        raise SystemExit("sightline: torch is missing: install torch >= 2.10, then build with --no-build-isolation")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise SystemExit(f"sightline: torch {version} is too old: its stable ABI begins with 2.10")
    return Path(spec.origin).parent


class BuildNative(build_ext):
    """Configures, compiles and places the libraries of this package; in place (editable) also the _bench module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            raise SystemExit(f"sightline: no C++ compiler ({compiler}): install one with C++20, or set CXX")
        build = ROOT / "build" / "cmake"
        # Every path is given every time: with build isolation the ones of the last run are gone.
        options = {
            "SIGHTLINE_TORCH_DIR": torch_folder(),
            "SIGHTLINE_PYTHON": sys.executable,
            "SIGHTLINE_CUDA": os.environ.get("SIGHTLINE_CUDA", "auto"),
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
        }
        if self.inplace:
            options["SIGHTLINE_BENCH"] = "ON"
        flags = [f"-D{name}={value}" for name, value in options.items()]
        targets = [] if self.inplace else ["--target", "sightline_libraries"]
        cmake = tool("cmake")
        for arguments in (
            ["-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags],
            ["--build", str(build), *targets],
        ):
            if subprocess.call([cmake, *arguments]) != 0:
                raise SystemExit("sightline: the build failed; the reason stands above")

        folder = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        for name in LIBRARIES:
            place(build / name, folder / name)


def place(built: Path, library: Path) -> None:
    """Copy a library into the package; one that was not built this time must not stay there."""
    if not built.exists():
        library.unlink(missing_ok=True)
        return
    # Written aside and renamed: an interrupted copy must not look like a finished build, and a running process keeps
    # the old file.
    partial = library.with_suffix(".partial")
    shutil.copyfile(built, partial)
    partial.replace(library)


class WheelForEveryPython(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("sightline._lib.libsightline", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelForEveryPython},
)
