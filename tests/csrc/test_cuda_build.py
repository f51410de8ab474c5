"""What libsightline_cuda.so must be wherever it is built, and when tools/check_cuda_code.py must complain."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import required
import torch

ROOT = Path(__file__).parent.parent.parent
LIBRARY = ROOT / "python" / "sightline" / "_lib" / "libsightline_cuda.so"

LISTING = """
Fatbin elf code:
================
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1400 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90
 Function first:
  REG:120 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check_cuda_code = _tool("check_cuda_code")


@pytest.fixture
def library() -> Path:
    if not LIBRARY.exists():
        pytest.skip("libsightline_cuda.so was not built: no nvcc")
    return LIBRARY


@pytest.mark.skipif(
    shutil.which("nvcc") is None or os.environ.get("SIGHTLINE_CUDA", "auto") == "off", reason="there is no nvcc"
)
def test_the_library_is_built_where_nvcc_is() -> None:
    assert LIBRARY.exists()


def test_the_library_has_code_for_the_promised_gpus_and_spills_nowhere(library: Path) -> None:
    if check_cuda_code.find_cuobjdump() is None:
        required.missing("there is no cuobjdump (Triton's wheel has one)")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_cuda_code.py", library], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sm_80" in done.stdout
    assert "sm_90" in done.stdout


def test_the_library_keeps_to_the_stable_abi_and_brings_its_own_cuda_runtime(library: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_stable_abi.py", library], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    needed = subprocess.run(["readelf", "--dynamic", "--wide", library], check=True, capture_output=True, text=True)
    assert "libtorch_cuda.so" in needed.stdout
    assert "libcudart" not in needed.stdout


def test_the_check_accepts_kernels_without_a_stack() -> None:
    kernels = check_cuda_code.parse_resource_usage(LISTING)
    assert [(kernel.architecture, kernel.name, kernel.registers) for kernel in kernels] == [
        (80, "first", 168),
        (90, "first", 120),
    ]
    assert check_cuda_code.violations(kernels) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("STACK:0", "STACK:8", "8 bytes of registers in memory"),
        ("LOCAL:0", "LOCAL:16", "16 bytes of registers in memory"),
        ("sm_90", "sm_100", "no machine code for sm_90"),
        ("Function first:\n  REG:120", "Function second:\n  REG:120", "not every kernel"),
    ],
)
def test_the_check_complains(old: str, new: str, complaint: str) -> None:
    found = check_cuda_code.violations(check_cuda_code.parse_resource_usage(LISTING.replace(old, new)))
    assert any(complaint in violation for violation in found)


LOADING = """
import ctypes, sys
import torch
import sightline
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
library = ctypes.CDLL(sys.argv[2])
library.sightline_cuda_architectures.restype = library.sightline_cuda_driver_problem.restype = ctypes.c_char_p
print(torch.ops.sightline.attention_decode.default._schema)
print(library.sightline_cuda_architectures().decode())
print(library.sightline_cuda_driver_problem())
print(torch._C._dispatch_has_kernel_for_dispatch_key("sightline::attention_decode", "CUDA"))
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings the real libtorch_cuda.so")
def test_the_library_registers_its_operator_even_with_a_torch_without_cuda(library: Path) -> None:
    stub = ROOT / "build" / "cmake" / "stub" / "libtorch_cuda.so"
    if not stub.exists():
        required.missing("the stub of libtorch_cuda.so, which the build leaves beside the library, is not there")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, "-c", LOADING, str(stub), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    schema, architectures, driver, registered = done.stdout.strip().splitlines()
    assert schema.startswith("sightline::attention_decode(Tensor query, Tensor key, Tensor value, Tensor? key_lengths")
    assert {"80", "90"} <= set(architectures.split(","))
    assert driver == "None" or "the driver supports CUDA" in driver
    assert registered == "True"
