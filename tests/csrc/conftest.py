"""The pybind11 module that shows the torch-free kernels to NumPy; development builds put it in build/bench."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


def _load() -> ModuleType | None:
    folder = Path(os.environ.get("SIGHTLINE_BENCH_PATH", ROOT / "build" / "bench"))
    path = folder / f"_bench{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("_bench", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCH = _load()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", BENCH.isas() if BENCH is not None else ["generic"])


@pytest.fixture(scope="session")
def bench() -> ModuleType:
    if BENCH is None:
        pytest.skip("the module _bench was not built (CMake option SIGHTLINE_BENCH, needs Python's headers)")
    return BENCH
