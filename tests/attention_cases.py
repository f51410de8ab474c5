"""Named cases of attention, and running one of them forward and backward on a backend.

A case is drawn anew by every test: calling an entry of OPTIONS makes options of `sightline.attention` for given sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import sightline as sl

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# (M, N): one below, at and above the tiles of the kernels, and the smallest there are.
RAGGED_SIZES = [
    (1, 1),
    (1, 7),
    pytest.param(3, 3, marks=pytest.mark.isa),
    (63, 65),
    pytest.param(113, 203, marks=pytest.mark.isa),
    (128, 217),
    (511, 513),
    (1, 4097),
]

WEIGHTINGS: dict[str, sl.Softmax | sl.Softplus] = {
    "softmax": sl.Softmax(),
    "ssmax": sl.Softmax(length_scale=True),
    "capped": sl.Softmax(softcap=1.5),
    "cosine": sl.Softmax(normalize_qk=True),
    "sharp_softmax": sl.Softmax(reweight=sl.Reweight(3.0)),
    "offset_softmax": sl.Softmax(normalize_qk=True, reweight=sl.Reweight(4.0, offset=0.5, exempt_rows=0)),
    "lssa": sl.LSSA(),
    "raw_softplus": sl.Softplus(length_scale=False, normalize_qk=False),
    "lssar": sl.LSSAR(),
    "lssar1": sl.LSSAR(1.0),
    "lssar2.5": sl.LSSAR(2.5),
    "lssar3": sl.LSSAR(3.0),
}
MAIN_WEIGHTINGS = {name: WEIGHTINGS[name] for name in ("softmax", "lssa", "lssar")}
# The dtypes differ in how numbers are read and rounded, not in what is done with them: float16 meets few.
PAIRS = {
    f"{name}-{dtype}": (weighting, DTYPES[dtype])
    for name, weighting in WEIGHTINGS.items()
    for dtype in DTYPES
    if dtype != "fp16" or name in MAIN_WEIGHTINGS
}
OPTION_PAIRS = {
    f"{name}-{dtype}": (WEIGHTINGS[name], DTYPES[dtype])
    for dtype, names in {
        "fp32": ("softmax", "capped", "lssa", "lssar"),
        "fp16": ("lssa",),
        "bf16": ("softmax", "lssar"),
    }.items()
    for name in names
}


def by_turn(names: str | tuple[str, ...], entries: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test over these entries and every dtype, and by `weighting` with the next main one each time.

    Entries, dtypes and weightings then all meet in pairs, in a third of the cases of their product. What a kernel does
    about a shape, a width or a layout goes by the dtype that it loads or by the weighting, not by both at once.
    """
    several = not isinstance(names, str)
    cases = []
    for (place, entry), (turn, dtype) in itertools.product(enumerate(entries), enumerate(DTYPES)):
        marks = getattr(entry, "marks", ())
        values = entry.values if hasattr(entry, "marks") else entry if several else (entry,)
        weighting = list(MAIN_WEIGHTINGS)[(place + turn) % len(MAIN_WEIGHTINGS)]
        name = "-".join(map(str, (*values, weighting, dtype)))
        cases.append(pytest.param(*values, MAIN_WEIGHTINGS[weighting], DTYPES[dtype], marks=marks, id=name))
    return pytest.mark.parametrize((*(names if several else (names,)), "weighting", "dtype"), cases)


