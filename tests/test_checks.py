"""Every tensor that the public attention functions take meets what it must not be, and says so by name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from argument_cases import DV, HK, OPTIONAL_TENSORS, PER_NAME, B, D, H, M, N, arguments, packed, refusal
from torch import Tensor

import sightline as sl
from sightline._checks import check_attention

NO_TENSORS = [None, 3, "tensor", [[1.0]], np.zeros((B, HK, N, D), np.float32)]


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("wrong", NO_TENSORS, ids=lambda wrong: type(wrong).__name__)
def test_inputs_must_be_tensors(name: str, wrong: Any) -> None:
    message = refusal(TypeError, **{name: wrong})
    assert message == f"{name}: expected a tensor, got {type(wrong).__name__}"


@pytest.mark.parametrize("name", OPTIONAL_TENSORS)
@pytest.mark.parametrize("wrong", NO_TENSORS[1:], ids=lambda wrong: type(wrong).__name__)
def test_optional_tensors_must_be_tensors(name: str, wrong: Any) -> None:
    changes = packed(**{name: wrong}) if name.startswith("cu_") else {name: wrong}
    assert refusal(TypeError, **changes).startswith(f"{name}: expected a tensor, got ")


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8])
def test_inputs_must_be_of_a_supported_floating_dtype(name: str, dtype: torch.dtype) -> None:
    message = refusal(TypeError, **{name: arguments()[name].to(dtype)})
    assert message.startswith(f"{name}: expected dtype float32, float16, bfloat16 or float64, got ")


@pytest.mark.parametrize("name", ["key", "value"])
def test_inputs_must_share_a_dtype(name: str) -> None:
    message = refusal(TypeError, **{name: arguments()[name].half()})
    assert message == f"{name}: expected dtype float32 as query, got float16"


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_inputs_must_be_dense(name: str) -> None:
    assert refusal(TypeError, **{name: arguments()[name].to_sparse()}).startswith(f"{name}: expected a dense")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_inputs_must_not_be_nested(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.rand(H, 3, D), torch.rand(H, 3, D)], layout=layout)
    assert refusal(TypeError, query=nested).startswith("query: expected a dense (strided) tensor, got a nested")


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("axes", [0, 1, 3, 5])
def test_inputs_must_have_four_axes(name: str, axes: int) -> None:
    shape = (1, *arguments()[name].shape) if axes == 5 else arguments()[name].shape[:axes]
    message = refusal(ValueError, **{name: torch.rand(shape)})
    assert re.match(rf"{name}: expected 4 axes \(B, Hk?, [MN], Dv?\), got shape \(", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query": torch.rand(B, H, M, 0), "key": torch.rand(B, HK, N, 0)},
            "query: expected head width of at least 1, got 0",
        ),
        ({"query": torch.rand(B, 0, M, D)}, "query: expected at least 1 head, got 0"),
        ({"key": torch.rand(3, HK, N, D)}, "key: expected batch size 2 as in query, got 3"),
        ({"key": torch.rand(1, HK, N, D)}, "key: expected batch size 2 as in query, got 1"),
        ({"key": torch.rand(B, HK, N, 80)}, "key: expected head width 8 as in query, got 80"),
        ({"key": torch.rand(B, 3, N, D)}, "key: expected a number of heads that divides the 4 of query, got 3"),
        ({"key": torch.rand(B, 8, N, D)}, "key: expected a number of heads that divides the 4 of query, got 8"),
        ({"key": torch.rand(B, 0, N, D)}, "key: expected a number of heads that divides the 4 of query, got 0"),
        ({"value": torch.rand(1, HK, N, DV)}, "value: expected batch size 2 as in query, got 1"),
        ({"value": torch.rand(B, H, N, DV)}, "value: expected 2 heads as in key, got 4"),
        ({"value": torch.rand(B, HK, N + 1, DV)}, "value: expected 7 keys as in key, got 8"),
        ({"value": torch.rand(B, HK, N, 0)}, "value: expected head width of at least 1, got 0"),
    ],
)
def test_shapes_of_the_inputs_must_fit_each_other(changes: dict[str, Tensor], message: str) -> None:
    assert refusal(ValueError, **changes) == message


@pytest.mark.parametrize("name", PER_NAME)
def test_tensors_must_be_on_the_device_of_the_query(name: str) -> None:
    assert refusal(ValueError, **{name: PER_NAME[name].to("meta")}) == f"{name}: expected device cpu as query, got meta"


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_offsets_must_be_on_the_device_of_the_query(name: str) -> None:
    changes = packed()
    changes[name] = changes[name].to("meta")
    assert refusal(ValueError, **changes) == f"{name}: expected device cpu as query, got meta"


@pytest.mark.parametrize("name", [name for name in PER_NAME if name not in ("key", "value")])
def test_optional_tensors_must_be_dense(name: str) -> None:
    assert refusal(TypeError, **{name: PER_NAME[name].to_sparse()}).startswith(f"{name}: expected a dense")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("key_lengths", torch.tensor([1.0, 2.0])),
        ("key_lengths", torch.ones(B, dtype=torch.int16)),
        ("key_mask", torch.ones(B, N)),
        ("key_mask", torch.ones(B, N, dtype=torch.int64)),
        ("attn_mask", torch.ones(M, N, dtype=torch.int64)),
        ("attn_mask", torch.ones(M, N, dtype=torch.float64)),
        ("attn_mask", torch.ones(M, N, dtype=torch.float16)),
        ("alibi_slopes", torch.ones(H, dtype=torch.int64)),
        ("sinks", torch.ones(H, dtype=torch.bool)),
        ("scale", torch.ones(H, dtype=torch.int32)),
        ("value_weights", torch.ones(B, HK, N, dtype=torch.int64)),
        ("key_segments", torch.ones(B, N)),
        ("key_segments", torch.ones(B, N, dtype=torch.bool)),
    ],
)
def test_optional_tensors_must_be_of_their_dtype(name: str, wrong: Tensor) -> None:
    message = refusal(TypeError, **{name: wrong})
    assert re.match(rf"{name}: expected dtype .*, got {str(wrong.dtype).removeprefix('torch.')}$", message)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_offsets_must_be_int32(name: str) -> None:
    changes = packed()
    changes[name] = changes[name].long()
    assert refusal(TypeError, **changes) == f"{name}: expected dtype int32, got int64"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("key_lengths", (), "(B,) = (2,)"),
        ("key_lengths", (1,), "(B,) = (2,)"),
        ("key_lengths", (B, 1), "(B,) = (2,)"),
        ("key_mask", (N,), "(B, N) = (2, 7)"),
        ("key_mask", (1, N), "(B, N) = (2, 7)"),
        ("key_mask", (B, N + 1), "(B, N) = (2, 7)"),
        ("key_mask", (B, 1, N), "(B, N) = (2, 7)"),
        ("attn_mask", (M, N + 1), "(B, H, M, N) = (2, 4, 5, 7)"),
        ("attn_mask", (M + 1, N), "(B, H, M, N) = (2, 4, 5, 7)"),
        ("attn_mask", (HK, M, N), "(B, H, M, N) = (2, 4, 5, 7)"),
        ("attn_mask", (3, 1, M, N), "(B, H, M, N) = (2, 4, 5, 7)"),
        ("attn_mask", (1, B, H, M, N), "(B, H, M, N) = (2, 4, 5, 7)"),
        ("attn_mask", (0,), "(B, H, M, N) = (2, 4, 5, 7)"),
        ("alibi_slopes", (HK,), "(H,) = (4,)"),
        ("alibi_slopes", (B, H), "(H,) = (4,)"),
        ("sinks", (), "(H,) = (4,)"),
        ("sinks", (1,), "(H,) = (4,)"),
        ("scale", (), "(H,) = (4,)"),
        ("scale", (HK,), "(H,) = (4,)"),
        ("scale", (1, H), "(H,) = (4,)"),
        ("value_weights", (B, N), "(B, Hk, N) = (2, 2, 7) or (B, H, N)"),
        ("value_weights", (B, 3, N), "(B, Hk, N) = (2, 2, 7) or (B, H, N)"),
        ("value_weights", (B, HK, M), "(B, Hk, N) = (2, 2, 7) or (B, H, N)"),
        ("key_segments", (N,), "(B, N) = (2, 7)"),
        ("key_segments", (B, M), "(B, N) = (2, 7)"),
    ],
)
def test_optional_tensors_must_have_their_shape(name: str, shape: tuple[int, ...], expected: str) -> None:
    message = refusal(ValueError, **{name: torch.zeros(shape, dtype=PER_NAME[name].dtype)})
    got = "(" + ", ".join(map(str, shape)) + ")"
    assert message.startswith(f"{name}: expected ")
    assert expected in message
    assert message.endswith(f", got {got}")


@pytest.mark.parametrize("shape", [(), (1,), (N,), (M, 1), (1, 1), (H, 1, N), (B, 1, M, N), (1, H, 1, 1), (B, H, M, N)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_every_mask_that_broadcasts_is_accepted(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.ones(shape, dtype=dtype)
    output = sl.attention(**arguments(attn_mask=mask))
    assert output.isfinite().all()


def check(autocast_dtype: torch.dtype | None = None, **changes: Any) -> None:
    options: dict[str, Any] = dict.fromkeys(
        (*OPTIONAL_TENSORS, "scale", "window", "observe"),
    )
    options |= {"weighting": sl.Softmax(), "causal": False, "dropout_p": 0.0, "backend": "auto"}
    check_attention(**(options | arguments(**changes)), autocast_dtype=autocast_dtype)


def test_dtypes_are_compared_after_autocast() -> None:
    check(torch.bfloat16, key=torch.rand(B, HK, N, D).half(), attn_mask=torch.zeros(M, N, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="attn_mask: expected dtype bool, float32 or bfloat16, got float16"):
        check(torch.bfloat16, attn_mask=torch.zeros(M, N, dtype=torch.float16))
    with pytest.raises(TypeError, match="value: expected dtype float32, float16 or bfloat16, got float64"):
        check(torch.bfloat16, value=torch.rand(B, HK, N, DV).double())


def test_checks_read_no_number_of_a_tensor() -> None:
    tensors = {name: tensor.to("meta") for name, tensor in (arguments() | PER_NAME).items()}
    del tensors["value_weights"], tensors["key_segments"]
    check(**tensors)
    with pytest.raises(ValueError, match="key_mask: expected shape"):
        check(**(tensors | {"key_mask": torch.ones(B, M, dtype=torch.bool, device="meta")}))
