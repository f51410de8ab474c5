"""How time is measured: side by side in one process, in rounds, as medians with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

_Sample = TypeVar("_Sample")


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of repeated measurements, in their unit."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise samples, interpolating linearly between neighbours.

        Raises:
            ValueError: there are no samples.

        Example:
            >>> Spread.of([3.0, 1.0, 2.0]).median
            2.0
        """
        if not samples:
            raise ValueError("samples: expected at least one measurement")
        return cls(*(_quantile(sorted(samples), share) for share in (0.5, 0.1, 0.9)))


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def interleave(
    runs: Mapping[str, Callable[[], _Sample]], repetitions: Mapping[str, int]
) -> Iterator[tuple[int, str, _Sample | Exception]]:
    """Run each name's call once per round until it had its repetitions, and yield every sample as it comes.

    Rounds spread a machine's drift (clock, temperature, neighbours) over all names alike. A call that raises yields
    its exception and takes no further part.

    Args:
        runs: for each name a call that returns one sample.
        repetitions: for each name the number of rounds it takes part in.

    Yields:
        (round counted from 1, name, sample or exception)

    Example:
        >>> [name for _, name, _ in interleave({"a": int, "b": int}, {"a": 2, "b": 1})]
        ['a', 'b', 'a']
    """
    failed: set[str] = set()
    for turn in range(1, max(repetitions.values(), default=0) + 1):
        for name, run in runs.items():
            if name in failed or repetitions[name] < turn:
                continue
            try:
                sample = run()
            except Exception as error:
                failed.add(name)
                yield turn, name, error
            else:
                yield turn, name, sample


def repetitions_within(limit: float, seconds_per_run: float, most: int) -> int:
    """Repetitions that fit into a time limit in seconds: at least one, at most `most`.

    Example:
        >>> repetitions_within(10.0, 3.0, most=5), repetitions_within(10.0, 40.0, most=5)
        (3, 1)
    """
    return max(1, int(min(most, limit / max(seconds_per_run, 1e-9))))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished; on the CPU everything already has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, including the work it leaves running on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def matmul_size(device: torch.device) -> int:
    """Rows and columns of the matrices behind `matmul_peak`.

    Large enough to fill the device, and on the CPU small enough (some 10 ms) to find a moment without neighbours.
    """
    return 8192 if device.type == "cuda" else 1024


def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """The matrix-product rate this machine reaches, in GFLOP/s: the yardstick for shares of peak.

    The best of repeated products of two square matrices over the given time, after one warm-up.
    """
    size = matmul_size(device)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        seconds_of(lambda: left @ right, device)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            best = min(best, seconds_of(lambda: left @ right, device))
    return 2 * size**3 / best / 1e9


def attention_flops(heads: int, tokens: int, query_width: int, value_width: int, *, causal: bool = True) -> int:
    """Useful floating-point operations of one attention forward, B = 1: two products over the visible pairs.

    The same count for every implementation, whether it computes invisible pairs or sweeps the keys twice.

    Example:
        >>> attention_flops(heads=1, tokens=2, query_width=1, value_width=1)
        12
    """
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    return 2 * heads * pairs * (query_width + value_width)
