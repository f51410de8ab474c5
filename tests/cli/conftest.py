"""Running the `sightline` command as a user does: as a process, judged by exit code, output and files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def sightline(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call `sightline ARGUMENTS...` in an empty directory; keywords go to `subprocess.run`."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sightline", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, **options
        )

    return run
