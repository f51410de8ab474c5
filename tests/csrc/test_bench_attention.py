"""The kernels without torch give what `sightline.attention` gives: the binding adds nothing of its own."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import MAIN_WEIGHTINGS, Sizes, random_inputs
from tolerance import assert_close_to_reference

import sightline as sl
from sightline import ops


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS)
def test_attention_equals_the_operator(bench: ModuleType, isa: str, weighting: str, causal: bool) -> None:
    query, key, value = random_inputs(Sizes())
    options: dict[str, Any] = {
        "weighting": MAIN_WEIGHTINGS[weighting],
        "causal": causal,
        "observe": sl.Observe(log_normalizer=True),
    }
    expected, stats = sl.attention(query, key, value, **options, backend="native")
    arrays = query.numpy(), key.numpy(), value.numpy()
    output, log_normalizer = map(torch.from_numpy, bench.attention(isa, *arrays, weighting=weighting, causal=causal))
    if isa == ops.isa_name():
        # Same kernels, but perhaps not the same build.
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(log_normalizer, stats.log_normalizer)
    exact = (tensor.double() for tensor in (query, key, value))
    reference, exact_stats = sl.attention(*exact, **options, backend="reference")
    in_dtype, dtype_stats = sl.attention(query, key, value, **options, backend="reference")
    reweighted = weighting == "lssar"
    assert_close_to_reference(output, reference, in_dtype, reweighted=reweighted)
    assert_close_to_reference(
        log_normalizer, exact_stats.log_normalizer, dtype_stats.log_normalizer, name="log_normalizer"
    )


@pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS)
def test_threads_of_its_own_give_the_same_bits(bench: ModuleType, isa: str, weighting: str) -> None:
    arrays = [tensor.numpy() for tensor in random_inputs(Sizes(queries=300, keys=300))]
    one, _ = bench.attention(isa, *arrays, weighting=weighting, causal=True, threads=1)
    three, _ = bench.attention(isa, *arrays, weighting=weighting, causal=True, threads=3)
    assert (one == three).all()


def test_wrong_arguments_are_named(bench: ModuleType) -> None:
    query, key, value = (tensor.numpy() for tensor in random_inputs(Sizes()))
    with pytest.raises(ValueError, match="isa: this machine cannot run 'sse9'"):
        bench.attention("sse9", query, key, value)
    with pytest.raises(ValueError, match="weighting: expected 'softmax', 'lssa' or 'lssar', got 'mean'"):
        bench.attention("generic", query, key, value, weighting="mean")
    with pytest.raises(ValueError, match="key and value: expected shapes that fit query"):
        bench.attention("generic", query, key[:1], value)
