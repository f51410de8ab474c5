"""The Triton kernels compile for GPUs that this machine does not have, and no register spills.

A sample of the cases of docs/triton_resources.md; .ci/run compiles all of them with tools/triton_resources.py.
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


def compiled(section: str, target: str, name: str, dtype: str, width: int) -> str:
    """What tools/triton_resources.py says of a case in which nothing spills."""
    command = [sys.executable, "tools/triton_resources.py", "--print", "--jobs", "1", "--section", section]
    command += ["--target", target, "--case", name, "--dtype", dtype, "--width", str(width)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "dtype", "tiles"),
    # Loads by descriptors, forward and gradients; on Blackwell a forward that is specialised.
    [("sm_90", "softmax", "bf16", 6), ("sm_100", "lssar", "bf16", 1)],
)
def test_candidates_compile_to_bulk_loads_and_split_loops(target: str, name: str, dtype: str, tiles: int) -> None:
    report = compiled("candidates", target, name, dtype, 64)
    loads = [int(number) for number in re.findall(r"bulk_loads=(\d+)", report)]
    loops = [int(number) for number in re.findall(r"split_loops=(\d+)", report)]
    assert len(loads) == len(loops) == tiles
    # K and V of each loop, or rows and their gradients, once or more; re-weighting reads K for its first sweep too.
    assert all(count >= 4 for count in loads)
    # The loop over whole tiles and the one over the ragged end, per sweep.
    assert all(count == (0 if target == "sm_90" else 4) for count in loops)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "dtype", "count"),
    # Softmax counts no keys and takes no norms, and re-weighting alone measures a split before it attends to it, and
    # has a forward of its own where nothing is saved.
    [("sm_90", "lssar", "fp16", 11), ("sm_80", "softmax", "fp32", 7), ("gfx942", "softmax", "bf16", 7)],
)
def test_kernels_compile_without_spills(target: str, name: str, dtype: str, count: int) -> None:
    report = compiled("defaults", target, name, dtype, 64)
    assert report.count("kernel=") == count
    if target == "sm_90":
        large = re.findall("kernel='(?:attention_forward|query_gradients|key_gradients).*products='([^']*)'", report)
        assert large == ["wgmma"] * 4
    assert not re.search("bulk_loads=[1-9]|split_loops=[1-9]", report)  # nothing of that was measured yet


@pytest.mark.slow
@pytest.mark.parametrize(("target", "order", "dtype"), [("sm_90", "causal", "bf16"), ("gfx90a", "unordered", "bf16")])
def test_kernels_of_the_recurrence_compile_without_spills(target: str, order: str, dtype: str) -> None:
    # Of eight kernels, the states of backward are computed again, in its own tiles.
    assert compiled("recurrence", target, order, dtype, 64).count("kernel=") == 10
