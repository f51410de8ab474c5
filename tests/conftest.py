"""Random numbers that differ from run to run and can be repeated, and memory that never holds a right answer by chance.

Every test draws from a seed of its own, made from the seed of the run and the test's name: one that fails is repeated,
alone or among the others, with the SIGHTLINE_TEST_SEED that its report names.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import sysconfig
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import required
import torch

SEED_VARIABLE = "SIGHTLINE_TEST_SEED"

# mallopt(M_PERTURB, value) of glibc fills what malloc hands out with value ^ 0xff. Every byte 0x7f is 3.4e38 in float32
# and bfloat16, NaN in float16 and far outside every index. (0xff, NaN in every dtype, would need the value 0, which
# turns the filling off; and torch's own fill_uninitialized_memory does not reach tensors made through the stable ABI.)
M_PERTURB = -6
FILL_WITH_0X7F = 0x80

PYTHON_HEADER = Path(sysconfig.get_path("include")) / "Python.h"


def pytest_configure(config: pytest.Config) -> None:
    # In the environment, so that xdist's workers and tests that start another pytest share it.
    os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(2**32)))
    # Tests are small: threads wait for each other longer than they work, above all on a busy machine. Those that are
    # about threads set their own number.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: a worker that began one of them when the others had ended would keep them waiting.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    # What is loaded by now stays. Looking through it again and again took a tenth of the time of Triton's interpreter.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    required.fail_where_a_module_is_missing(report)
    return report


def pytest_report_header(config: pytest.Config) -> str:
    return f"random numbers: {SEED_VARIABLE}={os.environ[SEED_VARIABLE]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("Random numbers", f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]} repeats this test"))
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if item.get_closest_marker("inductor") is not None and not PYTHON_HEADER.exists():
        required.missing(
            f"torch's inductor compiles against Python's headers: {PYTHON_HEADER} is missing (python3-dev)"
        )


@pytest.fixture(autouse=True)
def fresh_random_numbers(request: pytest.FixtureRequest) -> None:
    """Seeds torch and random for this test."""
    seed = zlib.crc32(f"{os.environ[SEED_VARIABLE]}:{request.node.nodeid}".encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[bool]:
    """Fills what malloc hands out, so that an entry which a kernel forgets to write cannot pass for a result."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # a C library other than glibc
        yield False
        return
    yield mallopt(M_PERTURB, FILL_WITH_0X7F) == 1
    mallopt(M_PERTURB, 0)
