"""`decode_token`, the short way of a model's new token: the numbers of `sl.attention`, and when it is not open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DTYPES, MAIN_WEIGHTINGS

import sightline as sl
from sightline import ops
from sightline.attention import scale_number, weighting_scalars

main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())
SOFTMAX = sl.Softmax()


def inputs(queries: int = 1, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = (2, 8, queries, 32), (2, 2, 50, 32), (2, 2, 50, 64)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def new_token(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weighting: Any = SOFTMAX, sinks: Any = None
) -> torch.Tensor | None:
    scalars = (scale_number(None, weighting, query), *weighting_scalars(weighting))
    return ops.decode_token(query, key, value, None, None, sinks, True, 20, -1, *scalars)


@main_weightings
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_the_numbers_are_those_of_attention(weighting: Any, dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype=dtype)
    expected = sl.attention(query, key, value, weighting=weighting, causal=True, window=(20, None))
    output = new_token(query, key, value, weighting)
    assert output is not None
    assert torch.equal(output, expected)
    assert output.stride() == expected.stride()


def test_several_rows_gradients_float64_and_mixed_dtypes_take_the_long_way() -> None:
    assert new_token(*inputs(queries=2)) is None
    assert new_token(*inputs(dtype=torch.float64)) is None
    query, key, value = inputs()
    assert new_token(query, key.bfloat16(), value) is None
    assert new_token(query, key, value.half()) is None
    assert new_token(query.requires_grad_(), key, value) is None
    with torch.no_grad():
        assert new_token(query, key, value) is not None
    query, key, value = inputs()
    assert new_token(query, key, value, sinks=torch.zeros(8, requires_grad=True)) is None


def test_autocast_takes_the_long_way() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert new_token(*inputs()) is None


@pytest.mark.parametrize(("backend", "is_open"), [("reference", False), ("native", True), ("auto", True)])
def test_the_environment_decides(backend: str, is_open: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGHTLINE_BACKEND", backend)
    assert (new_token(*inputs()) is not None) is is_open


def test_an_unknown_backend_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGHTLINE_BACKEND", "fastest")
    with pytest.raises(ValueError, match="SIGHTLINE_BACKEND: expected one of"):
        new_token(*inputs())


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    query, key, value = inputs()
    with pytest.raises(RuntimeError, match="key: expected the width of query"):
        new_token(query, key[..., :16], value)
    with pytest.raises(RuntimeError, match="value: expected the heads and rows of key"):
        new_token(query, key, value[:, :, :-1])


def test_a_function_transform_takes_the_long_way() -> None:
    query, key, value = inputs()
    seen = []

    def one_of_many(query: torch.Tensor) -> torch.Tensor:
        seen.append(new_token(query, key, value))
        return query

    torch.func.vmap(one_of_many)(query[None])
    assert seen == [None]