@dataclass(frozen=True)
class Sizes:
    """B, H, Hk, M, N, D and Dv."""

    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    queries: int = 70
    keys: int = 130
    width: int = 24
    value_width: int = 20

    def scores(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.queries, self.keys


def ragged_sizes(queries: int, keys: int) -> Sizes:
    """Small sizes for RAGGED_SIZES, with enough rows for the largest error of a handful not to be a matter of luck."""
    rows = min(64 * keys, 1024, 65536 // keys)
    batch = max(1, rows // queries)
    return Sizes(batch=batch, heads=2, key_heads=1, queries=queries, keys=keys)


@dataclass
class Problem:
    """Inputs of one call; `options` are those of `sightline.attention`, `seed` is for dropout."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    seed: int = field(default_factory=lambda: int(torch.randint(2**31, ())))

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another floating dtype, options included."""
        options = {name: _cast(option, dtype) for name, option in self.options.items()}
        return Problem(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype), options, self.seed)

    def redrawn(self, turn: int) -> Problem:
        """Query, key and value with their numbers in another order, each: of random ones another draw every turn."""
        seed = self.seed + 1 + turn
        order = torch.Generator(device=self.query.device).manual_seed(seed)
        inputs = (shuffled(tensor, order) for tensor in (self.query, self.key, self.value))
        return Problem(*inputs, self.options, seed)


def _cast(option: Any, dtype: torch.dtype) -> Any:
    return option.to(dtype) if isinstance(option, Tensor) and option.is_floating_point() else option


def shuffled(tensor: Tensor, order: torch.Generator) -> Tensor:
    """The numbers of a tensor in another order; `order` may be of another device than the tensor."""
    places = torch.randperm(tensor.numel(), generator=order, device=order.device)
    return tensor.flatten()[places.to(tensor.device)].view(tensor.shape)


def random_inputs(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query (B, H, M, D), key (B, Hk, N, D) and value (B, Hk, N, Dv)."""
    return (
        torch.randn(sizes.batch, sizes.heads, sizes.queries, sizes.width).to(dtype),
        torch.randn(sizes.batch, sizes.key_heads, sizes.keys, sizes.width).to(dtype),
        torch.randn(sizes.batch, sizes.key_heads, sizes.keys, sizes.value_width).to(dtype),
    )


def random_problem(sizes: Sizes, dtype: torch.dtype, **options: Any) -> Problem:
    return Problem(*random_inputs(sizes, dtype), options)


def clustered_problem(
    dtype: torch.dtype, queries: int = 64, keys: int = 640, scale_of_rows: int = 1, **options: Any
) -> Problem:
    """Keys near one of five directions, a stretch of keys for each, and rows that look for one of them.

    The directions are random but not the angles between them, from which the tiles that count follow: cosines from 0 to
    0.57, so that some tiles lie far below the bound of skipping, some near it and some above.
    `scale_of_rows`: by how much more than 32 rows one after the other look for the same.
    """
    orthogonal = torch.linalg.qr(torch.randn(16, 5)).Q.T
    leaning = orthogonal + torch.linspace(0.0, 0.7, 5)[:, None] * orthogonal[:1]
    centres = torch.nn.functional.normalize(leaning, dim=-1) * 4.0
    key = centres.repeat_interleave(keys // 5, 0) + 0.3 * torch.randn(1, 2, keys, 16)
    wanted = torch.arange(queries) // (32 * scale_of_rows) % 5
    query = centres[wanted] + 0.3 * torch.randn(1, 4, queries, 16)
    value = torch.randn(1, 2, keys, 16)
    return Problem(query.to(dtype), key.to(dtype), value.to(dtype), options)


def _left_padding(sizes: Sizes) -> Tensor:
    padding = torch.randint(0, sizes.keys, (sizes.batch, 1))
    return torch.arange(sizes.keys) >= padding


def _float_mask(*shape: int) -> Tensor:
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -math.inf)


def _mask_with_blind_rows(sizes: Sizes) -> Tensor:
    mask = torch.rand(sizes.scores()) < 0.5
    mask[:, :, :: max(1, sizes.queries // 5)] = False
    return mask


def _cuts(length: int) -> Tensor:
    """Offsets of four documents, one of them empty."""
    inner = torch.randint(0, length + 1, (2,)).sort().values
    return torch.tensor([0, inner[0], inner[0], inner[1], length], dtype=torch.int32)


# What each option looks like for given sizes. Those that pack documents want B = 1.
OPTIONS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "causal": lambda s: {"causal": True},
    "left_window": lambda s: {"window": (9, None)},
    "right_window": lambda s: {"window": (None, 11)},
    "window": lambda s: {"window": (40, 3)},
    "diagonal_window": lambda s: {"window": (0, 0)},
    "causal_window": lambda s: {"causal": True, "window": (33, 5)},
    "unlimited_window": lambda s: {"window": (None, None)},
    "lengths": lambda s: {"key_lengths": torch.randint(1, s.keys + 1, (s.batch,))},
    "causal_lengths": lambda s: {
        "causal": True,
        "key_lengths": torch.randint(0, s.keys + 1, (s.batch,), dtype=torch.int32),
    },
    "no_length": lambda s: {"key_lengths": torch.zeros(s.batch, dtype=torch.int64)},
    "key_mask": lambda s: {"key_mask": torch.rand(s.batch, s.keys) < 0.6},
    "strided_key_mask": lambda s: {"key_mask": (torch.rand(s.keys, s.batch) < 0.6).T},
    "left_padding": lambda s: {"causal": True, "key_mask": _left_padding(s)},
    "bool_mask": lambda s: {"attn_mask": torch.rand(s.scores()) < 0.7},
    "bool_mask_of_rows": lambda s: {"attn_mask": torch.rand(s.queries, s.keys) < 0.7, "causal": True},
    "bool_mask_of_keys": lambda s: {"attn_mask": torch.rand(s.batch, 1, 1, s.keys) < 0.7},
    "expanded_bool_mask": lambda s: {
        "attn_mask": (torch.rand(s.heads, 1, s.keys) < 0.7).expand(s.heads, s.queries, -1)
    },
    "blind_rows": lambda s: {"attn_mask": _mask_with_blind_rows(s)},
    "nothing_visible": lambda s: {"key_mask": torch.zeros(s.batch, s.keys, dtype=torch.bool)},
    "float_mask": lambda s: {"attn_mask": _float_mask(*s.scores())},
    "smallest_numbers": lambda s: {
        "attn_mask": torch.zeros(s.queries, s.keys).masked_fill(torch.rand(s.queries, 1) < 0.2, torch.finfo().min)
    },
    "alibi": lambda s: {"alibi_slopes": 0.3 * torch.rand(s.heads)},
    "causal_alibi": lambda s: {"causal": True, "alibi_slopes": 2.0 ** -torch.arange(1.0, s.heads + 1)},
    "number_scale": lambda s: {"scale": 0.3},
    "negative_scale": lambda s: {"scale": -0.4},
    "zero_scale": lambda s: {"scale": 0.0},
    "scale_per_head": lambda s: {"scale": 0.2 + torch.rand(s.heads)},
    "scale_with_a_zero": lambda s: {"scale": torch.arange(s.heads) * 0.2},
    "dropout": lambda s: {"dropout_p": 0.3},
    "causal_dropout": lambda s: {"causal": True, "dropout_p": 0.7},
    "everything": lambda s: {
        "causal": True,
        "window": (60, None),
        "key_lengths": torch.randint(s.keys // 2, s.keys + 1, (s.batch,)),
        "key_mask": torch.rand(s.batch, s.keys) < 0.9,
        "attn_mask": _float_mask(s.heads, 1, s.keys),
        "alibi_slopes": 0.1 * torch.rand(s.heads),
        "scale": 0.2 + torch.rand(s.heads),
        "dropout_p": 0.1,
    },
}
SOFTMAX_OPTIONS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "sinks": lambda s: {"sinks": torch.randn(s.heads)},
    "causal_sinks": lambda s: {"sinks": torch.randn(s.heads), "causal": True, "window": (20, None)},
    "large_and_small_sinks": lambda s: {"sinks": torch.tensor([-40.0, 40.0]).repeat(s.heads)[: s.heads]},
    "sinks_of_blind_rows": lambda s: {"sinks": torch.randn(s.heads), "attn_mask": _mask_with_blind_rows(s)},
}
PACKINGS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "documents": lambda s: {"cu_seqlens_q": _cuts(s.queries), "cu_seqlens_k": _cuts(s.keys)},
    "causal_documents": lambda s: {"cu_seqlens_q": _cuts(s.queries), "cu_seqlens_k": _cuts(s.keys), "causal": True},
    "masked_documents": lambda s: {
        "cu_seqlens_q": _cuts(s.queries),
        "cu_seqlens_k": _cuts(s.keys),
        "window": (12, 5),
        "key_mask": torch.rand(1, s.keys) < 0.8,
        "alibi_slopes": torch.rand(s.heads),
    },
    "rows_outside_documents": lambda s: {
        "cu_seqlens_q": torch.tensor([0, s.queries // 3, s.queries // 2], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, s.keys // 2, s.keys - 3], dtype=torch.int32),
    },
}


def _padded(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), math.nan)
    wide[..., 2:-3] = tensor
    return wide[..., 2:-3]


def _every_second(tensor: Tensor, axis: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] *= 2
    sparse = tensor.new_full(shape, math.nan)
    view = sparse.unflatten(axis, (-1, 2)).select(axis if axis < 0 else axis + 1, 1)
    view.copy_(tensor)
    return view


def _reordered(tensor: Tensor, *axes: int) -> Tensor:
    inverse = torch.tensor(axes).argsort().tolist()
    return tensor.permute(axes).contiguous().permute(inverse)


# The same numbers in other memory. What lies between them is NaN, so that reading it shows.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads_inside": lambda x: _reordered(x, 0, 2, 1, 3),
    "batch_inside": lambda x: _reordered(x, 1, 2, 0, 3),
    "slice_of_wider_rows": _padded,
    "every_second_row": lambda x: _every_second(x, 2),
    "every_second_head": lambda x: _every_second(x, 1),
    "strided_last_axis": lambda x: _every_second(x, -1),
    "last_axis_outside": lambda x: _reordered(x, 3, 0, 1, 2),
    "odd_offset": lambda x: torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape),
}

# Options whose tensors may need gradients.
DIFFERENTIABLE = ("attn_mask", "sinks", "scale")


def outputs(problem: Problem, weighting: Any, backend: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and log_normalizer of a problem with these in place of its options."""
    torch.manual_seed(problem.seed)
    output, stats = sl.attention(
        problem.query,
        problem.key,
        problem.value,
        weighting=weighting,
        observe=sl.Observe(log_normalizer=True),
        backend=backend,
        **options,
    )
    return output, stats.log_normalizer


def run(
    problem: Problem,
    weighting: Any,
    backend: str,
    grad_output: Tensor | None = None,
    grad_log_normalizer: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output and log_normalizer, and with a gradient for either of them the gradients of everything that has one.

    The keys are "output", "log_normalizer", "query", "key", "value", and the names in DIFFERENTIABLE.
    """
    if grad_output is None and grad_log_normalizer is None:
        output, log_normalizer = outputs(problem, weighting, backend, problem.options)
        return {"output": output, "log_normalizer": log_normalizer}
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in ("query", "key", "value")}
    options = dict(problem.options)
    for name in DIFFERENTIABLE:
        option = options.get(name)
        if isinstance(option, Tensor) and option.is_floating_point():
            leaves[name] = options[name] = option.detach().requires_grad_()
    watched = Problem(leaves["query"], leaves["key"], leaves["value"], options, problem.seed)
    results = outputs(watched, weighting, backend, options)
    wanted = [
        (output, gradient.to(output.dtype))
        for output, gradient in zip(results, (grad_output, grad_log_normalizer), strict=True)
        if gradient is not None
    ]
    # A row that sees nothing has a log normaliser of -inf, and its gradient must not matter.
    gradients = torch.autograd.grad(
        [output for output, _ in wanted],
        list(leaves.values()),
        [gradient for _, gradient in wanted],
        allow_unused=True,
        materialize_grads=True,
    )
    received = dict(zip(leaves, gradients, strict=True))
    return {"output": results[0].detach(), "log_normalizer": results[1].detach(), **received}
