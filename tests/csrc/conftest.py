"""The pybind11 module that shows the torch-free kernels to NumPy; development builds put it in build/bench."""

from __future__ import annotations

from types import ModuleType

import pytest
import required
from machine_rates import bench_module

try:
    BENCH: ModuleType | None = bench_module()
except FileNotFoundError:
    BENCH = None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", BENCH.isas() if BENCH is not None else ["generic"])


@pytest.fixture(scope="session")
def bench() -> ModuleType:
    if BENCH is None:
        required.missing("the module _bench was not built (CMake option SIGHTLINE_BENCH, needs Python's headers)")
    return BENCH
