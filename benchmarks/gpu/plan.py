"""The parts of a check and their steps: which commands, under which limits, given what earlier calls found."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu import cases
from gpu.steps import PASSED_VARIABLE, Step

# Seconds. Together they stay under ten minutes; a build of missing libraries comes out of the same ten.
PARTS = {"tests": 190.0, "sanitize": 80.0, "bench": 310.0}
# The findings of each part, and the folders whose code they depend on.
KINDS = {
    "tests": ("tests",),
    "sanitize": (),
    "bench": ("peaks", "skips", "cases", "compiled", "running", "lost"),
    "tune": ("tiles",),
}
_BENCHMARKS = ("python/sightline", "benchmarks/gpu")
_FOLDERS = {"tests": ("python/sightline", "tests"), "sanitize": _BENCHMARKS, "bench": _BENCHMARKS, "tune": _BENCHMARKS}
# Of a part that is run by name, tuning always: the whole time is its own.
ALONE_LIMIT = 580.0
WHOLE_LIMIT = 590.0
BUILD_LIMIT = 300.0
DESCRIBE_LIMIT = 90.0
_MOST_WORKERS = 12  # processes that test at once on one GPU
_TEST_LIMIT = 90  # seconds of one test, which may compile a dozen kernels; a worker that exceeds it is ended
_RESTARTS = 4  # of a group of cases whose child was lost with one of its implementations
_NO_TESTS_LEFT = 5  # pytest's exit code
# Files, and the share of the part's time that they may take; what is cut off goes on in the next call.
_TESTS = {
    "hardware": (("tests/triton/test_hardware.py", "tests/triton/test_long_context.py", "tests/hf/test_gpu.py"), 0.6),
    "decoding": (("tests/ops/test_decode.py",), 0.45),
    "kernels": (("tests/triton/kernels",), 1.0),
}
# Tools, and what they watch: racecheck reports the reductions that Triton's compiler writes, which are not ours.
_SANITIZERS = {"memcheck": (), "racecheck": ("--native",), "synccheck": ()}
_CUDA_FOLDER = "/usr/local/cuda/bin"  # of the toolkit, which is often not on PATH


def environment(root: Path) -> dict[str, str]:
    """What every child is told: where the modules are, this tree before whatever else is installed or named."""
    folders = (root / "python", root / "benchmarks", root / "tests")
    named = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": ":".join([*map(str, folders), *([named] if named else [])]), "PYTHONUNBUFFERED": "1"}


def fingerprints(root: Path) -> dict[str, str]:
    """A hash for each part of the code that its findings depend on: results of other code are not continued."""
    return {part: _fingerprint(root, folders) for part, folders in _FOLDERS.items()}


def _fingerprint(root: Path, folders: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".so") and path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    """The compiler of the CUDA kernels, where there is one."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=_CUDA_FOLDER)


def build_step(python: str, root: Path) -> Step:
    """Build the native libraries with what this machine has."""
    command = (python, "setup.py", "--quiet", "build_ext", "--inplace")
    nvcc = find_nvcc()
    told = environment(root) | ({"CUDACXX": nvcc} if nvcc is not None else {})
    return Step("build", "libraries", command, BUILD_LIMIT, told)


def part_limit(part: str, alone: bool) -> float:
    """The seconds of a part: all there are where it is run by name."""
    return ALONE_LIMIT if alone else PARTS[part]


