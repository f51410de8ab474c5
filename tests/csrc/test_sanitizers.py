"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over ragged sizes and every option.

Each instruction set is a build of its own in build/sanitize, so that two workers compile side by side and a second run
compiles what changed. By default generic and the fastest one that the machine has; SIGHTLINE_SANITIZE names others
("avx2,avx512", or "all").
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import required

from sightline.cli.environment import instruction_sets

# Whichever test comes first compiles the kernels, on a busy machine for more than the usual limit.
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
CASES, SEED = 100, 1
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def wanted_sets() -> list[str]:
    available = instruction_sets()["available"]
    wanted = os.environ.get("SIGHTLINE_SANITIZE", "")
    if wanted:
        return available if wanted == "all" else wanted.split(",")
    return list(dict.fromkeys([available[0], available[-1]]))


def program(name: str) -> str:
    """The path of a build tool, of this environment (which need not be on PATH) or of the system."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        required.missing(f"{name} is missing")
    return path


def run_or_fail(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}", pytrace=False)
    return done.stdout


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A C++ compiler whose sanitized programs run here."""
    name = program(os.environ.get("CXX", "c++"))
    folder = tmp_path_factory.mktemp("sanitizers")
    source, binary = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    for command in ([name, *FLAGS, str(source), "-o", str(binary)], [str(binary)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            required.missing(f"{Path(command[0]).name} has no sanitizers that run here: {done.stderr.strip()[-300:]}")
    return name


@pytest.fixture(scope="module", params=wanted_sets())
def kernels(request: pytest.FixtureRequest, compiler: str) -> tuple[str, str]:
    """An instruction set, and the program with its kernels."""
    isa = request.param
    folder = ROOT / "build" / "sanitize" / isa
    options = {"CMAKE_CXX_COMPILER": compiler, "CMAKE_MAKE_PROGRAM": program("ninja"), "SIGHTLINE_SANITIZE": isa}
    flags = [f"-D{name}={value}" for name, value in options.items()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may have taken over some of this set's tests
        run_or_fail(program("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *flags)
        run_or_fail(program("cmake"), "--build", str(folder), "--parallel", "2")
    return isa, str(folder / "sanitize_kernels")


@pytest.mark.slow
def test_ragged_sizes_and_all_options_stay_within_memory_and_defined_behaviour(kernels: tuple[str, str]) -> None:
    isa, binary = kernels
    assert run_or_fail(binary, str(CASES), str(SEED)) == f"{isa}: {CASES} cases of each operation\n"


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        ("keys", "AddressSanitizer"),
        ("queries", "AddressSanitizer"),
        ("widths", "AddressSanitizer"),
        ("overflow", "runtime error: signed integer overflow"),
    ],
)
def test_sizes_beyond_the_memory_do_not_go_unnoticed(kernels: tuple[str, str], mistake: str, report: str) -> None:
    _, binary = kernels
    done = subprocess.run([binary, mistake], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert report in done.stderr
    assert f"while computing: attention with wrong {mistake}" in done.stderr
