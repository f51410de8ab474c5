"""The Triton kernels compile for GPUs that this machine does not have, and no register spills.

A sample of the cases of docs/triton_resources.md; tools/triton_resources.py compiles all of them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CASES = [
    (90, "softmax", "bf16", 128),
    (90, "lssar", "fp16", 64),
    (80, "lssa", "bf16", 64),
    (80, "lssar", "bf16", 256),
    (80, "softmax", "fp32", 64),
    (86, "lssar", "bf16", 128),
    (100, "lssar", "fp16", 64),
    (120, "softmax", "bf16", 128),
]


# Candidates that load by tensor descriptors, and on Blackwell those that are specialised: forward and gradients.
CANDIDATE_CASES = [
    (90, "softmax", "bf16", 128, 5),
    (90, "lssar", "fp16", 64, 6),
    (100, "softmax", "bf16", 64, 1),
    (100, "lssa", "bf16", 128, 1),
    (100, "lssar", "bf16", 64, 1),
]


def device_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(file name, function) of everything that Triton compiles."""
    for path in sorted((ROOT / "python" / "sightline" / "triton").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                yield path.name, node


def test_no_device_function_returns_none() -> None:
    """Triton's compiler refuses that before 3.7, which is not installed here to say so."""
    functions = list(device_functions())
    assert len(functions) > 50
    for name, function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant):
                assert node.value.value is not None, f"{name}: {function.name} returns None"


def compiled(arch: int, weighting: str, dtype: str, width: int, *options: str) -> str:
    """What tools/triton_resources.py says of a case in which nothing spills."""
    command = [sys.executable, "tools/triton_resources.py", "--check", *options]
    command += ["--arch", str(arch), "--weighting", weighting, "--dtype", dtype, "--width", str(width)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "weighting", "dtype", "width", "tiles"), CANDIDATE_CASES)
def test_candidates_compile_to_bulk_loads_and_split_loops(
    arch: int, weighting: str, dtype: str, width: int, tiles: int
) -> None:
    report = compiled(arch, weighting, dtype, width, "--candidates")
    loads = [int(number) for number in re.findall(r"bulk_loads=(\d+)", report)]
    loops = [int(number) for number in re.findall(r"split_loops=(\d+)", report)]
    assert len(loads) == len(loops) == tiles
    # K and V of each loop, or rows and their gradients, once or more; re-weighting reads K for its first sweep too.
    assert all(count >= 4 for count in loads)
    # The loop over whole tiles and the one over the ragged end, per sweep.
    assert all(count == (0 if arch == 90 else 4 if weighting == "lssar" else 2) for count in loops)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "weighting", "dtype", "width"), CASES)
def test_kernels_compile_without_spills(arch: int, weighting: str, dtype: str, width: int) -> None:
    report = compiled(arch, weighting, dtype, width)
    # softmax counts no keys and takes no norms, and re-weighting alone measures a split before it attends to it,
    # and has a forward of its own where nothing is saved.
    expected = {"softmax": 7, "lssa": 9, "lssar": 11}
    assert report.count("kernel=") == expected[weighting]
    if arch == 90:
        large = re.findall("kernel='(?:attention_forward|query_gradients|key_gradients).*products='([^']*)'", report)
        assert large == ["wgmma"] * (4 if weighting == "lssar" else 3)
    assert not re.search("bulk_loads=[1-9]|split_loops=[1-9]", report)  # nothing of that was measured yet
