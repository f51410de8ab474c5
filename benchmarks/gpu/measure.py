"""The child process of a benchmark step: `python -m gpu.measure GROUP`, findings through steps.record.

Implementations take turns within a case; each is compared with exact weights on a few rows before it is timed, so that
nothing wrong is ever called fast. Times come from CUDA events around enough calls to hide their launches.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sightline as sl
from gpu import cases, peers
from gpu.cases import IN_A_GRAPH, Case
from gpu.steps import found_before, record
from gpu.watch import EXIT_CODE, Watch
from sightline.cli.measure import Spread, attention_flops, interleave, matmul_peak
from sightline.cli.peak_memory import describe_error

ROUNDS = 7
SAMPLE_SECONDS = 0.003  # of calls between two events
CASE_SECONDS = 8.0  # rounds are fewer where seven would take longer
CHECKED_ROWS = 32
# Largest relative Frobenius error on those rows. That of bf16 rounding alone is 3e-3; peers that round normalised
# queries and keys get a few times that.
ALLOWED_ERROR = {"bfloat16": 3e-2, "float16": 5e-3, "float32": 5e-3}
PRODUCTS = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5, "decode": 1.0}
RECURRENCE_PRODUCTS = {"forward": 1.0, "forward+backward": 3.0}
PREFIX = 512  # tokens of a recurrence that are compared with its formula: later ones change nothing there

Call = Callable[[], Any]
Capture = Callable[[Call], Call]


class LostDeviceError(RuntimeError):
    """An implementation left the device useless to this process, as an access outside of memory does."""

    def __init__(self, implementation: str, why: str) -> None:
        super().__init__(why)
        self.implementation = implementation


def is_lost(device: torch.device) -> bool:
    """Whether the device answers no more."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def inputs_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query, key and value of a case."""
    generator = torch.Generator(device).manual_seed(0)
    rows = 1 if case.direction == "decode" else case.length

    def draw(heads: int, length: int) -> Tensor:
        shape = (case.batch, heads, length, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    return draw(case.heads, rows), draw(case.key_heads, case.length), draw(case.key_heads, case.length)


def relative_error(name: str, case: Case, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> float:
    """How far some rows of an output are from the exact weights' in float32, or a recurrence's from its formula."""
    if case.operation == "recurrence":
        prefix = (tensor[:1, :, :PREFIX].float() for tensor in inputs)
        exact = sl.additive_recurrence(*prefix, backend="reference")
        return float((output[:1, :, :PREFIX].float() - exact).norm() / exact.norm())
    query, key, value = (tensor[:1] for tensor in inputs)
    rows = torch.randint(query.shape[2], (min(CHECKED_ROWS, query.shape[2]),), device=query.device)
    group = case.heads // case.key_heads
    errors, size = 0.0, 0.0
    for head in range(0, case.heads, max(1, case.heads // 2)):
        weights = sl.attention_rows(
            query[:, head : head + 1].float(),
            key[:, head // group : head // group + 1].float(),
            rows,
            weighting=peers.weighting_of(name),
            causal=case.causal,
        )
        exact = weights @ value[:, head // group : head // group + 1].float()
        errors += float((output[:1, head : head + 1, rows].float() - exact).square().sum())
        size += float(exact.square().sum())
    return (errors / size) ** 0.5


def make_call(name: str, case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> Call:
    """The call to be timed, after its result has been checked.

    Raises:
        ArithmeticError: the result is wrong.
    """
    attention = peers.make(name, case)
    recording = case.direction in ("backward", "forward+backward")
    leaves = tuple(tensor.detach().requires_grad_(recording) for tensor in inputs)
    with torch.set_grad_enabled(recording):
        output = attention(*leaves)
    error = relative_error(name, case, inputs, output.detach())
    if not error <= ALLOWED_ERROR[case.dtype]:
        raise ArithmeticError(f"wrong result: relative error {error:.1e}")
    if not recording:

        def forward() -> Tensor:
            with torch.inference_mode():
                return attention(*inputs)

        return forward
    upstream = torch.randn_like(output)
    if case.direction == "backward":
        return partial(torch.autograd.grad, output, leaves, upstream, retain_graph=True)
    del output
    return lambda: torch.autograd.grad(attention(*leaves), leaves, upstream)


def _ordered(name: str, case: Case) -> bool:
    """Whether sums must come in the same order in every run: backward is compared deterministic with deterministic."""
    return "backward" in case.direction and not name.endswith("-unordered")


def seconds_per_call(call: Call, calls: int, deterministic: bool) -> float:
    """Seconds of one of so many calls in a row, by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def replayed(call: Call) -> Call:
    """The kernels of a call as one CUDA graph, whose replay costs the host a single launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_case(
    case: Case,
    implementations: tuple[str, ...],
    device: torch.device,
    timer: Callable[..., float] = seconds_per_call,
    capture: Capture = replayed,
    left_out: Mapping[str, str] | None = None,
    begin: Callable[[str], None] = lambda name: None,
    over: Callable[[str], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Times of all implementations of a case, in turns: {implementation: seconds and rates, or the error}.

    Decoding, whose kernels are shorter than what launches them, is timed as called and as a CUDA graph. `left_out`:
    implementations that are not to run, and why; `begin` hears of each that does, and `over` watches it.

    Raises:
        LostDeviceError: an implementation took the device with it.
    """
    names = implementations
    if case.direction == "decode":
        names = cases.with_graphs(names)
    inputs = inputs_of(case, device)
    results: dict[str, Any] = {}
    runs: dict[str, Callable[[], float]] = {}
    slowest = 0.0

    def told(name: str, failure: Exception) -> str:
        why = describe_error(failure)[:300]
        if is_lost(device):
            raise LostDeviceError(name, why)
        return why

    def watched(name: str, run: Callable[[], float]) -> float:
        with over(name):
            return run()

    for name in names:
        plain = name.removesuffix(IN_A_GRAPH)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**33
        error = (left_out or {}).get(name) or peers.needs_too_much(plain, case, free)
        if error is None:
            begin(name)
            try:
                with over(name):
                    call = make_call(plain, case, inputs)
                    call = call if name == plain else capture(call)
                    timer(call, 1, _ordered(name, case))
                    once = timer(call, 1, _ordered(name, case))
            except Exception as failure:
                error = told(name, failure)
            else:
                calls = max(1, min(100, int(SAMPLE_SECONDS / max(once, 1e-7))))
                runs[name] = partial(watched, name, partial(timer, call, calls, _ordered(name, case)))
                slowest += once * calls
        if error is not None:
            results[name] = {"error": error}
    rounds = max(3, min(ROUNDS, int(CASE_SECONDS / max(slowest, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _, name, sample in interleave(runs, dict.fromkeys(runs, rounds)):
        if isinstance(sample, Exception):
            results[name] = {"error": told(name, sample)}
        else:
            samples[name].append(sample)
    for name, seconds in samples.items():
        if name not in results:
            results[name] = {"repetitions": len(seconds), **rates(case, Spread.of(seconds))}
    return {name: results[name] for name in names}


def rates(case: Case, seconds: Spread) -> dict[str, Any]:
    """What a time means: TFLOP/s of the useful products, and of decoding the GB/s of keys and values read once."""
    found: dict[str, Any] = {"seconds": asdict(seconds)}
    width = case.head_dim
    if case.direction == "decode":
        size = getattr(torch, case.dtype).itemsize
        found["gigabytes_per_second"] = (
            2 * case.batch * case.key_heads * case.length * width * size / seconds.median / 1e9
        )
    elif case.operation == "recurrence":
        # A state of D x D per head: one product updates it with a token, one reads it.
        flops = 4 * case.batch * case.heads * case.length * width * width
        found["tflops"] = flops * RECURRENCE_PRODUCTS[case.direction] / seconds.median / 1e12
    else:
        flops = attention_flops(case.batch * case.heads, case.length, width, width, causal=case.causal)
        found["tflops"] = flops * PRODUCTS[case.direction] / seconds.median / 1e12
    return found


def measure_peaks(device: torch.device) -> None:
    """The yardsticks of this device: its best matrix product, and bytes read and written per second by a copy."""
    for dtype in ("bfloat16", "float16", "float32"):
        record({"kind": "peaks", "name": dtype, "tflops": matmul_peak(getattr(torch, dtype), device) / 1e3})
    source = torch.empty(2**31 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    best = min(seconds_per_call(lambda: target.copy_(source), 1, False) for _ in range(20))
    record({"kind": "peaks", "name": "copy", "gigabytes_per_second": 2 * source.numel() / best / 1e9})


def settle_torch() -> None:
    """The settings under which peers are measured."""
    # Every shape is a kernel of its own to FlexAttention; a graph that is differentiated again keeps its buffers; and
    # filling fresh memory is no part of being deterministic here, where every kernel writes all of its output.
    for module, setting, value in (
        ("torch._dynamo.config", "recompile_limit", 64),
        ("torch._functorch.config", "donated_buffer", False),
        ("torch.utils.deterministic", "fill_uninitialized_memory", False),
    ):
        owner = importlib.import_module(module)
        if hasattr(owner, setting):
            setattr(owner, setting, value)


def measure_group(group: cases.Group, device: torch.device) -> None:
    """Measure the cases of a group that are not done yet, and hand over each as it is done.

    Raises:
        SystemExit: an implementation took the device with it; the next child leaves it out of its case.
    """
    before = found_before()
    watch = Watch(group.name, before)
    for case in group.cases:
        key = group.key(case)
        if key in before.get("cases", {}):
            continue
        names = cases.with_graphs(group.implementations)
        try:
            results = measure_case(
                case,
                group.implementations,
                device,
                left_out=watch.left_out(key, names),
                begin=partial(watch.begin, key),
                over=partial(watch.over, key),
            )
        except LostDeviceError as error:
            watch.lose(key, error.implementation, str(error), for_good=True)
            watch.begin(None, None)
            raise SystemExit(EXIT_CODE) from error
        record({"kind": "cases", "name": key, "label": case.name, **asdict(case), "results": results})
        torch.cuda.empty_cache()


def main() -> None:
    """Measure a group of cases, or the yardsticks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", help="a group of gpu.cases, or peaks")
    name = parser.parse_args().group
    device = torch.device("cuda")
    settle_torch()
    if name == "peaks":
        measure_peaks(device)
        return
    measure_group(cases.find_group(name), device)


if __name__ == "__main__":
    main()
