"""Every option of the public attention functions, alone and combined, is refused by name where it is wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from argument_cases import HK, PER_NAME, B, H, M, N, arguments, packed, refusal

import sightline as sl


@pytest.mark.parametrize("causal", [None, 1, 0, "yes", torch.tensor(True)], ids=str)
def test_causal_must_be_a_boolean(causal: Any) -> None:
    assert refusal(TypeError, causal=causal).startswith("causal: expected True or False, got ")


def test_a_boolean_of_numpy_is_not_called_bool() -> None:
    assert refusal(TypeError, causal=np.True_) == "causal: expected True or False, got numpy.bool"


@pytest.mark.parametrize("window", [4, "10", (1.0, 2), (True, 1), ("1", None), {1, 2}, torch.tensor([1, 2])], ids=str)
def test_window_must_be_a_pair_of_integers(window: Any) -> None:
    assert refusal(TypeError, window=window).startswith("window: expected None or a pair (left, right)")


@pytest.mark.parametrize("window", [(), (1,), (1, 2, 3), (-1, 0), (0, -1), (-1, -1)], ids=str)
def test_window_must_have_two_sides_of_at_least_zero(window: Any) -> None:
    message = refusal(ValueError, window=window)
    assert message.startswith("window: expected None or a pair (left, right)")
    assert message.endswith(f"got {window}")


@pytest.mark.parametrize("window", [(0, 0), (None, None), (3, None), (None, 2), [1, 1], (10**12, 0)], ids=str)
def test_every_pair_of_sides_is_a_window(window: Any) -> None:
    assert sl.attention(**arguments(window=window)).isfinite().all()


@pytest.mark.parametrize("scale", ["0.1", True, [0.1], 1j, np.ones(H)], ids=str)
def test_scale_must_be_a_number_or_a_tensor(scale: Any) -> None:
    assert refusal(TypeError, scale=scale).startswith("scale: expected None, a finite number or a tensor (H,), got ")


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scale_must_be_finite(scale: float) -> None:
    assert refusal(ValueError, scale=scale).startswith("scale: expected None, a finite number")


@pytest.mark.parametrize("weighting", [sl.LSSA(), sl.LSSAR(), sl.Softmax(normalize_qk=True)], ids=str)
def test_head_width_one_has_no_default_scale_with_normalised_queries_and_keys(weighting: Any) -> None:
    narrow = {"query": torch.rand(B, H, M, 1), "key": torch.rand(B, HK, N, 1), "weighting": weighting}
    assert refusal(ValueError, **narrow).startswith("scale: expected a number or a tensor (H,)")
    assert sl.attention(**arguments(**narrow, scale=1.0)).isfinite().all()
    narrow["weighting"] = sl.Softmax()
    assert sl.attention(**arguments(**narrow)).isfinite().all()


@pytest.mark.parametrize("probability", ["0.1", None, True, False, torch.tensor(0.0), torch.tensor(0.1)], ids=str)
def test_dropout_must_be_a_number(probability: Any) -> None:
    assert refusal(TypeError, dropout_p=probability).startswith("dropout_p: expected a probability in [0, 1), got ")


@pytest.mark.parametrize("probability", [-0.1, 1.0, 1.5, math.nan, math.inf, 1])
def test_dropout_must_be_a_probability_below_one(probability: float) -> None:
    assert refusal(ValueError, dropout_p=probability) == (
        f"dropout_p: expected a probability in [0, 1), got {probability}"
    )


@pytest.mark.parametrize(
    "weighting",
    ["softmax", None, sl.Softmax, sl.LSSA, {"kind": "softmax"}, sl.Reweight()],
    ids=lambda w: getattr(w, "__name__", str(w)),
)
def test_weighting_must_be_a_weighting(weighting: Any) -> None:
    assert refusal(TypeError, weighting=weighting).startswith(
        "weighting: expected a Softmax, Softplus, LSSA() or LSSAR()"
    )


@pytest.mark.parametrize("backend", [None, 1, ["auto"], b"auto"], ids=str)
def test_backend_must_be_a_string(backend: Any) -> None:
    assert refusal(TypeError, backend=backend).startswith("backend: expected one of auto, native, triton, reference")


@pytest.mark.parametrize("backend", ["cuda", "", "AUTO"])
def test_backend_must_be_known(backend: str) -> None:
    assert refusal(ValueError, backend=backend) == (
        f"backend: expected one of auto, native, triton, reference, got {backend!r}"
    )


@pytest.mark.parametrize("weighting", [sl.LSSA(), sl.LSSAR(), sl.Softmax(reweight=sl.Reweight())], ids=str)
def test_sinks_go_with_plain_softmax_only(weighting: Any) -> None:
    message = refusal(NotImplementedError, weighting=weighting, sinks=torch.rand(H))
    assert message.startswith("sinks: expected a Softmax weighting without reweight, got ")


def test_alibi_slopes_have_no_gradient() -> None:
    slopes = torch.rand(H, requires_grad=True)
    message = refusal(NotImplementedError, alibi_slopes=slopes)
    assert message.startswith("alibi_slopes: expected no requires_grad")
    with torch.no_grad():
        assert sl.attention(**arguments(alibi_slopes=slopes)).isfinite().all()


@pytest.mark.parametrize("given", ["cu_seqlens_q", "cu_seqlens_k"])
def test_offsets_come_in_pairs(given: str) -> None:
    missing = {"cu_seqlens_q": "cu_seqlens_k", "cu_seqlens_k": "cu_seqlens_q"}[given]
    assert refusal(ValueError, **packed(**{missing: None})) == (
        f"{missing}: expected int32 offsets, because {given} is given, got None"
    )


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("shape", [(), (0,), (1, 3)])
def test_offsets_must_have_one_axis(name: str, shape: tuple[int, ...]) -> None:
    changes = packed(**{name: torch.zeros(shape, dtype=torch.int32)})
    assert refusal(ValueError, **changes).startswith(f"{name}: expected shape (documents + 1,), got ")


def test_offsets_must_count_the_same_documents() -> None:
    changes = packed(cu_seqlens_k=torch.tensor([0, N], dtype=torch.int32))
    assert refusal(ValueError, **changes) == "cu_seqlens_k: expected 3 offsets as in cu_seqlens_q, got 2"


def test_packed_documents_lie_in_one_batch_entry_without_key_lengths() -> None:
    offsets = {name: packed()[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    assert refusal(ValueError, **offsets).startswith("query: expected batch size 1 with packed documents")
    changes = packed(key_lengths=torch.tensor([N]))
    assert refusal(ValueError, **changes).startswith("key_lengths: expected None with packed documents")
    assert sl.attention(**packed()).isfinite().all()


@pytest.mark.parametrize("observe", [True, "entropy", {"entropy": True}, sl.Observe], ids=str)
def test_observe_must_be_an_observe(observe: Any) -> None:
    assert refusal(TypeError, observe=observe).startswith("observe: expected None or an Observe, got ")


@pytest.mark.parametrize(
    "request_for",
    [
        {"entropy": True},
        {"max_score": True},
        {"mean_score": True},
        {"max_weight": True},
        {"effective_keys": True},
        {"distance": True},
        {"sink_tokens": 4},
        {"top_k": 3},
        {"map_size": 8},
        {"distance_window": 0},
        {"column_mass": True},
        {"column_max": True},
        {"column_entropy": True},
        {"column_horizon": (0, 4)},
    ],
    ids=lambda request_for: next(iter(request_for)),
)
def test_statistics_that_no_backend_has_are_refused_by_name(request_for: dict[str, Any]) -> None:
    message = refusal(NotImplementedError, observe=sl.Observe(log_normalizer=True, **request_for))
    assert message.startswith("observe: ")
    assert next(iter(request_for)) in message


@pytest.mark.parametrize("name", ["value_weights", "key_segments"])
def test_tensors_of_a_statistic_come_with_its_request(name: str) -> None:
    wanted = {"value_weights": {"weighted_value": True}, "key_segments": {"segments": 3}}[name]
    (statistic,) = wanted
    given = {name: PER_NAME[name]}
    for observe in (None, sl.Observe(), sl.Observe(log_normalizer=True)):
        message = refusal(ValueError, observe=observe, **given)
        assert message == f"{name}: expected None, because observe.{statistic} is not set, got a tensor"
    message = refusal(ValueError, observe=sl.Observe(**wanted))
    assert message == f"{name}: expected a tensor, because observe.{statistic} is set, got None"
    assert refusal(NotImplementedError, observe=sl.Observe(**wanted), **given).startswith("observe: ")


def rows_refusal(error: type[Exception], rows: Any, **changes: Any) -> str:
    inputs = arguments(**changes)
    del inputs["value"]
    with pytest.raises(error) as caught:
        sl.attention_rows(**inputs, rows=rows)
    return str(caught.value)


def test_rows_are_one_axis_of_int64_indices() -> None:
    assert rows_refusal(TypeError, [0, 1]) == "rows: expected a tensor, got list"
    assert rows_refusal(TypeError, torch.tensor([0], dtype=torch.int32)) == "rows: expected dtype int64, got int32"
    assert rows_refusal(TypeError, torch.tensor([True])) == "rows: expected dtype int64, got bool"
    assert rows_refusal(ValueError, torch.tensor(0)) == "rows: expected one axis of row indices, got shape ()"
    assert rows_refusal(ValueError, torch.tensor([[0]])) == "rows: expected one axis of row indices, got shape (1, 1)"
    assert rows_refusal(ValueError, torch.tensor([0], device="meta")).startswith("rows: expected device cpu")


@pytest.mark.parametrize("row", [-1, M])
def test_rows_outside_the_query_are_refused(row: int) -> None:
    rows_refusal(IndexError, torch.tensor([0, row]))


def test_attention_rows_checks_the_arguments_it_shares_with_attention() -> None:
    rows = torch.tensor([0])
    assert (
        rows_refusal(ValueError, rows, key=torch.rand(B, HK, N, 80)) == "key: expected head width 8 as in query, got 80"
    )
    assert rows_refusal(TypeError, rows, causal=1).startswith("causal: ")
    assert rows_refusal(ValueError, rows, window=(-1, 0)).startswith("window: ")
    assert rows_refusal(NotImplementedError, rows, weighting=sl.LSSA(), sinks=torch.rand(H)).startswith("sinks: ")
