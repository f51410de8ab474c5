"""Compile what the benchmarks call, in as many processes as there are processors: `python -m gpu.compile_ahead MARK`.

Triton compiles a kernel in seconds, on one processor, and a benchmark calls some hundreds of them; left to themselves
the groups would spend their limits on that. MARK is a file that says that this machine has done it: the kernels lie in
Triton's cache, which ends with the machine. Results are not checked here, but their kernels have run once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from gpu import cases, measure, peers
from gpu.steps import record
from sightline.cli.peak_memory import describe_error

_MOST_WORKERS = 14
_COMPILED = ("softmax", "lssa", "lssar", "cuda", "triton", "flex", "flash", "recurrence", "fla")
Call = tuple[cases.Case, str]


def kernels_of(case: cases.Case, name: str) -> tuple[object, ...]:
    """What cases have in common that are computed by the same kernels."""
    direction = case.direction.removeprefix("forward+")
    return name, case.operation, case.dtype, case.head_dim, case.causal, direction


def shares(count: int) -> list[list[Call]]:
    """The calls to make, for so many processes: those that share kernels in one, the longest rows first."""
    families: dict[tuple[object, ...], list[Call]] = defaultdict(list)
    for group in cases.groups():
        for name in group.implementations:
            if name.partition("-")[0] in _COMPILED:
                for case in group.cases:
                    families[kernels_of(case, name)].append((case, name))
    found: list[list[Call]] = [[] for _ in range(count)]
    for family in sorted(families.values(), key=len, reverse=True):
        min(found, key=len).extend(dict.fromkeys(family))
    return found


def call_once(case: cases.Case, name: str, device: torch.device) -> None:
    """Call an implementation as its case is measured."""
    inputs = measure.inputs_of(case, device)
    attention = peers.make(name, case)
    recording = case.direction in ("backward", "forward+backward")
    leaves = [tensor.requires_grad_(recording) for tensor in inputs]
    with torch.inference_mode(not recording):
        output = attention(*leaves)
    if recording:
        torch.autograd.grad(output, leaves, torch.randn_like(output))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def work(share: list[Call], device: torch.device) -> None:
    """Make every call of a share, and hand over how long each took or why it failed."""
    measure.settle_torch()
    for case, name in share:
        start, why = time.perf_counter(), None
        try:
            call_once(case, name, device)
        except Exception as error:
            why = describe_error(error)[:300]
        seconds = round(time.perf_counter() - start, 2)
        record({"kind": "compiled", "name": f"{case.name}, {name}", "seconds": seconds, "error": why})
        if why is not None and measure.is_lost(device):
            raise SystemExit(f"{case.name}, {name}: {why}")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Start the processes and wait for them, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mark", type=Path)
    parser.add_argument("--share", type=int, nargs=2, metavar=("INDEX", "COUNT"))
    arguments = parser.parse_args()
    if arguments.share is not None:
        index, count = arguments.share
        work(shares(count)[index], torch.device("cuda"))
        return
    if arguments.mark.exists():
        return
    count = max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) - 1))
    command = [sys.executable, "-m", "gpu.compile_ahead", str(arguments.mark), "--share"]
    workers = [subprocess.Popen([*command, str(index), str(count)], close_fds=False) for index in range(count)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit(f"{sum(map(bool, codes))} of {count} processes failed")
    arguments.mark.parent.mkdir(parents=True, exist_ok=True)
    arguments.mark.touch()


if __name__ == "__main__":
    main()
