"""A Llama-shaped stack of attention layers: the model that `sightline bench` runs, and its rows of attention.

Each layer is RMSNorm, query/key/value projections, rotary embedding, grouped-query attention, output projection and a
residual sum (arXiv 2302.13971); there is no feed-forward part, which would cost the same in every row. The weights are
random with a fixed seed: speed and memory are those of a trained model, except where a kernel gains from structure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

import sightline as sl
from sightline.cli.bench_settings import StackShape
from sightline.cli.corpus import VOCABULARY
from sightline.cli.measure import seconds_of, synchronize

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SEED = 0
ROTARY_BASE = 10000.0
WARM_UP_TOKENS = 512

ROW_LABELS = {
    "eager": "eager",
    "sdpa": "torch SDPA",
    "softmax": "sightline Softmax",
    "lssa": "sightline LSSA",
    "lssar": "sightline LSSAR",
}


def eager_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention that materialises all weights, as models without a fused kernel compute it.

    query (B,H,N,D), key and value (B,Hk,N,D); returns (B,H,N,D). Weights are fp32, as in transformers' eager attention.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill_(future, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


def sdpa_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention by torch's own fused operator; shapes as in `eager_attention`."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def attention_rows() -> dict[str, Attention]:
    """The implementations that the benchmark compares, by the names of `ROW_LABELS`, each causal."""

    def weighted(weighting: sl.Softmax | sl.Softplus) -> Attention:
        return lambda query, key, value: sl.attention(query, key, value, weighting=weighting, causal=True)

    return {
        "eager": eager_attention,
        "sdpa": sdpa_attention,
        "softmax": weighted(sl.Softmax()),
        "lssa": weighted(sl.LSSA()),
        "lssar": weighted(sl.LSSAR()),
    }


class AttentionStack:
    """Embedding and layers of the given shape, with an attention implementation chosen per call.

    Args:
        shape: layers, heads and widths.
        dtype: dtype of weights and activations.
        device: where they live.
    """

    def __init__(self, shape: StackShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        generator = torch.Generator().manual_seed(SEED)
        width = shape.width

        def weight(rows: int, columns: int, deviation: float) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=generator) * deviation).to(device, dtype)

        self.embedding = weight(VOCABULARY, width, 1.0)
        projected = width + 2 * shape.kv_heads * shape.head_dim
        self.layers = [
            (weight(projected, width, width**-0.5), weight(width, width, width**-0.5)) for _ in range(shape.layers)
        ]

    def forward(self, tokens: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Hidden states (1, N, H * D) of token ids (N,)."""
        shape, length = self.shape, tokens.shape[0]
        hidden = functional.embedding(tokens, self.embedding)[None]
        rotation = self._rotation(length)
        kv_width = shape.kv_heads * shape.head_dim
        for projection, output in self.layers:
            normed = functional.rms_norm(hidden, (shape.width,))
            projected = functional.linear(normed, projection).split([shape.width, kv_width, kv_width], dim=-1)
            query, key, value = (part.view(1, length, -1, shape.head_dim).transpose(1, 2) for part in projected)
            attended = attention(_rotate(query, rotation), _rotate(key, rotation), value)
            hidden = hidden + functional.linear(attended.transpose(1, 2).reshape(1, length, shape.width), output)
        return hidden

    def _rotation(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.shape.head_dim // 2
        frequencies = ROTARY_BASE ** -(torch.arange(half, device=self.device) / half)
        angles = torch.outer(torch.arange(length, device=self.device), frequencies)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def _rotate(states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rotation
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True)
class RunTime:
    """Seconds of one forward pass, and of the attention calls inside it."""

    total: float
    attention: float


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


def timed_forward(stack: AttentionStack, tokens: torch.Tensor, attention: Attention) -> RunTime:
    """Run one forward pass under inference mode and time it."""
    timed = _TimedAttention(attention, stack.device)
    with torch.inference_mode():
        total = seconds_of(lambda: stack.forward(tokens, timed), stack.device)
    return RunTime(total, timed.seconds())


def token_tensor(tokens: bytes, device: torch.device) -> torch.Tensor:
    """Token ids (N,) of a text's bytes."""
    return torch.frombuffer(bytearray(tokens), dtype=torch.uint8).to(device, torch.int64)


def gpu_peak(stack: AttentionStack, tokens: torch.Tensor, attention: Attention) -> int:
    """Peak extra GPU memory of one forward pass in bytes, by torch's own allocator statistics."""
    timed_forward(stack, tokens[:WARM_UP_TOKENS], attention)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(stack.device)
    torch.cuda.reset_peak_memory_stats(stack.device)
    timed_forward(stack, tokens, attention)
    synchronize(stack.device)
    return torch.cuda.max_memory_allocated(stack.device) - before


@dataclass(frozen=True)
class StackForward:
    """One forward pass on the CPU, to be measured in a process of its own (`peak_memory.measure_peak`).

    One layer stands for all: layers run one after the other and free what they used.
    """

    shape: StackShape
    row: str
    tokens: bytes
    dtype: str
    threads: int

    def prepare(self) -> Callable[[], RunTime]:
        """Build a stack of one layer, warm it up on a short context, and return the pass over the whole one."""
        torch.set_num_threads(self.threads)
        device = torch.device("cpu")
        shape = StackShape(1, self.shape.heads, self.shape.kv_heads, self.shape.head_dim)
        stack = AttentionStack(shape, getattr(torch, self.dtype), device)
        attention, tokens = attention_rows()[self.row], token_tensor(self.tokens, device)
        timed_forward(stack, tokens[:WARM_UP_TOKENS], attention)
        return lambda: timed_forward(stack, tokens, attention)
