"""A pytest plugin: hands every test's outcome to the parent at once, and leaves out those that passed before."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from gpu.steps import PASSED_VARIABLE, record

SEED_VARIABLE = "SIGHTLINE_TEST_SEED"  # by which tests/conftest.py repeats the random numbers of a run
_MESSAGE = 1500  # characters of a failure that are kept


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = os.environ.get(PASSED_VARIABLE)
    if path is None or not Path(path).exists():
        return
    passed = set(json.loads(Path(path).read_text()))
    known = [item for item in items if item.nodeid in passed]
    if known:
        config.hook.pytest_deselected(items=known)
        items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> Generator[None, None, None]:
    """A test is what its call was; a set-up or tear-down counts where it failed or skipped."""
    if not os.environ.get("PYTEST_XDIST_WORKER") and (report.when == "call" or report.outcome != "passed"):
        finding = {"kind": "tests", "name": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.outcome == "skipped":
            finding["message"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.failed:
            finding["message"] = report.longreprtext[-_MESSAGE:]
            finding["seed"] = os.environ.get(SEED_VARIABLE)
        record(finding)
    return (yield)
