"""Measure the CPU kernels of this tree beside those of an earlier one, and write a JSON file into benchmarks/results.

    python benchmarks/revision_ratio.py REVISION FOLDER

FOLDER is the `python` folder of a built checkout of REVISION. Both run in processes of their own that take turns call
by call, on one thread, so that a machine that drifts, or has neighbours, drifts for both: what counts is the ratio of
neighbouring calls. render.py shows the result.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import say, write_document

import sightline as sl
from sightline.cli.measure import Spread

SCHEMA = "sightline-revision/1"
OWN = Path(__file__).resolve().parent.parent / "python"
WEIGHTINGS = {"softmax": sl.Softmax(), "lssa": sl.LSSA(), "lssar": sl.LSSAR()}
HEADS = 8


@dataclass(frozen=True)
class Case:
    """One call: `kernel` is a weighting, or the recurrence in order ("causal") or without ("unordered")."""

    kernel: str
    direction: str  # forward, backward or decode
    dtype: str
    length: int

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.direction}, {self.dtype}, N = {self.length:,}"


CASES = tuple(
    Case(*chosen, length)
    for length, kernels in ((2048, ("softmax", "lssa", "lssar")), (4096, ("causal", "unordered")))
    for chosen in itertools.product(kernels, ("forward", "backward"), ("float32", "bfloat16"))
) + tuple(
    Case(kernel, "decode", dtype, 8192)
    for kernel in ("softmax", "lssa", "lssar", "causal")
    for dtype in ("float32", "bfloat16")
)


def prepare(case: Case) -> Callable[[], object]:
    """The call of a case on normal inputs, B = 1; attention with D = 64, the recurrence with 128."""
    torch.manual_seed(0)
    recurrent, decoding = case.kernel not in WEIGHTINGS, case.direction == "decode"
    width, dtype = 128 if recurrent else 64, getattr(torch, case.dtype)
    queries = 1 if decoding else case.length
    keys = 1 if decoding and recurrent else case.length
    query, key, value = (torch.randn(1, HEADS, rows, width).to(dtype) for rows in (queries, keys, keys))
    if not recurrent:
        call = partial(sl.attention, weighting=WEIGHTINGS[case.kernel], causal=True, backend="native")
    elif decoding:
        _, state = sl.additive_recurrence(query, key, value, output_final_state=True)
        call = partial(sl.additive_recurrence, initial_state=state, output_final_state=True, backend="native")
    else:
        call = partial(sl.additive_recurrence, causal=case.kernel == "causal", backend="native")
    if case.direction != "backward":
        return torch.inference_mode()(partial(call, query, key, value))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = call(*leaves)
    return partial(torch.autograd.grad, output, leaves, torch.randn_like(output), retain_graph=True)


def child() -> None:
    """Answer every line, a case as JSON and how many calls, with the seconds of one."""
    torch.set_num_threads(1)
    prepared: dict[Case, Callable[[], object]] = {}
    for line in sys.stdin:
        options = json.loads(line)
        calls, case = options.pop("calls"), Case(**options)
        if case not in prepared:
            prepared[case] = prepare(case)
        call = prepared[case]
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        print((time.perf_counter() - begin) / calls, flush=True)


class Tree:
    """A process that runs the kernels of one tree."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "sightline" / "_lib" / "libsightline.so").exists():
            raise FileNotFoundError(f"folder: expected a built sightline in {folder}")
        command = [sys.executable, str(Path(__file__).resolve()), "--child"]
        told = {**os.environ, "PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            command, env=told, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )

    def seconds(self, case: Case, calls: int) -> float:
        """Seconds of one of so many calls."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({**asdict(case), "calls": calls}) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def sample(before: Tree, after: Tree, case: Case, rounds: int, sample_seconds: float) -> list[tuple[float, float]]:
    """Times of a case in both trees, pairs of neighbours."""
    once = min(tree.seconds(case, 1) for tree in (before, after) for _ in range(2))
    calls = max(1, int(sample_seconds / once))
    pairs = []
    for turn in range(rounds):
        order = (before, after) if turn % 2 == 0 else (after, before)
        found = {id(tree): tree.seconds(case, calls) for tree in order}
        pairs.append((found[id(before)], found[id(after)]))
    return pairs


def compare(case: Case, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The times of a case, and the ratio of neighbours: above 1 this tree is faster."""
    return {
        **asdict(case),
        "before": asdict(Spread.of([pair[0] for pair in pairs])),
        "after": asdict(Spread.of([pair[1] for pair in pairs])),
        "ratio": asdict(Spread.of([pair[0] / pair[1] for pair in pairs])),
    }


def measure(
    revision: str, folder: Path, cases: Sequence[Case], processes: int, rounds: int, sample_seconds: float
) -> dict[str, Any]:
    """Every case, in so many pairs of processes: what memory one of them was given may favour it for all its life."""
    pairs: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    for number in range(processes):
        trees = Tree(folder.resolve()), Tree(OWN)
        try:
            for case in cases:
                say(f"processes {number + 1} of {processes}: {case.name}")
                pairs[case] += sample(*trees, case, rounds, sample_seconds)
        finally:
            for tree in trees:
                tree.end()
    found = [compare(case, pairs[case]) for case in cases]
    libraries = (path / "sightline" / "_lib" / "libsightline.so" for path in (folder, OWN))
    hashes = [hashlib.sha256(library.read_bytes()).hexdigest()[:12] for library in libraries]
    middle = statistics.median(entry["ratio"]["median"] for entry in found)
    return {
        "before": revision,
        "libraries": hashes,
        "processes": processes,
        "rounds": rounds,
        "median_ratio": middle,
        "timings": found,
    }


def main() -> None:
    """Measure every case and write one JSON file."""
    if sys.argv[1:] == ["--child"]:
        child()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="what the earlier tree is called")
    parser.add_argument("folder", type=Path, help="its python folder, built")
    parser.add_argument("--processes", type=int, default=4, help="pairs of them, one after the other")
    parser.add_argument("--rounds", type=int, default=6, help="of each pair")
    parser.add_argument("--sample-seconds", type=float, default=0.1, help="of calls between two turns")
    parser.add_argument("--name", help="name of the result file, by default from device and instruction set")
    options = parser.parse_args()
    try:
        found = measure(
            options.revision, options.folder, CASES, options.processes, options.rounds, options.sample_seconds
        )
    except FileNotFoundError as error:
        parser.error(str(error))
    write_document(SCHEMA, found, name=options.name)


if __name__ == "__main__":
    main()
