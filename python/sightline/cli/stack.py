"""A Llama-shaped model: what `sightline bench` runs, and its rows of attention.

Each layer is RMSNorm, query/key/value projections, rotary embedding, grouped-query attention, output projection and a
residual sum, then where the shape has one a gated feed-forward part (arXiv 2302.13971). Prefill runs over a whole
context, decoding one token at a time over the cache that prefill left. The weights are random with a fixed seed: speed
and memory are those of a trained model, except where a kernel gains from structure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

import sightline as sl
from sightline.cli.bench_settings import StackShape
from sightline.cli.corpus import VOCABULARY
from sightline.weighting import Weighting

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SEED = 0
ROTARY_BASE = 10000.0

ROW_LABELS = {
    "eager": "eager",
    "sdpa": "torch SDPA",
    "softmax": "sightline Softmax",
    "lssa": "sightline LSSA",
    "lssar": "sightline LSSAR",
}


def eager_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention that materialises all weights, as models without a fused kernel compute it.

    query (B,H,M,D), the last M positions; key and value (B,Hk,N,D); returns (B,H,M,D). Weights are fp32, as in
    transformers' eager attention.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(1 + keys - queries)
    weights = scores.masked_fill_(future, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


def sdpa_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention by torch's own fused operator; shapes as in `eager_attention`, M = N or M = 1."""
    # torch aligns the first query with the first key: a single one would see that key alone.
    causal = query.shape[2] > 1
    return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def attention_rows() -> dict[str, Attention]:
    """The implementations that the benchmark compares, by the names of `ROW_LABELS`, each causal."""

    def weighted(weighting: Weighting) -> Attention:
        return lambda query, key, value: sl.attention(query, key, value, weighting=weighting, causal=True)

    return {
        "eager": eager_attention,
        "sdpa": sdpa_attention,
        "softmax": weighted(sl.Softmax()),
        "lssa": weighted(sl.LSSA()),
        "lssar": weighted(sl.LSSAR()),
    }


class Cache:
    """Keys and values (1, Hk, capacity, D) of every layer, of which the first `length` are filled."""

    def __init__(self, shape: StackShape, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        size = (shape.layers, 1, shape.kv_heads, capacity, shape.head_dim)
        self.keys, self.values = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the keys and values of new tokens after the filled ones; returns all of them, as views."""
        end = self.length + key.shape[2]
        filled = []
        for store, new in ((self.keys[layer], key), (self.values[layer], value)):
            store[:, :, self.length : end] = new
            filled.append(store[:, :, :end])
        return filled[0], filled[1]


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
        hidden = shape.feed_forward
        self.feed_forwards = [
            (weight(2 * hidden, width, width**-0.5), weight(width, hidden, hidden**-0.5))
            for _ in range(shape.layers if hidden else 0)
        ]

    def forward(self, tokens: torch.Tensor, attention: Attention, cache: Cache | None = None) -> torch.Tensor:
        """Hidden states (1, M, H * D) of token ids (M,), which follow those in the cache where one is given."""
        shape, length = self.shape, tokens.shape[0]
        hidden = functional.embedding(tokens, self.embedding)[None]
        rotation = self._rotation(0 if cache is None else cache.length, length)
        kv_width = shape.kv_heads * shape.head_dim
        for layer, (projection, output) in enumerate(self.layers):
            normed = functional.rms_norm(hidden, (shape.width,))
            projected = functional.linear(normed, projection).split([shape.width, kv_width, kv_width], dim=-1)
            query, key, value = (part.view(1, length, -1, shape.head_dim).transpose(1, 2) for part in projected)
            query, key = _rotate(query, rotation), _rotate(key, rotation)
            if cache is not None:
                key, value = cache.extend(layer, key, value)
            attended = attention(query, key, value)
            hidden = hidden + functional.linear(attended.transpose(1, 2).reshape(1, length, shape.width), output)
            if self.feed_forwards:
                hidden = hidden + self._feed_forward(layer, hidden)
        if cache is not None:
            cache.length += length
        return hidden

    def next_token(self, hidden: torch.Tensor) -> torch.Tensor:
        """The likeliest token id (1,) after the last of the hidden states; the embedding is the output matrix too."""
        last = functional.rms_norm(hidden[0, -1:], (self.shape.width,))
        return functional.linear(last, self.embedding).argmax(-1)

    def _feed_forward(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        into, out = self.feed_forwards[layer]
        gate, up = functional.linear(functional.rms_norm(hidden, (self.shape.width,)), into).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, out)

    def _rotation(self, first: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.shape.head_dim // 2
        frequencies = ROTARY_BASE ** -(torch.arange(half, device=self.device) / half)
        angles = torch.outer(torch.arange(first, first + length, device=self.device), frequencies)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def _rotate(states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rotation
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def token_tensor(tokens: bytes, device: torch.device) -> torch.Tensor:
    """Token ids (N,) of a text's bytes."""
    return torch.frombuffer(bytearray(tokens), dtype=torch.uint8).to(device, torch.int64)
