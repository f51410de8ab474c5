"""What a test needs beside the package: tools, packages, headers.

A developer may lack some of them, and the tests that need them are skipped. `.ci/run` has them all: where CI=true says
that it is running, what is missing is an error, for a skipped test looks as good as one that passed.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import NoReturn

import pytest


def under_ci() -> bool:
    return os.environ.get("CI") == "true"


def missing(what: str) -> NoReturn:
    """Skip the test that needs this, or fail it under CI."""
    if under_ci():
        pytest.fail(f"{what}, which .ci/run needs", pytrace=False)
    pytest.skip(what)


def module(name: str) -> ModuleType:
    """Import a module that the environment for development has."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(f"{name} cannot be imported: {error}")


def fail_where_a_module_is_missing(report: pytest.CollectReport) -> None:
    """What `pytest.importorskip` makes of a file of tests is an error under CI."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    if under_ci() and report.skipped and "could not import" in reason:
        report.outcome, report.longrepr = "failed", f"{reason}, which .ci/run needs"
