"""Forward, backward and decoding to 131,072 keys against exact rows, on a GPU; the checks themselves on any machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import MAIN_WEIGHTINGS
from torch import Tensor

import sightline as sl

main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())
LONGEST = 131072
BOUND = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
REWEIGHTED_FLOAT32_BOUND = 1e-4
_CHUNK = 16  # rows whose float64 weights are held at once


def draw(heads: int, length: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(1, heads, length, 64, device=device).to(dtype)


def chosen_rows(queries: int, count: int, device: str) -> Tensor:
    """The first and last rows, those around tiles, and random ones."""
    edges = [
        row for row in (0, 1, 2, 3, 63, 64, 127, 128, queries // 2, queries - 2, queries - 1) if 0 <= row < queries
    ]
    return torch.cat([torch.tensor(edges), torch.randint(queries, (count,))]).unique().to(device)


def exact_rows(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, weighting: Any) -> Tensor:
    """Rows of the output in float64, a few at a time."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    group = query.shape[1] // key.shape[1]
    wide = value.repeat_interleave(group, 1)
    chunks = [
        sl.attention_rows(query, key, part, weighting=weighting, causal=True) @ wide for part in rows.split(_CHUNK)
    ]
    return torch.cat(chunks, 2)


def assert_rows_are_exact(
    weighting: Any, dtype: torch.dtype, length: int, device: str, backend: str, queries: int | None = None
) -> None:
    """A causal call over `length` keys, its last `queries` rows (all by default), compared on chosen rows."""
    queries = length if queries is None else queries
    query = draw(4 if queries < length else 2, queries, dtype, device)
    key, value = (draw(2 if queries < length else 1, length, dtype, device) for _ in range(2))
    output = sl.attention(query, key, value, weighting=weighting, causal=True, backend=backend)
    rows = chosen_rows(queries, 48, device)
    exact = exact_rows(query, key, value, rows, weighting)
    error = (output[:, :, rows].double() - exact).norm() / exact.norm()
    bound = BOUND[dtype]
    if dtype == torch.float32 and weighting.reweight is not None:
        bound = REWEIGHTED_FLOAT32_BOUND
    assert error <= bound, f"relative error {float(error):.2e} exceeds {bound:.0e}"


@main_weightings
def test_the_check_itself_on_the_cpu(weighting: Any) -> None:
    for dtype in BOUND:
        assert_rows_are_exact(weighting, dtype, 300, "cpu", "native")
        assert_rows_are_exact(weighting, dtype, 300, "cpu", "native", queries=1)


@pytest.mark.gpu
@main_weightings
@pytest.mark.parametrize("dtype", list(BOUND), ids=["bf16", "fp16", "fp32"])
def test_gpu_forward_to_131072_keys(weighting: Any, dtype: torch.dtype) -> None:
    assert_rows_are_exact(weighting, dtype, LONGEST, "cuda", "triton")


@pytest.mark.gpu
@main_weightings
@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("dtype", list(BOUND), ids=["bf16", "fp16", "fp32"])
def test_gpu_decoding_over_131072_keys(weighting: Any, dtype: torch.dtype, backend: str) -> None:
    assert_rows_are_exact(weighting, dtype, LONGEST, "cuda", backend, queries=1)


def assert_late_keys_get_the_right_gradient(weighting: Any, length: int, device: str, backend: str) -> None:
    """Gradients of the last rows, which see every key, against the reference of those rows alone."""
    queries = 32
    query, key, value = draw(1, queries, torch.float32, device), *(draw(1, length, torch.float32, device) for _ in "kv")
    upstream = torch.randn_like(query)

    def gradients(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
        output = sl.attention(*leaves, weighting=weighting, causal=True, backend=name)
        return list(torch.autograd.grad(output, leaves, upstream.to(dtype)))

    expected = gradients("reference", torch.float64)
    for name, actual, exact in zip(("query", "key", "value"), gradients(backend, torch.float32), expected, strict=True):
        bound = 3 * (REWEIGHTED_FLOAT32_BOUND if weighting.reweight is not None else BOUND[torch.float32])
        error = (actual.double() - exact).norm() / exact.norm()
        assert error <= bound, f"gradient of {name}: relative error {float(error):.2e} exceeds {bound:.0e}"


@main_weightings
def test_the_check_of_gradients_on_the_cpu(weighting: Any) -> None:
    assert_late_keys_get_the_right_gradient(weighting, 700, "cpu", "native")


@pytest.mark.gpu
@main_weightings
def test_gpu_backward_over_131072_keys(weighting: Any) -> None:
    assert_late_keys_get_the_right_gradient(weighting, LONGEST, "cuda", "triton")
