"""Progress on stderr: a bar where it is a terminal, one line per step where it is not."""

from __future__ import annotations

import shutil
import sys
from typing import TextIO

_BAR_WIDTH = 24


class Progress:
    """Shows how much of the work is done, in units of the work's own cost.

    Args:
        total: cost of the whole work, in any unit.
        stream: where to write; stderr by default.
    """

    def __init__(self, total: float, stream: TextIO | None = None) -> None:
        self._total = total
        self._done = 0.0
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._is_terminal = self._stream is not None and self._stream.isatty()

    def show(self, label: str) -> None:
        """Say what runs now; to nobody where stderr is closed."""
        if self._stream is None:
            return
        share = min(1.0, self._done / self._total) if self._total else 1.0
        if self._is_terminal:
            filled = round(share * _BAR_WIDTH)
            line = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {share:4.0%} {label}"
            columns = shutil.get_terminal_size().columns
            self._stream.write("\r\x1b[K" + line[: columns - 1])
        else:
            self._stream.write(f"{share:4.0%} {label}\n")
        self._stream.flush()

    def advance(self, cost: float) -> None:
        """Count finished (or skipped) work of this cost."""
        self._done += cost

    def close(self) -> None:
        """Clear the bar so that what follows starts on an empty line."""
        if self._stream is not None and self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
