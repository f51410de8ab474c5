"""`sightline bench`: attention implementations side by side over context length.

At each length every row first runs once in a process of its own, which gives its peak memory and shows whether it runs
at all; then the rows take turns in this process, so that a drifting machine drifts for all of them.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from sightline import ops
from sightline.cli import environment, limits, report
from sightline.cli.bench_settings import BenchSettings, RequestedBench, WrongArgumentError, first_line
from sightline.cli.corpus import VOCABULARY, Corpus, read_corpus
from sightline.cli.measure import interleave, matmul_peak, matmul_size, repetitions_within
from sightline.cli.peak_memory import MeasurementError, describe_error, measure_peak
from sightline.cli.plot import draw
from sightline.cli.progress import Progress
from sightline.cli.report import BASELINE, Measurement
from sightline.cli.stack import (
    ROW_LABELS,
    SEED,
    AttentionStack,
    attention_rows,
    token_tensor,
)
from sightline.cli.timed_run import RunTime, StackForward, gpu_peak, timed_run

# Of the available memory: an estimate must not be what brings a machine to swapping. A GPU does not swap: there a row
# may try, and memory ends where an allocation fails.
_MEMORY_SHARE = {"cpu": 0.6, "cuda": 1.0}
_WARM_UP_BELOW = 1.0  # seconds; longer runs outweigh what a warm-up would change
_GPU_METHOD = "torch.cuda.max_memory_allocated"


class _Benchmark:
    """The state of one run: settings, model, and one measurement per row and length."""

    def __init__(self, settings: BenchSettings, corpus: Corpus, device: torch.device) -> None:
        self.settings, self.corpus, self.device = settings, corpus, device
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.stack = AttentionStack(settings.shape, self.dtype, device)
        self.attention = attention_rows()
        self.measurements = {
            (length, row): Measurement(row, length) for length in settings.lengths for row in self.attention
        }
        self.peak_gflops = 0.0
        rows = len(self.attention)
        self.progress = Progress(sum(2 * rows * length**2 for length in settings.lengths))
        self.backend = ops.choose_backend(torch.empty(1, 1, 1, 1, dtype=self.dtype, device=device), "auto")
        # The reference backend computes the plain formulas, which hold all pairs as eager does.
        self.materialising = {"eager"} | ({"softmax", "lssa", "lssar"} if self.backend == "reference" else set())

    def run(self) -> None:
        """Measure all rows at all lengths, shortest first, filling `measurements` as it goes."""
        for length in self.settings.lengths:
            expected = {row: seconds for row in self.attention if (seconds := self._first_run(row, length)) is not None}
            if expected:
                self._take_turns(self.corpus.context(length), expected)

    def measure_peak_rate(self) -> None:
        """Keep the best matrix-product rate seen so far: measured once, a busy moment would flatter every row."""
        self.peak_gflops = max(self.peak_gflops, matmul_peak(self.dtype, self.device))

    def _first_run(self, row: str, length: int) -> float | None:
        """Measure a row's memory; returns the expected seconds of one run, or None when the row takes no part."""
        measurement = self.measurements[length, row]
        self.progress.show(f"{length:,} tokens: memory of {ROW_LABELS[row]}")
        measurement.skipped = self._skip_reason(row, length)
        if measurement.skipped is None:
            try:
                seconds = self._measure_memory(measurement, self.corpus.context(length))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                measurement.skipped = f"memory: {length:,} tokens do not fit into that of the device"
            except Exception as error:  # Triton's errors derive from it alone
                measurement.failed = str(error) if isinstance(error, MeasurementError) else describe_error(error)
            else:
                measurement.skipped = limits.time_reason(seconds, self.settings.time_limit)
        self.progress.advance(length**2)
        if measurement.status in ("skipped", "failed"):
            self.progress.advance(length**2)
            return None
        return seconds

    def _skip_reason(self, row: str, length: int) -> str | None:
        settings = self.settings
        limit = settings.memory_limit
        if limit is None and (available := environment.available_memory(self.device)) is not None:
            limit = int(_MEMORY_SHARE[self.device.type] * available)
        need = limits.expected_memory(
            settings.shape,
            length,
            self.dtype.itemsize,
            materialises=row in self.materialising,
            decode_steps=settings.decode_steps,
        )
        if reason := limits.memory_reason(need, limit):
            share = f" ({_MEMORY_SHARE[self.device.type]:.0%} of the available memory)"
            return reason + (share if settings.memory_limit is None else " (--memory-limit)")
        shorter = [found for (tokens, name), found in self.measurements.items() if name == row and tokens < length]
        if full := next((found for found in shorter if found.skipped and found.skipped.startswith("memory")), None):
            return f"memory: already ended at {full.tokens:,} tokens"
        measured = [found for found in shorter if found.samples]
        if measured:
            expected = limits.expected_seconds(measured[-1].tokens, measured[-1].median_seconds(), length)
            return limits.time_reason(expected, settings.time_limit)
        too_long = next((found for found in shorter if found.skipped and found.skipped.startswith("time")), None)
        return f"time: already skipped at {too_long.tokens:,} tokens (--time-limit)" if too_long else None

    def _measure_memory(self, measurement: Measurement, context: bytes) -> float:
        settings, row = self.settings, measurement.row
        if self.device.type == "cuda":
            tokens = token_tensor(context, self.device)
            measurement.peak_bytes, run = gpu_peak(self.stack, tokens, self.attention[row], settings.decode_steps)
            measurement.memory_method = _GPU_METHOD
            return run.total + run.decode
        threads = torch.get_num_threads()
        forward = StackForward(settings.shape, row, context, settings.dtype, threads, settings.decode_steps)
        peak = measure_peak(forward)
        measurement.peak_bytes, measurement.memory_method = peak.extra_bytes, peak.method
        return peak.seconds * settings.shape.layers / forward.measured_layers

    def _take_turns(self, context: bytes, expected: dict[str, float]) -> None:
        settings, length = self.settings, len(context)
        tokens = token_tensor(context, self.device)
        runs: dict[str, Callable[[], RunTime]] = {
            row: partial(timed_run, self.stack, tokens, self.attention[row], settings.decode_steps) for row in expected
        }
        warm_up = {row: 1 for row, seconds in expected.items() if seconds < _WARM_UP_BELOW}
        repetitions = {
            row: repetitions_within(settings.time_limit - seconds * warm_up.get(row, 0), seconds, settings.repetitions)
            for row, seconds in expected.items()
        }
        if warm_up:
            self.progress.show(f"{length:,} tokens: warm-up")
            for _ in interleave({row: runs[row] for row in warm_up}, warm_up):
                pass
        rounds = max(repetitions.values(), default=0)
        shown = 0
        for turn, row, sample in interleave(runs, repetitions):
            measurement = self.measurements[length, row]
            if isinstance(sample, Exception):
                measurement.failed = describe_error(sample)
            else:
                measurement.samples.append(sample)
            if turn != shown:
                shown = turn
                self.progress.show(f"{length:,} tokens: time, round {turn} of {rounds}")
            self.progress.advance(length**2 / repetitions[row])


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WrongArgumentError(
            f"argument --device: expected a device of this machine, got {name}, "
            f"but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def run(request: RequestedBench, command: Sequence[str]) -> int:
    """Run the benchmark, print the table, write `bench.json` and `bench.png`.

    Args:
        request: what to measure; what it leaves open follows from the device.
        command: the command line, for the record.

    Returns:
        0 when everything was measured or skipped with a reason, 1 when a row failed, 130 when Ctrl-C ended it early;
        what was measured until then is written all the same.

    Raises:
        WrongArgumentError: the device is not there, heads do not divide, D is odd, the text is empty or cannot be read,
            or SIGHTLINE_BACKEND names a backend that cannot run here.
    """
    device = choose_device(request.given["device"])
    settings = request.on(device.type)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        corpus = read_corpus(settings.text, max(settings.lengths))
    except (OSError, ValueError) as error:
        raise WrongArgumentError(f"argument --text: {error}") from None

    try:
        benchmark = _Benchmark(settings, corpus, device)
    except (ValueError, RuntimeError, MemoryError) as error:  # RuntimeError: also torch's, where memory ends
        raise WrongArgumentError(first_line(error)) from None

    def measure() -> None:
        benchmark.measure_peak_rate()
        benchmark.run()

    def written(interrupted: bool) -> list[str]:
        benchmark.progress.close()
        document = _document(benchmark, command, interrupted=interrupted)
        _write(document, settings)
        return [result["status"] for result in document["results"]]

    print(_heading(benchmark), flush=True)
    return report.run_and_write("bench", measure, written)


def _heading(benchmark: _Benchmark) -> str:
    settings, corpus, shape = benchmark.settings, benchmark.corpus, benchmark.settings.shape
    described = environment.describe_device(benchmark.device)
    instruction_set = environment.instruction_sets()["chosen"]
    lines = [
        f"{shape.layers} {'' if shape.feed_forward else 'attention '}layer{'s' * (shape.layers > 1)} of width "
        f"{shape.width}, {shape.heads} query heads on {shape.kv_heads} key heads, D = {shape.head_dim}, "
        f"{f'feed-forward width {shape.feed_forward}, ' if shape.feed_forward else ''}{settings.dtype}, inference",
        f"{described['name']}, {described['threads']} threads",
        f"sightline backend: {benchmark.backend}, instruction set: {instruction_set or 'none'}",
        f"text: {corpus.source}, one byte is one token",
    ]
    repeated = [length for length in settings.lengths if corpus.repeats(length) > 1]
    if repeated:
        times = ", ".join(f"{corpus.repeats(length)} times for {length:,} tokens" for length in repeated)
        lines.append(f"text has {len(corpus.tokens):,} tokens and is repeated: {times}")
    return "\n".join(lines)


def _document(benchmark: _Benchmark, command: Sequence[str], *, interrupted: bool) -> dict[str, Any]:
    settings, shape, measurements = benchmark.settings, benchmark.settings.shape, benchmark.measurements
    model = {
        "layers": shape.layers,
        "width": shape.width,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "feed_forward": shape.feed_forward,
        "decode_steps": settings.decode_steps,
        "vocabulary": VOCABULARY,
        "weights": f"random, seed {SEED}",
    }
    return {
        "schema": report.SCHEMA,
        "command": shlex.join(command),
        "interrupted": interrupted,
        "device": environment.describe_device(benchmark.device),
        "versions": environment.versions(),
        "backend": benchmark.backend,
        "instruction_set": environment.instruction_sets(),
        "model": model,
        "dtype": settings.dtype,
        "text": {
            "source": benchmark.corpus.source,
            "tokens": len(benchmark.corpus.tokens),
            "repeats": {str(length): benchmark.corpus.repeats(length) for length in settings.lengths},
        },
        "peak": {
            "kind": f"best product of two square matrices, {matmul_size(benchmark.device)} rows, {settings.dtype}",
            "gflops": benchmark.peak_gflops,
        },
        "methods": {
            "seconds": "wall clock of one forward pass under inference mode, rows taking turns",
            "decode": "greedy decoding, one token at a time over the cache of the forward pass before it, timed apart",
            "peak_extra_bytes": "above the state before the pass and its decoding; without caches that of one layer, "
            "for each layer frees its buffers",
            "attention_gflops": "two products over the visible pairs for every row, by the time inside attention",
            "ratio_to_sdpa": "median time of torch SDPA over median time of the row: above 1 is faster",
        },
        "results": [
            report.record(found, measurements[length, BASELINE], model, benchmark.peak_gflops)
            for (length, _), found in measurements.items()
        ],
    }


def _write(document: dict[str, Any], settings: BenchSettings) -> None:
    json_path, picture_path = settings.output / "bench.json", settings.output / "bench.png"
    report.print_and_write(report.table(document["results"]), document, json_path)
    written = [str(json_path)]
    try:
        draw(document, picture_path)
        written.append(str(picture_path))
    except ImportError:
        print("no plot: matplotlib is missing, install it with `pip install sightline[plot]`", file=sys.stderr)
    print(f"\nwritten: {' '.join(written)}", flush=True)