def test_steps(
    python: str, root: Path, described: Mapping[str, Any], findings: Mapping[str, Any], limit: float
) -> list[Step]:
    """The tests that need a GPU, the most telling first; those that passed before are left out by the plugin.

    `limit`: the seconds of all steps together.
    """
    installed = described["installed"]
    unavailable = None if "pytest" in installed else f"pytest is not installed for {python}"
    passed = [name for name, test in findings.get("tests", {}).items() if test["outcome"] == "passed"]
    known = root / "build" / "gpu-check" / "passed.json"
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(passed))
    command = [python, "-m", "pytest", "-c", "benchmarks/gpu/pytest.ini", "--rootdir", ".", "-p", "gpu.record_tests"]
    if "xdist" in installed:
        workers = max(1, min(_MOST_WORKERS, described["processors"] - 1))
        command += ["-n", str(workers), "--dist", "worksteal"]
    if "pytest_timeout" in installed:
        # A thread, for a signal waits until a hanging call of the driver returns.
        command += ["--timeout", str(_TEST_LIMIT), "--timeout-method", "thread"]
    told = environment(root) | {PASSED_VARIABLE: str(known), "OMP_NUM_THREADS": "1"}
    accepted = (0, _NO_TESTS_LEFT)
    return [
        Step("tests", name, (*command, *files), share * limit, told, accepted, unavailable)
        for name, (files, share) in _TESTS.items()
    ]


def sanitize_steps(python: str, root: Path) -> list[Step]:
    """One call of every kernel, first alone, which compiles them, then under each tool of compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=_CUDA_FOLDER)
    unavailable = None if tool else "there is no compute-sanitizer"
    # Without torch's caching allocator every tensor is an allocation of its own, whose bounds are watched.
    told = environment(root) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Torch asks the driver for what it may not have; such answers are no errors of a kernel.
    options = ("--report-api-errors", "no", "--error-exitcode", "9")
    return [
        Step("sanitize", "no tool", (python, "-m", "gpu.sanitize"), 90.0, told),
        *(
            Step(
                "sanitize",
                name,
                (tool or "", "--tool", name, *options, python, "-m", "gpu.sanitize", *watched),
                90.0,
                told,
                unavailable=unavailable,
                unavailable_where="Device not supported",
            )
            for name, watched in _SANITIZERS.items()
        ),
    ]


def tiles_file(root: Path) -> Path:
    """Where tuning leaves its tiles and benchmarks find them."""
    return root / "build" / "gpu-check" / "tiles.json"


def tune_steps(python: str, root: Path) -> list[Step]:
    """Measure which tiles are fastest here, a weighting and head width at a time."""
    told = environment(root) | {"SIGHTLINE_TUNING": str(tiles_file(root)), "SIGHTLINE_AUTOTUNE": "1"}
    return [
        Step("tune", f"{name} D={width}", (python, "-m", "gpu.tune", name, str(width)), 150.0, told)
        for width in (128, 64)
        for name in cases.OURS
    ]


def restore_tiles(root: Path, findings: Mapping[str, Any]) -> None:
    """Give a machine the tiles that an earlier one of its kind was tuned to."""
    found: Mapping[str, Any] = findings.get("tiles", {})
    path = tiles_file(root)
    if path.exists() or not found:
        return
    some = next(iter(found.values()))
    content = {name: some[name] for name in ("kernels", "target")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "tiles": {name: tile["tile"] for name, tile in found.items()}}, indent=1))


def bench_steps(python: str, root: Path, findings: Mapping[str, Any]) -> list[Step]:
    """All kernels compiled, the yardsticks, tile skipping, then every group of cases.

    What was measured before is left out by the child. Compiling is of this machine, whatever earlier calls have done.
    """
    restore_tiles(root, findings)
    told = environment(root) | {"SIGHTLINE_TUNING": str(tiles_file(root))}
    mark = root / "build" / "gpu-check" / f"compiled-{fingerprints(root)['bench']}"
    return [
        Step("bench", "compile", (python, "-m", "gpu.compile_ahead", str(mark)), 150.0, told, every_call=True),
        Step("bench", "peaks", (python, "-m", "gpu.measure", "peaks"), 40.0, told),
        Step("bench", "tile skipping", (python, "-m", "gpu.skips"), 40.0, told),
        *(
            Step("bench", group.name, (python, "-m", "gpu.measure", group.name), group.limit, told, restarts=_RESTARTS)
            for group in cases.groups()
        ),
    ]
