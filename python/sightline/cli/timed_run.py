"""One run of the model: prefill, then decoding, each timed, and its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sightline.cli.bench_settings import StackShape
from sightline.cli.measure import seconds_of, synchronize
from sightline.cli.stack import Attention, AttentionStack, Cache, attention_rows, token_tensor

WARM_UP_TOKENS = 512


@dataclass(frozen=True)
class RunTime:
    """Seconds of one prefill, of the attention calls inside it, and of all decoding steps after it together."""

    total: float
    attention: float
    decode: float = 0.0


class _TimedAttention:
    """Attention that adds up the time spent in it; on a GPU by events, so that nothing waits inside the pass."""

    def __init__(self, attention: Attention, device: torch.device) -> None:
        self._attention, self._on_gpu = attention, device.type == "cuda"
        self._elapsed = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            output = self._attention(query, key, value)
            end.record()
            self._events.append((start, end))
            return output
        begin = time.perf_counter()
        output = self._attention(query, key, value)
        self._elapsed += time.perf_counter() - begin
        return output

    def seconds(self) -> float:
        """Seconds spent so far; call it after the device has finished."""
        return self._elapsed + sum(start.elapsed_time(end) for start, end in self._events) / 1e3


def timed_run(stack: AttentionStack, tokens: torch.Tensor, attention: Attention, decode_steps: int = 0) -> RunTime:
    """Run one forward pass over the tokens under inference mode, and so many steps of greedy decoding after it."""
    timed = _TimedAttention(attention, stack.device)
    if decode_steps == 0:
        with torch.inference_mode():
            total = seconds_of(lambda: stack.forward(tokens, timed), stack.device)
        return RunTime(total, timed.seconds())
    with torch.inference_mode():
        cache = Cache(stack.shape, tokens.shape[0] + decode_steps, stack.dtype, stack.device)
        following: list[torch.Tensor] = []

        def prefill() -> None:
            following.append(stack.next_token(stack.forward(tokens, timed, cache)))

        def decode() -> None:
            for _ in range(decode_steps):
                following.append(stack.next_token(stack.forward(following[-1], attention, cache)))

        total = seconds_of(prefill, stack.device)
        return RunTime(total, timed.seconds(), seconds_of(decode, stack.device))


def gpu_peak(
    stack: AttentionStack, tokens: torch.Tensor, attention: Attention, decode_steps: int = 0
) -> tuple[int, RunTime]:
    """Peak extra GPU memory of one run in bytes, by torch's own allocator statistics, and the run's times."""
    timed_run(stack, tokens[:WARM_UP_TOKENS], attention, min(1, decode_steps))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(stack.device)
    torch.cuda.reset_peak_memory_stats(stack.device)
    run = timed_run(stack, tokens, attention, decode_steps)
    synchronize(stack.device)
    return torch.cuda.max_memory_allocated(stack.device) - before, run


@dataclass(frozen=True)
class StackForward:
    """One run on the CPU, to be measured in a process of its own (`peak_memory.measure_peak`).

    One layer stands for all: layers run one after the other and free what they used. Caches alone stay, so with
    decoding every layer runs.
    """

    shape: StackShape
    row: str
    tokens: bytes
    dtype: str
    threads: int
    decode_steps: int = 0

    @property
    def measured_layers(self) -> int:
        """How many layers run in the process."""
        return self.shape.layers if self.decode_steps else 1

    def prepare(self) -> Callable[[], RunTime]:
        """Build the model, warm it up on a short context, and return the run over the whole one."""
        torch.set_num_threads(self.threads)
        device = torch.device("cpu")
        shape = StackShape(**{**vars(self.shape), "layers": self.measured_layers})
        stack = AttentionStack(shape, getattr(torch, self.dtype), device)
        attention, tokens = attention_rows()[self.row], token_tensor(self.tokens, device)
        timed_run(stack, tokens[:WARM_UP_TOKENS], attention, min(1, self.decode_steps))
        return lambda: timed_run(stack, tokens, attention, self.decode_steps)
