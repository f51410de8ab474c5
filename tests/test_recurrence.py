"""`sightline.additive_recurrence`: what it returns, which backend computes it, and what it says to bad arguments."""

from __future__ import annotations

import doctest
import importlib
import math
from typing import Any

import pytest
import torch

import sightline as sl
from sightline.ops import choose_recurrence_backend
from sightline.ops.backends import INTERPRETS_TRITON

B, H, HK, N, DK, DV = 2, 4, 2, 5, 8, 3


def state(**changes: Any) -> sl.RecurrenceState:
    return sl.RecurrenceState(torch.zeros(B, HK, DK), torch.zeros(B, HK, DK, DV))._replace(**changes)


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments that are right, then the changes."""
    right = {"query": torch.rand(B, H, N, DK), "key": torch.rand(B, HK, N, DK), "value": torch.rand(B, HK, N, DV)}
    return right | changes


def packed(**changes: Any) -> dict[str, Any]:
    right = {"query": torch.rand(1, H, N, DK), "key": torch.rand(1, HK, N, DK), "value": torch.rand(1, HK, N, DV)}
    return right | {"cu_seqlens": torch.tensor([0, 2, N], dtype=torch.int32)} | changes


WRONG_TYPES = [
    ({"query": [1.0]}, "query: expected a tensor, got list"),
    ({"query": torch.ones(B, H, N, DK, dtype=torch.int64)}, "query: expected dtype float32, float16"),
    ({"key": torch.rand(B, HK, N, DK).half()}, "key: expected dtype float32 as query, got float16"),
    ({"value": torch.rand(B, HK, N, DV).double()}, "value: expected dtype float32 as query, got float64"),
    ({"causal": 1}, "causal: expected True or False, got int"),
    ({"output_final_state": "yes"}, "output_final_state: expected True or False, got str"),
    ({"scale": "1"}, "scale: expected a finite number, got str"),
    ({"scale": True}, "scale: expected a finite number, got bool"),
    ({"scale": torch.ones(H)}, "scale: expected a finite number, got Tensor"),
    ({"backend": None}, "backend: expected one of auto, native, triton, reference, got NoneType"),
    ({"key_gain": 1.0}, "key_gain: expected a tensor, got float"),
    ({"key_gain": torch.ones(B, HK, N, DK).half()}, "key_gain: expected dtype float32, got float16"),
    ({"key_mask": torch.ones(B, N)}, "key_mask: expected dtype bool, got float32"),
    ({"initial_state": torch.zeros(2)}, "initial_state: expected None or a RecurrenceState, got Tensor"),
    ({"initial_state": state(memory=None)}, "initial_state.memory: expected a tensor, got NoneType"),
    (
        {"initial_state": state(memory=torch.zeros(B, HK, DK, DV).bfloat16())},
        "initial_state.memory: expected dtype float32, got bfloat16",
    ),
    (
        {"initial_state": state(log_normalizer=torch.zeros(B, HK, DK).double())},
        "initial_state.log_normalizer: expected dtype float32, got float64",
    ),
    (packed(cu_seqlens=torch.tensor([0, N])), "cu_seqlens: expected dtype int32, got int64"),
    (packed(cu_seqlens=[0, N]), "cu_seqlens: expected a tensor, got list"),
]
WRONG_VALUES = [
    ({"query": torch.rand(H, N, DK)}, "query: expected 4 axes (B, H, N, Dk), got shape (4, 5, 8)"),
    ({"value": torch.rand(HK, N, DV)}, "value: expected 4 axes (B, Hk, N, Dv), got shape (2, 5, 3)"),
    ({"query": torch.rand(B, 0, N, DK)}, "query: expected at least 1 head, got 0"),
    ({"query": torch.rand(B, H, N, 0)}, "query: expected head width from 1 to 512, got 0"),
    ({"value": torch.rand(B, HK, N, 513)}, "value: expected head width from 1 to 512, got 513"),
    ({"key": torch.rand(B, HK, N, 7)}, "key: expected head width 8 as in query, got 7"),
    ({"key": torch.rand(3, HK, N, DK)}, "key: expected batch size 2 as in query, got 3"),
    ({"key": torch.rand(B, HK, 4, DK)}, "key: expected 5 positions as in query, got 4"),
    ({"key": torch.rand(B, 3, N, DK)}, "key: expected a number of heads that divides the 4 of query, got 3"),
    ({"value": torch.rand(1, HK, N, DV)}, "value: expected batch size 2 as in query, got 1"),
    ({"value": torch.rand(B, HK, 6, DV)}, "value: expected 5 positions as in query, got 6"),
    ({"value": torch.rand(B, H, N, DV)}, "value: expected 2 heads as in key, got 4"),
    ({"scale": math.nan}, "scale: expected a finite number (at most 1e+30 in size), got nan"),
    ({"scale": -math.inf}, "scale: expected a finite number (at most 1e+30 in size), got -inf"),
    ({"backend": "cuda"}, "backend: expected one of auto, native, triton, reference, got 'cuda'"),
    ({"key_gain": torch.ones(B, H, N, DK)}, "key_gain: expected the shape of key, (2, 2, 5, 8), got (2, 4, 5, 8)"),
    ({"key_mask": torch.ones(B, 4, dtype=torch.bool)}, "key_mask: expected shape (B, N) = (2, 5), got (2, 4)"),
    ({"key_mask": torch.ones(N, dtype=torch.bool)}, "key_mask: expected shape (B, N) = (2, 5), got (5)"),
    (
        {"initial_state": (torch.zeros(2), torch.zeros(2), torch.zeros(2))},
        "initial_state: expected a RecurrenceState (log_normalizer, memory), got 3 entries",
    ),
    (
        {"initial_state": state(log_normalizer=torch.zeros(B, H, DK))},
        "initial_state.log_normalizer: expected shape (B, Hk, Dk) = (2, 2, 8), got (2, 4, 8)",
    ),
    (
        {"initial_state": state(memory=torch.zeros(B, HK, DV, DK))},
        "initial_state.memory: expected shape (B, Hk, Dk, Dv) = (2, 2, 8, 3), got (2, 2, 3, 8)",
    ),
    (
        packed(initial_state=sl.RecurrenceState(torch.zeros(1, HK, DK), torch.zeros(1, HK, DK, DV))),
        "initial_state.log_normalizer: expected shape (documents, Hk, Dk) = (2, 2, 8), got (1, 2, 8)",
    ),
    (packed(cu_seqlens=torch.zeros(0, dtype=torch.int32)), "cu_seqlens: expected shape (documents + 1,), got (0)"),
    (
        {"cu_seqlens": torch.tensor([0, N], dtype=torch.int32)},
        "query: expected batch size 1 with packed documents (cu_seqlens), got 2",
    ),
]


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [(TypeError, *case) for case in WRONG_TYPES] + [(ValueError, *case) for case in WRONG_VALUES],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_bad_arguments_are_refused_by_name(error, changes, message):
    with pytest.raises(error) as caught:
        sl.additive_recurrence(**arguments(**changes))
    assert type(caught.value) is error
    assert str(caught.value).startswith(message)
    assert sl.additive_recurrence(**arguments()).shape == (B, H, N, DV)


def test_a_tensor_on_another_device_is_refused():
    with pytest.raises(ValueError, match="key: expected device cpu as query, got meta"):
        sl.additive_recurrence(**arguments(key=torch.empty(B, HK, N, DK, device="meta")))


def test_output_is_a_view_of_memory_with_the_heads_inside():
    for backend in ("native", "reference"):
        output = sl.additive_recurrence(**arguments(), backend=backend)
        assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_an_empty_sequence_hands_its_state_on(backend, causal):
    given = sl.RecurrenceState(torch.randn(B, HK, DK), torch.randn(B, HK, DK, DV))
    given = sl.RecurrenceState(*(part.requires_grad_() for part in given))
    empty = arguments(query=torch.rand(B, H, 0, DK), key=torch.rand(B, HK, 0, DK), value=torch.rand(B, HK, 0, DV))
    output, final = sl.additive_recurrence(
        **empty, initial_state=given, output_final_state=True, causal=causal, backend=backend
    )
    assert output.shape == (B, H, 0, DV)
    for part, other in zip(given, final, strict=True):
        assert torch.equal(part, other)
        weights = torch.randn_like(part)
        assert torch.equal(torch.autograd.grad(other, part, weights, retain_graph=True)[0], weights)
    _, nothing = sl.additive_recurrence(**empty, output_final_state=True, causal=causal, backend=backend)
    assert (nothing.log_normalizer == -math.inf).all()
    assert not nothing.memory.any()


def test_an_empty_batch_gives_an_empty_output():
    empty = {name: tensor[:0] for name, tensor in arguments().items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in empty.items()}
    output = sl.additive_recurrence(**leaves)
    assert output.shape == (0, H, N, DV)
    output.sum().backward()
    assert leaves["key"].grad.shape == (0, HK, N, DK)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nothing_but_masked_keys_gives_zero(backend):
    mask = torch.zeros(B, N, dtype=torch.bool)
    output, final = sl.additive_recurrence(**arguments(key_mask=mask), output_final_state=True, backend=backend)
    assert not output.any()
    assert not final.memory.any()
    assert (final.log_normalizer == -math.inf).all()


def test_float64_is_computed_by_the_reference():
    tensors = {name: tensor.double() for name, tensor in arguments().items()}
    assert sl.additive_recurrence(**tensors).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="'native' has no float64 kernels"):
        sl.additive_recurrence(**tensors, backend="native")


@pytest.mark.skipif(INTERPRETS_TRITON, reason="the interpreter runs Triton's kernels on the CPU")
def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(NotImplementedError, match="backend: 'triton' is not available"):
        sl.additive_recurrence(**arguments(), backend="triton")


def test_the_environment_names_the_backend(monkeypatch):
    query = torch.rand(1, 1, 1, 1)
    assert choose_recurrence_backend(query, "auto") == "native"
    monkeypatch.setenv("SIGHTLINE_BACKEND", "reference")
    assert choose_recurrence_backend(query, "auto") == "reference"
    assert choose_recurrence_backend(query, "native") == "native"
    monkeypatch.setenv("SIGHTLINE_BACKEND", "gpu")
    with pytest.raises(ValueError, match="SIGHTLINE_BACKEND: expected one of"):
        choose_recurrence_backend(query, "auto")


def test_a_saved_state_is_loaded_as_weights_are(tmp_path):
    state = sl.RecurrenceState(torch.randn(1, 2, 8), torch.randn(1, 2, 8, 4))
    torch.save({"layer 0": state}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)["layer 0"]
    assert type(loaded) is sl.RecurrenceState
    torch.testing.assert_close(tuple(loaded), tuple(state), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["recurrence", "_recurrence_checks", "reference.recurrence"])
def test_doctests(name):
    failures, tests = doctest.testmod(importlib.import_module(f"sightline.{name}"))
    assert tests > 0
    assert failures == 0
