"""`sightline::attention_triton` as a citizen of PyTorch; its rules are the native operator's, tested in tests/ops."""

from __future__ import annotations

import pytest
import torch

import sightline as sl
from sightline.ops.attention import ATTENTION, ATTENTION_BACKWARD
from sightline.ops.triton_attention import ATTENTION_TRITON, ATTENTION_TRITON_BACKWARD

SCALARS = (True, -1, -1, 0.5, 0.0, 1, True, True, 0.0, 15.0, 1.0, 3)
STATISTICS = (0, 0, 0, 0, 0)


def make_inputs(*, grad: bool = False) -> tuple[torch.Tensor, ...]:
    shapes = [(2, 4, 9, 8), (2, 2, 11, 8), (2, 2, 11, 8)]
    return tuple(torch.randn(shape, requires_grad=grad) for shape in shapes)


def test_schemas_are_those_of_the_native_operators() -> None:
    for operator, native in ((ATTENTION_TRITON, ATTENTION), (ATTENTION_TRITON_BACKWARD, ATTENTION_BACKWARD)):
        assert str(operator._schema).replace("attention_triton", "attention") == str(native._schema)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck_of_forward(grad: bool) -> None:
    options = [None] * 11
    torch.library.opcheck(ATTENTION_TRITON, (*make_inputs(grad=grad), *options, *SCALARS, False, *STATISTICS))


def test_opcheck_of_backward() -> None:
    inputs = make_inputs()
    options = [None, None, torch.randn(1, 4, 9, 11), *[None] * 6]
    arguments = (*inputs, *options, None, None, *SCALARS, True, *STATISTICS)
    output, log_normalizer, saved_rows, saved_values, *_ = ATTENTION_TRITON(*arguments)
    leading = (torch.randn_like(output), torch.randn_like(log_normalizer), *inputs, output, saved_rows, saved_values)
    torch.library.opcheck(ATTENTION_TRITON_BACKWARD, (*leading, *options, *SCALARS, True, False, False))


def test_compiled_forward_and_backward_equal_eager() -> None:
    def loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sl.attention(query, key, value, weighting=sl.LSSA(), causal=True, backend="triton").square().sum()

    inputs = make_inputs(grad=True)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_vmap_equals_a_loop() -> None:
    def attend(query: torch.Tensor) -> torch.Tensor:
        return sl.attention(query, key, value, weighting=sl.LSSAR(), causal=True, backend="triton")

    query, key, value = make_inputs()
    queries = torch.randn(3, *query.shape)
    torch.testing.assert_close(torch.vmap(attend)(queries), torch.stack([attend(query) for query in queries]))


def test_second_derivatives_say_that_they_are_missing() -> None:
    query, key, value = make_inputs(grad=True)
    output = sl.attention(query, key, value, backend="triton")
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_what_triton_cannot_do_is_refused_with_a_reason() -> None:
    wide = torch.randn(1, 1, 3, 300)
    with pytest.raises(NotImplementedError, match="head widths up to 256"):
        sl.attention(wide, wide, wide, backend="triton")
    narrow = torch.randn(1, 1, 3, 8)
    with pytest.raises(NotImplementedError, match="head widths up to 256"):
        sl.attention(narrow, narrow, wide, backend="triton")
    double = narrow.double()
    with pytest.raises(NotImplementedError, match="float64"):
        sl.attention(double, double, double, backend="triton")


def test_a_raw_call_that_would_read_out_of_bounds_is_refused() -> None:
    query, key, value = make_inputs()
    with pytest.raises(RuntimeError, match="width of query"):
        ATTENTION_TRITON(query, key[..., :4], value, *[None] * 11, *SCALARS, False, *STATISTICS)
