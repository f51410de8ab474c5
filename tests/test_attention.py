"""The public functions: defaults, backends, statistics, dropout. The numbers themselves are tested in tests/ops."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from tolerance import Comparison, assert_close_to_reference
from torch.nn.functional import scaled_dot_product_attention

import sightline as sl
from sightline.ops import backends


def heads(*, batch=2, heads=4, key_heads=2, queries=10, keys=10, width=16, dtype=torch.float32, device="cpu"):
    shapes = (batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width)
    return tuple(torch.randn(shape, dtype=dtype, device=device) for shape in shapes)


def test_default_is_the_softmax_of_every_existing_model():
    query, key, value = heads()
    torch.testing.assert_close(
        sl.attention(query, key, value, causal=True),
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
    )


def test_output_alone_without_observe_and_a_pair_with_it():
    query, key, value = heads()
    assert isinstance(sl.attention(query, key, value), torch.Tensor)
    output, stats = sl.attention(query, key, value, observe=sl.Observe())
    assert stats.log_normalizer is None
    assert stats.entropy is None
    torch.testing.assert_close(output, sl.attention(query, key, value))


def test_statistics_that_no_backend_has_are_refused_by_name():
    query, key, value = heads()
    with pytest.raises(NotImplementedError, match=r"observe.*entropy"):
        sl.attention(query, key, value, observe=sl.Observe(entropy=True))


@pytest.mark.parametrize("weighting", [sl.Softmax(), sl.LSSA(), sl.LSSAR()])
def test_backends_agree(weighting):
    def drawn(_turn=0):
        tensors = heads()
        chosen, native, reference, exact = (
            sl.attention(*(tensor.to(dtype) for tensor in tensors), weighting=weighting, causal=True, backend=backend)
            for backend, dtype in (
                ("auto", torch.float32),
                ("native", torch.float32),
                ("reference", torch.float32),
                ("reference", torch.float64),
            )
        )
        assert torch.equal(chosen, native)
        assert reference.transpose(1, 2).is_contiguous()
        return Comparison(native, exact, reference)

    assert_close_to_reference(drawn(), reweighted=weighting.reweight is not None, redraw=drawn)


def test_triton_says_that_it_is_not_there():
    with pytest.raises(NotImplementedError, match="triton"):
        sl.attention(*heads(), backend="triton")


def test_environment_overrides_auto_only(monkeypatch):
    query, key, value = heads()
    monkeypatch.setenv("SIGHTLINE_BACKEND", "triton")
    with pytest.raises(NotImplementedError, match="triton"):
        sl.attention(query, key, value)
    sl.attention(query, key, value, backend="native")
    monkeypatch.setenv("SIGHTLINE_BACKEND", "fast")
    with pytest.raises(ValueError, match="SIGHTLINE_BACKEND: expected one of"):
        sl.attention(query, key, value)


def test_float64_goes_to_the_reference_without_a_word():
    query, key, value = heads(dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sl.attention(query, key, value).dtype == torch.float64
    with pytest.raises(NotImplementedError, match=r"native.*float64"):
        sl.attention(query, key, value, backend="native")


def test_falling_back_without_kernels_warns_once(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_KERNELS", False)
    monkeypatch.setattr(backends, "_warned_devices", set())
    query, key, value = heads()
    with pytest.warns(UserWarning, match="falls back"):
        first = sl.attention(query, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(sl.attention(query, key, value), first)
    with pytest.raises(NotImplementedError, match=r"native.*not available"):
        sl.attention(query, key, value, backend="native")


def test_reference_in_chunks_equals_the_whole(monkeypatch):
    query, key, value = heads(queries=37, keys=50)
    options = {"weighting": sl.LSSAR(), "causal": True, "dropout_p": 0.3, "backend": "reference"}
    torch.manual_seed(3)
    whole = sl.attention(query, key, value, **options)
    monkeypatch.setattr(importlib.import_module("sightline.attention"), "_REFERENCE_CHUNK", 2 * 4 * 50 * 8)
    torch.manual_seed(3)
    torch.testing.assert_close(sl.attention(query, key, value, **options), whole)


def test_dropout_follows_the_generator_and_keeps_the_mean():
    query, key, value = heads(batch=1, queries=64, keys=64)
    torch.manual_seed(0)
    one = sl.attention(query, key, torch.ones_like(value), dropout_p=0.25)
    torch.manual_seed(0)
    same = sl.attention(query, key, torch.ones_like(value), dropout_p=0.25)
    other = sl.attention(query, key, torch.ones_like(value), dropout_p=0.25)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert abs(one.mean().item() - 1) < 0.05
    weights = sl.attention(query, key, torch.eye(64).expand(1, 2, 64, 64), dropout_p=0.25)
    assert abs((weights == 0).float().mean().item() - 0.25) < 0.02  # of 16,384 weights: six standard deviations


def test_rows_reproduce_the_output_and_carry_gradients():
    query, key, value = heads(queries=20, keys=30)
    query.requires_grad_()
    rows = torch.tensor([19, 0, 7])
    weights = sl.attention_rows(query, key, rows, weighting=sl.LSSA(), causal=True)
    assert weights.shape == (2, 4, 3, 30)
    torch.testing.assert_close(
        weights @ value.repeat_interleave(2, 1),
        sl.attention(query, key, value, weighting=sl.LSSA(), causal=True)[:, :, rows],
    )
    weights[..., 0].sum().backward()
    assert query.grad[:, :, rows].abs().sum() > 0
    assert not query.grad[:, :, 1].any()


def test_rows_outside_the_query_are_refused():
    query, key, _ = heads()
    with pytest.raises(IndexError):
        sl.attention_rows(query, key, torch.tensor([10]))


@pytest.mark.parametrize(
    "name",
    [
        "sightline.attention",
        "sightline.weighting",
        "sightline.observe",
        "sightline._checks",
        "sightline.hf",
        "sightline.hf._transformers",
        "sightline.hf.attention",
        "sightline.hf.masks",
        "sightline.hf.settings",
        "sightline.hf.swap",
        "sightline.hf.visibility",
        "sightline.models.llama",
    ],
)
def test_doctests(name):
    failures, tests = doctest.testmod(importlib.import_module(name))
    assert tests > 0
    assert failures == 0


def test_import_leaves_optional_packages_alone():
    optional = "('transformers', 'matplotlib', 'triton', 'xarray')"
    code = f"import sys, sightline; print([name for name in {optional} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before = subprocess.run(
        [sys.executable, "-c", code.replace("import sys, sightline", "import sys, torch")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == before.stdout


def test_wrong_instruction_set_is_named_at_the_first_call():
    code = "import torch, sightline as sl; x = torch.ones(1, 1, 1, 4); sl.attention(x, x, x)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "SIGHTLINE_ISA": "mmx"}
    )
    assert result.returncode == 1
    assert "SIGHTLINE_ISA: expected one of generic" in result.stderr
    assert "got mmx" in result.stderr


def test_the_formula_has_a_shape_where_there_is_no_autocast() -> None:
    query, key = (torch.empty(1, 2, rows, 8, device="meta", dtype=torch.float64) for rows in (3, 5))
    assert sl.attention(query, key, key).shape == (1, 2, 3, 8)
    assert sl.attention_rows(query, key, torch.tensor([0, 2], device="meta")).shape == (1, 2, 2, 5)
    output, state = sl.additive_recurrence(key, key, key, output_final_state=True)
    assert output.shape == (1, 2, 5, 8)
    assert state.memory.shape == (1, 2, 8, 8)
