"""Peak memory of one call on the CPU, measured in a process of its own.

The kernel keeps the peak of a process's resident memory (`VmHWM` in /proc/self/status, the number that getrusage calls
ru_maxrss) and on Linux resets it to the present value when 5 is written to /proc/self/clear_refs. Reset just before
the call and read just after it, it is exact for calls of any duration, where a sampling thread misses short peaks.

The process is fresh, because an allocator that holds freed memory of another row would serve the call from it and hide
the need. Blocks from 1 MiB on are mapped one by one, as they always are in a young process: glibc would otherwise raise
that threshold as it sees blocks freed, and fragmentation, different in every run, would be part of the figure.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

_M_MMAP_THRESHOLD = -3  # malloc.h

KERNEL_PEAK = "VmHWM reset through /proc/self/clear_refs, in a fresh process"
GROWTH = "growth of ru_maxrss over the state before the call, in a fresh process (may read low)"


class PreparedCall(Protocol):
    """Something picklable that sets itself up in a fresh process and hands over the call to measure."""

    def prepare(self) -> Callable[[], Any]:
        """Set up, run once on a small problem so that pools and code are in place, and return the call."""


@dataclass(frozen=True)
class PeakMemory:
    """Extra memory above the state before the call in bytes, how it was measured, and the call's time in seconds."""

    extra_bytes: int
    method: str
    seconds: float


class MeasurementError(RuntimeError):
    """The call failed in its process; the message says how."""


def measure_peak(call: PreparedCall) -> PeakMemory:
    """Measure the peak extra memory of a call in a fresh process.

    On Linux the process is forked from a server that has imported torch but never run it, so it starts at once and
    with an untouched heap; elsewhere it is spawned.

    Raises:
        MeasurementError: the call raised, or its process was killed, which is what running out of memory looks like.
    """
    context: Any
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "numpy", __name__])
    else:
        context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(call, sending), daemon=True)
    process.start()
    sending.close()
    try:
        answer = receiving.recv()
    except EOFError:
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        raise MeasurementError(
            "its process was killed, most likely for want of memory"
            if killed
            else f"its process ended early with exit code {process.exitcode}"
        ) from None
    except BaseException:
        process.kill()
        raise
    finally:
        receiving.close()
        process.join()
    if isinstance(answer, str):
        raise MeasurementError(answer)
    return PeakMemory(*answer)


def _measure_and_send(call: PreparedCall, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent, which ends this process
    answer: str | tuple[int, str, float]
    try:
        _map_large_blocks()
        run = call.prepare()
        _return_freed_memory()
        before = _resident_bytes()
        exact = _reset_peak()
        largest_before = _largest_bytes()
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        peak = _largest_bytes()
        del result
        extra = peak - (largest_before if before is None else before)
        answer = (max(0, extra), KERNEL_PEAK if exact else GROWTH, seconds)
    except Exception as error:
        answer = describe_error(error)
    connection.send(answer)
    connection.close()


def describe_error(error: BaseException) -> str:
    """An exception in one line, for a table."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _map_large_blocks() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def _return_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes() -> int | None:
    return _status_bytes("VmRSS")


def _largest_bytes() -> int:
    largest = _status_bytes("VmHWM")
    if largest is not None:
        return largest
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
