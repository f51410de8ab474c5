"""Running the `sightline` command as a user does, judged by exit code, output and files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sightline.cli import main

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def sightline(tmp_path: Path) -> Run:
    """Call `sightline ARGUMENTS...` as a process in an empty directory; keywords go to `subprocess.run`."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sightline", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, **options
        )

    return run


@pytest.fixture
def sightline_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same within this process, without the seconds that importing torch takes: for what no process decides."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        try:
            code = main(list(arguments))
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)

    return run
