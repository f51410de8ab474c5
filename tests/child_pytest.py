"""Running tests in a process of their own, where an instruction set or Triton's interpreter is chosen for all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_pytest(*arguments: str, timeout: float | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`pytest -q` with these arguments, and these variables in its environment.

    Its plugins are those that the tests need: importing the others takes a second or two.
    """
    # A worker of xdist must not pass its identity on, nor this pytest options of plugins that the child does not load.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    plugins = ("--disable-plugin-autoload", "-p", "pytest_timeout", "-p", "no:cacheprovider")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
